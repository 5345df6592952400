"""What no plan in whole machines can cost less than (`--billing machine`).

Invariant: `least_cost` is a lower bound for every plan whose machines are each paid for in full
and run one batch at a time to its end, and in which a machine that serves several modules keeps
their budgets whatever the phases of their streams.

Three things are known of such a plan.

* A machine costs its price, however that is divided among its modules in proportion to the time it
  works for them. So a module costs at least what it does with fractional machines (`Frontier`).
* Either one of a module's machines is its own, and it pays the whole price of a machine that is
  fast enough; or all are shared, and on each a request may find another module's batch just begun:
  d(b) and the shortest batch of the other modules fit into the budget (`SharedFrontier`).
* The plan uses some set of kinds of machines: at least one of each, and a whole number. So it costs
  at least the least sum of such prices not below the optimum on that set alone; the cheapest set
  counts.

With limits (`least_cost_within`): a plan of at most n machines of a kind costs no less than it
would if each cost x more, minus n * x, whatever x. The best of some x counts (Lagrange).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from math import ceil, inf

import numpy as np

from paceline.core.profile import Configuration
from paceline.planner.assemble import graph_of
from paceline.planner.frontier import SAME_S, Choice, Curve, Floats, Frontier
from paceline.planner.optimal import optimum
from paceline.planner.problem import PlannedChain
from paceline.planner.schedule import TOLERANCE

MOST_SETS = 24
"""So many sets of kinds are looked into; then the bound is what is known so far."""

MANY_MODULES = 40
"""With more, every kind is used anyway: only the set of all of them is looked into."""

DEARER = (1.3, 2.0, 4.0)
"""By how much a limited kind is made dearer, beside what other kinds cost; with many modules only
by the first two."""


@dataclass(frozen=True, slots=True)
class SharedFrontier:
    """A module's least cost in whole machines; `waits_s` by hardware: others' shortest batches.

    Never below the module's frontier for fractional machines, and never rising.
    """

    frontier: Frontier
    waits_s: Mapping[str, float]

    @property
    def least_s(self) -> float:
        """The least latency at any cost."""
        return self.frontier.least_s

    def cost(self, latencies_s: Floats) -> Floats:
        """Least cost within each latency."""
        at_s = latencies_s + SAME_S
        own = np.full(len(latencies_s), inf)
        shared = np.full(len(latencies_s), inf)
        for curve in self.frontier.curves:
            price = np.where(curve.full_s[0] <= at_s, curve.price_per_hour, inf)
            own = np.minimum(own, price)
            shared = np.minimum(shared, self._shared(curve, at_s))
        found: Floats = np.minimum(np.maximum(self.frontier.cost(latencies_s), own), shared)
        return found

    def _shared(self, curve: Curve, at_s: Floats) -> Floats:
        """With batches that leave time for another module's shortest."""
        wait_s = self.waits_s.get(curve.hardware, inf)
        if wait_s == inf:
            return np.full(len(at_s), inf)
        fits = np.searchsorted(curve.duration_s, at_s - self.frontier.overhead_s - wait_s, "right")
        filled = np.minimum(curve.filled(at_s), fits)
        full = np.where(
            filled > 0, curve.unit[np.maximum(filled - 1, 0)] * self.frontier.rate_rps, inf
        )
        after_s = curve.duration_s[np.minimum(filled, len(curve.full_s) - 1)]
        spare_s = at_s - self.frontier.overhead_s - after_s
        usable = (filled < len(curve.full_s)) & (filled > 0) & (spare_s >= max(wait_s, SAME_S))
        padded = np.full(len(at_s), inf)
        np.divide(curve.price_per_hour * after_s, spare_s, out=padded, where=usable)
        found: Floats = np.minimum(full, padded)
        return found

    def cost_at(self, latency_s: float) -> float:
        """Least cost within one latency."""
        return float(self.cost(np.array([latency_s]))[0])

    def below(self, latencies_s: Floats) -> Floats:
        """The limit of the cost from below."""
        return self.cost(latencies_s - 2 * SAME_S)

    def at(self, latency_s: float) -> Choice | None:
        """What fractional machines would run."""
        return self.frontier.at(latency_s)

    def kinks_s(self, within_s: float) -> Floats:
        """Latencies at which the cost's shape changes, rising, up to `within_s`."""
        parts = [self.frontier.kinks_s(within_s)]
        for curve in self.frontier.curves:
            wait_s = self.waits_s.get(curve.hardware, inf)
            parts.append(curve.duration_s + self.frontier.overhead_s + wait_s)
        found = np.unique(np.concatenate(parts))
        kept: Floats = found[found <= within_s + SAME_S]
        return kept


