"""Simulation: the real dispatcher in virtual time, against simulated machines.

Same seed, same bytes. `world` steps, `backend` executes and fails, `content` answers, `workload`
says when requests come, `verify` measures the attainment of a plan.
"""
