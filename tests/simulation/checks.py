"""Independent oracles over the events a dispatcher is told and the actions it answers.

`Oracle` follows a run from outside, with its own tables and `reference.evaluate`; it never looks
into the dispatcher. The first thing that must never happen raises `Violation`. The checks:

    once       every accepted request ends exactly once, cancelled ones not at all
    answer     the answer's bytes are the only right ones (so rows were gathered in order)
    batch      rows within the model's limit and the plan's target; of one kind and shape
    work       a row runs only when it is somebody's, once, and again only after a failure, or on a
               second machine when the first takes far longer than is normal
    capacity   batches per machine within its slots, per model within its instances
    dead       nothing starts for a request that has ended or cannot meet its deadline
    wake       a request is ended by its deadline, not by the next event after it, nor by the end
               of a batch that holds its rows
    reason     a request fails only for a reason that was there
    retry      rows that a machine lost are not sent to it again, and to three machines at most
    stream     streamed items are the right ones, each once, and all of them in the end
    drained    in the end nothing is left anywhere
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from tests.simulation.book import (
    BatchSeen,
    MachineSeen,
    Request,
    Row,
    Violation,
    module_of,
    row_keys,
    skips,
    with_nulls,
)
from tests.simulation.reference import RowKey, evaluate

from paceline.core.errors import ErrorKind
from paceline.core.profile import Durations
from paceline.core.tensor import Tensor, row_slice
from paceline.dispatch import (
    Action,
    Answer,
    BatchDone,
    BatchFailed,
    Cancel,
    ChainRoute,
    Dispatcher,
    Event,
    Execute,
    Fail,
    InstallChain,
    MachineDown,
    MachineUp,
    Partial,
    RemoveChain,
    Settled,
    Submit,
)
from paceline.sim.content import TracingModels

EPSILON_S = 1e-9
LATE_S = 1e-8
"""How long after its deadline a request may end: those that end with it are in time."""
OVERDUE_FACTOR, LEAST_OVERDUE_S = 3.0, 0.05
"""A batch must have taken so many times its p99, and so long, before it is tried elsewhere."""
LOST = (ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE)
MOST_TRIES = 3
OVERLOAD = (ErrorKind.DEADLINE, ErrorKind.QUEUE_FULL, ErrorKind.OVERLOADED)


class Oracle:
    """An observer of a `World`; see the module docstring."""

    def __init__(
        self,
        models: TracingModels,
        durations: Mapping[str, Mapping[str, Durations]],
        *,
        faults: bool,
        settle_s: float = 0.0,
    ) -> None:
        """`faults`: batches may fail, so that requests may fail for other reasons than load.

        `settle_s`: how long after an event its consequences may come.
        """
        self._models = models
        self._durations = durations
        self._faults = faults
        self._settle_s = settle_s
        self._routes: dict[str, ChainRoute] = {}
        self._requests: dict[int, Request] = {}
        self._refused: dict[int, ErrorKind] = {}
        self._rows: dict[RowKey, list[Row]] = {}
        self._machines: dict[str, MachineSeen] = {}
        self._batches: dict[int, BatchSeen] = {}
        self._starts = 0
        self._deadlines: list[tuple[float, int]] = []
        self.ends: dict[int, tuple[float, str]] = {}
        """When and how each request ended."""

    def __call__(self, due_s: float, now_s: float, event: Event, actions: Sequence[Action]) -> None:
        if not isinstance(event, Settled):  # that one brings what earlier events held back
            self._check_wake(due_s)
        self._told(now_s, event)
        for action in actions:
            match action:
                case Execute():
                    self._execute(now_s, action)
                case Answer():
                    self._answer(now_s, action)
                case Fail():
                    self._fail(now_s, action, event)
                case Partial():
                    self._partial(action)
        if isinstance(event, Submit) and event.request not in self._requests:
            self._require(event.request in self._refused, "once", f"{event.request} got no answer")

    def finish(self, dispatcher: Dispatcher) -> None:
        """After the last event: nothing may be left."""
        for request in self._requests.values():
            self._require(bool(request.end), "drained", f"{request.name} never ended")
        self._require(not self._batches, "drained", f"batches {sorted(self._batches)} still run")
        left = dispatcher.in_flight
        self._require(left == 0, "drained", f"the dispatcher holds {left} requests")
        self._require(not dispatcher.loads(), "drained", f"queues hold {dispatcher.loads()}")
        for machine in dispatcher.machines():
            self._require(machine.busy == 0, "drained", f"{machine.name} counts as busy")

    # -- events -----------------------------------------------------------------------------

    def _told(self, now_s: float, event: Event) -> None:
        match event:
            case InstallChain():
                self._routes[event.route.bound.name] = event.route
            case RemoveChain():
                self._routes.pop(event.chain, None)
            case Submit():
                self._submit(event)
            case Cancel():
                self._requests[event.request].end = "cancelled"
                self.ends[event.request] = (now_s, "cancelled")
            case BatchDone():
                self._ended(now_s, event.batch, good=self._good(event), lost=False)
            case BatchFailed():
                self._ended(now_s, event.batch, good=False, lost=event.error.kind in LOST)
            case MachineUp():
                known = self._machines.get(event.machine)
                if known is None:
                    self._starts += 1
                    known = MachineSeen(
                        event.hardware, 0, {}, {}, f"{event.machine}#{self._starts}"
                    )
                    self._machines[event.machine] = known
                known.slots, known.instances = event.slots, event.instances
            case MachineDown():
                self._machines.pop(event.machine, None)

    def _submit(self, event: Submit) -> None:
        route = self._routes.get(event.chain)
        if route is None:
            return
        expected = evaluate(route.bound, self._models, event.inputs, event.outputs)
        request = Request(event, route, expected)
        self._requests[event.request] = request
        for module, keys in expected.rows.items():
            request.rows[module] = [Row(request, module, i) for i in range(len(keys))]
            for key, row in zip(keys, request.rows[module], strict=True):
                self._rows.setdefault(key, []).append(row)
        heapq.heappush(self._deadlines, (event.deadline_s, event.request))

    def _good(self, event: BatchDone) -> bool:
        """Whether these outputs are what was asked for and what the model declares."""
        batch = self._batches[event.batch]
        if len(event.outputs) != len(batch.outputs):
            return False
        for name, tensor in zip(batch.outputs, event.outputs, strict=True):
            declared = batch.spec.output(name)
            axis = (len(batch.rows),) if batch.spec.batches else ()
            at = len(axis)
            if declared is None or not declared.accepts(tensor.shape[at:]):
                return False
            if tensor.shape[:at] != axis:
                return False
        return True

    def _ended(self, now_s: float, batch_id: int, *, good: bool, lost: bool) -> None:
        batch = self._batches.pop(batch_id)
        machine = self._machines.get(batch.machine)
        if machine is not None:
            machine.running.pop(batch_id, None)
        for row in batch.rows:
            row.on.remove(batch)
            row.done = row.done or good
            row.failed = row.failed or not good
            if lost:
                row.lost_on.add(batch.incarnation)

    def _check_wake(self, due_s: float) -> None:
        """Whoever is there past its deadline was forgotten: an event after it comes too late."""
        latest_s = due_s - self._settle_s - LATE_S
        while self._deadlines and self._deadlines[0][0] < latest_s:
            deadline_s, identity = heapq.heappop(self._deadlines)
            request = self._requests[identity]
            self._require(
                bool(request.end),
                "wake",
                f"{request.name} is there at {due_s}, it should have ended at {deadline_s}",
            )

    # -- actions ----------------------------------------------------------------------------

    def _execute(self, now_s: float, action: Execute) -> None:
        what = f"batch {action.batch} of {action.call.model} on {action.machine}"
        machine = self._machines.get(action.machine)
        self._require(machine is not None, "capacity", f"{what}: the machine is down")
        assert machine is not None
        machine.running[action.batch] = action.call.model
        self._require(
            len(machine.running) <= machine.slots,
            "capacity",
            f"{what}: {len(machine.running)} batches in {machine.slots} slots",
        )
        same = sum(model == action.call.model for model in machine.running.values())
        instances = machine.instances.get(action.call.model, 0)
        self._require(
            same <= instances, "capacity", f"{what}: {same} batches on {instances} instances"
        )
        rows = self._attribute(now_s, action, what)
        module = module_of(rows[0])
        known = self._durations[module.spec.name][machine.hardware]
        overdue_s = max(LEAST_OVERDUE_S, OVERDUE_FACTOR * known.slow_at(len(rows)))
        batch = self._batches[action.batch] = BatchSeen(
            action.machine,
            machine.incarnation,
            tuple(rows),
            action.call.outputs,
            module.spec,
            now_s + overdue_s - EPSILON_S,
        )
        for row in rows:
            self._check_batch(row, action, machine, len(rows), what)
            row.on.append(batch)

    def _check_batch(
        self, row: Row, action: Execute, machine: MachineSeen, rows: int, what: str
    ) -> None:
        request, module = row.request, module_of(row)
        tried = row.lost_on | {batch.incarnation for batch in row.on}
        self._require(
            machine.incarnation not in tried and len(tried) < MOST_TRIES,
            "retry",
            f"{what}: {request.name} {row.module}[{row.index}] was tried on {sorted(tried)}",
        )
        route = next(m for m in request.route.modules if m.bound.name == row.module)
        limit = min(module.spec.row_limit, route.batch_sizes.get(machine.hardware, 1 << 30))
        self._require(rows <= limit, "batch", f"{what}: {rows} rows, the limit is {limit}")
        wanted = request.expected.wanted[row.module]
        self._require(
            set(action.call.outputs) >= set(wanted),
            "batch",
            f"{what}: asks for {action.call.outputs}, {request.name} needs {wanted}",
        )
        if request.route.bound.direct:
            self._require(
                action.call.version == request.submit.version
                and dict(action.call.parameters) == dict(request.submit.parameters),
                "batch",
                f"{what}: version or parameters are not those of {request.name}",
            )

    def _attribute(self, now_s: float, action: Execute, what: str) -> list[Row]:
        """Whose rows these are: each must be a live request's, and due."""
        found: list[list[Row]] = []
        for key in row_keys(action, self._models.specs[action.call.model].batches):
            owners = self._rows.get(key, [])
            self._require(bool(owners), "work", f"{what}: a row that belongs to nobody")
            open_ = [r for r in owners if not r.request.end and not r.done]
            idle = [r for r in open_ if not r.on] or [
                r for r in open_ if len(r.on) == 1 and now_s >= r.on[0].overdue_s
            ]
            if not idle:
                states = [
                    f"{r.request.name} {r.module}[{r.index}] "
                    f"({r.request.end or ('done' if r.done else 'running')})"
                    for r in owners
                ]
                ended = all(r.request.end for r in owners)
                self._require(False, "dead" if ended else "work", f"{what}: {', '.join(states)}")
            found.append(idle)
        # Modules with one model may have rows alike (with no items, nearly all are).
        of_one = set.intersection(*({_kind(r) for r in idle} for idle in found)) if found else set()
        rows: list[Row] = []
        for idle in found:
            alike = [r for r in idle if _kind(r) == min(of_one)] if of_one else idle
            row = next((r for r in alike if r not in rows), None)
            self._require(row is not None, "work", f"{what}: a row twice in one batch")
            assert row is not None
            floor_s = self._floor_s(row.request, row.module)
            self._require(
                now_s + floor_s <= row.request.submit.deadline_s + EPSILON_S,
                "dead",
                f"{what}: {row.request.name} cannot finish by {row.request.submit.deadline_s} "
                f"at {now_s}, it needs {floor_s}",
            )
            rows.append(row)
        self._require(len(rows) == action.rows > 0, "batch", f"{what}: {action.rows} announced")
        kinds = {_kind(r) for r in rows}
        self._require(len(kinds) == 1, "batch", f"{what}: mixes {sorted(kinds)}")
        return rows

    def _floor_s(self, request: Request, start: str) -> float:
        """The least time from the launch of `start` to the chain's end, alone in its batches."""
        if not request.route.modules[0].floor_s and all(
            not m.floor_s for m in request.route.modules
        ):
            return 0.0  # installed without durations
        chain = request.route.bound.chain
        tails: dict[str, float] = {}
        for module in reversed(chain.modules):
            after = max((tails[child] for child in chain.children(module.name)), default=0.0)
            own = min(known.at(1) for known in self._durations[module.model].values())
            tails[module.name] = own + after
        return tails[start]

    def _answer(self, now_s: float, action: Answer) -> None:
        request = self._end(now_s, action.request, "answered")
        for rows in request.rows.values():
            for row in rows:
                self._require(
                    row.done or (row.failed and skips(row)),
                    "work",
                    f"{request.name} answered before {row.module}[{row.index}]",
                )
        if request.submit.stream:
            self._check_streamed(request)
        got = tuple((t.name, t.datatype, t.shape, bytes(t.data)) for t in action.outputs)
        if got == with_nulls(request, got):
            return
        wrong = [
            f"{g[0]}{list(g[2])} for {e[0]}{list(e[2])}"
            for g, e in zip(got, request.expected.answer, strict=False)
            if g != e
        ]
        self._require(False, "answer", f"{request.name}: wrong {'; '.join(wrong) or 'count'}")

    def _fail(self, now_s: float, action: Fail, event: Event) -> None:
        kind = action.error.kind
        if action.request not in self._requests:
            self._require(action.request not in self._refused, "once", f"{action.request} twice")
            self._require(
                kind is ErrorKind.UNKNOWN_MODEL, "reason", f"{action.request}: {action.error}"
            )
            self._refused[action.request] = kind
            self.ends[action.request] = (now_s, kind.value)
            return
        request = self._end(now_s, action.request, kind.value)
        self._require(self._faults or kind in OVERLOAD, "reason", f"{request.name}: {action.error}")
        if kind is ErrorKind.DEADLINE and not isinstance(event, (BatchFailed, Submit)):
            # As it was planned: one that is urgent may go so that those behind it are in time.
            need_s = max(max(m.tail_s, m.floor_s) for m in request.route.modules)
            deadline_s = request.submit.deadline_s
            self._require(
                now_s + need_s >= deadline_s - EPSILON_S,
                "reason",
                f"{request.name} failed at {now_s}: it needs {need_s}, by {deadline_s}",
            )

    def _partial(self, action: Partial) -> None:
        request = self._requests.get(action.request)
        self._require(
            request is not None and not request.end and request.submit.stream,
            "stream",
            f"items of {action.request}, which has ended or does not stream",
        )
        assert request is not None
        expected = {e[0]: Tensor(*e) for e in request.expected.answer}
        for got in action.outputs:
            count, whole = got.shape[0], expected[got.name]
            told = request.streamed.setdefault(got.name, set())
            items = set(range(action.start, action.start + count))
            self._require(
                not told & items, "stream", f"{request.name}: {got.name} {sorted(items)} twice"
            )
            told |= items
            right = row_slice(whole, action.start, count)
            self._require(
                bytes(right.data) == bytes(got.data) and right.shape == got.shape,
                "stream",
                f"{request.name}: wrong items {sorted(items)} of {got.name}",
            )

    def _check_streamed(self, request: Request) -> None:
        chain = request.route.bound.chain
        for name, *_ in request.expected.answer:
            source = chain.outputs[name].module
            if source is None or chain.module(source).for_each is None:
                continue
            told = len(request.streamed.get(name, ()))
            there = sum(row.done for row in request.rows[source])
            self._require(
                told == there, "stream", f"{request.name}: {told} of {there} items of {name}"
            )

    def _end(self, now_s: float, identity: int, how: str) -> Request:
        request = self._requests.get(identity)
        self._require(request is not None, "once", f"{how} request {identity}, which is unknown")
        assert request is not None
        self._require(
            not request.end, "once", f"{request.name} is {how} after it was {request.end}"
        )
        request.end = how
        self.ends[identity] = (now_s, how)
        return request

    def _require(self, holds: bool, check: str, message: str) -> None:
        if not holds:
            raise Violation(check, message)


def _kind(row: Row) -> tuple[str, str]:
    """Rows of one kind may share a batch."""
    return row.request.submit.chain, row.module
