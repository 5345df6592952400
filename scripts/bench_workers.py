"""What dividing machines among front processes costs in batching (`paceline serve --workers N`).

Every worker has its share of the machines and of the rate, and batches only its own requests. One
worker's share is run through the real dispatcher in virtual time; all workers are alike. Prints a
table for module M3 of Harpagon (batches of 2, 8, 32 take 0.1, 0.25, 0.8 s) at 198 requests/s.
Same seed, same figures; nothing is timed.
"""

from __future__ import annotations

import argparse

from rich.table import Table

from paceline.core.chain import Chain, Module, Source
from paceline.core.plan import Allocation, ChainPlan, ModulePlan, Plan
from paceline.core.profile import Durations, ProfileRow, Profiles
from paceline.core.tensor import TensorSpec
from paceline.report import console
from paceline.sim.verify import SimResult, simulate

RATE_RPS = 198.0
SLO_S = 1.0
POINTS = ((1, 0.08), (2, 0.1), (8, 0.25), (32, 0.8))
PROFILES = Profiles(tuple(ProfileRow("m3", "gpu", size, took_s) for size, took_s in POINTS))


def share(machines: int, workers: int, requests: int, seed: int) -> SimResult:
    """One of `workers` equal workers over `machines` machines in all."""
    chain = Chain(
        "m3",
        SLO_S,
        (TensorSpec("x", "UINT8", (1,)),),
        (Module("m3", "m3", {"x": Source(None, "x")}),),
        {"y": Source("m3", "y")},
    )
    own, rate_rps = machines / workers, RATE_RPS / workers
    allocation = Allocation("gpu", 32, Durations(POINTS).at(32), own, 1.0)
    module = ModulePlan("m3", "m3", rate_rps, 0.0, SLO_S, SLO_S, (allocation,))
    plan = Plan("pooled", "fractional", (ChainPlan("m3", SLO_S, rate_rps, SLO_S, (module,)),))
    return simulate([chain], plan, PROFILES, arrivals="poisson", requests=requests, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, help="per worker")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    table = Table(title="M3 at 198 requests/s, Poisson, 1.0 s", box=None, title_justify="left")
    for name in ("machines", "workers", "attained", "mean batch", "p50 ms", "p99 ms", "busy"):
        table.add_column(name, justify="right")
    for machines in (6, 12):
        for workers in (1, 2, 3, 6):
            result = share(machines, workers, options.requests, options.seed)
            (chain,), (module,) = result.chains, result.modules
            table.add_row(
                str(machines),
                str(workers),
                f"{chain.attainment:.2%}",
                f"{module.batch_size:.1f}",
                f"{chain.percentile_s(0.5) * 1e3:.0f}",
                f"{chain.percentile_s(0.99) * 1e3:.0f}",
                f"{result.utilisation:.0%}",
            )
    console().print(table)


if __name__ == "__main__":
    main()
