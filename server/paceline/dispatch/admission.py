"""Admission control: refuse at the door what would miss its deadline, so that overload does not
spend machines on late answers.

A request's end is predicted by walking its chain: a module starts when its parents have ended, and
not before a batch for one more row could start there. Which batch that is the module's policy knows
(`Collector.foreseen`), behind the rows ahead (admitted, not yet launched, as urgent or more); it
grows at the planned rate until it starts. Nor does it start before those have been served that come
there before the request, but have not come yet (`arrivals`). Rows that one batch brings come
together; where a request has several of its own, the last one counts. Of the chain's other modules
that share machines with it, what the queues' order (launch-by times) puts before the request
counts: further down, not the rows of requests that entered just before it; further up, those of
requests that enter just after it as well.

Modules that fewer than every second request needs (`when`) count as far as they are likely: what
others wait for there keeps nobody out who probably does not need it, if there is time to spare
elsewhere. Who comes too late for such a module is not ahead of others there.

Behind more urgent priorities it also counts what will come at them meanwhile; and a chain to which
they leave next to nothing is owed a little all the same (`foresight`).

A prediction is an expectation, and in overload requests are admitted right up to their deadlines.
So every admitted request that misses its deadline after all widens its chain's margin, at its
priority, for a while.

Invariant: `Stage.ahead` counts, by priority, exactly the rows (expected, then actual) that
admitted requests have not yet had launched there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import ceil, exp, inf

from paceline.dispatch.arrivals import first_arrivals, placed
from paceline.dispatch.collector import NOTHING_ROWS
from paceline.dispatch.foresight import FIRST, Foresight, Shares, Urgent, level
from paceline.dispatch.machines import MachinePool
from paceline.dispatch.refusals import overloaded, too_cold
from paceline.dispatch.stage import Served, Stage

ReadyIn = Callable[[str, float], float]
"""How long from an instant on until a model can be used; 0 when it can."""

Visit = tuple[float, float, float, float]
"""Of a module: how long until a request's batch there ends, how many other requests have their rows
before it in that batch, how long until it comes there, and how many other rows come with it.
"""

MISS_STEP = 0.05
"""By what share of a chain's slack (its objective less planned batches along its slowest path) a
miss widens its margin; at most to all of it."""
MARGIN_FADES_S = 3.0
"""In which time a margin fades to 1/e."""
LIKELY = 0.5
"""A request is refused that is at least as likely to end too late as not."""
MISSES_APART_S = 0.1
"""Misses closer than this count once: a stall makes many, and says nothing about predictions."""


@dataclass(slots=True)
class _Margin:
    """What is kept free of a chain's objective."""

    wide_s: float = 0.0
    at_s: float = 0.0

    def left_s(self, now_s: float) -> float:
        if self.wide_s == 0.0:
            return 0.0
        return self.wide_s * exp((self.at_s - now_s) / MARGIN_FADES_S)


class Ticket:
    """What one admitted request still has ahead of it: rows by module, in the chain's order.

    `priority` is how it is dispatched, `asked` what it came with. `doubtful` modules would end too
    late, but may not be needed.
    """

    __slots__ = ("asked", "doubtful", "priority", "rows", "stages")

    def __init__(
        self,
        priority: int,
        asked: int,
        stages: tuple[Stage, ...],
        rows: list[float],
        doubtful: Collection[int] = (),
    ) -> None:
        self.priority = priority
        self.asked = asked
        self.stages = stages
        self.rows = rows
        self.doubtful = doubtful

    @property
    def in_doubt(self) -> bool:
        """Whether it waits for a module that was foreseen to end too late."""
        return any(self.rows[place] for place in self.doubtful)