def least_cost(chains: Sequence[PlannedChain], prices: Mapping[str, float]) -> float:
    """See the module docstring; 0 if nothing is known. `prices` by hardware."""
    kinds = tuple(sorted(prices))
    if sum(len(chain.modules) for chain in chains) > MANY_MODULES:
        return least_price(_on(chains, kinds), list(prices.values()))

    def at_least(kinds: Iterable[str], cost: float) -> float:
        """The least sum of at least one of each kind that is not below `cost`."""
        own = [prices[kind] for kind in kinds]
        return sum(own) + least_price(cost - sum(own), own)

    # A set is looked into when what is known of it is the least of all; a smaller set costs no
    # less, so what is known of a set holds for those within it.
    open_sets: list[tuple[float, bool, tuple[str, ...], float]] = []
    known = _on(chains, kinds)
    if known == inf:
        return 0.0
    for chosen in _subsets(kinds):
        everything = chosen == kinds
        heappush(open_sets, (at_least(chosen, known), not everything, chosen, known))
    for _ in range(MOST_SETS):
        least, guessed, chosen, _ = open_sets[0]
        if not guessed:
            return least
        heappop(open_sets)
        cost = _on(chains, chosen)
        if cost < inf:
            heappush(open_sets, (max(least, at_least(chosen, cost)), False, chosen, cost))
    return open_sets[0][0]


def least_cost_within(
    chains: Sequence[PlannedChain], prices: Mapping[str, float], limits: Mapping[str, int]
) -> float:
    """`least_cost` of plans of at most so many machines of the kinds in `limits`."""
    many = sum(len(chain.modules) for chain in chains) > MANY_MODULES
    best = least_cost(chains, prices)
    dearer = dict(prices)
    for kind in sorted(limits.keys() & prices.keys()):
        found, own = dearer, prices[kind]
        like = [price for price in prices.values() if price > own]
        for price in sorted({own * f for f in DEARER[: 2 if many else None]} | set(like)):
            tried = dearer | {kind: price}
            given = sum((tried[k] - prices[k]) * limits[k] for k in limits if k in prices)
            bound = least_cost(_priced(chains, tried), tried) - given
            if bound > best:
                best, found = bound, tried
        dearer = found
    return least_price(best, list(prices.values()))


def _priced(chains: Sequence[PlannedChain], prices: Mapping[str, float]) -> list[PlannedChain]:
    return [
        replace(
            chain,
            modules=tuple(
                replace(
                    m,
                    configurations=tuple(
                        replace(c, price_per_hour=prices[c.hardware]) for c in m.configurations
                    ),
                )
                for m in chain.modules
            ),
        )
        for chain in chains
    ]


def _subsets(kinds: Sequence[str]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [()]
    for kind in kinds:
        found += [(*each, kind) for each in found]
    return found[1:]


def _on(chains: Sequence[PlannedChain], kinds: Sequence[str]) -> float:
    """What all chains cost at least on these kinds of machines; infinite if not feasible."""
    configurations: dict[tuple[str, str], list[Configuration]] = {}
    for chain in chains:
        for module in chain.modules:
            configurations[chain.name, module.name] = [
                c for c in module.configurations if c.hardware in kinds
            ]
    if not all(configurations.values()):
        return inf
    frontiers = {
        (chain.name, m.name): Frontier.of(
            configurations[chain.name, m.name], m.rate_rps, m.overhead_s
        )
        for chain in chains
        for m in chain.modules
    }
    wait_s = _waits(frontiers)
    total = 0.0
    for chain in chains:
        own = [
            SharedFrontier(frontiers[chain.name, m.name], wait_s((chain.name, m.name)))
            for m in chain.modules
        ]
        best = optimum(graph_of(chain), own, chain.slo_s)
        if best is None:
            return inf
        total += best.bound_per_hour
    return total


def _waits(
    frontiers: Mapping[tuple[str, str], Frontier],
) -> Callable[[tuple[str, str]], dict[str, float]]:
    """For a module, by hardware, the shortest batch of all others there."""
    shortest: dict[str, list[tuple[float, tuple[str, str]]]] = {}
    for name, frontier in frontiers.items():
        for curve in frontier.curves:
            shortest.setdefault(curve.hardware, []).append((float(curve.duration_s[0]), name))
    for each in shortest.values():
        each.sort()

    def of(name: tuple[str, str]) -> dict[str, float]:
        return {
            hardware: next((s for s, other in each[:2] if other != name), inf)
            for hardware, each in shortest.items()
        }

    return of


def least_price(cost: float, prices: Sequence[float]) -> float:
    """The least sum of whole machines' prices that is not below `cost`.

    >>> least_price(4.1, [3.06, 0.526]), least_price(0.2, [3.06, 0.526]), least_price(0.0, [1.0])
    (4.112, 0.526, 0.0)
    """
    if cost <= 0:
        return 0.0
    kinds = sorted(set(prices), reverse=True)
    if cost > 40 * kinds[-1]:
        # So many ways to add up that some sum is just above.
        return cost
    best = ceil(cost / kinds[-1] - TOLERANCE) * kinds[-1]

    def add(at: int, total: float) -> None:
        nonlocal best
        if total >= cost * (1 - TOLERANCE):
            best = min(best, total)
            return
        if at + 1 == len(kinds):
            best = min(best, total + ceil((cost - total) / kinds[at] - TOLERANCE) * kinds[at])
            return
        for count in range(ceil((cost - total) / kinds[at] - TOLERANCE) + 1):
            add(at + 1, total + count * kinds[at])

    add(0, 0.0)
    return best
