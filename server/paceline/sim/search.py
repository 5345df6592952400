"""Verified plans: the least headroom with which a plan attains what its chains ask for.

The real dispatcher runs candidate plans in virtual time. Which mixture of a higher rate and a
shorter objective is the cheapest differs from chain to chain, so both are searched.

Invariant: a plan that is returned attained its targets, with the stated confidence, on requests
that took no part in the search; the same seed gives the same plan.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import ceil, inf, log

from paceline.core.chain import Chain
from paceline.core.errors import ConfigError, PlanError
from paceline.core.plan import Attainment, ChainAttainment, Plan
from paceline.core.profile import Profiles
from paceline.planner.fits import usable
from paceline.planner.problem import Options, PlannedChain
from paceline.planner.solve import HEURISTICS
from paceline.sim.evidence import Evidence
from paceline.sim.headroom import NONE, Headroom, Verification, plan_with
from paceline.sim.results import SimResult
from paceline.sim.screen import Refuted, Screen, spent
from paceline.sim.tally import Tally
from paceline.sim.verify import simulate

RATE_STEP = 1.025
"""Rates are raised by whole steps of this factor."""
RATE_STEPS = 280
"""A chain that misses its target at 1,007 times its rate misses it for another reason: of some a
hundredth of a machine keeps up with the rate, and a request whose items come together takes some
whole ones."""
LOW_RPS = 1.0
"""Below, the steps go on to what they come to from here (`most_steps`): of a rate so low the
smallest part of a machine keeps up, but others own the machine for longer than an objective."""
SLO_FACTORS = ((0.8,), (0.9, 1.0), (0.7, 0.6, 0.5))
"""First what is the cheapest most often; from there each way, as long as it gets cheaper."""
FACTORS = tuple(factor for way in SLO_FACTORS for factor in way)
WORTHWHILE = 0.99
"""Another factor of the objective is looked at where it can cost no more than this share."""
CONFIRMATIONS = 12
"""How often a plan that the search found is given more steps when fresh requests refute it."""
PATIENCE = 7
"""From so many refutations on each doubles the steps that are given next: in whole machines, many
steps may change nothing."""
LEAST_SCREENED = 10.0
"""So many objectives long is a run that screening lets pass."""
SCREENED = 2
"""The search looks at one in so many of the requests that the result is confirmed with."""
GUESSES = 4
"""How many rates are tried for about the highest that is still cheaper with another objective."""

SHARES = {"optimal": 0.4, "harpagon": 0.4} | dict.fromkeys(
    ("nexus", "scrooge", "inferline", "clipper"), 0.05
)
"""By policy, its share of the stated probability of error. The plans of others than the optimum,
though dearer as planned, may need less headroom: it uses up objectives and machines to the last.
Most is left for the two that nearly always give the cheapest."""

Progress = Callable[[str, str], None]
"""Told the subject, and what of it is being tried."""


def verified(
    chains: Sequence[Chain],
    demands: Sequence[PlannedChain],
    options: Options,
    profiles: Profiles,
    how: Verification,
    base: Plan,
    *,
    progress: Progress = lambda subject, detail: None,
    alternatives: Sequence[str] = tuple(HEURISTICS),
) -> tuple[Plan, dict[str, Headroom]]:
    """The cheapest plan found whose chains attain their targets, and its headroom by chain.

    `base` is the plan without any. Where machines are not shared each chain is verified by itself,
    and the optimum's plan beside those of `alternatives`: the cheapest verified one counts (its
    policy is in its headroom). Raises PlanError when no headroom is enough, ConfigError when too
    few requests could show it.
    """
    if not any(how.arrivals.judged(chain) for chain in chains):
        return base, {}
    demands = usable(demands, options)
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
    policies: tuple[str, ...] = ("",)
    if options.policy == "optimal" and options.billing == "fractional":
        policies += tuple(alternatives)
    for own_chains, own_demands, own_base in units:
        if not any(how.arrivals.judged(chain) for chain in own_chains):
            plans.append(own_base)
            continue
        plan, headroom, shown = _cheapest(
            [
                _Search(own_chains, own_demands, options, profiles, how, own_base, progress, policy)
                for policy in policies
            ]
        )
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


Found = tuple[Plan, dict[str, Headroom], list[ChainAttainment]]
"""A verified plan, the headroom that it has, and what it attained."""


def _cheapest(searches: Sequence[_Search]) -> Found:
    """The cheapest plan that they find, of equal ones the first. Raises what the first one raised
    if none finds any.
    """
    best: Found | None = None
    refusal: PlanError | ConfigError | None = None
    limit, below = inf, searches[0].steps + 1
    for search in searches:
        if best is not None and search.plans_as(searches[0], best[0]):
            continue
        try:
            found = search.run(limit, below)
        except (PlanError, ConfigError) as error:
            refusal = refusal or error
            continue
        if found is not None:
            best, limit = found, found[0].cost_per_hour
            # Every policy's plan costs at least the optimum's for the same headroom.
            below = searches[0].steps_below(limit)
    if best is None:
        assert refusal is not None, "a search without a limit finds a plan or raises"
        raise refusal
    return best


class _Search:
    """Chains that are planned together, by `policy` if not by the options' own, and what is known
    of their plans.
    """

    def __init__(
        self,
        chains: Sequence[Chain],
        demands: Sequence[PlannedChain],
        options: Options,
        profiles: Profiles,
        how: Verification,
        base: Plan,
        progress: Progress,
        policy: str = "",
    ) -> None:
        self._policy = policy
        self._chains = chains
        self._demands = demands
        self._options = replace(options, bound=False)
        self._profiles = profiles
        # The error is divided among all policies that the cheapest plan may come from, also where
        # one is asked for alone: whether a plan passes must not depend on who asks.
        share = SHARES[policy or options.policy] if options.billing == "fractional" else 1.0
        self._arrivals = how.arrivals
        self._evidence = Evidence(chains, demands, how, 1.0 - (1.0 - how.confidence) * share)
        self._judged = self._evidence.judged
        self._progress = progress
        self._needing: set[str] = set()
        """Chains that missed their target without headroom; the others are planned as declared."""
        self._base = base
        self._plans: dict[tuple[int, float], Plan | None] = {}
        self._enough: dict[tuple[int, float], bool] = {}
        self._least_rps = min(demand.rate_rps for demand in demands)
        self.steps = most_steps(self._least_rps)
        """The most that are tried."""
        self.found: tuple[int, float] | None = None
        """The headroom that was confirmed."""

    def plans_as(self, other: _Search, best: Plan) -> bool:
        """Whether, of a low rate, this policy rents what the other one's verified plan does: it has
        to be as sure of it, or surer, and hardly finds anything cheaper. Where no batch fills, all
        policies plan the same.
        """
        if self is other or self._least_rps >= LOW_RPS or other.found is None:
            return False
        given = Headroom(RATE_STEP ** other.found[0], other.found[1], self._policy)
        headroom = {demand.name: given for demand in self._demands}
        try:
            return _machines(plan_with(self._demands, self._options, headroom)) == _machines(best)
        except PlanError:
            return False

    def steps_below(self, limit: float) -> int:
        """With so many steps, or more, the optimum's plan costs `limit` or more: it never gets
        cheaper for a higher rate, as it may be served as a part of one (dummy requests).
        """
        cost = self._cost_for_all
        return bisect_left(range(self.steps + 1), limit, key=lambda step: cost((step, 1.0)))

    def run(self, limit: float, below: int) -> Found | None:
        """The cheapest verified plan; None if it would cost `limit` or more, as every plan with
        `below` steps or more does.

        What it costs as planned, or where the search has come to, does not tell: a greedy policy
        may find a cheaper plan for more headroom.
        """
        if not self._can_cost_less(limit, range(below), FACTORS):
            return None
        found = self._cheapest()
        tried = self.steps
        for attempt in range(CONFIRMATIONS):
            if found is None:
                break
            if not self._can_cost_less(limit, range(found[0], below), found[1:]):
                return None
            steps = 1
            plan = self._plan(found)
            if plan is not None:
                self._tell("confirming", found)
                sure = spent(self._evidence.sure, attempt)
                instants, seed = self._evidence.instants(f"confirm {attempt}", sure)
                most = self._evidence.allowed(instants, sure)
                # More misses than that refute it; of several chains all that miss are wanted.
                refuted = Refuted(most)
                result = self._simulated(plan, instants, seed, refuted)
                shown = [self._attained(chain, result, found, sure) for chain in self._judged]
                short = refuted.chains | {c.chain for c in shown if c.at_least < c.target}
                if not short:
                    cheaper = plan.cost_per_hour < limit
                    self.found = found
                    return (plan, self._headroom(found), shown) if cheaper else None
                if not short <= self._needing:
                    self._need(short)
                    found = self._cheapest()
                    continue
                steps = _further(max(result.chain(n).requests / len(instants[n]) for n in short))
                steps <<= max(0, attempt + 1 - PATIENCE)
            tried, found = found[0], (found[0] + steps, found[1])
            if found[0] > self.steps:
                break
        raise self._unreachable(tried)

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
        for way in SLO_FACTORS:
            for factor in way:
                found = self._least(factor, best)
                if found is None and best is not None:
                    break
                best = found or best
        return best

    def _least(self, factor: float, best: tuple[int, float] | None) -> tuple[int, float] | None:
        """The fewest steps that pass with this factor and cost less than `best`."""
        low: int
        high: int | None
        if best is None:
            low, high = self._first(factor)
        else:
            most = self._within(self._cost(best) * WORTHWHILE, factor, best[0])
            if most is None or not self._passes((most, factor)):
                return None
            low, high = self._below(most, factor)
        if high is None:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._passes((middle, factor)) else (middle, high)
        return high, factor

    def _within(self, limit: float, factor: float, step: int) -> int | None:
        """About the most steps, `step` at most, that cost no more than `limit` with this factor;
        cost is nearly in proportion to the rate, so that a few tries find them.
        """
        for _ in range(GUESSES):
            if step < 0:
                break
            cost = self._cost((step, factor))
            if cost <= limit:
                return step
            step -= ceil(log(cost / limit) / log(RATE_STEP)) if cost < inf else 2
        return None

    def _first(self, factor: float) -> tuple[int, int | None]:
        """Steps that do not pass (-1: none was tried) and more steps that do (None: none do)."""
        low, step = -1, 0
        while not self._passes((step, factor)):
            if step >= self.steps:
                return low, None
            low, step = step, min(self.steps, max(2, 2 * step))
        return low, step

    def _below(self, high: int, factor: float) -> tuple[int, int]:
        """Steps that do not pass, from `high` that do downwards, and more that do."""
        by = 1
        while high > 0 and self._passes((max(0, high - by), factor)):
            high, by = max(0, high - by), 2 * by
        return max(-1, high - by), high

    def _passes(self, at: tuple[int, float]) -> bool:
        """Whether screening lets it pass."""
        if at in self._enough:
            return self._enough[at]
        plan = self._plan(at)
        if plan is None:
            self._enough[at] = False
            return False
        self._tell("with", at)
        part = 1 if self._arrivals.trace else SCREENED
        instants, seed = self._evidence.instants("search", self._evidence.sure, part)
        most = self._evidence.allowed(instants, self._evidence.sure)
        # Without headroom all chains that need it are wanted; later one is enough to go on.
        targets = {chain.name: chain.attainment for chain in self._judged}
        least = {
            demand.name: ceil(LEAST_SCREENED * demand.slo_s * demand.rate_rps)
            for demand in self._demands
        }
        screen = Screen(targets, most, all_=not self._needing, least=least)
        result = self._simulated(plan, instants, seed, screen)
        missed = screen.missed(result)
        if not missed <= self._needing:
            self._need(missed)
        self._enough[at] = not missed
        self._evidence.saw(result)
        return not missed

    def _tell(self, what: str, at: tuple[int, float]) -> None:
        names = ", ".join(chain.name for chain in self._judged[:4])
        more = f" and {len(self._judged) - 4} more" if len(self._judged) > 4 else ""
        kinds = " and ".join(sorted({self._arrivals.of(chain) for chain in self._judged}))
        self._progress(
            f"simulating {names}{more} under {kinds} arrivals",
            f"{what} {RATE_STEP ** at[0]:.2f}x the rate in {at[1]:.1f}x the objective"
            + (f", planned by {self._policy}" if self._policy else ""),
        )

    def _need(self, chains: set[str]) -> None:
        """More chains get headroom: what is known holds without any only."""
        self._needing |= chains
        self._plans.clear()
        self._enough = {(0, 1.0): False}

    def _simulated(
        self,
        plan: Plan,
        instants: Mapping[str, Sequence[float]],
        seed: int,
        decided: Callable[[Tally], bool],
    ) -> SimResult:
        return simulate(
            self._chains, plan, self._profiles, arrivals=instants, seed=seed, decided=decided
        )

    def _attained(
        self, chain: Chain, result: SimResult, at: tuple[int, float], confidence: float
    ) -> ChainAttainment:
        own = result.chain(chain.name)
        headroom = self._headroom(at).get(chain.name, NONE)
        return ChainAttainment(
            chain.name,
            self._arrivals.of(chain),
            chain.attainment,
            own.attainment,
            self._evidence.at_least(chain, own, confidence),
            own.requests,
            headroom.rate_factor,
            headroom.slo_factor,
            self._policy,
        )

    def _headroom(self, at: tuple[int, float]) -> dict[str, Headroom]:
        """By chain; none without any."""
        if at == (0, 1.0):
            return {c.name: Headroom(policy=self._policy) for c in self._chains if self._policy}
        given = Headroom(RATE_STEP ** at[0], at[1], self._policy)
        return dict.fromkeys(sorted(self._needing), given)

    def _plan(self, at: tuple[int, float]) -> Plan | None:
        """None where the objective is too short for any plan."""
        if at == (0, 1.0) and not self._policy:
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
        return inf if plan is None else plan.cost_per_hour

    def _can_cost_less(self, limit: float, steps: range, factors: Sequence[float]) -> bool:
        """Whether any plan with such headroom costs less than `limit`."""
        return limit == inf or any(self._cost_for_all(at) < limit for at in product(steps, factors))

    def _cost_for_all(self, at: tuple[int, float]) -> float:
        """With headroom for every chain, whether it needs any or not."""
        given = Headroom(RATE_STEP ** at[0], at[1], self._policy)
        try:
            names = (demand.name for demand in self._demands)
            return plan_with(
                self._demands, self._options, dict.fromkeys(names, given)
            ).cost_per_hour
        except PlanError:
            return inf

    def _unreachable(self, steps: int) -> PlanError:
        chain = min(self._judged, key=lambda c: (c.name not in self._needing, c.name))
        cause = ": too many requests or items come at once" if steps >= self.steps else ""
        return PlanError(
            f"chain {chain.name!r} does not attain {chain.attainment:.6g} under "
            f"{self._arrivals.of(chain)} arrivals, not even planned for "
            f"{RATE_STEP**steps:.3g} times its rate{cause}; relax slo_ms or attainment",
            chain=chain.name,
        )


def _machines(plan: Plan) -> list[tuple[str, str, int, str]]:
    """What a plan rents, in order, to six digits."""
    return [
        (module.module, part.hardware, part.batch_size, f"{part.machines:.6g}")
        for chain in plan.chains
        for module in chain.modules
        for part in module.allocations
    ]


def most_steps(rate_rps: float) -> int:
    """The most steps that a rate is raised by: to 1,007 times itself, or 1,007 requests/s.

    >>> most_steps(3.0), most_steps(0.5), most_steps(1e-5)
    (280, 309, 747)
    """
    return RATE_STEPS + max(0, ceil(log(LOW_RPS / rate_rps) / log(RATE_STEP)))


def _further(share: float) -> int:
    """Steps to go on by when this share of a confirmation's requests was enough to refute it.

    >>> [_further(share) for share in (0.05, 0.2, 0.4, 0.9)]
    [4, 3, 2, 1]
    """
    return next((steps for steps, least in ((1, 0.5), (2, 0.25), (3, 0.125)) if share >= least), 4)
