"""The dispatcher proper: one queue per module, batches handed to machines, deadlines kept.

Pooled dispatch (beyond Harpagon; worst case `d + b/T`): whenever a machine is free it takes from
the most urgent queue whose model it holds. A batch is *closed* when it is full or when its oldest
request's slack has run out (its launch-by time has come); closed batches go first, earliest
launch-by first within a priority. A machine that would idle otherwise takes an unfinished batch:
waiting could not fill it before the machine idles.

Invariants: a request that was submitted ends exactly once, in Answer or Fail, unless cancelled;
a machine runs at most `slots` batches, and of a model at most its instances; nothing is launched
for a request that cannot meet its deadline any more, or that has failed or been cancelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from math import inf, nextafter

from paceline.core.errors import BackendError, ErrorKind, Rejected, RequestError
from paceline.core.ports import ModelCall
from paceline.core.request import Span, Timeline
from paceline.core.tensor import Tensor, split_rows
from paceline.dispatch.chain_run import ChainRun, Work
from paceline.dispatch.events import (
    Action,
    Answer,
    BatchDone,
    BatchFailed,
    Cancel,
    Event,
    Execute,
    Fail,
    InstallChain,
    MachineDown,
    MachineUp,
    RemoveChain,
    Submit,
    Tick,
    Wake,
)
from paceline.dispatch.queue import Entry, ModuleQueue, Piece, batch_inputs
from paceline.dispatch.route import ChainRoute, ModuleRoute

MAX_ATTEMPTS = 2
"""Executions of the same rows: the first, and one more where the machine was lost."""


@dataclass(slots=True)
class Machine:
    """An executor: what it holds and what it is doing."""

    name: str
    hardware: str
    slots: int
    instances: Mapping[str, int]
    running: dict[str, int] = field(default_factory=dict)
    busy: int = 0
    up: bool = True

    def can_run(self, model: str) -> bool:
        free = self.busy < self.slots
        return self.up and free and self.running.get(model, 0) < self.instances.get(model, 0)


@dataclass(slots=True)
class ModuleLoad:
    """Rows of a module that wait and that run; `oldest_s` is when the first of them was queued."""

    queued: int = 0
    oldest_s: float = inf
    executing: int = 0


@dataclass(frozen=True, slots=True)
class _Batch:
    machine: Machine
    route: ModuleRoute
    pieces: tuple[Piece, ...]
    rows: int
    started_s: float


class Dispatcher:
    """See the module docstring; `handle` is the one door."""

    def __init__(self) -> None:
        self._routes: dict[str, ChainRoute] = {}
        self._queues: dict[int, ModuleQueue] = {}
        self._machines: dict[str, Machine] = {}
        self._runs: dict[int, ChainRun] = {}
        self._per_chain: dict[str, int] = {}
        self._batches: dict[int, _Batch] = {}
        self._ids = count(1)
        self._wake_s = inf

    def handle(self, event: Event, *, now_s: float) -> list[Action]:
        """Take one event in and return what to do about it, in order."""
        actions: list[Action] = []
        match event:
            case Submit():
                self._submit(event, now_s, actions)
            case BatchDone():
                self._batch_done(event, now_s, actions)
            case BatchFailed():
                self._batch_failed(event, now_s, actions)
            case Cancel():
                self._drop(event.request)
            case Tick():
                self._wake_s = inf
            case InstallChain():
                self._routes[event.route.bound.name] = event.route
            case RemoveChain():
                self._routes.pop(event.chain, None)
            case MachineUp():
                self._machine_up(event)
            case MachineDown():
                if (machine := self._machines.pop(event.machine, None)) is not None:
                    machine.up = False
        self._expire(now_s, actions)
        self._launch(now_s, actions)
        self._schedule_wake(actions)
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
        for queue in self._queues.values():
            load = found.setdefault((queue.route.chain, queue.route.bound.name), ModuleLoad())
            load.queued += queue.rows
            if (oldest_s := queue.oldest_s()) is not None:
                load.oldest_s = min(load.oldest_s, oldest_s)
        for batch in self._batches.values():
            load = found.setdefault((batch.route.chain, batch.route.bound.name), ModuleLoad())
            load.executing += batch.rows
        return found

    def machines(self) -> tuple[Machine, ...]:
        """Machines that are up, by name."""
        return tuple(machine for _, machine in sorted(self._machines.items()))

    # -- requests ---------------------------------------------------------------------------

    def _submit(self, event: Submit, now_s: float, actions: list[Action]) -> None:
        assert event.request not in self._runs, event.request
        route = self._routes.get(event.chain)
        error: RequestError | None = None
        if route is None:
            message = f"Request for unknown model: '{event.chain}' is not found"
            error = RequestError(ErrorKind.UNKNOWN_MODEL, message)
        elif self._per_chain.get(event.chain, 0) >= route.max_requests:
            error = Rejected(ErrorKind.QUEUE_FULL, "Exceeds maximum queue size")
        if route is None or error is not None:
            assert error is not None
            actions.append(Fail(event.request, error, _refused(event, error, now_s)))
            return
        run = ChainRun(event, route, now_s=now_s)
        self._runs[event.request] = run
        self._per_chain[event.chain] = self._per_chain.get(event.chain, 0) + 1
        self._advance(run, now_s, actions)

    def _advance(self, run: ChainRun, now_s: float, actions: list[Action]) -> None:
        """Queue what can start; answer when everything has ended."""
        try:
            for work in run.ready():
                self._enqueue(run, work, now_s)
        except RequestError as error:
            self._fail(run, error, now_s, actions)
            return
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
        priority = submit.priority
        entry = Entry(
            run=run,
            route=route,
            inputs=work.inputs,
            outputs=outputs,
            rows=work.rows,
            key=alike if route.bound.spec.batches else seq,
            priority=run.route.bound.chain.priority if priority is None else priority,
            launch_by_s=submit.deadline_s - route.tail_s,
            latest_s=submit.deadline_s - route.floor_s,
            queued_s=now_s,
            seq=seq,
        )
        self._queue(entry)

    def _queue(self, entry: Entry) -> None:
        queue = self._queues.get(id(entry.route))
        if queue is None:
            queue = self._queues[id(entry.route)] = ModuleQueue(entry.route)
        queue.add(entry)
        entry.run.entries.add(entry)

    def _fail(
        self, run: ChainRun, error: RequestError, now_s: float, actions: list[Action]
    ) -> None:
        if run.submit.request in self._runs:
            self._end(run)
            actions.append(Fail(run.submit.request, error, run.timeline(now_s, error)))

    def _drop(self, request: int) -> None:
        if (run := self._runs.get(request)) is not None:
            self._end(run)

    def _end(self, run: ChainRun) -> None:
        """Take a request out of every table; batches that hold its rows will ignore them."""
        del self._runs[run.submit.request]
        left = self._per_chain.pop(run.submit.chain) - 1
        if left:
            self._per_chain[run.submit.chain] = left
        for entry in run.entries:
            if (queue := self._queues.get(id(entry.route))) is not None:
                queue.discard(entry)
            entry.alive = False
        run.entries.clear()

    # -- time -------------------------------------------------------------------------------

    def _expire(self, now_s: float, actions: list[Action]) -> None:
        for queue in list(self._queues.values()):
            for entry in queue.expired(now_s):
                error = _too_late(entry.route, now_s, entry.run.submit.deadline_s)
                self._fail(entry.run, error, now_s, actions)
        for key in [key for key, queue in self._queues.items() if not queue.rows]:
            del self._queues[key]

    def _schedule_wake(self, actions: list[Action]) -> None:
        due = [at for q in self._queues.values() if (at := q.next_expiry_s()) is not None]
        # Just behind the last instant at which a launch would still be in time.
        if due and (at_s := nextafter(min(due), inf)) < self._wake_s:
            self._wake_s = at_s
            actions.append(Wake(at_s))

    # -- machines ---------------------------------------------------------------------------

    def _machine_up(self, event: MachineUp) -> None:
        known = self._machines.get(event.machine)
        if known is None:
            known = Machine(event.machine, event.hardware, event.slots, {})
            self._machines[event.machine] = known
        known.slots, known.instances = event.slots, dict(event.instances)

    def _launch(self, now_s: float, actions: list[Action]) -> None:
        while (choice := self._choose(now_s)) is not None:
            queue, machine = choice
            actions.append(self._execute(queue, machine, now_s))
            if not queue.rows:
                del self._queues[id(queue.route)]

    def _choose(self, now_s: float) -> tuple[ModuleQueue, Machine] | None:
        """The next batch to launch and where: closed batches first, then the most urgent."""
        best: tuple[tuple[bool, int, float, int], ModuleQueue, Machine] | None = None
        for queue in self._queues.values():
            machine = self._free_machine(queue.route)
            head = queue.head()
            if machine is None or head is None:
                continue
            size = _batch_limit(queue.route, machine)
            closed = now_s >= head.launch_by_s or queue.rows_like(head, size) >= size
            order = (not closed, *head.order)
            if best is None or order < best[0]:
                best = (order, queue, machine)
        return None if best is None else best[1:]

    def _free_machine(self, route: ModuleRoute) -> Machine | None:
        """A machine that can run the module now: planned hardware first, then the least busy."""
        model = route.bound.spec.name
        free = [m for m in self._machines.values() if m.can_run(model)]
        if not free:
            return None
        return min(free, key=lambda m: (m.hardware not in route.batch_sizes, m.busy, m.name))

    def _execute(self, queue: ModuleQueue, machine: Machine, now_s: float) -> Execute:
        route, spec = queue.route, queue.route.bound.spec
        pieces = tuple(queue.take(_batch_limit(route, machine)))
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
        batch = next(self._ids)
        self._batches[batch] = _Batch(machine, route, pieces, rows, now_s)
        machine.busy += 1
        machine.running[spec.name] = machine.running.get(spec.name, 0) + 1
        return Execute(batch, machine.name, call, rows)

    def _release(self, batch_id: int) -> _Batch:
        batch = self._batches.pop(batch_id)
        batch.machine.busy -= 1
        batch.machine.running[batch.route.bound.spec.name] -= 1
        return batch

    def _batch_done(self, event: BatchDone, now_s: float, actions: list[Action]) -> None:
        batch = self._release(event.batch)
        try:
            per_piece = _split_outputs(batch, event.outputs)
        except BackendError as error:
            for piece in batch.pieces:
                self._fail(piece.entry.run, error, now_s, actions)
            return
        for piece, outputs in zip(batch.pieces, per_piece, strict=True):
            entry = piece.entry
            if not entry.alive:
                continue
            run, name = entry.run, entry.route.bound.name
            run.spans.append(_span(batch, piece, now_s))
            try:
                complete = run.rows_done(name, entry.base + piece.start, outputs, piece.count)
            except RequestError as error:
                self._fail(run, error, now_s, actions)
                continue
            if complete:
                run.entries -= {e for e in run.entries if e.route is entry.route}
                self._advance(run, now_s, actions)

    def _batch_failed(self, event: BatchFailed, now_s: float, actions: list[Action]) -> None:
        batch = self._release(event.batch)
        lost = event.error.kind is ErrorKind.UNAVAILABLE
        for piece in batch.pieces:
            if not piece.entry.alive:
                continue
            if lost and piece.entry.attempt < MAX_ATTEMPTS:
                self._queue(piece.retry(seq=next(self._ids)))
            else:
                self._fail(piece.entry.run, event.error, now_s, actions)


def _batch_limit(route: ModuleRoute, machine: Machine) -> int:
    return min(route.batch_size(machine.hardware), route.bound.spec.row_limit)


def _split_outputs(batch: _Batch, outputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The outputs of each piece, with a row axis; BackendError where they cannot be the batch's."""
    spec = batch.route.bound.spec
    wanted = batch.pieces[0].entry.outputs
    if len(outputs) != len(wanted):
        raise BackendError(f"model '{spec.name}' returned {len(outputs)} of {len(wanted)} outputs")
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
