"""The dispatcher proper: a collector per module, batches handed to machines, deadlines kept.

Whenever something happens, every machine that is free is offered the most urgent batch that the
collectors would launch (`waiting`).

Invariants: a request that was submitted ends exactly once, in Answer or Fail, unless cancelled;
a machine runs at most `slots` batches, and of a model at most its instances; nothing is launched
for a request that cannot meet its deadline any more, or that has failed or been cancelled. What is
executed more than once, and where, is the subject of `retries`.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import count
from math import inf

from paceline.core.errors import BackendError, ErrorKind, RequestError
from paceline.core.ports import ModelCall
from paceline.core.request import Timeline
from paceline.core.tensor import Tensor
from paceline.dispatch.admission import Admission, ReadyIn
from paceline.dispatch.batch import Batch
from paceline.dispatch.chain_run import ChainRun, Work
from paceline.dispatch.collector import TIE_S, Offer
from paceline.dispatch.events import (
    Abort,
    Action,
    Answer,
    BatchDone,
    BatchFailed,
    Broken,
    Cancel,
    Entered,
    Event,
    Execute,
    Fail,
    InstallChain,
    MachineDown,
    MachineUp,
    Partial,
    Passed,
    Reached,
    RemoveChain,
    Submit,
    Tick,
    TooCold,
    Wake,
)
from paceline.dispatch.foresight import FIRST
from paceline.dispatch.holders import Machine
from paceline.dispatch.learned import LearnedDuration
from paceline.dispatch.loads import ModuleLoad, loads
from paceline.dispatch.machines import HangLimits, MachinePool
from paceline.dispatch.queue import Entry, batch_inputs
from paceline.dispatch.refusals import never_entered, queue_full, timed_out, too_late
from paceline.dispatch.retries import Retries, for_requests, is_lost, stranded
from paceline.dispatch.route import ChainRoute
from paceline.dispatch.running import Running
from paceline.dispatch.stage import Served, Stage, served
from paceline.dispatch.waiting import Waiting


class Dispatcher:
    """See the module docstring; `handle` is the one door."""

    def __init__(self, hang: HangLimits | None = None) -> None:
        self._served: dict[str, Served] = {}
        self._stages: dict[int, Stage] = {}
        """By the identity of the module's route; of replaced routes until they are empty."""
        self._pool = MachinePool(hang)
        self._waiting = Waiting(self._pool)
        self._admission = Admission()
        self._runs: dict[int, ChainRun] = {}
        self._per_chain: dict[str, int] = {}
        self._running = Running()
        self._ids = count(1)
        self._retries = Retries(
            self._pool, self._waiting, self._running, self._admission, self._ids
        )
        self._wake_s = inf
        self._leasing = False

    def lease(self, ready_in_s: ReadyIn) -> None:
        """From now on models come and go: `ready_in_s` says when each can be used, and actions
        tell which of them requests may use, wait for and have used.
        """
        self._admission.ready_in_s = ready_in_s
        self._leasing = True

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
            case Abort():
                if (run := self._runs.get(event.request)) is not None:
                    self._fail(run, event.error, now_s, actions)
            case Tick():
                self._wake_s = inf
            case InstallChain():
                self._install(event.route)
            case RemoveChain():
                self._served.pop(event.chain, None)
                self._plan_machines()
            case MachineUp():
                self._pool.up(event.machine, event.hardware, event.slots, event.instances)
                self._give_up_stranded(now_s, actions)
            case MachineDown():
                self._pool.down(event.machine)
        if settled:
            look_s = self._running.look_s
            if self._waiting or look_s <= now_s or look_s < self._wake_s:
                self._settle(now_s, actions)
        return actions

    def running(self, machine: str, model: str) -> int:
        """Batches of a model that a machine executes."""
        found = self._pool.get(machine)
        lane = found.lanes.get(model) if found is not None else None
        return lane.running if lane is not None else 0

    def bearable(self, now_s: float) -> float:
        """By what factor what remains of every request could take longer and still be in time."""
        least = inf
        for run in self._runs.values():
            tail_s = max((entry.stage.route.tail_s for entry in run.entries), default=0.0)
            if tail_s > 0:
                least = min(least, (run.submit.deadline_s - now_s) / tail_s)
        return least

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._runs)

    def in_flight_of(self, chain: str) -> int:
        """Requests of one chain that have not ended."""
        return self._per_chain.get(chain, 0)

    def loads(self) -> dict[tuple[str, str], ModuleLoad]:
        """What waits and what runs now, by (chain, module), modules with nothing left out."""
        return loads(self._waiting, self._running)

    def machines(self) -> tuple[Machine, ...]:
        """Machines that are up, by name."""
        return self._pool.all()

    def durations_learned(self) -> tuple[LearnedDuration, ...]:
        """What batches took lately, by model, machine, hardware and batch size."""
        return self._pool.learned.all()

    # -- requests ---------------------------------------------------------------------------

    def _submit(self, event: Submit, now_s: float, actions: list[Action]) -> None:
        assert event.request not in self._runs, event.request
        try:
            run = self._admit(event, now_s)
        except RequestError as error:
            actions.append(_failed(event.request, error, never_entered(event, error, now_s)))
            if self._leasing and error.kind is ErrorKind.OVERLOADED:
                cold = self._admission.cold(self._served[event.chain], now_s)
                actions += [TooCold(event.chain, tuple(cold))] if cold else []
            return
        self._runs[event.request] = run
        if self._leasing:
            stages = run.served.stages
            modules = tuple([stages[place].route for place in run.places])
            priority = run.ticket.asked
            actions.append(Entered(event.request, modules, event.deadline_s, priority))
        self._per_chain[event.chain] = self._per_chain.get(event.chain, 0) + 1
        self._advance(run, now_s, actions)

    def _admit(self, event: Submit, now_s: float) -> ChainRun:
        """The request's run. Raises RequestError where it cannot or must not enter."""
        served = self._served.get(event.chain)
        if served is None:
            message = f"Request for unknown model: '{event.chain}' is not found"
            raise RequestError(ErrorKind.UNKNOWN_MODEL, message)
        route = served.route
        if self._per_chain.get(event.chain, 0) >= route.max_requests:
            raise queue_full(route.longest.floor_s)
        if now_s + route.longest.floor_s > event.deadline_s:
            raise too_late(route.longest, now_s, event.deadline_s)
        priority = route.bound.chain.priority if event.priority is None else event.priority
        budget_s = event.deadline_s - now_s
        ticket = self._admission.admit(served, priority, budget_s, self._pool, now_s)
        return ChainRun(event, served, ticket, now_s=now_s)

    def _advance(self, run: ChainRun, now_s: float, actions: list[Action]) -> None:
        """Queue what can start; answer when everything has ended."""
        try:
            for work in run.ready():
                self._enqueue(run, work, now_s)
                if self._leasing:
                    actions.append(Reached(run.submit.request, work.step.bound.spec.name))
        except RequestError as error:
            self._fail(run, error, now_s, actions)
            return
        while run.idle:
            idle = run.idle.pop()
            self._admission.counted(run.ticket, idle.place, 0)
            if self._leasing:
                actions.append(Passed(run.submit.request, idle.bound.spec.name, used=False))
        if run.done:
            if now_s > run.submit.deadline_s:
                self._admission.missed(run.served, now_s, run.ticket.asked)
            self._end(run)
            actions.append(Answer(run.submit.request, run.answer(), run.timeline(now_s)))

    def _enqueue(self, run: ChainRun, work: Work, now_s: float) -> None:
        step, submit, inputs = work.step, run.submit, work.inputs
        stage = run.served.stages[step.place]
        route, deadline_s = stage.route, submit.deadline_s
        if now_s + route.floor_s > deadline_s:
            raise too_late(route, now_s, deadline_s)
        seq = next(self._ids)
        key: Hashable = seq
        if step.bound.spec.batches:
            # What may share a batch: the same rows, outputs, version and parameters.
            alike = tuple([(t.name, t.datatype, t.shape[1:]) for t in inputs])
            parameters = tuple(sorted(submit.parameters.items())) if submit.parameters else ()
            key = (alike, step.wanted, submit.version, parameters)
        # What is owed does not wait for others to share its batches.
        launch_by_s = now_s if run.ticket.priority == FIRST else deadline_s - route.tail_s
        order = (run.ticket.priority, launch_by_s, seq, 0)
        latest_s = deadline_s - route.floor_s
        entry = Entry(run, stage, step, inputs, work.rows, key, order, latest_s, now_s)
        self._admission.counted(run.ticket, step.place, work.rows)
        self._waiting.add(entry, now_s)

    def _install(self, route: ChainRoute) -> None:
        """New requests take this route; stages of replaced routes go when they are empty."""
        self._served[route.bound.name] = served(route, self._stages)
        self._plan_machines()
        current = {id(module) for chain in self._served.values() for module in chain.route.modules}
        for key, stage in list(self._stages.items()):
            if key not in current and not stage.collector.rows:
                del self._stages[key]

    def _plan_machines(self) -> None:
        """Tell the pool how many machines the plans of all chains have."""
        needed: dict[str, float] = {}
        for chain in self._served.values():
            for module in chain.route.modules:
                for kind, machines in module.machines.items():
                    needed[kind] = needed.get(kind, 0.0) + machines
        self._pool.planned_for(needed)

    def _fail(
        self, run: ChainRun, error: RequestError, now_s: float, actions: list[Action]
    ) -> None:
        if run.submit.request in self._runs:
            if error.kind is ErrorKind.DEADLINE and not run.ticket.in_doubt:
                self._admission.missed(run.served, now_s, run.ticket.asked)
            self._end(run)
            actions.append(_failed(run.submit.request, error, run.timeline(now_s, error)))

    def _end(self, run: ChainRun) -> None:
        """Take a request out of every table; batches that hold its rows will ignore them."""
        chain = run.submit.chain
        del self._runs[run.submit.request]
        left = self._per_chain.pop(chain) - 1
        if left:
            self._per_chain[chain] = left
        self._admission.ended(run.ticket)
        for entry in run.entries:
            self._waiting.discard(entry)
        run.entries.clear()

    # -- launching --------------------------------------------------------------------------

    def _settle(self, now_s: float, actions: list[Action]) -> None:
        """Give up what is late, launch what can go, and say when to look again."""
        waiting, running = self._waiting, self._running
        if running.look_s <= now_s:
            for since_s, number, batch in running.due(now_s):
                self._look_at(number, batch, since_s, now_s, actions)
        elif self._wake_s < inf and not waiting.changed(now_s):
            return
        for entry in waiting.late(now_s):
            if self._retries.gives_way(entry):
                continue
            error = too_late(entry.stage.route, now_s, entry.run.submit.deadline_s)
            self._fail(entry.run, error, now_s, actions)
        while (choice := waiting.choose(now_s)) is not None:
            actions.append(self._execute(*choice, now_s))
        at_s, look_s = waiting.look_s(), running.look_s
        if look_s < at_s:
            at_s = look_s
        if at_s < self._wake_s:
            self._wake_s = at_s
            actions.append(Wake(at_s))

    def _execute(self, stage: Stage, offer: Offer, now_s: float) -> Execute:
        route, spec, machine = stage.route, stage.route.bound.spec, offer.machine
        pieces = offer.take()
        rows = 0
        latest_s = inf
        for piece in pieces:
            rows += piece.count
            entry = piece.entry
            if entry.latest_s < latest_s:
                latest_s = entry.latest_s
            self._admission.launched(entry.run.ticket, entry.step.place, piece.count)
        first = pieces[0].entry
        inputs = batch_inputs(pieces, rows, batches=spec.batches)
        outputs = first.step.wanted
        if first.run.served.route.bound.direct:
            # Only a model called by its own name sees the client's version and parameters.
            submit = first.run.submit
            name = submit.request_id if len(pieces) == 1 else ""
            call = ModelCall(spec.name, inputs, outputs, submit.version, name, submit.parameters)
        else:
            call = ModelCall(spec.name, inputs, outputs)
        batch = next(self._ids)
        timeout_s, overdue_s = self._pool.started(machine, route, rows, batch, now_s)
        # When the first of them is late, or about when they may have to be tried elsewhere.
        deadline_s = latest_s + route.floor_s
        look_s = deadline_s + TIE_S
        overdue_at_s = now_s + overdue_s
        if overdue_at_s < look_s:
            look_s = deadline_s - route.tail_s - overdue_s - route.beyond_s
            if look_s < overdue_at_s:
                look_s = overdue_at_s
        made = Batch(machine, stage, offer.lot, pieces, rows, now_s)
        self._running.add(batch, made, look_s)
        stage.collector.launched(offer, batch, machine.ends_s[batch])
        return Execute(batch, machine.name, call, rows, timeout_s)

    # -- what comes back --------------------------------------------------------------------

    def _release(self, batch_id: int) -> Batch:
        batch = self._running.pop(batch_id)
        model, overdue = batch.stage.route.model, batch.overdue
        self._pool.ended(batch.machine, model, batch_id, overdue=overdue)
        if not overdue:
            batch.stage.collector.ended(batch.lot, batch_id)
        return batch

    def _batch_done(self, event: BatchDone, now_s: float, actions: list[Action]) -> None:
        batch = self._release(event.batch)
        try:
            per_piece = batch.split(event.outputs)
        except BackendError as error:
            self._batch_failed(batch, error, now_s, actions, garbled=True)
            return
        took_s = now_s - batch.started_s
        self._pool.succeeded(batch.machine, batch.stage.route, batch.rows, took_s)
        for piece, outputs in zip(batch.pieces, per_piece, strict=True):
            entry = piece.entry
            if not entry.alive:
                continue
            if entry.race:
                self._retries.won(entry)
            entry.run.spans.append(batch.span(piece, now_s))
            self._rows_done(entry, piece.start, piece.count, outputs, now_s, actions)

    def _rows_done(
        self,
        entry: Entry,
        first: int,
        count: int,
        outputs: tuple[Tensor, ...] | None,
        now_s: float,
        actions: list[Action],
    ) -> None:
        run, step, start = entry.run, entry.step, entry.base + first
        if run.submit.stream and outputs is not None and (part := run.partial(step, outputs)):
            actions.append(Partial(run.submit.request, start, part))
        try:
            complete = run.rows_done(step, start, count, outputs)
        except RequestError as error:
            self._fail(run, error, now_s, actions)
            return
        if complete:
            if self._leasing:
                actions.append(Passed(run.submit.request, step.bound.spec.name))
            if len(run.entries) == 1:
                run.entries.clear()
            else:
                run.entries = [other for other in run.entries if other.step is not step]
            self._advance(run, now_s, actions)

    def _batch_failed(
        self,
        batch: Batch,
        error: RequestError,
        now_s: float,
        actions: list[Action],
        *,
        garbled: bool = False,
    ) -> None:
        lost = garbled or is_lost(error)
        error = for_requests(error)
        if lost and self._pool.broke(batch.machine, batch.stage.route.model, now_s):
            actions.append(Broken(batch.machine.name, batch.stage.route.model, error.message))
        for piece in batch.pieces:
            entry = piece.entry
            if not entry.alive or self._retries.goes_on(batch, piece, now_s, lost=lost):
                continue
            entry.run.spans.append(batch.span(piece, now_s))
            self._give_up(entry, piece.start, piece.count, error, now_s, actions)

    def _give_up_stranded(self, now_s: float, actions: list[Action]) -> None:
        """What failed, and was to be tried on a machine that has its model no more."""
        again = [e for run in self._runs.values() for e in run.entries if e.failed_on and e.waiting]
        for entry in again:
            if not entry.waiting or not self._retries.is_stranded(entry):
                continue
            first, left = entry.taken, entry.waiting
            self._waiting.discard(entry)
            if self._retries.gives_way(entry):
                continue
            self._admission.launched(entry.run.ticket, entry.step.place, left)
            self._give_up(entry, first, left, stranded(entry), now_s, actions)

    def _give_up(
        self,
        entry: Entry,
        first: int,
        count: int,
        error: RequestError,
        now_s: float,
        actions: list[Action],
    ) -> None:
        """Rows that are computed nowhere: nulls where they may be skipped, or else their request
        fails.
        """
        if entry.step.bound.module.on_error != "skip":
            self._fail(entry.run, error, now_s, actions)
            return
        if entry.race:
            self._retries.won(entry)
        self._rows_done(entry, first, count, None, now_s, actions)

    def _look_at(
        self, number: int, batch: Batch, since_s: float, now_s: float, actions: list[Action]
    ) -> None:
        """Give up rows that are late; the others are tried elsewhere if the batch is overdue."""
        for piece in batch.pieces:
            run = piece.entry.run
            if piece.entry.alive and now_s > (deadline_s := run.submit.deadline_s):
                self._fail(run, timed_out(batch, now_s, deadline_s), now_s, actions)
        if alive := [piece.entry for piece in batch.pieces if piece.entry.alive]:
            look_s = self._retries.look_at(number, batch, alive, since_s, now_s)
            self._running.again(number, look_s)


def _failed(request: int, error: RequestError, timeline: Timeline) -> Fail:
    """Without where it was raised: those frames hold the actions of which it becomes a part, a
    cycle for the garbage collector, which stops everything for 15 ms every 400 refusals.
    """
    return Fail(request, error.with_traceback(None), timeline)
