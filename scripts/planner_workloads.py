"""The generated workloads of `bench_planner.py`: measured models in seeded chains."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from paceline.config import read_hardware, read_profiles
from paceline.core.profile import Hardware, Profiles
from paceline.planner.paths import Graph
from paceline.planner.problem import Options, PlannedChain, PlannedModule

ROOT = Path(__file__).resolve().parent.parent
WORKLOADS = 1131
SHAPES: Mapping[str, Sequence[Sequence[int]]] = {
    "chain of 2": ((), (0,)),
    "chain of 3": ((), (0,), (1,)),
    "chain of 4": ((), (0,), (1,), (2,)),
    "fork of 2": ((), (0,), (0,)),
    "fork of 3": ((), (0,), (0,), (0,)),
    "tree": ((), (0,), (0,), (1,)),
    "diamond": ((), (0,), (0,), (1, 2)),
}
FAN_OUTS = (0.25, 0.5, 1.0, 2.0, 3.0)
HARDWARE = ("v100", "t4", "mixed")
RATE_BANDS = ((3.0, 30.0), (30.0, 200.0), (200.0, 1600.0))
"""Chain requests/s by which results are told apart."""

OPTIMAL = Options(policy="optimal")
PLAIN = Options(policy="harpagon")


class Workloads:
    """Where workloads draw their models from."""

    def __init__(self) -> None:
        self.profiles: Profiles = read_profiles(ROOT / "examples/data/profiles.csv")
        self.prices = read_hardware(ROOT / "examples/data/hardware.csv")
        self.models = sorted({row.model for row in self.profiles.rows})

    def chain(
        self, seed: str, shape: Sequence[Sequence[int]] | None = None, hardware: str = "mixed"
    ) -> PlannedChain:
        """The workload of this seed."""
        rng = random.Random(seed)
        parents = shape or SHAPES[rng.choice(sorted(SHAPES))]
        rate_rps = 3.0 * (1600 / 3.0) ** rng.random()
        allowed: dict[str, Hardware] = dict(self.prices)
        if hardware != "mixed":
            allowed = {hardware: self.prices[hardware]}
        least = 2 if hardware == "mixed" else 1
        models = [
            m for m in self.models if len(set(self.profiles.hardware_of(m)) & set(allowed)) >= least
        ]
        modules = []
        for i, above in enumerate(parents):
            model = rng.choice(models)
            fan_out = 1.0 if i == 0 else rng.choice(FAN_OUTS)
            configurations = self.profiles.configurations(model, allowed)
            names = tuple(f"m{parent}" for parent in above)
            modules.append(PlannedModule(f"m{i}", model, rate_rps * fan_out, names, configurations))
        least_s = Graph.of(parents).longest(
            [min(c.duration_s for c in m.configurations) for m in modules]
        )
        return PlannedChain(seed, least_s * rng.uniform(1.2, 5.0), rate_rps, tuple(modules))


@cache
def source() -> Workloads:
    return Workloads()


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
