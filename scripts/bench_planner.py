#!/usr/bin/env python3
"""Plans 1,131 generated workloads with every policy and prints how they compare.

    .venv/bin/python scripts/bench_planner.py            # all; --quick for 90
    .venv/bin/python scripts/bench_planner.py --json out.json
    .venv/bin/python scripts/bench_planner.py --together    # only 100 chains at once
    .venv/bin/python scripts/bench_planner.py --apart       # only whole machines for one chain
    .venv/bin/python scripts/bench_planner.py --fractions   # only fractions of machines
    .venv/bin/python scripts/bench_planner.py --brute       # only Harpagon against brute force
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
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from time import process_time
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.planner_brute import compared, report_brute
from scripts.planner_poisson import KINDS, attain, report_attained
from scripts.planner_workloads import (
    HARDWARE,
    OPTIMAL,
    PLAIN,
    SHAPES,
    WORKLOADS,
    Workloads,
    percentile,
    source,
)

from paceline.core.errors import PlanError
from paceline.core.profile import Configuration
from paceline.planner.problem import Options, PlannedChain
from paceline.planner.solve import HEURISTICS, POLICIES, solve

ABLATIONS: Mapping[str, Options] = {
    "round-robin dispatch": replace(PLAIN, dispatch="round-robin"),
    "two tuples": replace(PLAIN, max_tuples=2),
    "no dummy requests": replace(PLAIN, dummy=False),
    "no dummy requests, two tuples": replace(PLAIN, dummy=False, max_tuples=2),
    "no dummy requests, one tuple": replace(PLAIN, dummy=False, max_tuples=1),
    "no reassignment": replace(PLAIN, reassign=False),
    "no splitting by efficiency": replace(PLAIN, efficiency=False),
    "no node merger": replace(PLAIN, node_merger=False),
    "no cost-direct": replace(PLAIN, cost_direct=False),
    "the published walk alone": replace(PLAIN, strict=True),
    "pooled dispatch": replace(PLAIN, dispatch="pooled"),
}

TOGETHER = ("harpagon", "nexus", "scrooge", "inferline")
"""What 100 chains at once are planned by beside the optimum; Clipper finds no plan for some."""


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


def measure(at: int) -> dict[str, Any]:
    """Everything about one workload."""
    chain = source().chain(f"workload {at}", hardware=HARDWARE[at % 3])
    return fractions(at) | measure_whole(chain)


def fractions(at: int) -> dict[str, Any]:
    """One workload in fractions of machines, by every policy and without parts of Harpagon."""
    hardware = HARDWARE[at % 3]
    chain = source().chain(f"workload {at}", hardware=hardware)
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
    return result


def measure_whole(chain: PlannedChain) -> dict[str, Any]:
    """A chain in whole machines of its own."""
    started = process_time()
    whole = solve([chain], replace(OPTIMAL, billing="machine"))
    took_s = process_time() - started
    found = {"machine_s": took_s, "machine": whole.cost_per_hour, "machine_gap": whole.gap}
    for policy in POLICIES[1:]:
        try:
            plan = solve([chain], Options(policy=policy, billing="machine", bound=False))
        except PlanError:
            continue
        found[f"machine {policy}"] = plan.cost_per_hour
    return found


def apart(at: int) -> dict[str, Any]:
    """One workload in whole machines, and its fractional optimum."""
    chain = source().chain(f"workload {at}", hardware=HARDWARE[at % 3])
    return {"optimal": solve([chain], OPTIMAL).cost_per_hour} | measure_whole(chain)


def report_fractions(results: Sequence[Mapping[str, Any]]) -> None:
    """The tables of docs/benchmarks/planner.md on fractions of machines."""
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
    report_ablations(results)
    print("\n| hardware | harpagon / optimal | nexus | scrooge | inferline | clipper |")
    print("|---|---|---|---|---|---|")
    for hardware in HARDWARE:
        own = [r for r in results if r["hardware"] == hardware]
        cells = [
            f"{mean(r[p] / r['optimal'] for r in own if r[p] is not None):.3f}"
            for p in POLICIES[1:]
        ]
        print(f"| {hardware} | {' | '.join(cells)} |")


def report_ablations(results: Sequence[Mapping[str, Any]]) -> None:
    """What each part of Harpagon saves."""
    print("\n| harpagon with | cost / full harpagon, mean | max | feasible |")
    print("|---|---|---|---|")
    for name in ABLATIONS:
        ratios = [r[name] / r["harpagon"] for r in results if r[name] and r["harpagon"]]
        feasible = sum(r[name] is not None for r in results) / len(results)
        print(f"| {name} | {mean(ratios):.3f} | {max(ratios):.2f} | {feasible:.1%} |")


def report_whole(results: Sequence[Mapping[str, Any]]) -> None:
    """The tables on chains in whole machines of their own."""
    print("\n| whole machines, one chain at a time | feasible | cost / optimal, mean | max |")
    print("|---|---|---|---|")
    beaten = 0
    for policy in POLICIES:
        key = f"machine {policy}" if policy != OPTIMAL.policy else "machine"
        ratios = [r[key] / r["machine"] for r in results if key in r]
        beaten += sum(ratio < 1 - 1e-9 for ratio in ratios)
        print(
            f"| {policy} | {len(ratios) / len(results):.1%} | {mean(ratios):.3f} | "
            f"{max(ratios):.2f} |"
        )
    times = [r["machine_s"] * 1e3 for r in results]
    print(
        f"\nworkloads on which a policy beats `optimal`: {beaten}; gap median "
        f"{median(r['machine_gap'] for r in results):.1%}, mean "
        f"{mean(r['machine_gap'] for r in results):.1%}, cost / fractional optimum median "
        f"{median(r['machine'] / r['optimal'] for r in results):.2f}; "
        f"planned in {median(times):.0f} ms median, {percentile(times, 0.99):.0f} ms p99"
    )


def random_dag(modules: int, seed: int) -> list[tuple[int, ...]]:
    """Each waits for each of those before it with probability 0.3: hardly ever series-parallel."""
    rng = random.Random(seed)
    return [tuple(a for a in range(b) if rng.random() < 0.3) for b in range(modules)]


def timings(workloads: Workloads, repeats: int) -> None:
    """Four modules on four kinds of hardware; twelve modules."""
    long_chain = tuple((i - 1,) if i else () for i in range(12))
    cases: dict[str, tuple[Sequence[Sequence[int]] | None, bool]] = {
        "4 modules, 4 kinds of hardware, series": (SHAPES["chain of 4"], True),
        "4 modules, 4 kinds of hardware, diamond": (SHAPES["diamond"], True),
        "4 modules, not series-parallel (the letter N)": (((), (), (0,), (0, 1)), True),
        "12 modules in series": (long_chain, False),
        "12 modules, random DAGs (every edge with probability 0.3)": (None, False),
    }
    print("\n| optimal | ms, median | p99 | gap, max |")
    print("|---|---|---|---|")
    for name, (shape, four) in cases.items():
        times, gaps = [], []
        for i in range(repeats):
            chain = workloads.chain(f"timing {i}", shape or random_dag(12, i))
            chain = four_kinds(chain) if four else chain
            started = process_time()
            plan = solve([chain], OPTIMAL)
            times.append((process_time() - started) * 1e3)
            gaps.append(1 - plan.lower_bound_per_hour / plan.cost_per_hour)
        print(f"| {name} | {median(times):.1f} | {percentile(times, 0.99):.1f} | {max(gaps):.3%} |")


def hundred(draw: int) -> list[PlannedChain]:
    """100 chains of four modules."""
    shapes = [shape for shape in SHAPES.values() if len(shape) == 4]
    return [source().chain(f"together {draw} {i}", shapes[i % len(shapes)]) for i in range(100)]


def together(draws: Sequence[int]) -> None:
    """100 chains of four modules, in whole machines; the same by some other policies."""
    head = " | ".join(("cost/h", "idle", "lower bound", "gap", "s", *TOGETHER))
    print(f"\n| 100 chains of 4 modules, whole machines | {head} |")
    print("|---|---|---|---|---|---|" + "---|" * len(TOGETHER))
    gaps, beaten = [], 0
    for repeat in draws:
        chains = hundred(repeat)
        started = process_time()
        plan = solve(chains, replace(OPTIMAL, billing="machine"))
        took_s = process_time() - started
        idle = plan.cost_per_hour - sum(
            m.price_per_hour * sum(share.utilisation for share in m.shares) for m in plan.machines
        )
        gaps.append(plan.gap)
        others = [
            solve(chains, Options(policy=policy, billing="machine", bound=False)).cost_per_hour
            for policy in TOGETHER
        ]
        beaten += sum(cost < plan.cost_per_hour * (1 - 1e-9) for cost in others)
        print(
            f"| {repeat} | {plan.cost_per_hour:.1f} | {idle:.1f} | "
            f"{plan.lower_bound_per_hour:.1f} | {plan.gap:.1%} | {took_s:.1f} | "
            + " | ".join(f"{cost:.1f}" for cost in others)
            + " |"
        )
    print(f"\nmedian gap {median(gaps):.1%}; plans of other policies that cost less: {beaten}")


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="90 workloads and fewer repeats")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--json", type=Path, help="also write every result here")
    parser.add_argument("--together", action="store_true", help="only the 100 chains")
    parser.add_argument(
        "--draws", type=int, nargs="+", default=list(range(5)), help="of 100 chains"
    )
    parser.add_argument("--apart", action="store_true", help="only whole machines for one chain")
    parser.add_argument("--fractions", action="store_true", help="only fractions of machines")
    parser.add_argument("--brute", action="store_true", help="only Harpagon's own brute force")
    parser.add_argument("--timings", action="store_true", help="only how long `optimal` plans")
    parser.add_argument(
        "--verify", type=int, metavar="N", help="only N workloads, Poisson arrivals"
    )
    parser.add_argument("--kinds", help="policies to verify, between semicolons (default: all)")
    parser.add_argument("--results", type=Path, default=Path("poisson.jsonl"), help="added to")
    parser.add_argument("--minutes", type=float, default=600.0, help="then nothing new is begun")
    arguments = parser.parse_args()
    if arguments.together:
        together(arguments.draws)
        return
    if arguments.timings:
        timings(source(), 50)
        return
    if arguments.fractions:
        count = 90 if arguments.quick else WORKLOADS
        with ProcessPoolExecutor(arguments.jobs) as pool:
            report_fractions(list(pool.map(fractions, range(count), chunksize=5)))
        return
    if arguments.brute:
        count = 90 if arguments.quick else WORKLOADS
        with ProcessPoolExecutor(arguments.jobs) as pool:
            brute = list(pool.map(compared, range(count), chunksize=5))
        report_brute(brute)
        if arguments.json:
            arguments.json.write_text(json.dumps(brute), encoding="utf-8")
        return
    if arguments.apart:
        with ProcessPoolExecutor(arguments.jobs) as pool:
            report_whole(list(pool.map(apart, range(WORKLOADS), chunksize=5)))
        return
    if arguments.verify:
        kinds = arguments.kinds.split(";") if arguments.kinds else list(KINDS)
        if OPTIMAL.policy not in kinds or not set(kinds) <= set(KINDS):
            parser.error(f"--kinds takes optimal and any of {'; '.join(KINDS)}")
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
    report_fractions(results)
    report_whole(results)
    timings(source(), 10 if arguments.quick else 50)
    together(arguments.draws[: 1 if arguments.quick else None])
    if arguments.json:
        arguments.json.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
