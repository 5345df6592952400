"""Goodput in overload, by dispatch policy: `python -m tests.simulation.overload` (`--help`).

The real dispatcher serves real plans in virtual time at one to five times the planned rate. Of
every plan's goodput (answers in time per second, once the queues have filled) is told what share of
its peak is left at each rate.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from paceline.core.chain import Chain, Dispatch, Module, Source
from paceline.core.errors import PlanError
from paceline.core.plan import Allocation, ChainPlan, ModulePlan, Plan
from paceline.core.profile import Configuration, Durations, ProfileRow, Profiles
from paceline.core.tensor import TensorSpec
from paceline.dispatch import Action, Answer, Event, route_chain
from paceline.planner.problem import Billing, Options, PlannedChain, PlannedModule
from paceline.planner.solve import solve
from paceline.sim import workload
from paceline.sim.fleet import (
    BlankModels,
    batch_limits,
    blank_chain,
    planned_durations,
    planned_machines,
)
from paceline.sim.stimuli import Install
from paceline.sim.verify import requests_of
from paceline.sim.world import World

POLICIES: Mapping[Dispatch, str] = {
    "pooled": "optimal",
    "throughput-cost": "harpagon",
    "round-robin": "nexus",
}
"""Dispatch, and the planner that plans for it."""
BOTH: tuple[Billing, ...] = ("fractional", "machine")
FACTORS = (1.0, 1.5, 2.0, 3.0, 5.0)
"""Multiples of the planned rate."""
OBJECTIVES = 20.0
"""How long a run takes, in objectives, of which the first `FILLING` are not looked at."""
FILLING = 4.0

Points = tuple[tuple[int, float], ...]
"""Durations by batch size."""
Profile = Mapping[str, Points]
"""By hardware."""
X, Y = TensorSpec("x", "UINT8", (1,)), TensorSpec("y", "UINT8", (1,))
PRICES = {"big": 1.0, "small": 0.4}

M3: Points = ((1, 0.08), (2, 0.1), (8, 0.25), (32, 0.8))
MODELS: Mapping[str, Profile] = {
    "m3": {"big": M3, "small": ((1, 0.2), (2, 0.26), (8, 0.7), (16, 1.3))},
    "hear": {
        "big": ((1, 0.05), (2, 0.08), (4, 0.115), (8, 0.2)),
        "small": ((1, 0.09), (2, 0.15), (4, 0.26), (8, 0.49)),
    },
    "read": {
        "big": ((1, 0.03), (2, 0.04), (4, 0.055), (8, 0.085)),
        "small": ((1, 0.07), (2, 0.10), (4, 0.15), (8, 0.26)),
    },
    "speak": {
        "big": ((1, 0.02), (2, 0.025), (4, 0.04), (8, 0.07)),
        "small": ((1, 0.03), (2, 0.045), (4, 0.08), (8, 0.15)),
    },
}


@dataclass(frozen=True, slots=True)
class Case:
    """A plan to be overloaded: its chains, which of them is, and with what."""

    name: str
    dispatch: Dispatch
    chains: tuple[Chain, ...]
    plan: Plan
    profiles: Profiles


def chain_of(
    name: str, models: Sequence[str], slo_s: float, dispatch: Dispatch, priority: int = 0
) -> Chain:
    """These models one after the other."""
    modules = tuple(
        Module(model, model, {"x": Source(models[at - 1], "y") if at else Source(None, "x")})
        for at, model in enumerate(models)
    )
    outputs = {"y": Source(models[-1], "y")}
    return Chain(name, slo_s, (X,), modules, outputs, priority=priority, dispatch=dispatch)


def profiles_of(models: Iterable[str], hardware: Iterable[str]) -> Profiles:
    kinds = tuple(hardware)
    return Profiles(
        tuple(
            ProfileRow(model, kind, size, took_s)
            for model in models
            for kind in kinds
            for size, took_s in MODELS[model][kind]
        )
    )


def planned(
    name: str,
    models: Sequence[str],
    hardware: Sequence[str],
    slo_s: float,
    rate_rps: float,
    dispatch: Dispatch,
    billing: Billing,
    chains: Sequence[str] = ("c",),
) -> Case:
    """`chains` alike, the first the most urgent, planned as the server plans for this policy.

    Raises PlanError.
    """
    made = tuple(chain_of(c, models, slo_s, dispatch, at) for at, c in enumerate(chains))
    configurations = {
        model: tuple(
            Configuration(kind, size, took_s, PRICES[kind])
            for kind in hardware
            for size, took_s in MODELS[model][kind]
        )
        for model in models
    }
    wanted = [
        PlannedChain(
            chain.name,
            slo_s,
            rate_rps,
            tuple(
                PlannedModule(m.name, m.model, rate_rps, tuple(m.parents), configurations[m.model])
                for m in chain.modules
            ),
        )
        for chain in made
    ]
    options = Options(policy=POLICIES[dispatch], dispatch=dispatch, billing=billing, bound=False)
    plan = solve(wanted, options)
    return Case(name, dispatch, made, plan, profiles_of(models, hardware))


def scheduled(
    name: str, schedule: Sequence[tuple[int, float]], slo_s: float, dispatch: Dispatch
) -> Case:
    """M3 of algorithms.md 1.2 under a schedule of (batch size, machines), at its full rate."""
    known = Durations(M3)
    made = tuple(
        Allocation("big", size, known.at(size), machines, 1.0) for size, machines in schedule
    )
    rate_rps = min(198.0, sum(a.rate_rps for a in made))
    module = ModulePlan("m3", "m3", rate_rps, 0.0, slo_s, slo_s, made)
    plan = Plan(dispatch, "fractional", (ChainPlan("c", slo_s, rate_rps, slo_s, (module,)),))
    chain = chain_of("c", ["m3"], slo_s, dispatch)
    return Case(name, dispatch, (chain,), plan, profiles_of(["m3"], ["big"]))


def bound_of(schedule: Sequence[tuple[int, float]], dispatch: Dispatch) -> float:
    """The policy's worst case (algorithms.md 1.1, 1.4.1)."""
    known = Durations(M3)
    ranks = [
        (known.at(size), size, machines * size / known.at(size)) for size, machines in schedule
    ]
    left_rps = total_rps = sum(rate_rps for _, _, rate_rps in ranks)
    found_s = 0.0
    for took_s, size, rate_rps in ranks:
        if dispatch == "pooled":
            found_s = max(found_s, took_s + size / total_rps)
        elif dispatch == "throughput-cost":
            found_s = max(found_s, took_s + size / left_rps)
        else:
            found_s = max(found_s, took_s + size / min(rate_rps, size / took_s))
        left_rps -= rate_rps
    return found_s


