"""Residency under whatever order of requests, outcomes, faults and corrections Hypothesis finds.

The machine below plays the Tritons: it keeps its own book of what was asked of them, in bytes, and
of what was granted, and holds every action against it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, assume, settings
from hypothesis import Phase as Stage
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paceline.residency import events as ev
from paceline.residency.ledger import Footprint, Phase
from paceline.residency.residency import Residency
from paceline.residency.state import Limits

MODELS = ("a", "b", "c", "d", "e")
MACHINES = ("m1", "m2")
BLOCKS = {"shared": 40, "more": 25}


@dataclass
class Book:
    """What a machine holds, as it was asked: model -> (own bytes, instances), and its operation."""

    budget: int
    held: dict[str, tuple[int, int]] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    unloads: dict[str, int] = field(default_factory=dict)
    shrinks: dict[str, int] = field(default_factory=dict)
    leaked: set[str] = field(default_factory=set)
    recycling: bool = False

    def used(self, blocks: dict[str, dict[str, int]]) -> int:
        there = {key: size for model in self.held for key, size in blocks[model].items()}
        return sum(own * n for own, n in self.held.values()) + sum(there.values())


@dataclass
class Request:
    steps: list[str]
    deadline: float
    granted: bool = False
    at: int = 0


class Play(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.r = Residency(Limits(most_loads=2))
        self.books: dict[str, Book] = {}
        self.own: dict[str, int] = {}
        self.blocks: dict[str, dict[str, int]] = {}
        self.requests: dict[int, Request] = {}
        self.refused = 0
        self.next = 0

    @initialize(
        own=st.lists(st.integers(5, 60), min_size=len(MODELS), max_size=len(MODELS)),
        blocks=st.lists(
            st.sets(st.sampled_from(sorted(BLOCKS))), min_size=len(MODELS), max_size=len(MODELS)
        ),
        budget=st.integers(60, 250),
        machines=st.integers(1, 2),
        keep=st.sampled_from((None, 3.0)),
    )
    def begin(
        self,
        own: list[int],
        blocks: list[set[str]],
        budget: int,
        machines: int,
        keep: float | None,
    ) -> None:
        self.budget = budget
        for model, size, keys in zip(MODELS, own, blocks, strict=True):
            self.own[model] = size
            self.blocks[model] = {key: BLOCKS[key] for key in keys}
            footprint = Footprint(size, self.blocks[model])
            instances = {name: 1 + len(model + name) % 2 for name in MACHINES}
            self.tell(ev.Declare(model, footprint, instances))
        self.tell(ev.ChainUp("chain", {"a": 5.0, "b": 1.0}, keep_alive_s=keep))
        for name in MACHINES[:machines]:
            self.up(name)

    # -- what happens -----------------------------------------------------------------------

    @rule(
        steps=st.lists(st.sampled_from(MODELS), min_size=1, max_size=3, unique=True),
        budget=st.sampled_from((0.5, 5.0, 1e6)),
        priority=st.integers(0, 1),
    )
    def enter(self, steps: list[str], budget: float, priority: int) -> None:
        self.next += 1
        request = Request(steps, self.now + budget)
        self.requests[self.next] = request
        needs = tuple(
            ev.Need(model, in_s=0.1 * i, after_s=0.1 * (3 - i)) for i, model in enumerate(steps)
        )
        self.tell(ev.Enter(self.next, needs, request.deadline, priority))

    def running(self) -> list[int]:
        return [number for number, request in self.requests.items() if request.granted]

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def finish_step(self, data: Any) -> None:
        self.step(data.draw(st.sampled_from(self.running())))

    def step(self, number: int) -> None:
        request = self.requests[number]
        model = request.steps[request.at]
        request.at += 1
        over = request.at == len(request.steps)
        request.granted = False
        self.tell(ev.Passed(number, model))
        if over:
            del self.requests[number]
            self.tell(ev.Leave(number))
        else:
            self.tell(ev.Reach(number, request.steps[request.at]))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        number = data.draw(st.sampled_from(sorted(self.requests)))
        del self.requests[number]
        self.tell(ev.Leave(number))

    def under_way(self, kind: str) -> list[tuple[str, str]]:
        return [
            (name, model)
            for name, book in sorted(self.books.items())
            for model in sorted(getattr(book, kind))
            if model not in book.leaked
        ]

    @precondition(lambda self: self.under_way("loads"))
    @rule(data=st.data(), how=st.sampled_from(("done", "done", "twice", "failed", "hung")))
    def load_ends(self, data: Any, how: str) -> None:
        name, model = data.draw(st.sampled_from(self.under_way("loads")))
        self.end_load(name, model, how)

    def end_load(self, name: str, model: str, how: str) -> None:
        book = self.books[name]
        operation = book.loads.pop(model)
        growing = operation < 0
        operation = abs(operation)
        if growing and model in book.shrinks:
            book.held[model] = (book.held[model][0], book.shrinks.pop(model))
        if how in ("done", "twice") or growing:
            own = None
            if how == "twice" and not growing:
                own = self.own[model] = min(2 * self.own[model], 200)
                for other in self.books.values():
                    if model in other.held:
                        other.held[model] = (own, other.held[model][1])
            self.tell(ev.LoadDone(operation, name, model, own))
        elif how == "failed":
            del book.held[model]
            self.tell(ev.LoadFailed(operation, name, model, "on purpose"))
        else:
            self.tell(ev.LoadHung(operation, name, model, "on purpose"))

    @precondition(lambda self: self.under_way("unloads"))
    @rule(data=st.data(), stuck=st.sampled_from((False, False, False, True)))
    def unload_ends(self, data: Any, stuck: bool) -> None:
        name, model = data.draw(st.sampled_from(self.under_way("unloads")))
        self.end_unload(name, model, stuck)

    def end_unload(self, name: str, model: str, stuck: bool) -> None:
        book = self.books[name]
        operation = book.unloads.pop(model)
        if stuck:
            book.leaked.add(model)
            self.tell(ev.UnloadStuck(operation, name, model))
        else:
            del book.held[model]
            self.tell(ev.UnloadDone(operation, name, model))

    @rule(seconds=st.sampled_from((0.1, 1.0, 6.0)))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.tell(ev.Tick())

    @rule(
        interference=st.sampled_from(((), (1.0, 1.0), (1.5, 2.0), (3.0, 8.0))),
        bearable=st.sampled_from((0.5, 1.2, 1.7, 9.0)),
    )
    def pace(self, interference: tuple[float, ...], bearable: float) -> None:
        for name in self.books:
            self.tell(ev.Pace(name, interference, bearable))

    @rule(name=st.sampled_from(MACHINES))
    def down(self, name: str) -> None:
        assume(name in self.books)
        self.lose(name)

    def lose(self, name: str) -> None:
        del self.books[name]
        for request in self.requests.values():
            if request.granted:
                model = request.steps[request.at]
                request.granted = any(model in self.open(other) for other in self.books)
        self.tell(ev.MachineDown(name))

    @rule(name=st.sampled_from(MACHINES))
    def up(self, name: str) -> None:
        assume(name not in self.books)
        self.books[name] = Book(self.budget)
        self.tell(ev.MachineUp(name, self.budget, recyclable=True))

    @rule(model=st.sampled_from(MODELS))
    def withdraw_and_declare(self, model: str) -> None:
        self.tell(ev.Forget(model))
        self.tell(ev.Declare(model, Footprint(self.own[model], self.blocks[model])))

    # -- what it wants ----------------------------------------------------------------------

    def tell(self, event: ev.Event) -> None:
        for action in self.r.handle(event, now_s=self.now):
            match action:
                case ev.Load():
                    self.check_load(action)
                case ev.Unload():
                    self.check_unload(action)
                case ev.Grant():
                    request = self.requests[action.request]
                    assert request.steps[request.at] == action.model and not request.granted
                    places = [n for n in self.books if action.model in self.open(n)]
                    assert places, f"{action} while no machine holds it"
                    request.granted = True
                case ev.Refuse():
                    request = self.requests.pop(action.request)
                    assert request.steps[request.at] == action.model and not request.granted
                    self.refused += 1
                    self.r.handle(ev.Leave(action.request), now_s=self.now)
                case ev.Recycle():
                    self.check_recycle(action.machine)
                case ev.Wake():
                    assert action.at_s >= self.now, (action, self.now)

    def open(self, name: str) -> set[str]:
        """Models that a machine can serve, as far as it was asked."""
        book = self.books[name]
        busy = {model for model, operation in book.loads.items() if operation > 0}
        return set(book.held) - busy - set(book.unloads) - book.leaked

    def check_load(self, action: ev.Load) -> None:
        book = self.books[action.machine]
        before = book.held.get(action.model)
        assert action.model not in book.loads and action.model not in book.unloads
        was_over = book.used(self.blocks) > book.budget
        growing = before is not None
        shrinks = before is not None and action.instances < before[1]
        assert not was_over or shrinks, f"{action} while too much is held"
        instances = action.instances
        if shrinks and before is not None:
            instances, book.shrinks[action.model] = before[1], action.instances
        book.held[action.model] = (self.own[action.model], instances)
        book.loads[action.model] = -action.operation if growing else action.operation
        used = book.used(self.blocks)
        assert used <= book.budget, f"{action}: {used} of {book.budget} bytes"
        assert sum(op > 0 for op in book.loads.values()) <= 2

    def check_unload(self, action: ev.Unload) -> None:
        book = self.books[action.machine]
        assert action.model in book.held and action.model not in book.unloads
        users = [n for n, q in self.requests.items() if q.granted and q.steps[q.at] == action.model]
        others = [n for n in self.books if n != action.machine and action.model in self.open(n)]
        assert not users or others, f"{action} while {users} use it"
        book.loads.pop(action.model, None)
        book.unloads[action.model] = action.operation

    def check_recycle(self, name: str) -> None:
        book = self.books[name]
        assert book.leaked and not book.recycling, f"{name} is restarted for nothing"
        for request in self.requests.values():
            if request.granted:
                model = request.steps[request.at]
                others = [o for o in self.books if o != name and model in self.open(o)]
                assert others or model not in self.open(name)
        book.recycling = True

    @invariant()
    def the_ledger_says_what_the_machines_hold(self) -> None:
        for name, book in self.books.items():
            ledger = self.r.machines[name].ledger
            for held in ledger.held():
                assert held.model in book.held, (name, held)
                leaked = held.phase is Phase.LEAKED
                assert leaked == (held.model in book.leaked), (name, held)
            assert {held.model for held in ledger.held()} == set(book.held)

    def teardown(self) -> None:
        """Once everything works again, every request is served or refused, and soon."""
        if not self.own:
            return
        for name in MACHINES:
            if name not in self.books:
                self.up(name)
        for _ in range(400):
            if not self.requests:
                break
            self.now += 1.0
            for name, book in list(self.books.items()):
                if book.recycling:
                    self.lose(name)
                    self.up(name)
            for place in self.under_way("loads"):
                if place[1] in self.books[place[0]].loads:
                    self.end_load(*place, "done")
            for place in self.under_way("unloads"):
                if place[1] in self.books[place[0]].unloads:
                    self.end_unload(*place, False)
            for number in self.running():
                if number in self.requests:
                    self.step(number)
            self.tell(ev.Tick())
        assert not self.requests, f"{self.requests} were never answered: {self.r.machines}"
        assert len(self.r.leases) == 0


TestResidency = Play.TestCase
TestResidency.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    phases=(Stage.explicit, Stage.reuse, Stage.generate, Stage.shrink),
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
