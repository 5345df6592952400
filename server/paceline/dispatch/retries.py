"""Rows that are executed more than once: after a failure, or beside a batch that takes too long.

A batch that its lane lost is tried on other machines; one that the model refused, without those
that shared it. A batch that is overdue (decision 35) races: its rows are tried on a second machine
as well, and whoever is done first counts.

Invariants: rows are on a machine once at most (a restarted machine is another one), on
`MOST_TRIES` in all and on two at a time. Rows that are tried again count as ahead again for
`Admission`, those of a race's loser do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf, nextafter

from paceline.core.errors import BackendError, ErrorKind, RequestError
from paceline.dispatch.admission import Admission
from paceline.dispatch.batch import Batch
from paceline.dispatch.chain_run import ChainRun
from paceline.dispatch.collector import TIE_S
from paceline.dispatch.machines import MachinePool
from paceline.dispatch.queue import Entry, Piece
from paceline.dispatch.running import Running
from paceline.dispatch.waiting import Waiting

MOST_TRIES = 3
"""Machines that rows are tried on before their request fails."""
OWN_STALL_S = 0.01
"""By how much this process must be late itself before it does not call a batch overdue for it."""

_GONE = (ErrorKind.NOT_READY, ErrorKind.UNKNOWN_MODEL)
"""The lane does not hold its model any more: it is being repaired, or its Triton came back."""
_LOST = (ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE, *_GONE)
"""Failures of the lane, not of the request: unreachable, hanging, its process dead."""


def is_lost(error: RequestError) -> bool:
    """Whether the lane failed, not the request."""
    return error.kind in _LOST


def for_requests(error: RequestError) -> RequestError:
    """What the requests of a failed batch are told, if nothing else helps.

    A model that is gone is no unknown model to them: they asked for what is served. Nor is a batch
    that hung a deadline: their own may be far.
    """
    if error.kind in _GONE or error.kind is ErrorKind.DEADLINE:
        return BackendError(error.message, kind=ErrorKind.UNAVAILABLE)
    return error


def stranded(entry: Entry) -> RequestError:
    """What a request is told whose rows can be tried nowhere any more."""
    route, lost = entry.stage.route, ", ".join(sorted(name for name, _ in entry.failed_on))
    return BackendError(
        f"module '{route.name}' failed on {lost}; no other machine has model '{route.model}'",
        kind=ErrorKind.UNAVAILABLE,
    )


class Retries:
    """See the module docstring."""

    def __init__(
        self,
        pool: MachinePool,
        waiting: Waiting,
        running: Running,
        admission: Admission,
        ids: Iterator[int],
    ) -> None:
        """`ids` number entries, each newer than those before."""
        self._pool = pool
        self._waiting = waiting
        self._running = running
        self._admission = admission
        self._ids = ids

    def goes_on(self, batch: Batch, piece: Piece, now_s: float, *, lost: bool) -> bool:
        """Whether rows of a batch that failed are tried again, or others still hold them.

        `lost`: the lane failed. Otherwise the model refused the batch, in which one bad request may
        have been: the others are tried without it, and items that may be skipped one by one.
        """
        entry = piece.entry
        retry = lost and self._may_retry(batch, entry)
        if entry.race and _rivalled(entry) and (entry.race > 0 or (lost and not retry)):
            # The others that hold its rows go on.
            self._drop(entry.run, entry.race)
        elif retry:
            failed_on = entry.failed_on | {batch.machine.identity}
            again = piece.retry(seq=next(self._ids), failed_on=failed_on)
            self._again(again, now_s)
        elif lost:
            return False
        elif len(batch.pieces) > 1:
            self._again(piece.retry(seq=next(self._ids), alone=True), now_s)
        elif piece.count > 1 and entry.step.bound.module.on_error == "skip":
            for row in range(piece.count):
                one = Piece(entry, piece.start + row, 1)
                self._again(one.retry(seq=next(self._ids), alone=True), now_s)
        else:
            return False
        return True

    def look_at(
        self, number: int, batch: Batch, alive: Sequence[Entry], since_s: float, now_s: float
    ) -> float:
        """Try rows of a batch elsewhere if it is overdue; returns when to look at it again.

        `alive` are entries whose deadlines have not passed; `since_s` is when this was due.
        """
        next_s = _behind_s(min(entry.run.submit.deadline_s for entry in alive))
        if batch.overdue:
            return next_s
        at_s = self._retry_s(batch, alive)
        if at_s <= now_s and now_s - since_s > OWN_STALL_S:
            # It is us who were late: what has come in since is to be read first.
            at_s = now_s + OWN_STALL_S
        elif at_s <= now_s and not self._race(number, batch, now_s):
            at_s = now_s + max(OWN_STALL_S, batch.stage.route.again_s(batch.rows))
        return min(next_s, at_s) if at_s > now_s else next_s

    def won(self, entry: Entry) -> None:
        """Rows that raced are done: the others that hold them give way."""
        self._drop(entry.run, -entry.race)

    def gives_way(self, entry: Entry) -> bool:
        """Forget an entry that left its queue too late; False where no others hold its rows."""
        if not entry.race or not _rivalled(entry):
            return False
        self._admission.launched(entry.run.ticket, entry.step.place, entry.rows - entry.taken)
        self._drop(entry.run, entry.race)
        return True

    def is_stranded(self, entry: Entry) -> bool:
        """Whether rows that failed wait though every machine that has their model lost them."""
        if self._pool.others(entry.stage.route.model, entry.failed_on):
            return False
        # One that went down may come back as another.
        return all(self._pool.is_up(identity) for identity in entry.failed_on)

    def _again(self, entry: Entry, now_s: float) -> None:
        self._admission.counted_again(entry.run.ticket, entry.step.place, entry.rows)
        self._waiting.add(entry, now_s)

    def _may_retry(self, batch: Batch, entry: Entry) -> bool:
        failed_on = entry.failed_on | {batch.machine.identity}
        if len(failed_on) >= MOST_TRIES:
            return False
        # A machine that went down may come back as another incarnation before the deadline.
        return not batch.machine.up or self._pool.others(batch.stage.route.model, failed_on)

    def _retry_s(self, batch: Batch, entries: Sequence[Entry]) -> float:
        """When rows of a batch have to be tried elsewhere; inf where that could not be in time.

        At the last moment at which what is left, and a batch that another machine may just have
        begun, still fit; not before the batch is overdue.
        """
        route = batch.stage.route
        overdue_s = batch.started_s + self._pool.overdue_s(batch.machine, route, batch.rows)
        by_s = min((e.launch_by_s for e in entries if e.latest_s >= overdue_s), default=inf)
        return max(overdue_s, by_s - route.again_s(batch.rows))

    def _race(self, number: int, batch: Batch, now_s: float) -> bool:
        """Try rows of a batch elsewhere as well; False where no other machine could take any.

        Until the batch ends nothing more is sent to its lane, and its lot may use another machine.
        """
        model, identity = batch.stage.route.model, batch.machine.identity
        pieces, again = [], []
        for piece in batch.pieces:
            entry = piece.entry
            failed_on = entry.failed_on | {identity}
            own = piece
            if (
                entry.alive
                and now_s <= entry.latest_s
                and len(failed_on) < MOST_TRIES
                and self._pool.others(model, failed_on, sound=True)
                and not (entry.race and _rivalled(entry))
            ):
                own = _own_piece(piece)
                own.entry.race = next(self._ids)
                other = own.retry(seq=next(self._ids), failed_on=failed_on)
                other.race = -own.entry.race
                again.append(other)
            pieces.append(own)
        if not again:
            return False
        self._running.replace(number, replace(batch, pieces=tuple(pieces), overdue=True))
        self._pool.overdue(batch.machine, model)
        batch.stage.collector.ended(batch.lot, number)
        for other in again:
            self._again(other, now_s)
        return True

    def _drop(self, run: ChainRun, race: int) -> None:
        """Forget the entries of one side of a race."""
        for entry in run.entries:
            if entry.race == race and entry.alive:
                if left := entry.waiting:
                    self._admission.launched(run.ticket, entry.step.place, left)
                self._waiting.discard(entry)


def _behind_s(deadline_s: float) -> float:
    """When it has passed for sure: what ends at the deadline is in time."""
    return max(deadline_s + TIE_S, nextafter(deadline_s, inf))


def _rivalled(entry: Entry) -> bool:
    """Whether others still hold the same rows."""
    return any(other.alive and other.race == -entry.race for other in entry.run.entries)


def _own_piece(piece: Piece) -> Piece:
    """The piece with an entry that holds no other rows."""
    if piece.count == piece.entry.rows:
        return piece
    entry = piece.entry.part(piece.start, piece.count)
    entry.taken = entry.rows
    entry.run.entries.append(entry)
    return Piece(entry, 0, entry.rows)
