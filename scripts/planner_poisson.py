"""Plans verified under Poisson arrivals; `bench_planner.py --verify`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import takewhile
from math import ceil, floor
from pathlib import Path
from statistics import mean, median
from time import process_time, time
from typing import Any

from scripts.planner_workloads import (
    HARDWARE,
    OPTIMAL,
    RATE_BANDS,
    WORKLOADS,
    percentile,
    source,
)

from paceline.core.chain import Chain, Module, Source
from paceline.core.errors import PlanError
from paceline.core.plan import Plan
from paceline.core.tensor import TensorSpec
from paceline.planner.problem import Options, PlannedChain
from paceline.planner.solve import HEURISTICS, POLICIES, solve
from paceline.sim.evidence import LEAST_OBJECTIVES
from paceline.sim.headroom import Verification
from paceline.sim.screen import Refuted
from paceline.sim.search import verified
from paceline.sim.tally import Tally
from paceline.sim.verify import simulate

TARGET = 0.99
VERIFIED_REQUESTS = 4000
FRESH_EVERY = 4
"""One workload in so many is served once more, by requests that took no part in verifying it."""
LONGER = 8
"""Those below the target then are served so many times as long: a plan at its target is below it
in half of all short runs."""
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
        self.profiles = source().profiles
        name = f"workload {at}"
        demand = source().chain(name, hardware=HARDWARE[at % 3])
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
        """What `paceline.sim.search.verified` finds: for the optimum the cheapest one of its own
        plan and of those that are asked for as the other policies'. That leaves out searches that
        cannot be cheaper; here every one is made, as it is asked for as a policy, too.
        """
        if options != OPTIMAL:
            return self._searched(options)
        found = (self._searched(each) for each in (options, *(KINDS[p] for p in HEURISTICS)))
        return min(filter(None, found), key=lambda plan: plan.cost_per_hour, default=None)

    def _searched(self, options: Options) -> Plan | None:
        key = options.policy, options.billing
        if key not in self._known:
            how = Verification(requests=VERIFIED_REQUESTS, seed=self._at)
            base = self.planned(options)
            asked = [self.chain], [self.demand], options, self.profiles, how
            try:
                self._known[key] = base and verified(*asked, base, alternatives=())[0]
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
