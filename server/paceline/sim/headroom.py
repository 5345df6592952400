"""Verified plans: the least headroom with which a plan attains what its chains ask for.

The real dispatcher runs a plan in virtual time; while a chain misses its target, the plan is made
for a higher rate or a shorter objective than declared, so that every choice - budgets, batches,
machines - follows. Which mixture of the two is the cheapest differs from chain to chain, so both
are searched (docs/decisions/0014).

Invariant: a plan that is returned attained its targets, with the stated confidence, on requests
that took no part in the search; the same seed gives the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from random import Random
from statistics import NormalDist

from paceline.core.chain import Chain
from paceline.core.errors import ConfigError, PlanError
from paceline.core.plan import Attainment, ChainAttainment, ChainPlan, Plan
from paceline.core.profile import Profiles
from paceline.planner.problem import Options, PlannedChain
from paceline.planner.solve import solve
from paceline.sim import workload
from paceline.sim.results import ChainResult, SimResult, wilson
from paceline.sim.verify import simulate

RATE_STEP = 1.025
"""Rates are raised by whole steps of this factor."""
RATE_STEPS = 190
"""A chain that misses its target at 109 times its rate misses it for another reason."""
SLO_FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
CONFIRMATIONS = 12
"""How often a plan that the search found is given one more step when fresh requests refute it."""
LEAST_REQUESTS = 10_000
MOST_REQUESTS = 1_000_000
"""Of all chains together, in one run."""
SCREENED = 4
"""The search looks at one in so many of the requests that the result is confirmed with."""

Progress = Callable[[str, str], None]
"""Told the subject, and what of it is being tried."""


@dataclass(frozen=True, slots=True)
class Headroom:
    """A plan for `rate_factor` times the rate, within `slo_factor` times the objective."""

    rate_factor: float = 1.0
    slo_factor: float = 1.0

    def of(self, chain: PlannedChain) -> PlannedChain:
        """What is planned in place of `chain`."""
        return replace(
            chain,
            slo_s=chain.slo_s * self.slo_factor,
            rate_rps=chain.rate_rps * self.rate_factor,
            modules=tuple(
                replace(m, rate_rps=m.rate_rps * self.rate_factor) for m in chain.modules
            ),
        )


NONE = Headroom()


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What plans are verified against.

    `kind` is `poisson`, `uniform`, or "" for what each chain declares; a `trace` (with `window`)
    is stretched to each chain's rate. Evenly spaced requests need no verification: the published
    bounds hold for them.
    """

    kind: str = ""
    trace: Path | None = None
    window: str = ""

    def of(self, chain: Chain) -> str:
        """How a report calls it."""
        return self.trace.name if self.trace is not None else self.kind or chain.arrivals

    def judged(self, chain: Chain) -> bool:
        return self.of(chain) != "uniform"

    def instants(
        self, chain: Chain, rate_rps: float, requests: int, rng: Random
    ) -> Sequence[float]:
        """`requests` arrivals, or all those of the trace. Raises ConfigError."""
        if self.trace is not None:
            found = workload.read_trace(self.trace, rng, rate_rps=rate_rps, window=self.window)
            if len(found) > MOST_REQUESTS:
                raise ConfigError(
                    f"{len(found)} requests at {rate_rps:g} a second, more than {MOST_REQUESTS}; "
                    "select a part with --window",
                    where=str(self.trace),
                )
            return found
        if self.of(chain) == "uniform":
            return workload.uniform(rate_rps, requests)
        return workload.poisson(rate_rps, requests, rng)


