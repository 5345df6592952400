"""The dispatcher proper: a collector per module, batches handed to machines, deadlines kept.

Whenever something happens, every machine that is free is offered the most urgent batch that its
collectors would launch: closed batches first, by priority and launch-by time (earliest deadline
first). So that low priority is not starved for ever, one launch in `AGED_EVERY` goes to a request
that has waited `AGED_AFTER_S`, if there is one behind more urgent ones.

Invariants: a request that was submitted ends exactly once, in Answer or Fail, unless cancelled;
a machine runs at most `slots` batches, and of a model at most its instances; nothing is launched
for a request that cannot meet its deadline any more, or that has failed or been cancelled; rows
are executed at most once per machine (a restarted machine is another one).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from math import inf, nextafter

from paceline.core.errors import BackendError, ErrorKind, Rejected, RequestError
from paceline.core.ports import ModelCall
from paceline.core.request import Span, Timeline
from paceline.core.tensor import Tensor, split_rows
from paceline.core.values import value
from paceline.dispatch.admission import Admission
from paceline.dispatch.chain_run import ChainRun, Work
from paceline.dispatch.collector import Collector, Offer
from paceline.dispatch.events import (
    Action,
    Answer,
    BatchDone,
    BatchFailed,
    Broken,
    Cancel,
    Event,
    Execute,
    Fail,
    InstallChain,
    MachineDown,
    MachineUp,
    Partial,
    RemoveChain,
    Submit,
    Tick,
    Wake,
)
from paceline.dispatch.machines import Machine, MachinePool
from paceline.dispatch.policy import collector
from paceline.dispatch.queue import Entry, Piece, batch_inputs
from paceline.dispatch.route import ChainRoute, ModuleRoute

AGED_AFTER_S = 5.0
AGED_EVERY = 16
"""Low priority gets at most one launch in so many while more urgent requests wait."""

MOST_TRIES = 3
"""Machines that rows are tried on before their request fails."""

_GONE = (ErrorKind.NOT_READY, ErrorKind.UNKNOWN_MODEL)
"""The lane does not hold its model any more: it is being repaired, or its Triton came back."""
_LOST = (ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE, *_GONE)
"""Failures of the lane, not of the request: unreachable, hanging, its process dead."""


@dataclass(slots=True)
class ModuleLoad:
    """Rows of a module that wait and that run; `oldest_s` is when the first of them was queued."""

    queued: int = 0
    oldest_s: float = inf
    executing: int = 0


@value
class _Batch:
    machine: Machine
    collector: Collector
    lot: int
    pieces: tuple[Piece, ...]
    rows: int
    started_s: float

    @property
    def route(self) -> ModuleRoute:
        return self.collector.route


class Dispatcher:
    """See the module docstring; `handle` is the one door."""

    def __init__(self) -> None:
        self._routes: dict[str, ChainRoute] = {}
        self._collectors: dict[int, Collector] = {}
        self._active: dict[int, Collector] = {}
        self._pool = MachinePool()
        self._admission = Admission()
        self._runs: dict[int, ChainRun] = {}
        self._per_chain: dict[str, int] = {}
        self._batches: dict[int, _Batch] = {}
        self._ids = count(1)
        self._wake_s = inf
        self._launches = 0

    def handle(self, event: Event, *, now_s: float, settled: bool = True) -> list[Action]:
        """Take one event in and return what to do about it, in order.

        With `settled` false more events are at hand: batches are launched and deadlines looked
        at by a later call, which is to come at once (`Settled` where there is no event left).
        """
        actions: list[Action] = []
        match event:
            case Submit():
                self._submit(event, now_s, actions)
            case BatchDone():
                self._batch_done(event, now_s, actions)
            case BatchFailed():
                batch = self._release(event.batch)
                self._batch_failed(batch, event.error, now_s, actions)
            case Cancel():
                if (run := self._runs.get(event.request)) is not None:
                    self._end(run)
            case Tick():
                self._wake_s = inf
            case InstallChain():
                self._install(event.route)
            case RemoveChain():
                self._routes.pop(event.chain, None)
            case MachineUp():
                self._pool.up(event.machine, event.hardware, event.slots, event.instances)
            case MachineDown():
                self._pool.down(event.machine)
        if settled:
            self._expire(now_s, actions)
            self._launch(now_s, actions)
            self._schedule_wake(now_s, actions)
        return actions

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._runs)

    def in_flight_of(self, chain: str) -> int:
        """Requests of one chain that have not ended."""
        return self._per_chain.get(chain, 0)

    def loads(self) -> dict[tuple[str, str], ModuleLoad]:
        """What waits and what runs now, by (chain, module), modules with nothing left out."""
        found: dict[tuple[str, str], ModuleLoad] = {}
        for module in self._waiting():
            load = found.setdefault((module.route.chain, module.route.name), ModuleLoad())
            for queue in module.queues():
                load.queued += queue.rows
                if (oldest := queue.oldest()) is not None:
                    load.oldest_s = min(load.oldest_s, oldest.queued_s)
        for batch in self._batches.values():
            load = found.setdefault((batch.route.chain, batch.route.name), ModuleLoad())
            load.executing += batch.rows
        return found

    def machines(self) -> tuple[Machine, ...]:
        """Machines that are up, by name."""
        return self._pool.all()

    # -- requests ---------------------------------------------------------------------------

    def _submit(self, event: Submit, now_s: float, actions: list[Action]) -> None:
        assert event.request not in self._runs, event.request
        try:
            run = self._admit(event, now_s)
        except RequestError as error:
            actions.append(Fail(event.request, error, _refused(event, error, now_s)))
            return
        self._runs[event.request] = run
        self._per_chain[event.chain] = self._per_chain.get(event.chain, 0) + 1
        self._advance(run, now_s, actions)

    def _admit(self, event: Submit, now_s: float) -> ChainRun:
        """The request's run. Raises RequestError where it cannot or must not enter."""
        route = self._routes.get(event.chain)
        if route is None:
            message = f"Request for unknown model: '{event.chain}' is not found"
            raise RequestError(ErrorKind.UNKNOWN_MODEL, message)
        if self._per_chain.get(event.chain, 0) >= route.max_requests:
            raise Rejected(ErrorKind.QUEUE_FULL, "Exceeds maximum queue size")
        first = max(route.modules, key=lambda module: module.floor_s)
        if now_s + first.floor_s > event.deadline_s:
            raise _too_late(first, now_s, event.deadline_s)
        priority = route.bound.chain.priority if event.priority is None else event.priority
        budget_s = event.deadline_s - now_s
        ticket = self._admission.admit(route, priority, budget_s, self._pool, now_s)
        return ChainRun(event, route, ticket, now_s=now_s)

    def _advance(self, run: ChainRun, now_s: float, actions: list[Action]) -> None:
        """Queue what can start; answer when everything has ended."""
        try:
            for work in run.ready():
                self._enqueue(run, work, now_s)
        except RequestError as error:
            self._fail(run, error, now_s, actions)
            return
        while run.idle:
            self._admission.counted(run.ticket, run.idle.pop(), 0)
        if run.done:
            self._end(run)
            actions.append(Answer(run.submit.request, run.answer(), run.timeline(now_s)))

    def _enqueue(self, run: ChainRun, work: Work, now_s: float) -> None:
        route, submit = work.route, run.submit
        if now_s + route.floor_s > submit.deadline_s:
            raise _too_late(route, now_s, submit.deadline_s)
        seq = next(self._ids)
        outputs = run.wanted(route.bound)
        rows = tuple((t.name, t.datatype, t.shape[1:]) for t in work.inputs)
        parameters = tuple(sorted(submit.parameters.items()))
        alike = (rows, outputs, submit.version, parameters)
        entry = Entry(
            run=run,
            route=route,
            inputs=work.inputs,
            outputs=outputs,
            rows=work.rows,
            key=alike if route.bound.spec.batches else seq,
            priority=run.ticket.priority,
            launch_by_s=submit.deadline_s - route.tail_s,
            latest_s=submit.deadline_s - route.floor_s,
            queued_s=now_s,
            seq=seq,
        )
        self._admission.counted(run.ticket, route, work.rows)
        self._queue(entry, now_s)

    def _queue(self, entry: Entry, now_s: float) -> None:
        route = entry.route
        module = self._collectors.get(id(route))
        if module is None:
            module = self._collectors[id(route)] = collector(entry.run.route, route)
        self._active[id(route)] = module
        for part in module.add(entry, now_s):
            part.run.entries.add(part)

    def _waiting(self) -> list[Collector]:
        """Collectors with rows."""
        idle = [key for key, module in self._active.items() if not module.rows]
        for key in idle:
            del self._active[key]
        return list(self._active.values())

    def _install(self, route: ChainRoute) -> None:
        """New requests take this route; collectors of replaced routes go when they are empty."""
        self._routes[route.bound.name] = route
        current = {id(module) for chain in self._routes.values() for module in chain.modules}
        for key, module in list(self._collectors.items()):
            if key not in current and not module.rows:
                del self._collectors[key]
                self._active.pop(key, None)

    def _fail(
        self, run: ChainRun, error: RequestError, now_s: float, actions: list[Action]
    ) -> None:
        if run.submit.request in self._runs:
            self._end(run)
            actions.append(Fail(run.submit.request, error, run.timeline(now_s, error)))

    def _end(self, run: ChainRun) -> None:
        """Take a request out of every table; batches that hold its rows will ignore them."""
        del self._runs[run.submit.request]
        left = self._per_chain.pop(run.submit.chain) - 1
        if left:
            self._per_chain[run.submit.chain] = left
        self._admission.ended(run.ticket)
        for entry in run.entries:
            if (module := self._collectors.get(id(entry.route))) is not None:
                module.discard(entry)
            entry.alive = False
        run.entries.clear()

    # -- time -------------------------------------------------------------------------------

    def _expire(self, now_s: float, actions: list[Action]) -> None:
        for module in self._waiting():
            gone = [entry for queue in module.queues() for entry in queue.expired(now_s)]
            gone += module.doomed(self._pool, now_s)
            for entry in gone:
                error = _too_late(entry.route, now_s, entry.run.submit.deadline_s)
                self._fail(entry.run, error, now_s, actions)

    def _schedule_wake(self, now_s: float, actions: list[Action]) -> None:
        at_s = inf
        for module in self._waiting():
            # Just behind the last instant at which a launch would still be in time.
            for queue in module.queues():
                if (expiry_s := queue.next_expiry_s()) is not None:
                    at_s = min(at_s, nextafter(expiry_s, inf))
            if (offer_s := module.next_offer_s(self._pool, now_s)) is not None:
                at_s = min(at_s, offer_s)
        if at_s < self._wake_s:
            self._wake_s = at_s
            actions.append(Wake(at_s))

    # -- launching --------------------------------------------------------------------------

    def _launch(self, now_s: float, actions: list[Action]) -> None:
        while (choice := self._choose(now_s)) is not None:
            actions.append(self._execute(*choice, now_s))

    def _choose(self, now_s: float) -> tuple[Collector, Offer] | None:
        """The next batch to launch: closed batches first, then the most urgent."""
        best: tuple[Collector, Offer] | None = None
        for module in self._waiting():
            offer = module.offer(self._pool, now_s)
            if offer is not None and (best is None or offer.rank < best[1].rank):
                best = (module, offer)
        if best is None:
            return None
        self._launches += 1
        if self._launches % AGED_EVERY == 0:
            return self._aged(best, now_s) or best
        return best

    def _aged(self, best: tuple[Collector, Offer], now_s: float) -> tuple[Collector, Offer] | None:
        """A batch for the request that has waited longest behind more urgent ones."""
        aged: Entry | None = None
        found: tuple[Collector, Offer] | None = None
        for module in self._waiting():
            offer = module.offer(self._pool, now_s)
            oldest = offer.queue.oldest() if offer is not None else None
            if offer is None or oldest is None or now_s - oldest.queued_s < AGED_AFTER_S:
                continue
            behind = oldest.priority > best[1].head.priority
            if offer.machine.identity in oldest.failed_on:
                continue
            if behind and (aged is None or oldest.queued_s < aged.queued_s):
                aged, found = oldest, (module, offer.led_by(oldest))
        return found

    def _execute(self, module: Collector, offer: Offer, now_s: float) -> Execute:
        route, spec, machine = module.route, module.route.bound.spec, offer.machine
        pieces = offer.take()
        rows = sum(piece.count for piece in pieces)
        first = pieces[0].entry
        # Only a model called by its own name sees the client's version and parameters.
        submit = first.run.submit if first.run.route.bound.direct else None
        call = ModelCall(
            spec.name,
            batch_inputs(pieces, batches=spec.batches),
            first.outputs,
            version=submit.version if submit else "",
            request_id=submit.request_id if submit and len(pieces) == 1 else "",
            parameters=submit.parameters if submit else {},
        )
        for piece in pieces:
            self._admission.launched(piece.entry.run.ticket, route, piece.count)
        batch = next(self._ids)
        self._batches[batch] = _Batch(machine, module, offer.lot, pieces, rows, now_s)
        self._pool.started(machine, route, rows, batch, now_s)
        module.launched(offer)
        timeout_s = self._pool.hang_s(machine, route, rows)
        return Execute(batch, machine.name, call, rows, timeout_s)

    # -- what comes back --------------------------------------------------------------------

    def _release(self, batch_id: int) -> _Batch:
        batch = self._batches.pop(batch_id)
        self._pool.ended(batch.machine, batch.route.model, batch_id)
        batch.collector.ended(batch.lot)
        return batch

    def _batch_done(self, event: BatchDone, now_s: float, actions: list[Action]) -> None:
        batch = self._release(event.batch)
        try:
            per_piece = _split_outputs(batch, event.outputs)
        except BackendError as error:
            self._batch_failed(batch, error, now_s, actions, garbled=True)
            return
        took_s = now_s - batch.started_s
        self._pool.succeeded(batch.machine, batch.route, batch.rows, took_s)
        for piece, outputs in zip(batch.pieces, per_piece, strict=True):
            self._piece_done(batch, piece, outputs, now_s, actions)

    def _piece_done(
        self,
        batch: _Batch,
        piece: Piece,
        outputs: tuple[Tensor, ...] | None,
        now_s: float,
        actions: list[Action],
    ) -> None:
        entry = piece.entry
        if not entry.alive:
            return
        run, name, start = entry.run, entry.route.name, entry.base + piece.start
        run.spans.append(_span(batch, piece, now_s))
        if run.submit.stream and outputs is not None:
            part = run.partial(name, outputs)
            actions += [Partial(run.submit.request, start, part)] if part else []
        try:
            complete = run.rows_done(name, start, piece.count, outputs)
        except RequestError as error:
            self._fail(run, error, now_s, actions)
            return
        if complete:
            run.entries = {other for other in run.entries if other.route is not entry.route}
            self._advance(run, now_s, actions)

    def _batch_failed(
        self,
        batch: _Batch,
        error: RequestError,
        now_s: float,
        actions: list[Action],
        *,
        garbled: bool = False,
    ) -> None:
        lost = error.kind in _LOST or garbled
        if error.kind in _GONE:
            # To the client this is no unknown model: it asked for what is served.
            error = BackendError(error.message, kind=ErrorKind.UNAVAILABLE)
        if lost and self._pool.broke(batch.machine, batch.route.model, now_s):
            actions.append(Broken(batch.machine.name, batch.route.model, error.message))
        if error.kind is ErrorKind.DEADLINE:
            # The batch hung; to its requests that is a failure, their own deadlines may be far.
            error = BackendError(error.message, kind=ErrorKind.UNAVAILABLE)
        # A batch that the model refused may hold one bad request: try the others without it.
        alone = not lost and len(batch.pieces) > 1
        for piece in batch.pieces:
            entry = piece.entry
            if not entry.alive:
                continue
            if lost and self._may_retry(batch, entry):
                failed_on = entry.failed_on | {batch.machine.identity}
                again = piece.retry(seq=next(self._ids), failed_on=failed_on)
                self._again(again, now_s)
            elif alone:
                self._again(piece.retry(seq=next(self._ids), alone=True), now_s)
            elif entry.route.bound.module.on_error != "skip":
                self._fail(entry.run, error, now_s, actions)
            elif piece.count > 1 and not lost:
                for row in range(piece.count):
                    one = Piece(entry, piece.start + row, 1)
                    self._again(one.retry(seq=next(self._ids), alone=True), now_s)
            else:
                self._piece_done(batch, piece, None, now_s, actions)

    def _again(self, entry: Entry, now_s: float) -> None:
        self._admission.counted_again(entry.run.ticket, entry.route, entry.rows)
        self._queue(entry, now_s)

    def _may_retry(self, batch: _Batch, entry: Entry) -> bool:
        failed_on = entry.failed_on | {batch.machine.identity}
        if len(failed_on) >= MOST_TRIES:
            return False
        # A machine that went down may come back as another incarnation before the deadline.
        return not batch.machine.up or self._pool.others(batch.route.model, failed_on)