class Admission:
    """See the module docstring."""

    def __init__(self) -> None:
        self._margins: dict[tuple[str, int], _Margin] = {}
        """By chain and level."""
        self._least: dict[str, tuple[Served, int, float]] = {}
        """What `_least_s` found, by chain, for these machines (`MachinePool.layout`)."""
        self._foresight = Foresight()
        self._shares = Shares()
        self._busy: dict[Stage, None] = {}
        """Stages with rows ahead (an ordered set)."""
        self.ready_in_s: ReadyIn | None = None
        """How long until a model is in memory; None: all are, always."""

    def admit(
        self, served: Served, priority: int, budget_s: float, pool: MachinePool, now_s: float
    ) -> Ticket:
        """A ticket for a request with `budget_s` left.

        Raises Rejected (OVERLOADED, with `retry_after_s`) when it is predicted to end too late.
        """
        cold = self.cold(served, now_s) if self.ready_in_s is not None else None
        given = priority
        planned = served.route.modules[0].rate_rps > 0
        visits: Sequence[Visit] = ()
        fan_outs, doubtful = list(served.fan_outs), frozenset[int]()
        if planned or cold:
            predicted_s, visits = self._predict(served, priority, pool, now_s, budget_s)
            margin_s = 0.0
            if self._margins:
                margin_s = self._margin_s(served, priority, predicted_s, pool, now_s)
            excess_s = predicted_s + margin_s - budget_s
            if excess_s > 0:
                if cold:
                    raise too_cold(served.name, cold, excess_s)
                if not self._is_owed(served, priority, budget_s, pool, now_s):
                    raise overloaded(served.name, excess_s)
                given = FIRST
            elif served.sometimes:
                by_s = budget_s - margin_s
                doubtful = frozenset(p for p in served.sometimes if visits[p][0] > by_s)
                for place in doubtful:
                    fan_outs[place] = 0.0
        self._shares.admitted(served, priority)
        self._foresight.admitted(served, given, now_s)
        for stage, rows in zip(served.stages, fan_outs, strict=True):
            self._count(stage, given, rows)
        if planned and not cold and given == priority:
            at_level = level(priority)
            for place, (_, _, there_s, company) in enumerate(visits):
                if there_s <= 0.0 or place in doubtful:
                    continue
                arrivals = served.stages[place].arrivals.get(at_level)
                if arrivals is None:
                    arrivals = first_arrivals(served, place, at_level, pool)
                if arrivals is not None:
                    arrivals.add(served.fan_outs[place], company, now_s + there_s)
        return Ticket(given, priority, served.stages, fan_outs, doubtful)

    def cold(self, served: Served, now_s: float) -> dict[str, float]:
        """Models of the chain that are not in memory, and how long until they are."""
        if self.ready_in_s is None:
            return {}
        ready_in_s = ((s.route.model, self.ready_in_s(s.route.model, now_s)) for s in served.stages)
        return {model: wait_s for model, wait_s in ready_in_s if wait_s > 0}

    def predicted_s(
        self,
        served: Served,
        priority: int,
        pool: MachinePool,
        now_s: float,
        budget_s: float = inf,
    ) -> float:
        """Time from now to the answer of a request that would enter now with `budget_s` left."""
        return self._predict(served, priority, pool, now_s, budget_s)[0]

    def _predict(
        self, served: Served, priority: int, pool: MachinePool, now_s: float, budget_s: float
    ) -> tuple[float, list[Visit]]:
        """The same, and each module's part in it."""
        visits: list[Visit] = []
        # Ends where nobody waits at modules that run for some requests only.
        least: list[float] = []
        answer_s = 0.0
        # Where machines are too few for the planned rate, no more than they can take gets in.
        share = min(1.0, pool.slots / served.load) if served.load > 0 else 1.0
        urgent = self._foresight.urgent(priority, now_s)
        at_level = level(priority)
        # Where as many rows as expected take too long by themselves, only those get through that
        # have fewer.
        all_count = not served.many or self._least_s(served, pool) <= budget_s
        for place, stage in enumerate(served.stages):
            route = stage.route
            own = served.fan_outs[place] if all_count else min(1.0, served.fan_outs[place])
            there_s = company = wait_s = 0.0
            for parent in served.parents[place]:
                if visits[parent][0] > there_s:
                    there_s = visits[parent][0]
                    company = visits[parent][1] * own
            if there_s > 0.0 and (arrivals := stage.arrivals.get(at_level)) is not None:
                if arrivals.layout != pool.layout:
                    placed(arrivals, served, place, pool)
                wait_s = arrivals.wait_s(company, now_s + there_s)
            comes = (there_s, wait_s, company, own)
            end_s, before, took_s = self._end(
                stage, comes, priority, budget_s, share, urgent, pool, now_s
            )
            beside = served.beside[place]
            if beside and end_s - took_s <= there_s and len(beside) < pool.slots_of(route.home):
                # Nobody waits, and there is a slot for each of them.
                beside = ()
            for other in beside:
                # Its own rows there go first where they share machines.
                first = served.stages[other].route
                part = pool.part_of(route.home, first.home)
                end_s += served.fan_outs[other] * first.row_s * part
            visits.append((end_s, before, there_s, company))
            if served.sometimes:
                least_s = max((least[parent] for parent in served.parents[place]), default=0.0)
                least.append(least_s + took_s if place in served.sometimes else end_s)
            if end_s > answer_s:
                answer_s = end_s
        if served.sometimes:
            answer_s = max(_expected_s(served, visits), *least)
        return answer_s, visits

    def missed(self, served: Served, now_s: float, priority: int = 0) -> None:
        """A request that was admitted did not end in time, which was not foreseen."""
        chain = served.route.bound.chain
        if served.route.modules[0].rate_rps <= 0:
            return
        margin = self._margins.setdefault((chain.name, level(priority)), _Margin())
        if margin.wide_s and now_s < margin.at_s + MISSES_APART_S:
            return
        slack_s = max(0.0, chain.slo_s - max(stage.route.tail_s for stage in served.stages))
        wider_s = margin.left_s(now_s) + MISS_STEP * slack_s
        margin.wide_s, margin.at_s = min(slack_s, wider_s), now_s

    def counted(self, ticket: Ticket, place: int, rows: int) -> None:
        """A module's real number of rows is known (0: it does not run)."""
        if ticket.rows[place] != rows:
            self._change(ticket, place, rows - ticket.rows[place])

    def counted_again(self, ticket: Ticket, place: int, rows: int) -> None:
        """Rows that were launched have to be launched once more."""
        self._change(ticket, place, rows)

    def launched(self, ticket: Ticket, place: int, rows: int) -> None:
        """Some of its rows went to a machine."""
        had = ticket.rows[place]
        left = ticket.rows[place] = had - rows if had > rows else 0.0
        self._count(ticket.stages[place], ticket.priority, left - had)

    def ended(self, ticket: Ticket) -> None:
        """Whatever was left is not ahead of anybody any more."""
        priority = ticket.priority
        for stage, rows in zip(ticket.stages, ticket.rows, strict=True):
            ahead = stage.ahead
            left = ahead.get(priority)
            if left is None:
                continue
            left -= rows
            if left > NOTHING_ROWS:
                ahead[priority] = left
                continue
            # Sums of floats end near 0, not at it: start over, so that errors do not add up.
            del ahead[priority]
            if not ahead:
                del self._busy[stage]

    def _is_owed(
        self, served: Served, priority: int, budget_s: float, pool: MachinePool, now_s: float
    ) -> bool:
        """Whether a request that would be refused is to be served before all others instead."""
        if not self._foresight.behind(priority, now_s):
            return False
        if not self._shares.owes(served, priority, pool, now_s):
            return False
        return self.predicted_s(served, FIRST, pool, now_s, budget_s) <= budget_s

    def _margin_s(
        self, served: Served, priority: int, predicted_s: float, pool: MachinePool, now_s: float
    ) -> float:
        """No more than what the request is expected to wait: where nothing waits, none is refused
        for it."""
        margin = self._margins.get((served.name, level(priority)))
        if margin is None:
            return 0.0
        return min(margin.left_s(now_s), max(0.0, predicted_s - self._least_s(served, pool)))

    def _least_s(self, served: Served, pool: MachinePool) -> float:
        """How long a request takes that waits for no other, with as many rows as expected."""
        if not served.many:
            return served.route.longest.floor_s
        known = self._least.get(served.name)
        if known is None or known[0] is not served or known[1] != pool.layout:
            known = served, pool.layout, _longest_s(served, pool)
            self._least[served.name] = known
        return known[2]

    def _end(
        self,
        stage: Stage,
        comes: tuple[float, float, float, float],
        priority: int,
        budget_s: float,
        share: float,
        urgent: Urgent,
        pool: MachinePool,
        now_s: float,
    ) -> tuple[float, float, float]:
        """When a request's batch at a module would end, from now, how many requests have their
        rows before its own in it, and how long it takes.

        `comes`: after how long it is there, how long it waits then at the least for those who come
        before it (`arrivals`), how many rows come with its own, and how many are its own. `share`
        of the planned rate is admitted. Where nobody can tell, the batch starts at once.
        """
        there_s, wait_s, company, own = comes
        route = stage.route
        start_s, joined, size, known, rate_rps = 0.0, 1, route.full_rows, route.best, route.rate_rps
        # Its last row counts.
        more = own - 1.0 if own > 1.0 else 0.0
        at_once = company + more + 1.0
        if self.ready_in_s is not None and (cold_s := self.ready_in_s(route.model, now_s)) > 0:
            start_s = cold_s
        elif route.row_s > 0:
            rows = stage.waiting_before(priority) if urgent else stage.ahead_of(priority)
            foreseen = stage.collector.foreseen(
                rows + more, priority, budget_s - route.tail_s, pool, now_s
            )
            if foreseen is not None:
                start_s, joined, size, known, rate_rps, at_once = foreseen
                urgent_s = 0.0
                if len(self._busy) > 1:
                    same_s, urgent_s = self._others_s(stage, priority, there_s, share, urgent, pool)
                    start_s += same_s
                if urgent:
                    start_s = self._foresight.start_s(urgent, start_s, urgent_s, route.home, pool)
        if there_s > 0.0:
            if known is not None and company + more >= at_once:
                # Rows of one batch come together, and do not fit into those that can start then.
                late_s = int((company + more) / at_once) * known.at(size)
                if late_s > wait_s:
                    wait_s = late_s
            there_s += wait_s
        if there_s > start_s:
            start_s = there_s
        taken = joined + int(rate_rps * start_s) if start_s > 0 else joined
        if taken > size:
            taken = size
        took_s = known.at(taken) if known is not None else 0.0
        before = (joined - 1 - more) / (own if own > 1.0 else 1.0) if joined > 1 + more else 0.0
        return start_s + took_s, before, took_s

    def _others_s(
        self,
        stage: Stage,
        priority: int,
        there_s: float,
        share: float,
        urgent: Urgent,
        pool: MachinePool,
    ) -> tuple[float, float]:
        """Work of other modules that goes before on each of the module's slots; and, where more
        urgent work is foreseen, that which is already here."""
        route = stage.route
        work_s = urgent_s = 0.0
        parts = stage.parts
        if stage.layout != pool.layout:
            stage.layout = pool.layout
            parts.clear()
        for other in self._busy:
            part = parts.get(other)
            if part is None:
                part = parts[other] = pool.part_of(route.home, other.route.home)
            if other is stage or part == 0.0:
                continue
            row_s = other.route.row_s * part
            ahead = other.ahead
            alone = len(ahead) == 1 and priority in ahead
            rows = ahead[priority] if alone else other.ahead_of(priority)
            if urgent and rows > (own := other.ahead.get(priority, 0.0)):
                urgent_s += min(rows - own, other.collector.rows) * row_s
                rows = own
            if other.route.chain == route.chain:
                # Launched by `deadline - tail`: entered that much before it, they go before it.
                lag_s = route.tail_s - other.route.tail_s
                rate_rps = share * other.route.rate_rps
                if lag_s > 0:
                    rows -= min(other.ahead.get(priority, 0.0), rate_rps * lag_s)
                else:
                    rows += rate_rps * min(-lag_s, there_s)
            work_s += rows * row_s
        return work_s, urgent_s

    def _change(self, ticket: Ticket, place: int, rows: float) -> None:
        had = ticket.rows[place]
        left = ticket.rows[place] = max(0.0, had + rows)
        self._count(ticket.stages[place], ticket.priority, left - had)

    def _count(self, stage: Stage, priority: int, rows: float) -> None:
        ahead = stage.ahead
        if not ahead:
            self._busy[stage] = None
        ahead[priority] = ahead.get(priority, 0.0) + rows