@dataclass(frozen=True, slots=True)
class Verification:
    """How sure to be: `requests` of the chain with the fewest (0: as many as its target needs)."""

    arrivals: Arrivals = field(default_factory=Arrivals)
    confidence: float = 0.95
    requests: int = 0
    seed: int = 0

    def needed(self, target: float) -> int:
        """Requests to simulate; ConfigError where so few could never show the target."""
        z = NormalDist().inv_cdf(0.5 + self.confidence / 2.0)
        least = ceil(z * z * target / (1.0 - target)) + 1
        if self.requests and self.requests < least:
            raise ConfigError(
                f"{target:.6g} with {self.confidence:.0%} confidence takes {least} requests, "
                f"got {self.requests}",
                key="--requests",
            )
        return self.requests or max(LEAST_REQUESTS, 12 * least)


def plan_with(
    chains: Sequence[PlannedChain], options: Options, headroom: Mapping[str, Headroom]
) -> Plan:
    """The plan with headroom by chain; its rates and objectives are those declared."""
    plan = solve([headroom.get(chain.name, NONE).of(chain) for chain in chains], options)
    declared = zip(plan.chains, chains, strict=True)
    return replace(plan, chains=tuple(_declared(planned, chain) for planned, chain in declared))


def verified(
    chains: Sequence[Chain],
    demands: Sequence[PlannedChain],
    options: Options,
    profiles: Profiles,
    how: Verification,
    base: Plan,
    *,
    progress: Progress = lambda subject, detail: None,
) -> tuple[Plan, dict[str, Headroom]]:
    """The cheapest plan found whose chains attain their targets, and its headroom by chain.

    `base` is the plan without any. Where machines are not shared each chain is verified by itself.
    Raises PlanError when no headroom is enough, ConfigError when too few requests could show it.
    """
    if not any(how.arrivals.judged(chain) for chain in chains):
        return base, {}
    if options.billing == "machine" or len(chains) == 1:
        units = [(tuple(chains), tuple(demands), base)]
    else:
        units = [
            ((chain,), (demand,), replace(base, chains=(planned,)))
            for chain, demand, planned in zip(chains, demands, base.chains, strict=True)
        ]
    found: dict[str, Headroom] = {}
    attained: list[ChainAttainment] = []
    plans: list[Plan] = []
    for own_chains, own_demands, own_base in units:
        search = _Search(own_chains, own_demands, options, profiles, how, own_base, progress)
        plan, headroom, shown = search.run() if search.judged else (own_base, {}, [])
        plans.append(plan)
        found |= headroom
        attained += shown
    whole = replace(
        base,
        chains=tuple(chain for plan in plans for chain in plan.chains),
        machines=tuple(machine for plan in plans for machine in plan.machines),
        attainment=Attainment(tuple(attained), how.confidence, base.cost_per_hour),
    )
    return whole, found