def _split_outputs(batch: _Batch, outputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The outputs of each piece, with a row axis; BackendError where they cannot be the batch's."""
    spec = batch.route.bound.spec
    wanted = batch.pieces[0].entry.outputs
    if len(outputs) != len(wanted):
        raise BackendError(f"model '{spec.name}' returned {len(outputs)} of {len(wanted)} outputs")
    for name, tensor in zip(wanted, outputs, strict=True):
        declared = spec.output(name)
        shape = tensor.shape[1:] if spec.batches else tensor.shape
        if declared is None or declared.datatype != tensor.datatype or not declared.accepts(shape):
            expected = f"{declared.datatype} {list(declared.shape)}" if declared else "nothing"
            raise BackendError(
                f"model '{spec.name}' returned a malformed output: {name} is {tensor.datatype} "
                f"{list(shape)}, declared {expected}"
            )
    if not spec.batches:
        return [tuple(tensor.reshaped((1, *tensor.shape)) for tensor in outputs)]
    counts = [piece.count for piece in batch.pieces]
    try:
        return list(zip(*(split_rows(tensor, counts) for tensor in outputs), strict=True))
    except ValueError as error:
        raise BackendError(f"model '{spec.name}' returned a malformed output: {error}") from None


def _span(batch: _Batch, piece: Piece, now_s: float) -> Span:
    return Span(
        module=batch.route.bound.name,
        model=batch.route.bound.spec.name,
        machine=batch.machine.name,
        rows=piece.count,
        batch_size=batch.rows,
        queued_s=piece.entry.queued_s,
        started_s=batch.started_s,
        ended_s=now_s,
    )


def _too_late(route: ModuleRoute, now_s: float, deadline_s: float) -> Rejected:
    shortfall_s = max(0.0, now_s + route.floor_s - deadline_s)
    if now_s >= deadline_s:
        message = "Request timeout expired"
    else:
        message = (
            f"Request timeout expired: module '{route.bound.name}' and what follows need "
            f"{route.floor_s * 1e3:.1f} ms, {shortfall_s * 1e3:.1f} ms more than are left"
        )
    return Rejected(ErrorKind.DEADLINE, message, shortfall_s=shortfall_s)


def _refused(event: Submit, error: RequestError, now_s: float) -> Timeline:
    """The timeline of a request that never entered its chain."""
    return Timeline(
        request=event.request,
        request_id=event.request_id,
        chain=event.chain,
        arrived_s=now_s,
        ended_s=now_s,
        deadline_s=event.deadline_s,
        spans=(),
        error=error.message,
        rejected=True,
    )