class Goodput:
    """An observer that counts answers in time, by chain, between two instants."""

    def __init__(self, since_s: float, until_s: float) -> None:
        self.since_s, self.until_s = since_s, until_s
        self.met: dict[str, int] = {}
        self.missed = 0

    def __call__(self, due_s: float, now_s: float, event: Event, actions: Sequence[Action]) -> None:
        if not self.since_s <= now_s < self.until_s:
            return
        for action in actions:
            if isinstance(action, Answer):
                chain = action.timeline.chain
                self.met[chain] = self.met.get(chain, 0) + action.timeline.met


def goodput_rps(
    case: Case, factors: Mapping[str, float], *, steady: bool, seed: int = 1, whole: bool = True
) -> dict[str, float]:
    """Answers in time per second, by chain, at these multiples of the planned rates."""
    rng = Random(seed)
    slo_s = max(chain.slo_s for chain in case.chains)
    end_s = OBJECTIVES * slo_s
    arrivals: dict[str, Sequence[float]] = {}
    for chain in case.chains:
        plan = case.plan.chain(chain.name)
        assert plan is not None
        rate_rps = plan.rate_rps * factors[chain.name]
        count = round(rate_rps * end_s)
        draw = (
            workload.uniform(rate_rps, count) if steady else workload.poisson(rate_rps, count, rng)
        )
        arrivals[chain.name] = draw
    durations = planned_durations(case.plan, case.profiles)
    limits = batch_limits(case.plan, case.chains)
    bounds = {c.name: blank_chain(c, limits[c.name]) for c in case.chains}
    specs = {m.spec.name: m.spec for bound in bounds.values() for m in bound.modules}
    machines = planned_machines(case.plan, whole=whole)
    seen = Goodput(FILLING * slo_s, end_s)
    world = World(machines, durations, BlankModels(specs), seed=seed, observers=(seen,))
    world.run(
        Install(0.0, route_chain(bound, case.plan.chain(name), durations))
        for name, bound in bounds.items()
    )
    world.run_stream(requests_of(case.chains, arrivals, rng))
    return {c.name: seen.met.get(c.name, 0) / (seen.until_s - seen.since_s) for c in case.chains}