class _Search:
    """Chains that are planned together, and what is known of their plans."""

    def __init__(
        self,
        chains: Sequence[Chain],
        demands: Sequence[PlannedChain],
        options: Options,
        profiles: Profiles,
        how: Verification,
        base: Plan,
        progress: Progress,
    ) -> None:
        self._chains = chains
        self._demands = demands
        self._options = options
        self._profiles = profiles
        self._how = how
        self._progress = progress
        self.judged = [chain for chain in chains if how.arrivals.judged(chain)]
        self._requests = max((how.needed(c.attainment) for c in self.judged), default=0)
        self._needing: set[str] = set()
        """Chains that missed their target without headroom; the others are planned as declared."""
        self._base = base
        self._plans: dict[tuple[int, float], Plan | None] = {}
        self._enough: dict[tuple[int, float], bool] = {}

    def run(self) -> tuple[Plan, dict[str, Headroom], list[ChainAttainment]]:
        """The cheapest verified plan."""
        found = self._cheapest()
        for attempt in range(CONFIRMATIONS):
            if found is None:
                break
            plan = self._plan(found)
            if plan is not None:
                self._tell("confirming", found)
                result = self._simulated(plan, *self._instants(f"confirm {attempt}"))
                shown = [self._attained(chain, result, found) for chain in self.judged]
                short = {c.chain for c in shown if c.at_least < c.target}
                if not short:
                    return plan, self._headroom(found), shown
                if not short <= self._needing:
                    self._need(short)
                    found = self._cheapest()
                    continue
            found = (found[0] + 1, found[1]) if found[0] < RATE_STEPS else None
        raise self._unreachable()

    def _cheapest(self) -> tuple[int, float] | None:
        """Steps of the rate and a factor of the objective that screening lets pass."""
        while True:
            known = set(self._needing)
            found = self._search()
            if self._needing == known:
                return found

    def _search(self) -> tuple[int, float] | None:
        """By bisection over the rate, for each factor of the objective that may be cheaper."""
        if self._passes((0, 1.0)):
            return (0, 1.0)
        best: tuple[int, float] | None = None
        for factor in SLO_FACTORS:
            most = RATE_STEPS if best is None else self._cheaper_than(best, factor)
            if most is None:
                continue
            low, high = self._bracket(factor, most)
            if high is None:
                continue
            while high - low > 1:
                middle = (low + high) // 2
                if self._passes((middle, factor)):
                    high = middle
                else:
                    low = middle
            if best is None or self._cost((high, factor)) < self._cost(best):
                best = (high, factor)
        return best

    def _cheaper_than(self, best: tuple[int, float], factor: float) -> int | None:
        """The most steps that, with this factor, still cost less than `best`."""
        cost = self._cost(best)
        if self._cost((0, factor)) >= cost:
            return None
        low, high = 0, best[0]
        if self._cost((high, factor)) < cost:
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._cost((middle, factor)) < cost else (low, middle)
        return low

    def _bracket(self, factor: float, most: int) -> tuple[int, int | None]:
        """Steps that do not pass (-1: none was tried) and more steps that do (None: none do)."""
        if most < RATE_STEPS and not self._passes((most, factor)):
            return most, None
        low, step = -1, 0
        while not self._passes((min(step, most), factor)):
            if step >= most:
                return low, None
            low, step = step, max(1, 2 * step)
        return low, min(step, most)

    def _passes(self, at: tuple[int, float]) -> bool:
        """Whether no more requests than a quarter of what may be missed miss, of a quarter."""
        if at in self._enough:
            return self._enough[at]
        plan = self._plan(at)
        if plan is None:
            self._enough[at] = False
            return False
        self._tell("with", at)
        instants, seed = self._instants("search", 1 if self._how.arrivals.trace else SCREENED)
        most = {c.name: self._allowed(c, len(instants[c.name])) for c in self.judged}
        # Without headroom all chains that need it are wanted; later one is enough to go on.
        stop = most if self._needing else None
        result = self._simulated(plan, instants, seed, stop)
        missed = {c.chain for c in result.chains if c.chain in most and _missed(c) > most[c.chain]}
        if not missed <= self._needing:
            self._need(missed)
        self._enough[at] = not missed
        return not missed

    def _tell(self, what: str, at: tuple[int, float]) -> None:
        names = ", ".join(chain.name for chain in self.judged[:4])
        more = f" and {len(self.judged) - 4} more" if len(self.judged) > 4 else ""
        kinds = " and ".join(sorted({self._how.arrivals.of(chain) for chain in self.judged}))
        self._progress(
            f"simulating {names}{more} under {kinds} arrivals",
            f"{what} {RATE_STEP ** at[0]:.2f}x the rate in {at[1]:.1f}x the objective",
        )

    def _need(self, chains: set[str]) -> None:
        """More chains get headroom: what is known holds without any only."""
        self._needing |= chains
        self._plans.clear()
        self._enough = {(0, 1.0): False}

    def _instants(self, salt: str, part: int = 1) -> tuple[dict[str, Sequence[float]], int]:
        """Arrivals of one part in so many of the requests, and a seed for the rest of the run.

        The chain of least rate gets as many as it needs, the others come for as long.
        """
        seed = Random(f"{self._how.seed} {salt}").randrange(1 << 30)
        rates = {demand.name: demand.rate_rps for demand in self._demands}
        span_s = self._requests / part / min(rates.values())
        total = round(span_s * sum(rates.values()))
        if self._how.arrivals.trace is None and total > MOST_REQUESTS:
            raise ConfigError(
                f"verifying these chains takes {total} requests at a time, more than "
                f"{MOST_REQUESTS}; verify fewer together, or use --no-verify",
                key="attainment",
            )
        found = {
            chain.name: self._how.arrivals.instants(
                chain, rate_rps, round(span_s * rate_rps), Random(f"{seed} {chain.name}")
            )
            for chain in self._chains
            if (rate_rps := rates[chain.name])
        }
        return found, seed

    def _simulated(
        self,
        plan: Plan,
        instants: Mapping[str, Sequence[float]],
        seed: int,
        most: Mapping[str, int] | None = None,
    ) -> SimResult:
        return simulate(
            self._chains, plan, self._profiles, arrivals=instants, seed=seed, most_missed=most
        )

    def _allowed(self, chain: Chain, requests: int) -> int:
        """The most of so many requests that may miss: the share with which the lower bound of all
        requests reaches the target.
        """
        traced = self._how.arrivals.trace is not None
        total = requests if traced else self._requests
        if wilson(total, total, self._how.confidence)[0] < chain.attainment:
            raise ConfigError(
                f"{total} requests cannot show {chain.attainment:.6g} with "
                f"{self._how.confidence:.0%} confidence; take a longer trace",
                key="--arrivals",
            )
        low, high = 0, total
        while high - low > 1:
            middle = (low + high) // 2
            bound = wilson(total - middle, total, self._how.confidence)[0]
            low, high = (middle, high) if bound >= chain.attainment else (low, middle)
        return low * requests // total

    def _attained(self, chain: Chain, result: SimResult, at: tuple[int, float]) -> ChainAttainment:
        own = result.chain(chain.name)
        headroom = self._headroom(at).get(chain.name, NONE)
        return ChainAttainment(
            chain.name,
            self._how.arrivals.of(chain),
            chain.attainment,
            own.attainment,
            own.at_least(self._how.confidence),
            own.requests,
            headroom.rate_factor,
            headroom.slo_factor,
        )

    def _headroom(self, at: tuple[int, float]) -> dict[str, Headroom]:
        """By chain; none without any."""
        if at == (0, 1.0):
            return {}
        return {name: Headroom(RATE_STEP ** at[0], at[1]) for name in sorted(self._needing)}

    def _plan(self, at: tuple[int, float]) -> Plan | None:
        """None where the objective is too short for any plan."""
        if at == (0, 1.0):
            return self._base
        if at not in self._plans:
            try:
                made = plan_with(self._demands, self._options, self._headroom(at))
                self._plans[at] = replace(
                    made, lower_bound_per_hour=self._base.lower_bound_per_hour
                )
            except PlanError:
                self._plans[at] = None
        return self._plans[at]

    def _cost(self, at: tuple[int, float]) -> float:
        plan = self._plan(at)
        return float("inf") if plan is None else plan.cost_per_hour

    def _unreachable(self) -> PlanError:
        chain = min(self.judged, key=lambda c: (c.name not in self._needing, c.name))
        return PlanError(
            f"chain {chain.name!r} does not attain {chain.attainment:.6g} under "
            f"{self._how.arrivals.of(chain)} arrivals, not even planned for "
            f"{RATE_STEP**RATE_STEPS:.0f} times its rate; relax slo_ms or attainment",
            chain=chain.name,
        )


def _missed(result: ChainResult) -> int:
    return result.requests - result.met


def _declared(planned: ChainPlan, chain: PlannedChain) -> ChainPlan:
    """A plan made with headroom, for the rates and the objective that it serves."""
    modules = zip(planned.modules, chain.modules, strict=True)
    return replace(
        planned,
        slo_s=chain.slo_s,
        rate_rps=chain.rate_rps,
        modules=tuple(replace(plan, rate_rps=module.rate_rps) for plan, module in modules),
    )
