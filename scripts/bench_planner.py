#!/usr/bin/env python3
"""Plans 1,131 generated workloads with every policy and prints how they compare.

    .venv/bin/python scripts/bench_planner.py            # all; --quick for 90
    .venv/bin/python scripts/bench_planner.py --json out.json
    .venv/bin/python scripts/bench_planner.py --together    # only 100 chains at once
    .venv/bin/python scripts/bench_planner.py --apart       # only whole machines for one chain
    .venv/bin/python scripts/bench_planner.py --timings     # only how long `optimal` plans
    .venv/bin/python scripts/bench_planner.py --verify 24   # so many of them under Poisson arrivals
    .venv/bin/python scripts/bench_planner.py --verify 1131 --results FILE   # resumable

Workloads are seeded: chains of 2 to 4, forks, trees and diamonds of the models in examples/data;
fan-outs 0.25 to 3, rates 3 to 1,600 requests/s, objectives 1.2 to 5 times the least latency; a
third on V100 only, a third on T4 only, a third on everything the models were measured on. Times are
of the processor, so that a busy machine changes them little.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from itertools import takewhile
from math import ceil, floor
from pathlib import Path
from statistics import mean, median
from time import process_time, time
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "server"))

from paceline.config import read_hardware, read_profiles  # noqa: E402
from paceline.core.chain import Chain, Module, Source  # noqa: E402
from paceline.core.errors import PlanError  # noqa: E402
from paceline.core.plan import Plan  # noqa: E402
from paceline.core.profile import Configuration, Hardware, Profiles  # noqa: E402
from paceline.core.tensor import TensorSpec  # noqa: E402
from paceline.planner.assemble import graph_of  # noqa: E402
from paceline.planner.compose import compose  # noqa: E402
from paceline.planner.paths import Graph  # noqa: E402
from paceline.planner.problem import Options, PlannedChain, PlannedModule  # noqa: E402
from paceline.planner.residual import ModuleScheduler  # noqa: E402
from paceline.planner.solve import HEURISTICS, POLICIES, solve  # noqa: E402
from paceline.planner.split import choices  # noqa: E402
from paceline.sim.headroom import Verification  # noqa: E402
from paceline.sim.screen import Refuted  # noqa: E402
from paceline.sim.search import LEAST_OBJECTIVES, verified  # noqa: E402
from paceline.sim.tally import Tally  # noqa: E402
from paceline.sim.verify import simulate  # noqa: E402

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

OPTIMAL = Options(policy="optimal")
PLAIN = Options(policy="harpagon")
ABLATIONS: Mapping[str, Options] = {
    "round-robin dispatch": replace(PLAIN, dispatch="round-robin"),
    "two tuples": replace(PLAIN, max_tuples=2),
    "no dummy requests": replace(PLAIN, dummy=False),
    "no reassignment": replace(PLAIN, reassign=False),
    "no node merger": replace(PLAIN, node_merger=False),
    "no cost-direct": replace(PLAIN, cost_direct=False),
    "pooled dispatch": replace(PLAIN, dispatch="pooled"),
}


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
def _source() -> Workloads:
    return Workloads()


def four_kinds(chain: PlannedChain) -> PlannedChain:
    """The same with a fourth kind of hardware, where only up to three were measured."""
    modules = []
    for module in chain.modules:
        kinds = sorted({c.hardware for c in module.configurations})
        found = list(module.configurations)
        for i in range(4 - len(kinds)):
            like = [c for c in module.configurations if c.hardware == kinds[i % len(kinds)]]
            found += [
                Configuration(
                    f"made-{i}", c.batch_size, c.duration_s * (1.3 + i), c.price_per_hour / 1.5
                )
                for c in like
            ]
        modules.append(replace(module, configurations=tuple(found)))
    return replace(chain, modules=tuple(modules))


def heuristic_cost(chain: PlannedChain, options: Options) -> float | None:
    try:
        return sum(s.cost_per_hour for s in HEURISTICS[options.policy](chain, options))
    except PlanError:
        return None


def exact_split_cost(chain: PlannedChain) -> float | None:
    """Harpagon's schedules for every budget that changes one, in the cheapest of all splits."""
    offers = []
    for module in chain.modules:
        front = choices(ModuleScheduler(module, PLAIN), chain.slo_s)
        offers.append(
            (np.array([c.latency_s for c in front]), np.array([c.cost_per_hour for c in front]))
        )
    found = compose(graph_of(chain), offers, chain.slo_s)
    return None if found is None else found.bound