def cases(dispatch: Dispatch) -> Iterator[Case]:
    """Plans of one policy: of one kind of machines and of two, with residuals, 1 to 8 machines,
    objectives tight and loose."""
    schedules: Mapping[str, Sequence[Sequence[tuple[int, float]]]] = {
        "pooled": [[(32, 4.95)], [(8, 6.2)], [(32, 1.0)], [(8, 2.0)]],
        "throughput-cost": [
            [(32, 4.0), (2, 1.9)],
            [(32, 4.0), (8, 1.0), (2, 0.3)],
            [(32, 5.0)],
            [(32, 1.0), (8, 0.5)],
            [(8, 1.0)],
        ],
        "round-robin": [[(8, 6.0), (2, 0.3)], [(8, 1.0)], [(8, 2.0), (2, 0.5)], [(32, 4.0)]],
    }
    for schedule in schedules[dispatch]:
        told = "+".join(f"{machines:g}x{size}" for size, machines in schedule)
        bound_s = bound_of(schedule, dispatch)
        for loose in (1.0, 2.5):
            yield scheduled(f"m3 {told} slo={loose:g}", schedule, loose * bound_s, dispatch)
    chains = (("m3",), ("hear", "read", "speak"))
    for models in chains:
        least_s = sum(MODELS[model]["big"][0][1] for model in models)
        for kinds in (("big",), ("big", "small")):
            for rate_rps in (12.0, 45.0, 150.0):
                for loose in (3.0, 6.0, 15.0):
                    for billing in BOTH:
                        told = (
                            f"{'-'.join(models)} {'+'.join(kinds)} {rate_rps:g}/s "
                            f"slo={loose:g} {billing}"
                        )
                        try:
                            case = planned(
                                told, models, kinds, loose * least_s, rate_rps, dispatch, billing
                            )
                        except PlanError:
                            continue
                        if len(planned_machines(case.plan, whole=True)) <= 9:
                            yield case


def shares(case: Case, *, steady: bool, seed: int = 1) -> dict[float, float]:
    """Goodput by factor, in shares of the planned rate."""
    plan = case.plan.chain("c")
    assert plan is not None
    return {
        factor: goodput_rps(case, {"c": factor}, steady=steady, seed=seed)["c"] / plan.rate_rps
        for factor in FACTORS
    }


def kept(found: Mapping[float, float]) -> float:
    """The least share of the peak below a rate that is left at that rate."""
    peak, least = 0.0, 1.0
    for _, goodput in sorted(found.items()):
        peak = max(peak, goodput)
        least = min(least, goodput / peak if peak else 0.0)
    return least


def print_priorities(dispatch: Dispatch) -> None:
    """Goodput of an urgent chain and of one like it that may wait, which share machines."""
    for models, kinds, rate_rps, loose in (
        (("m3",), ("big",), 45.0, 6.0),
        (("hear", "read", "speak"), ("big", "small"), 30.0, 6.0),
        (("hear", "read", "speak"), ("big",), 45.0, 15.0),
    ):
        slo_s = loose * sum(MODELS[model]["big"][0][1] for model in models)
        told = f"{'-'.join(models)} {'+'.join(kinds)} {rate_rps:g}/s slo={loose:g}"
        names = ("urgent", "other")
        case = planned(told, models, kinds, slo_s, rate_rps, dispatch, "machine", names)
        found = []
        for loads in ((1.0, 0.0), (1.0, 1.0), (1.0, 2.0), (1.0, 5.0), (2.0, 2.0), (5.0, 5.0)):
            by_chain = goodput_rps(case, dict(zip(names, loads, strict=True)), steady=False)
            shares = "+".join(f"{by_chain[name] / rate_rps:.2f}" for name in names)
            found.append(f"{loads[0]:g}+{loads[1]:g}: {shares}")
        print(f"{dispatch} {case.name}   {', '.join(found)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", choices=list(POLICIES), action="append")
    parser.add_argument("--steady", action="store_true", help="evenly spaced arrivals alone")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--priorities", action="store_true", help="two chains instead of one")
    given = parser.parse_args()
    for dispatch in given.policy or POLICIES:
        if given.priorities:
            print_priorities(dispatch)
        else:
            print_cases(dispatch, given.only, (True,) if given.steady else (True, False))


def print_cases(dispatch: Dispatch, only: str, arrivals: Sequence[bool]) -> None:
    """Goodput of every case over its planned rate, and what is left of its peak."""
    print("goodput over the planned rate at " + ", ".join(f"{f:g}x" for f in FACTORS))
    worst, count, bad = 1.0, 0, 0
    for case in cases(dispatch):
        if only not in case.name:
            continue
        for steady in arrivals:
            found = shares(case, steady=steady)
            least = kept(found)
            worst, count, bad = min(worst, least), count + 1, bad + (least < 0.95)
            told = " ".join(f"{share:5.2f}" for share in found.values())
            mark = "*" if least < 0.95 else " "
            kind = "steady" if steady else "poisson"
            print(f"{mark}{least:5.2f} {told}  {dispatch} {kind:7} {case.name}", flush=True)
    print(f"{dispatch}: {bad} of {count} below 0.95, the worst {worst:.3f}")


if __name__ == "__main__":
    main()
