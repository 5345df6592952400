"""Pure functions from demand to plan: Harpagon's dispatch bounds, scheduling and splitting.

Start reading at `solve.solve`. Bottom up: `worst_case` (level 1), `schedule` and `residual`
(level 2), `paths` and `split` (level 3), `bound` (what no plan can go below), `problem` (input).
"""