def measure(at: int) -> dict[str, Any]:
    """Everything about one workload."""
    source = _source()
    hardware = HARDWARE[at % 3]
    chain = source.chain(f"workload {at}", hardware=hardware)
    result: dict[str, Any] = {"at": at, "hardware": hardware, "modules": len(chain.modules)}
    started = process_time()
    plan = solve([chain], OPTIMAL)
    result["optimal_s"] = process_time() - started
    result["optimal"] = plan.cost_per_hour
    result["bound"] = plan.lower_bound_per_hour
    for policy in POLICIES[1:]:
        started = process_time()
        result[policy] = heuristic_cost(chain, Options(policy=policy))
        result[f"{policy}_s"] = process_time() - started
    for name, options in ABLATIONS.items():
        result[name] = heuristic_cost(chain, options)
    result["exact split"] = exact_split_cost(chain)
    return result | measure_whole(chain)


def measure_whole(chain: PlannedChain) -> dict[str, Any]:
    """A chain in whole machines of its own."""
    started = process_time()
    whole = solve([chain], replace(OPTIMAL, billing="machine"))
    took_s = process_time() - started
    return {"machine_s": took_s, "machine": whole.cost_per_hour, "machine_gap": whole.gap}


def apart(at: int) -> dict[str, Any]:
    """One workload in whole machines, and its fractional optimum."""
    chain = _source().chain(f"workload {at}", hardware=HARDWARE[at % 3])
    return {"optimal": solve([chain], OPTIMAL).cost_per_hour} | measure_whole(chain)


TARGET = 0.99
VERIFIED_REQUESTS = 4000
FRESH_EVERY = 4
"""One workload in so many is served once more, by requests that took no part in verifying it."""
LONGER = 8
"""Those below the target then are served so many times as long: a plan at its target is below it
in half of all short runs."""
RATE_BANDS = ((3.0, 30.0), (30.0, 200.0), (200.0, 1600.0))
KINDS: Mapping[str, Options] = {
    **{policy: Options(policy=policy) for policy in POLICIES},
    "optimal, whole machines": replace(OPTIMAL, billing="machine"),
}


def served(chain: PlannedChain) -> Chain:
    """The workload as a chain that can be executed: as many items as its rates say, on average."""
    modules = tuple(
        Module(
            m.name,
            m.model,
            {p: Source(p, "y") for p in m.parents} or {"x": Source(None, "x")},
            fan_out=m.rate_rps / chain.rate_rps,
        )
        for m in chain.modules
    )
    inputs = (TensorSpec("x", "UINT8", (1,)),)
    last = {"y": Source(modules[-1].name, "y")}
    return Chain(chain.name, chain.slo_s, inputs, modules, last, attainment=TARGET)


class Verifier:
    """Plans of a workload, verified under Poisson arrivals; each search is made once."""

    def __init__(self, at: int) -> None:
        self._at = at
        self.profiles = _source().profiles
        name = f"workload {at}"
        demand = _source().chain(name, hardware=HARDWARE[at % 3])
        self.demand = replace(demand, name=name.replace(" ", "-"))
        self.chain = served(self.demand)
        self._known: dict[tuple[str, str], Plan | None] = {}

    def planned(self, options: Options) -> Plan | None:
        """As it is planned, without headroom."""
        try:
            return solve([self.demand], options)
        except PlanError:
            return None

    def verified(self, options: Options) -> Plan | None:
        """What `paceline.sim.search.verified` finds: for the optimum the cheaper one of its own
        plan and the one that is asked for as Harpagon's.
        """
        own = self._searched(options)
        if options != OPTIMAL:
            return own
        other = self.planned(PLAIN)
        if other is None or (own is not None and other.cost_per_hour >= own.cost_per_hour):
            return own
        found = [plan for plan in (own, self._searched(PLAIN)) if plan is not None]
        return min(found, key=lambda plan: plan.cost_per_hour, default=None)

    def _searched(self, options: Options) -> Plan | None:
        key = options.policy, options.billing
        if key not in self._known:
            how = Verification(requests=VERIFIED_REQUESTS, seed=self._at)
            base = self.planned(options)
            try:
                self._known[key] = (
                    base
                    and verified(
                        [self.chain],
                        [self.demand],
                        options,
                        self.profiles,
                        how,
                        base,
                        alternatives=(),
                    )[0]
                )
            except PlanError:
                self._known[key] = None
        return self._known[key]

    @property
    def lasting(self) -> int:
        """Requests of a run that is as long as a confirmation."""
        longest = LEAST_OBJECTIVES * self.demand.slo_s * self.demand.rate_rps
        return max(VERIFIED_REQUESTS, ceil(longest))

    def share(
        self, plan: Plan, decided: Callable[[Tally], bool] | None = None, runs: int = 1
    ) -> float:
        """Attained by requests that neither search nor confirmation has seen, as long as a
        confirmation lasts, or so many times as long.
        """
        return simulate(
            [self.chain],
            plan,
            self.profiles,
            arrivals="poisson",
            requests=self.lasting * runs,
            seed=WORKLOADS + self._at,
            decided=decided,
        ).attainment


