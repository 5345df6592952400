"""Goodput in overload, by dispatch policy: `python -m tests.simulation.overload` (`--help`).

The real dispatcher serves real plans in virtual time at one to five times the planned rate. Of a
plan's *goodput* (answers in time per second, once the queues have filled) is told what is *left* at
a rate: its share of the peak, the most goodput that it has at any rate up to that one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median

from tests.simulation.overload_plans import (
    MODELS,
    POLICIES,
    Case,
    drawn_plan,
    known_plans,
    line,
    on,
    planned,
)

from paceline.core.chain import Dispatch
from paceline.dispatch import Action, Answer, Event, Submit, route_chain
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

FACTORS = (1.0, 1.5, 2.0, 5.0)
"""Multiples of the planned rate."""
KEPT = 0.95
"""What should be left of the peak."""
OBJECTIVES = 20.0
"""How long a run takes at the least, in objectives, of which the first `FILLING` are not looked
at."""
FILLING = 4.0
REQUESTS = 400.0
"""How many come at the least in what is looked at, at the planned rate. Where some requests need
more than others, what is left varies by chance, with so many by some 5 %."""
DRAWN: Mapping[str, Sequence[int]] = {
    "development": (*range(40), *range(1000, 1060), *range(2000, 2060), *range(3000, 3060)),
    "held-out": range(4000, 4060),
}
"""Seeds of drawn plans: those that were looked at while rules were changed, and others."""


@dataclass(slots=True)
class Counts:
    """Requests of a chain, and those of them that were answered in time."""

    offered: int = 0
    met: int = 0


class Goodput:
    """An observer that counts, by chain, requests that come and answers in time between two
    instants."""

    def __init__(self, since_s: float, until_s: float) -> None:
        self.since_s, self.until_s = since_s, until_s
        self.counts: dict[str, Counts] = {}

    def __call__(self, due_s: float, now_s: float, event: Event, actions: Sequence[Action]) -> None:
        if not self.since_s <= now_s < self.until_s:
            return
        if isinstance(event, Submit):
            self.counts.setdefault(event.chain, Counts()).offered += 1
        for action in actions:
            if isinstance(action, Answer):
                chain = self.counts.setdefault(action.timeline.chain, Counts())
                chain.met += action.timeline.met


@dataclass(frozen=True, slots=True)
class Rates:
    """Requests per second: that came, and that were answered in time."""

    offered_rps: float
    met_rps: float


def serve(
    case: Case,
    factors: Mapping[str, float],
    *,
    steady: bool,
    seed: int = 1,
    requests: float = REQUESTS,
    everywhere: bool = False,
) -> dict[str, Rates]:
    """By chain, at these multiples of the planned rates. `everywhere`: every machine holds every
    model, as the server places them, not only those that the plan has there.
    """
    rng = Random(seed)
    slo_s = max(chain.slo_s for chain in case.chains)
    rates_rps = {chain.chain: chain.rate_rps for chain in case.plan.chains}
    filled_s = FILLING * slo_s
    end_s = max(OBJECTIVES * slo_s, filled_s + requests / min(rates_rps.values()))
    arrivals: dict[str, Sequence[float]] = {}
    for chain, planned_rps in rates_rps.items():
        rate_rps = planned_rps * factors[chain]
        count = round(rate_rps * end_s)
        if not count:
            continue
        draw = (
            workload.uniform(rate_rps, count) if steady else workload.poisson(rate_rps, count, rng)
        )
        arrivals[chain] = draw
    durations = planned_durations(case.plan, case.profiles)
    limits = batch_limits(case.plan, case.chains)
    bounds = {c.name: blank_chain(c, limits[c.name]) for c in case.chains}
    specs = {m.spec.name: m.spec for bound in bounds.values() for m in bound.modules}
    machines = planned_machines(case.plan, whole=True)
    if everywhere:
        kinds = sorted({machine.hardware for machine in machines})
        durations = {
            model: {
                kind: known
                for kind in kinds
                if (known := case.profiles.durations(model, kind)) is not None
            }
            for model in durations
        }
        for machine in machines:
            machine.instances = dict.fromkeys(durations, 1)
    seen = Goodput(filled_s, end_s)
    world = World(machines, durations, BlankModels(specs), seed=seed, observers=(seen,))
    world.run(
        Install(0.0, route_chain(bound, case.plan.chain(name), durations))
        for name, bound in bounds.items()
    )
    world.run_stream(requests_of(case.chains, arrivals, rng))
    took_s = end_s - filled_s
    counts = {chain: seen.counts.get(chain, Counts()) for chain in rates_rps}
    return {name: Rates(c.offered / took_s, c.met / took_s) for name, c in counts.items()}


def served(
    case: Case, *, steady: bool, requests: float = REQUESTS, everywhere: bool = False
) -> dict[float, Rates]:
    """A plan of one chain, by multiple of its rate."""
    return {
        factor: serve(case, {"c": factor}, steady=steady, requests=requests, everywhere=everywhere)[
            "c"
        ]
        for factor in FACTORS
    }


def left(found: Mapping[float, Rates], factor: float) -> float:
    """What is left at a multiple of the planned rate of the peak up to there."""
    peak_rps = max(rates.met_rps for other, rates in found.items() if other <= factor)
    return found[factor].met_rps / peak_rps if peak_rps else 0.0


def plans(kind: str, dispatch: Dispatch) -> Iterator[Case]:
    """Those of `known`, of a set of `DRAWN`, or of seeds FIRST-LAST."""
    if kind == "known":
        yield from known_plans(dispatch)
        return
    seeds = DRAWN.get(kind)
    if seeds is None:
        first, _, last = kind.partition("-")
        seeds = range(int(first), int(last or first) + 1)
    for seed in seeds:
        yield drawn_plan(seed, dispatch)


def print_plans(
    kind: str,
    dispatch: Dispatch,
    only: str,
    arrivals: Sequence[bool],
    requests: float,
    everywhere: bool,
) -> None:
    """What is left of every plan's peak, and a row of a table for all."""
    rows = []
    for steady in arrivals:
        told = "steady" if steady else "poisson"
        kept: dict[str, tuple[float, float]] = {}
        for case in plans(kind, dispatch):
            if only not in case.name:
                continue
            found = served(case, steady=steady, requests=requests, everywhere=everywhere)
            kept[case.name] = (left(found, 2.0), left(found, 5.0))
            rate_rps = case.plan.chains[0].rate_rps
            shares = " ".join(
                f"{rates.met_rps / rate_rps:4.2f}/{rates.offered_rps / rate_rps:4.2f}"
                for rates in found.values()
            )
            mark = "*" if min(kept[case.name]) < KEPT else " "
            print(
                f"{mark}{kept[case.name][0]:5.2f} {kept[case.name][1]:5.2f}  {shares}  "
                f"{dispatch} {told:7} {case.name}",
                flush=True,
            )
        if kept:
            rows.append(_row(kind, dispatch, told, kept))
    print("| plans | policy | arrivals | number | kept at 2x | at 5x | median | worst | which |")
    print("\n".join(["|---" * 9 + "|", *rows]), flush=True)


