"""Plans to be overloaded: those that the rules were chosen on, and others drawn by a seed.

Every plan is made as the server makes it for that dispatch policy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from random import Random

from paceline.core.chain import Chain, Dispatch, Module, Source
from paceline.core.errors import PlanError
from paceline.core.plan import Allocation, ChainPlan, ModulePlan, Plan
from paceline.core.profile import Durations, Hardware, ProfileRow, Profiles
from paceline.core.tensor import TensorSpec
from paceline.planner.problem import Billing, Options, demand
from paceline.planner.solve import solve
from paceline.sim.fleet import planned_machines

POLICIES: Mapping[Dispatch, str] = {
    "pooled": "optimal",
    "throughput-cost": "harpagon",
    "round-robin": "nexus",
}
"""Dispatch, and the planner that plans for it."""
BOTH: tuple[Billing, ...] = ("fractional", "machine")

Points = tuple[tuple[int, float], ...]
"""Durations by batch size."""
Profile = Mapping[str, Points]
"""By hardware."""
X, Y = TensorSpec("x", "UINT8", (1,)), TensorSpec("y", "UINT8", (1,))
HARDWARE = {"big": Hardware("big", 1.0), "small": Hardware("small", 0.4)}

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
Step = tuple[str, tuple[str, ...], float]
"""A module, its parents, and how often it runs per request: 1, or that many on average."""
SHAPES: Mapping[str, Sequence[Step]] = {
    "one": [("a", (), 1.0)],
    "two": [("a", (), 1.0), ("b", ("a",), 1.0)],
    "three": [("a", (), 1.0), ("b", ("a",), 1.0), ("c", ("b",), 1.0)],
    "fork": [("a", (), 1.0), ("b", ("a",), 1.0), ("c", ("a",), 1.0)],
    "join": [
        ("a", (), 1.0),
        ("b", ("a",), 1.0),
        ("c", ("a",), 1.0),
        ("d", ("b", "c"), 1.0),
    ],
    "each": [("a", (), 1.0), ("b", ("a",), 3.0)],
    "gather": [("a", (), 1.0), ("b", ("a",), 2.0), ("c", ("b",), 1.0)],
    "sometimes": [("a", (), 1.0), ("b", ("a",), 0.4), ("c", ("a",), 1.0)],
}
MOST_MACHINES = 12
MOST_REQUESTS = 3000
"""Of a drawn plan, in twenty objectives at the planned rate."""


@dataclass(frozen=True, slots=True)
class Case:
    """A plan to be overloaded: its chains, which of them is, and with what."""

    name: str
    dispatch: Dispatch
    chains: tuple[Chain, ...]
    plan: Plan
    profiles: Profiles


def line(models: Sequence[str]) -> list[Step]:
    """These models one after the other."""
    return [(model, (models[at - 1],) if at else (), 1.0) for at, model in enumerate(models)]


def chain_of(
    name: str, steps: Sequence[Step], slo_s: float, dispatch: Dispatch, priority: int = 0
) -> Chain:
    """Modules named as their models."""
    modules = tuple(
        Module(
            model,
            model,
            {f"x{at}": Source(parent, "y") for at, parent in enumerate(parents)}
            or {"x": Source(None, "x")},
            for_each=Source(parents[0], "y") if fan_out > 1.0 else None,
            fan_out=fan_out,
        )
        for model, parents, fan_out in steps
    )
    outputs = {"y": Source(steps[-1][0], "y")}
    return Chain(name, slo_s, (X,), modules, outputs, priority=priority, dispatch=dispatch)


def profiles_of(models: Mapping[str, Profile]) -> Profiles:
    return Profiles(
        tuple(
            ProfileRow(model, kind, size, took_s)
            for model, profile in models.items()
            for kind, points in profile.items()
            for size, took_s in points
        )
    )


def planned(
    name: str,
    steps: Sequence[Step],
    models: Mapping[str, Profile],
    slo_s: float,
    rate_rps: float,
    dispatch: Dispatch,
    billing: Billing,
    chains: Sequence[str] = ("c",),
) -> Case:
    """`chains` alike, the first the most urgent, planned as the server plans for this policy.

    Raises PlanError.
    """
    made = tuple(chain_of(c, steps, slo_s, dispatch, at) for at, c in enumerate(chains))
    profiles = profiles_of({model: models[model] for model, _, _ in steps})
    kinds = {kind for profile in models.values() for kind in profile}
    hardware = {kind: HARDWARE[kind] for kind in sorted(kinds)}
    wanted = [demand(chain, rate_rps, profiles, hardware, {}, 0.0) for chain in made]
    options = Options(policy=POLICIES[dispatch], dispatch=dispatch, billing=billing, bound=False)
    return Case(name, dispatch, made, solve(wanted, options), profiles)


def on(models: Mapping[str, Profile], kinds: Sequence[str]) -> dict[str, Profile]:
    """What is known of these models on these kinds of machines alone."""
    return {name: {kind: known[kind] for kind in kinds} for name, known in models.items()}


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
    chain = chain_of("c", line(["m3"]), slo_s, dispatch)
    return Case(name, dispatch, (chain,), plan, profiles_of(on({"m3": MODELS["m3"]}, ["big"])))


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


def known_plans(dispatch: Dispatch, names: Collection[str] = ()) -> Iterator[Case]:
    """Those that the rules were chosen on: of one kind of machines and of two, with residuals, 1 to
    9 machines, objectives tight and loose. Only those of these names, where any are given."""
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
            name = f"m3 {told} slo={loose:g}"
            if not names or name in names:
                yield scheduled(name, schedule, loose * bound_s, dispatch)
    chains = (("m3",), ("hear", "read", "speak"))
    for models in chains:
        least_s = sum(MODELS[model]["big"][0][1] for model in models)
        for kinds in (("big",), ("big", "small")):
            profiles = on({model: MODELS[model] for model in models}, kinds)
            for rate_rps in (12.0, 45.0, 150.0):
                for loose in (3.0, 6.0, 15.0):
                    for billing in BOTH:
                        told = (
                            f"{'-'.join(models)} {'+'.join(kinds)} {rate_rps:g}/s "
                            f"slo={loose:g} {billing}"
                        )
                        if names and told not in names:
                            continue
                        slo_s = loose * least_s
                        try:
                            case = planned(
                                told, line(models), profiles, slo_s, rate_rps, dispatch, billing
                            )
                        except PlanError:
                            continue
                        if len(planned_machines(case.plan, whole=True)) <= 9:
                            yield case


def drawn_plan(seed: int, dispatch: Dispatch) -> Case:
    """Other models, shapes, rates and objectives: the first that is drawn which can be planned for
    every policy, on few machines. The workload depends on the seed alone."""
    rng = Random(f"overload {seed}")
    while True:
        shape = rng.choice(list(SHAPES))
        steps = SHAPES[shape]
        kinds = rng.choice((("big",), ("big", "small")))
        models = on({model: _profile(rng) for model, _, _ in steps}, kinds)
        least_s = _least_s(steps, models)
        slo_s = round(least_s * _between(rng, 1.6, 12.0), 4)
        rate_rps = round(_between(rng, 8.0, 200.0), 1)
        billing = rng.choice(BOTH)
        if rate_rps * slo_s * 20.0 > MOST_REQUESTS:
            continue
        name = (
            f"{seed} {shape} {'+'.join(kinds)} {rate_rps:g}/s slo={slo_s / least_s:.1f} {billing}"
        )
        found = {}
        try:
            for policy in POLICIES:
                case = planned(name, steps, models, slo_s, rate_rps, policy, billing)
                if len(planned_machines(case.plan, whole=True)) > MOST_MACHINES:
                    break
                found[policy] = case
            else:
                return found[dispatch]
        except PlanError:
            continue


def _profile(rng: Random) -> Profile:
    """Durations of a model: something fixed and something a row, and not quite that."""
    fixed_s = _between(rng, 0.004, 0.08)
    row_s = fixed_s * _between(rng, 0.08, 0.6)
    slower = rng.uniform(1.5, 3.0), rng.uniform(1.5, 3.0)
    sizes = (1, 2, 4, 8, 16, 32)[: rng.randint(3, 6)]
    found = {}
    for kind, (fixed, row) in {"big": (1.0, 1.0), "small": slower}.items():
        took_s, points = 0.0, []
        for size in sizes:
            exact_s = (fixed * fixed_s + size * row * row_s) * rng.uniform(0.95, 1.05)
            took_s = round(max(took_s, exact_s), 5)
            points.append((size, took_s))
        found[kind] = tuple(points)
    return found


def _least_s(steps: Sequence[Step], models: Mapping[str, Profile]) -> float:
    """The slowest path in batches of one."""
    ends_s: dict[str, float] = {}
    for model, parents, _ in steps:
        start_s = max((ends_s[parent] for parent in parents), default=0.0)
        ends_s[model] = start_s + min(points[0][1] for points in models[model].values())
    return max(ends_s.values())


def _between(rng: Random, least: float, most: float) -> float:
    """Evenly drawn in orders of magnitude."""
    return exp(rng.uniform(log(least), log(most)))
