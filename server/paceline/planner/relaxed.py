"""The linear relaxation as a flow through the DAG, solved anew where little has changed.

Invariant: once settled, no cycle of arcs gains, whichever way more is sent around it.

What a second of latency costs a module is a flow through it (the dual of the linear program in
which options are blended): what comes in from those it waits for goes out to those that wait for
it, and all of it comes back through the objective. A flow f through a module whose blended options
cost y(x) for latency x is worth the least of y(x) + f * x, the objective takes f * slo. More around
a cycle gains the latencies of the modules that get more and loses those of the modules that get
less, each at the options that are then best, until one of them changes its options. Where nothing
gains, prices and latencies prove each other (Fulkerson 1961, Kelley 1961: how to shorten a project
for the least).

Where one module's options changed, only cycles through that module can gain, so that a few steps
lead from one node of a search to the next.

>>> import numpy as np
>>> graph = Graph.of([(), (0,)])
>>> options = [([1.0, 3.0], [8.0, 2.0]), ([1.0, 2.0], [6.0, 1.0])]
>>> flow = Flow.of(graph, [(np.array(s), np.array(costs)) for s, costs in options], 4.5)
>>> flow is not None and flow.prices()
Prices(per_s=(3.0, 3.0), total_per_s=3.0, latencies_s=(2.5, 2.0))
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from math import inf

from paceline.planner.hull import Hull, Offers, Prices, lower_hull, narrowed
from paceline.planner.paths import Graph

_SAME = 1e-11
"""Relative: rounding of flows, and of latencies beside the objective."""


def latency_prices(graph: Graph, offers: Sequence[Offers], slo_s: float) -> Prices | None:
    """What a second of latency costs where options may be blended; None if nothing fits."""
    flow = Flow.of(graph, offers, slo_s)
    return None if flow is None else flow.prices()


@dataclass(frozen=True, slots=True)
class _Net:
    """Arcs by number: through the modules first, then from one to the next, the last back from the
    end to the start through the objective. `leaving` a point: to which, by which arc, whether that
    gets more or less.
    """

    modules: int
    leaving: tuple[tuple[tuple[int, int, bool], ...], ...]
    ends: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, graph: Graph) -> _Net:
        count = len(graph.parents)
        start, end = 2 * count, 2 * count + 1
        ends = [(2 * i, 2 * i + 1) for i in range(count)]
        ends += [(start, 2 * i) for i, above in enumerate(graph.parents) if not above]
        for i, below in enumerate(graph.children):
            ends += [(2 * i + 1, 2 * to) for to in below] or [(2 * i + 1, end)]
        ends.append((end, start))
        leaving: list[list[tuple[int, int, bool]]] = [[] for _ in range(2 * count + 2)]
        for arc, (a, b) in enumerate(ends):
            leaving[a].append((b, arc, True))
            leaving[b].append((a, arc, False))
        return cls(count, tuple(tuple(each) for each in leaving), tuple(ends))


@dataclass(frozen=True, slots=True)
class _Blend:
    """One module's hull. `latencies_s[j]` is best at prices of latency between `breaks[j - 1]` and
    `breaks[j]`, which rise.
    """

    hull: Hull
    latencies_s: tuple[float, ...]
    breaks: tuple[float, ...]

    @classmethod
    def of(cls, hull: Hull) -> _Blend:
        latencies_s, costs = hull
        breaks = [
            (costs[at - 1] - costs[at]) / (latencies_s[at] - latencies_s[at - 1])
            for at in range(len(costs) - 1, 0, -1)
        ]
        return cls(hull, tuple(reversed(latencies_s)), tuple(breaks))


@dataclass(slots=True)
class Flow:
    """See the module docstring. Of every arc what it carries, the latency that a cycle gains by
    more of it and loses by less of it, and up to how much more or less; of every point when it is
    reached.

    `at_s` proves that no cycle gains: it rises along an arc by at least what more of it gains, and
    by at most what less of it loses.
    """

    net: _Net
    slo_s: float
    blends: list[_Blend]
    carried: list[float]
    more_s: list[float]
    less_s: list[float]
    more: list[float]
    less: list[float]
    at_s: list[float]

    @classmethod
    def of(cls, graph: Graph, offers: Sequence[Offers], slo_s: float) -> Flow | None:
        """The best flow for these options; None where even the fastest exceed `slo_s`."""
        net = _Net.of(graph)
        zero, most = [0.0] * len(net.ends), [inf] * len(net.ends)
        blends = [_Blend.of(lower_hull(*offer)) for offer in offers]
        at_s = [0.0] * len(net.leaving)
        found = cls(net, slo_s, blends, zero, zero[:], zero[:], most, zero[:], at_s)
        for module, above in enumerate(graph.parents):
            found._refresh(module)
            at_s[2 * module] = max((at_s[2 * before + 1] for before in above), default=0.0)
            at_s[2 * module + 1] = at_s[2 * module] + found.more_s[module]
        at_s[-1] = max(at_s)
        found.more_s[-1] = found.less_s[-1] = -slo_s
        return found if found._settle(len(net.ends) - 1) else None

    def after(self, offers: Sequence[Offers | None], module: int) -> Flow | None:
        """The best flow where of `module`'s options a range of latencies is left, of others all
        that are best at this flow's prices (None: as it was). None where nothing fits any more.
        """
        found = replace(
            self,
            blends=[
                blend if offer is None else _Blend.of(narrowed(blend.hull, *offer))
                for blend, offer in zip(self.blends, offers, strict=True)
            ],
            carried=self.carried[:],
            more_s=self.more_s[:],
            less_s=self.less_s[:],
            more=self.more[:],
            less=self.less[:],
            at_s=self.at_s[:],
        )
        for at, offer in enumerate(offers):
            if offer is not None:
                found._refresh(at)
        return found if found._settle(module) else None

    def prices(self) -> Prices:
        """The prices that the flow stands for, and latencies that are best at these."""
        latencies_s = [
            min(self.at_s[2 * i + 1] - self.at_s[2 * i], self.less_s[i])
            for i in range(self.net.modules)
        ]
        return Prices(tuple(self.carried[: self.net.modules]), self.carried[-1], tuple(latencies_s))

    def _refresh(self, module: int) -> None:
        blend, carried = self.blends[module], self.carried[module]
        first = bisect_left(blend.breaks, carried * (1 - _SAME))
        last = bisect_right(blend.breaks, carried * (1 + _SAME))
        self.less_s[module] = blend.latencies_s[first]
        self.more_s[module] = blend.latencies_s[last]
        self.less[module] = carried - (blend.breaks[first - 1] if first else 0.0)
        self.more[module] = blend.breaks[last] - carried if last < len(blend.breaks) else inf

    def _settle(self, arc: int) -> bool:
        """Send what gains through `arc`, one way or the other; False if there is no end of it."""
        a, b = self.net.ends[arc]
        rounding_s = _SAME * self.slo_s
        for forward, start, end in ((True, b, a), (False, a, b)):
            while forward or self.carried[arc] > _SAME * self.carried[-1]:
                own_s = self.more_s[arc] if forward else -self.less_s[arc]
                gain_s = self.at_s[end] + own_s - self.at_s[start]
                if gain_s <= rounding_s:
                    break
                short_s, via = self._short(start, end, arc, gain_s)
                self.at_s = [
                    at_s - min(by_s, short_s[end])
                    for at_s, by_s in zip(self.at_s, short_s, strict=True)
                ]
                if gain_s - short_s[end] <= rounding_s:
                    break
                cycle = [(arc, forward), *_path(via, start, end)]
                amount = min(self.more[k] if more else self.less[k] for k, more in cycle)
                if amount == inf:
                    return False
                self._send(cycle, amount)
        return True

    def _send(self, cycle: Sequence[tuple[int, bool]], amount: float) -> None:
        for k, forward in cycle:
            self.carried[k] += amount if forward else -amount
            if k < self.net.modules:
                self._refresh(k)
            else:
                self.less[k] = self.carried[k]

    def _short(
        self, start: int, end: int, without: int, most_s: float
    ) -> tuple[list[float], list[tuple[int, int, bool]]]:
        """By how much the best path from `start` to every point falls short of what `at_s` allows,
        `most_s` at most, and the last arc of each; `without` one arc (Dijkstra 1959).
        """
        carried, at_s = self.carried, self.at_s
        none = _SAME * carried[-1]
        found_s = [most_s] * len(at_s)
        via = [(-1, -1, True)] * len(at_s)
        found_s[start] = 0.0
        waiting = [(0.0, start)]
        while waiting:
            here_s, point = heappop(waiting)
            if point == end:
                break
            if here_s > found_s[point]:
                continue
            for to, arc, forward in self.net.leaving[point]:
                if arc == without:
                    continue
                if forward:
                    length_s = self.more_s[arc]
                elif carried[arc] > none:
                    length_s = -self.less_s[arc]
                else:
                    continue
                there_s = here_s + max(0.0, at_s[to] - at_s[point] - length_s)
                if there_s < found_s[to]:
                    found_s[to] = there_s
                    via[to] = (point, arc, forward)
                    heappush(waiting, (there_s, to))
        return found_s, via


def _path(via: Sequence[tuple[int, int, bool]], start: int, end: int) -> Iterator[tuple[int, bool]]:
    """The arcs by which `end` was reached, the last one first, and whether each gets more."""
    while end != start:
        end, arc, forward = via[end]
        yield arc, forward