def _row(kind: str, dispatch: str, told: str, kept: Mapping[str, tuple[float, float]]) -> str:
    """How many plans keep `KEPT` of their peak at two and at five times the planned rate; of the
    lesser of both the median and the worst.
    """
    at_2 = [two for two, _ in kept.values()]
    at_5 = [five for _, five in kept.values()]
    least = {name: min(both) for name, both in kept.items()}
    worst = min(least, key=lambda name: least[name])
    good_2, good_5 = (sum(share >= KEPT for share in at) for at in (at_2, at_5))
    return (
        f"| {kind} | {dispatch} | {told} | {len(kept)} | {good_2 / len(kept):.1%} | "
        f"{good_5 / len(kept):.1%} | {median(least.values()):.3f} | {least[worst]:.3f} | {worst} |"
    )


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
        known = on({model: MODELS[model] for model in models}, kinds)
        case = planned(told, line(models), known, slo_s, rate_rps, dispatch, "machine", names)
        found = []
        for loads in ((1.0, 0.0), (1.0, 1.0), (1.0, 2.0), (1.0, 5.0), (2.0, 2.0), (5.0, 5.0)):
            by_chain = serve(case, dict(zip(names, loads, strict=True)), steady=False)
            shares = "+".join(f"{by_chain[name].met_rps / rate_rps:.2f}" for name in names)
            found.append(f"{loads[0]:g}+{loads[1]:g}: {shares}")
        print(f"{dispatch} {case.name}   {', '.join(found)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", choices=list(POLICIES), action="append")
    parser.add_argument(
        "--plans",
        nargs="*",
        default=["known", *DRAWN],
        help=f"known, {', '.join(DRAWN)}, or seeds FIRST-LAST; default: all that have a name",
    )
    parser.add_argument("--arrivals", choices=("steady", "poisson"), help="default: both")
    parser.add_argument("--only", default="", help="plans whose name has this in it")
    parser.add_argument(
        "--requests",
        type=float,
        default=REQUESTS,
        help="how many to look at, at the planned rate (default: %(default)g)",
    )
    parser.add_argument(
        "--everywhere",
        action="store_true",
        help="every machine holds every model, as the server places them",
    )
    parser.add_argument("--priorities", action="store_true", help="two chains instead of one")
    given = parser.parse_args()
    arrivals = [given.arrivals == "steady"] if given.arrivals else [True, False]
    for dispatch in given.policy or POLICIES:
        if given.priorities:
            print_priorities(dispatch)
            continue
        for kind in given.plans:
            print_plans(kind, dispatch, given.only, arrivals, given.requests, given.everywhere)


if __name__ == "__main__":
    main()