def attained(task: tuple[int, Sequence[str], float]) -> list[dict[str, Any]]:
    """A workload by some policies under Poisson arrivals, as planned and verified; nothing when the
    time (of the wall, in seconds since the epoch) is over.
    """
    at, kinds, until_s = task
    if time() > until_s:
        return []
    verifier = Verifier(at)
    allowed = {verifier.chain.name: floor(verifier.lasting * (1.0 - TARGET))}
    results = []
    for kind in kinds:
        started = process_time()
        options = KINDS[kind]
        found: dict[str, Any] = {"at": at, "kind": kind, "rate_rps": verifier.demand.rate_rps}
        if (base := verifier.planned(options)) is not None:
            found["cost"] = base.cost_per_hour
            found["attained"] = verifier.share(base, Refuted(allowed))
            if (plan := verifier.verified(options)) is not None:
                assert plan.attainment is not None
                shown = plan.attainment.tightest
                found["verified"] = plan.cost_per_hour
                found["at_least"] = shown.at_least
                found["headroom"] = [shown.rate_factor, shown.slo_factor]
                if at % FRESH_EVERY == 0:
                    found["attained_verified"] = verifier.share(plan)
                    if found["attained_verified"] < TARGET:
                        found["attained_longer"] = verifier.share(plan, runs=LONGER)
        results.append(found | {"took_s": process_time() - started})
    return results


def attain(
    count: int, kinds: Sequence[str], path: Path, minutes: float, jobs: int
) -> list[dict[str, Any]]:
    """So many workloads by those policies, except what the file holds, to which the rest is added.

    Returns, by workload, what the file holds of it in the end, as far as it goes without gaps: that
    the slow ones of the last few are missing must not make the rest look better.
    """
    # Spread over all of them, however far it gets; 700 and 1131 have no common factor.
    order = [step * 700 % WORKLOADS for step in range(count)]
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    done = {(found["at"], found["kind"]) for found in results}
    until_s = time() + 60 * minutes
    todo = []
    for at in order:
        if missing := [kind for kind in kinds if (at, kind) not in done]:
            todo.append((at, missing, until_s))
    with ProcessPoolExecutor(jobs) as pool, path.open("a", encoding="utf-8") as file:
        for finished in as_completed([pool.submit(attained, task) for task in todo]):
            for found in finished.result():
                file.write(json.dumps(found) + "\n")
                results.append(found)
            file.flush()
    by_workload: dict[int, dict[str, Any]] = {}
    for found in results:
        own = by_workload.setdefault(found["at"], {"at": found["at"]})
        own["rate_rps"] = found["rate_rps"]
        own[found["kind"]] = found if "cost" in found else None
    whole = takewhile(lambda at: all(kind in by_workload.get(at, {}) for kind in kinds), order)
    return [by_workload[at] for at in sorted(whole)]


