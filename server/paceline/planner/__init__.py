"""Pure functions from demand to plan: the optimum, Harpagon, the systems it is compared with.

Start reading at `solve.solve`. Input: `problem`. Optimum: `frontier` (one module), `compose` and
`series_parallel` (the DAG), `optimal`. Harpagon, bottom up: `worst_case` (level 1), `schedule` and
`residual` (level 2), `paths` and `split` (level 3), `harpagon`. Whole machines: `cycle` and
`urgency` (what one machine can hold), `pack`, `machines`; `whole_bound` is what none can beat.
"""
