"""Rows that wait, over all modules: which batch goes next, what is late, when to look again.

Of the batches that collectors would launch the most urgent goes: closed batches first, by priority
and launch-by time (earliest deadline first). What runs is not interrupted, so a closed batch is
held back for more urgent rows that wait for theirs to fill where it would take the last machine
that is free by their launch-by time. So that low priority is not starved for ever, one launch in
`AGED_EVERY` goes to a request that has waited `AGED_AFTER_S`, if there is one behind more urgent
ones.

A collector is asked again only where its rows or machines changed since, or the instant has come at
which time alone may change its answer: with many modules most events concern one or two of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, nextafter

from paceline.dispatch.collector import TIE_S, Offer
from paceline.dispatch.machines import MachinePool
from paceline.dispatch.queue import Entry
from paceline.dispatch.stage import Stage

AGED_AFTER_S = 5.0
AGED_EVERY = 16
"""Low priority gets at most one launch in so many while more urgent requests wait."""

Choice = tuple[Stage, Offer]


class Waiting:
    """See the module docstring."""

    def __init__(self, pool: MachinePool) -> None:
        self._pool = pool
        self._active: dict[Stage, None] = {}
        """Stages that may have rows waiting (an ordered set)."""
        self._launches = 0
        self._priority: int | None = None
        """Of the first rows that ever came,"""
        self._several = False
        """and whether others had another one."""
        self._held: list[Stage] = []
        """Stages whose batch is held back."""

    def __bool__(self) -> bool:
        return bool(self._active)

    def add(self, entry: Entry, now_s: float) -> None:
        """Rows have to be executed."""
        stage, run = entry.stage, entry.run
        if entry.priority != self._priority:
            self._several = self._priority is not None
            if not self._several:
                self._priority = entry.priority
        stage.look_s = -inf
        self._active[stage] = None
        run.entries += stage.collector.add(entry, self._pool, now_s)

    def discard(self, entry: Entry) -> None:
        """A request has ended: forget what waits of it."""
        stage = entry.stage
        stage.look_s = -inf
        stage.collector.discard(entry)

    def stages(self) -> list[Stage]:
        """Stages with rows."""
        waiting = [stage for stage in self._active if stage.collector.rows]
        if len(waiting) < len(self._active):
            self._active = dict.fromkeys(waiting)
        return waiting

    def changed(self, now_s: float) -> bool:
        """Whether any collector has to be asked again."""
        versions = self._pool.versions
        for stage in self._active:
            if now_s >= stage.look_s or stage.version != versions.get(stage.route.model, 0):
                return True
        return False

    def late(self, now_s: float) -> Iterator[Entry]:
        """Takes out what cannot be in time any more."""
        versions = self._pool.versions
        for stage in self._active:
            if now_s >= stage.look_s or stage.version != versions.get(stage.route.model, 0):
                yield from stage.collector.late(self._pool, now_s)

    def look_s(self) -> float:
        """When time alone changes something: a batch may go, or is late. After `choose` found
        nothing more.
        """
        return min((stage.look_s for stage in self.stages()), default=inf)

    def choose(self, now_s: float) -> Choice | None:
        """The next batch to launch."""
        for stage in self._held:
            stage.look_s = -inf
        self._held.clear()
        while (best := self._best(now_s)) is not None and self._several:
            stage, offer = best
            held_s = self._held_until_s(stage, offer, now_s)
            if held_s <= now_s:
                break
            self._held.append(stage)
            stage.offer = None
            stage.look_s = min(held_s, nextafter(stage.collector.next_expiry_s(), inf))
        if best is None:
            return None
        self._launches += 1
        if self._launches % AGED_EVERY == 0:
            best = self._aged(best, now_s) or best
        best[0].look_s = -inf
        return best

    def _best(self, now_s: float) -> Choice | None:
        """The most urgent of what the collectors would launch."""
        versions = self._pool.versions
        best: Choice | None = None
        for stage in self._active:
            if not stage.collector.rows:
                continue
            version = versions.get(stage.route.model, 0)
            if now_s >= stage.look_s or stage.version != version:
                stage.version = version
                self._ask(stage, now_s)
            offer = stage.offer
            if offer is not None and (best is None or offer.rank < best[1].rank):
                best = (stage, offer)
        return best

    def _held_until_s(self, stage: Stage, offer: Offer, now_s: float) -> float:
        """Until when a batch has to leave its machine to more urgent rows; -inf where it may go."""
        machine, priority = offer.machine, offer.head.priority
        took_s = self._pool.expected_s(machine, stage.route, offer.size)
        oldest = offer.queue.oldest()
        if took_s is None or (oldest and now_s - oldest.queued_s >= AGED_AFTER_S):
            return -inf
        end_s = now_s + took_s
        for other in self._active:
            lane = machine.lanes.get(other.route.model)
            if other is stage or not other.collector.rows or lane is None:
                continue
            if not lane.instances or lane.quarantined:
                continue
            if not self._pool.usable(other.route.home).get(machine.hardware):
                continue
            heads = [queue.head() for queue in other.collector.queues()]
            by_s = min((h.launch_by_s for h in heads if h and h.priority < priority), default=-inf)
            if now_s < by_s < end_s - TIE_S:
                others_s = self._pool.free_at_s(other.route.model, now_s)[1:]
                if not others_s or by_s < others_s[0] - TIE_S:
                    return by_s
        return -inf

    def _ask(self, stage: Stage, now_s: float) -> None:
        """What the collector would launch now, or else when to ask it again."""
        answer = stage.collector.offer(self._pool, now_s)
        if isinstance(answer, Offer):
            stage.offer = answer
            stage.look_s = inf
            return
        stage.offer = None
        # Just behind the last instant at which a launch would still be in time.
        expiry_s = nextafter(stage.collector.next_expiry_s(), inf)
        stage.look_s = expiry_s if expiry_s < answer else answer

    def _aged(self, best: Choice, now_s: float) -> Choice | None:
        """A batch for the request that has waited longest behind more urgent ones."""
        aged: Entry | None = None
        found: Choice | None = None
        for stage in self.stages():
            offer = stage.offer
            oldest = offer.queue.oldest() if offer is not None else None
            if offer is None or oldest is None or now_s - oldest.queued_s < AGED_AFTER_S:
                continue
            behind = oldest.priority > best[1].head.priority
            if offer.machine.identity in oldest.failed_on:
                continue
            if behind and (aged is None or oldest.queued_s < aged.queued_s):
                aged, found = oldest, (stage, offer.led_by(oldest))
        return found