def _expected_s(served: Served, visits: Sequence[Visit]) -> float:
    """When a request is expected to end of which some modules may not run; those that are as likely
    to run as not count as if they ran.
    """
    expected_s, chance, late = 0.0, 0.0, list[int]()
    for place in sorted(range(len(visits)), key=lambda place: -visits[place][0]):
        end_s = visits[place][0]
        if not served.above[place].intersection(late):
            # Where a module runs those above it have run.
            known = sum(served.fan_outs[other] for other in late if place in served.above[other])
            more = max(0.0, served.fan_outs[place] - known)
            if chance + more >= LIKELY:
                return expected_s + (1.0 - chance) * end_s
            expected_s += more * end_s
            chance += more
        late.append(place)
    return expected_s


def _longest_s(served: Served, pool: MachinePool) -> float:
    """The slowest path, in batches of the request's own rows."""
    ends_s: list[float] = []
    for stage, parents, rows in zip(served.stages, served.parents, served.fan_outs, strict=True):
        route = stage.route
        size = route.full_rows
        slots = max(1, pool.slots_of(route.home))
        batches = ceil(max(1.0, rows) / size)
        took_s = route.best_s(min(size, ceil(max(1.0, rows))))
        took_s += (ceil(batches / slots) - 1) * route.best_s(size)
        ends_s.append(max((ends_s[parent] for parent in parents), default=0.0) + took_s)
    return max(ends_s)