def report_attained(results: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> None:
    """The table of plans under Poisson arrivals."""
    print(
        f"\n{len(results)} workloads, Poisson arrivals, {TARGET:.0%} in time with 95 % "
        f"confidence: {VERIFIED_REQUESTS} requests or {LEAST_OBJECTIVES:g} objectives of traffic\n"
    )
    print(
        "| policy | planned | below 99 % as planned | cost of headroom, median | p90 | not "
        "verifiable | verified cost / optimal, mean | max | below 99 % once verified | the same, "
        f"fresh requests, and {LONGER} times as many |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for kind in kinds:
        planned = [r[kind] for r in results if r[kind] is not None]
        shown = [found for found in planned if "verified" in found]
        extra = [found["verified"] / found["cost"] - 1 for found in shown]
        ratios = [
            r[kind]["verified"] / r["optimal"]["verified"]
            for r in results
            if r[kind] is not None and "verified" in r[kind] and "verified" in r["optimal"]
        ]
        below = mean(found["attained"] < TARGET for found in planned)
        fresh = [found["attained_verified"] for found in shown if "attained_verified" in found]
        longer = sum(found.get("attained_longer", 1.0) < TARGET for found in shown)
        again = f"{sum(share < TARGET for share in fresh)}, {longer} of {len(fresh)}"
        print(
            f"| {kind} | {len(planned)} | {below:.0%} | {median(extra):.1%} | "
            f"{percentile(extra, 0.9):.1%} | {len(planned) - len(shown)} | {mean(ratios):.3f} | "
            f"{max(ratios):.2f} | {sum(found['at_least'] < TARGET for found in shown)} | {again} |"
        )
    print("\n| cost of headroom, median | " + " | ".join(kinds) + " |")
    print("|---" * (1 + len(kinds)) + "|")
    for low, high in RATE_BANDS:
        own = [r for r in results if low <= r["rate_rps"] < high]
        cells = []
        for kind in kinds:
            extra = [r[kind]["verified"] / r[kind]["cost"] - 1 for r in own if _shown(r[kind])]
            cells.append(f"{median(extra):.0%}" if extra else "-")
        print(f"| {low:g} to {high:g} requests/s ({len(own)}) | {' | '.join(cells)} |")
    _report_cheaper(results, kinds)
    took_s = [sum(r[kind]["took_s"] for kind in kinds if _shown(r[kind])) for r in results]
    print(f"\n{mean(took_s):.1f} s of CPU a workload")


def _report_cheaper(results: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> None:
    """How often others cost less than `optimal`, each verified."""
    for kind in kinds:
        ratios = [
            r[kind]["verified"] / r["optimal"]["verified"]
            for r in results
            if _shown(r[kind]) and _shown(r["optimal"])
        ]
        if kind != "optimal" and ratios:
            print(
                f"\n{kind}, verified, costs less than optimal, verified, on "
                f"{sum(ratio < 1 - 1e-9 for ratio in ratios)} of {len(ratios)} "
                f"(by {1 - min(ratios):.0%} at most)"
            )


def _shown(found: Mapping[str, Any] | None) -> bool:
    return found is not None and "verified" in found


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def report(results: Sequence[Mapping[str, Any]]) -> None:
    """The tables of docs/benchmarks/planner.md."""
    count = len(results)
    print(f"{count} workloads\n")
    print("| policy | feasible | cost / optimal, mean | max | plans in ms of CPU, median | p99 |")
    print("|---|---|---|---|---|---|")
    beaten = 0
    for policy in POLICIES:
        costs = [(r[policy] / r["optimal"]) for r in results if r[policy] is not None]
        times = [r[f"{policy}_s"] * 1e3 for r in results]
        beaten += sum(ratio < 1 - 1e-9 for ratio in costs)
        print(
            f"| {policy} | {len(costs) / count:.1%} | {mean(costs):.3f} | {max(costs):.2f} | "
            f"{median(times):.1f} | {percentile(times, 0.99):.1f} |"
        )
    print(f"\nworkloads on which a policy beats `optimal`: {beaten}")
    gaps = [1 - r["bound"] / r["optimal"] for r in results]
    print(
        f"`optimal` above its own lower bound: median {median(gaps):.4%}, "
        f"p99 {percentile(gaps, 0.99):.4%}, max {max(gaps):.4%}"
    )
    both = [r for r in results if r["harpagon"] is not None and r["exact split"] is not None]
    equal = sum(r["harpagon"] <= r["exact split"] * (1 + 1e-6) for r in both)
    print(
        f"harpagon costs no more than its exact split: {equal / len(both):.1%} (published 91.5 %)"
    )
    print("\n| harpagon with | cost / full harpagon, mean | max | feasible |")
    print("|---|---|---|---|")
    for name in ABLATIONS:
        ratios = [r[name] / r["harpagon"] for r in results if r[name] and r["harpagon"]]
        feasible = sum(r[name] is not None for r in results)
        print(f"| {name} | {mean(ratios):.3f} | {max(ratios):.2f} | {feasible / count:.1%} |")
    print("\n| hardware | harpagon / optimal | nexus | scrooge | inferline | clipper |")
    print("|---|---|---|---|---|---|")
    for hardware in HARDWARE:
        own = [r for r in results if r["hardware"] == hardware]
        cells = [
            f"{mean(r[p] / r['optimal'] for r in own if r[p] is not None):.3f}"
            for p in POLICIES[1:]
        ]
        print(f"| {hardware} | {' | '.join(cells)} |")
    report_whole(results)


def report_whole(results: Sequence[Mapping[str, Any]]) -> None:
    """The line on chains in whole machines of their own."""
    times = [r["machine_s"] * 1e3 for r in results]
    print(
        f"\nwhole machines, one chain at a time: gap median "
        f"{median(r['machine_gap'] for r in results):.1%}, mean "
        f"{mean(r['machine_gap'] for r in results):.1%}, cost / fractional optimum median "
        f"{median(r['machine'] / r['optimal'] for r in results):.2f}; "
        f"planned in {median(times):.0f} ms median, {percentile(times, 0.99):.0f} ms p99"
    )


def timings(source: Workloads, repeats: int) -> None:
    """Four modules on four kinds of hardware; twelve modules."""
    long_chain = tuple((i - 1,) if i else () for i in range(12))
    cases = {
        "4 modules, 4 kinds of hardware, series": (SHAPES["chain of 4"], True),
        "4 modules, 4 kinds of hardware, diamond": (SHAPES["diamond"], True),
        "4 modules, not series-parallel (the letter N)": (((), (), (0,), (0, 1)), True),
        "12 modules in series": (long_chain, False),
    }
    print("\n| optimal | ms, median | p99 | gap, max |")
    print("|---|---|---|---|")
    for name, (shape, four) in cases.items():
        times, gaps = [], []
        for i in range(repeats):
            chain = source.chain(f"timing {i}", shape)
            chain = four_kinds(chain) if four else chain
            started = process_time()
            plan = solve([chain], OPTIMAL)
            times.append((process_time() - started) * 1e3)
            gaps.append(1 - plan.lower_bound_per_hour / plan.cost_per_hour)
        print(f"| {name} | {median(times):.1f} | {percentile(times, 0.99):.1f} | {max(gaps):.3%} |")


def together(source: Workloads, repeats: int) -> None:
    """100 chains of four modules, in whole machines."""
    shapes = [shape for shape in SHAPES.values() if len(shape) == 4]
    print("\n| 100 chains of 4 modules, whole machines | cost/h | idle | lower bound | gap | s |")
    print("|---|---|---|---|---|---|")
    gaps = []
    for repeat in range(repeats):
        chains = [
            source.chain(f"together {repeat} {i}", shapes[i % len(shapes)]) for i in range(100)
        ]
        started = process_time()
        plan = solve(chains, replace(OPTIMAL, billing="machine"))
        took_s = process_time() - started
        idle = plan.cost_per_hour - sum(
            m.price_per_hour * sum(share.utilisation for share in m.shares) for m in plan.machines
        )
        gaps.append(plan.gap)
        print(
            f"| {repeat} | {plan.cost_per_hour:.1f} | {idle:.1f} | "
            f"{plan.lower_bound_per_hour:.1f} | {plan.gap:.1%} | {took_s:.1f} |"
        )
    print(f"\nmedian gap {median(gaps):.1%}")


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="90 workloads and fewer repeats")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--json", type=Path, help="also write every result here")
    parser.add_argument("--together", action="store_true", help="only the 100 chains")
    parser.add_argument("--apart", action="store_true", help="only whole machines for one chain")
    parser.add_argument("--timings", action="store_true", help="only how long `optimal` plans")
    parser.add_argument(
        "--verify", type=int, metavar="N", help="only N workloads, Poisson arrivals"
    )
    parser.add_argument("--kinds", help="policies to verify, between semicolons (default: all)")
    parser.add_argument("--results", type=Path, default=Path("poisson.jsonl"), help="added to")
    parser.add_argument("--minutes", type=float, default=600.0, help="then nothing new is begun")
    arguments = parser.parse_args()
    if arguments.together:
        together(Workloads(), 5)
        return
    if arguments.timings:
        timings(Workloads(), 50)
        return
    if arguments.apart:
        with ProcessPoolExecutor(arguments.jobs) as pool:
            report_whole(list(pool.map(apart, range(WORKLOADS), chunksize=5)))
        return
    if arguments.verify:
        kinds = arguments.kinds.split(";") if arguments.kinds else list(KINDS)
        attainments = attain(
            arguments.verify, kinds, arguments.results, arguments.minutes, arguments.jobs
        )
        report_attained(attainments, kinds)
        if arguments.json:
            arguments.json.write_text(json.dumps(attainments), encoding="utf-8")
        return
    count = 90 if arguments.quick else WORKLOADS
    with ProcessPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(measure, range(count), chunksize=5))
    report(results)
    source = Workloads()
    timings(source, 10 if arguments.quick else 50)
    together(source, 1 if arguments.quick else 5)
    if arguments.json:
        arguments.json.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
