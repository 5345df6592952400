"""The systems that Harpagon is compared with, under the same cost model and primitives.

Invariant: each returns schedules that serve every module's whole rate with every path within the
objective, or raises PlanError; all use measured batch sizes only and none sends dummy requests.
"""
