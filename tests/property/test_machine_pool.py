"""Which machines are free, and when the others are, against looking at every machine each time."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paceline.core.bind import bind
from paceline.core.chain import Chain, Module, Source
from paceline.core.model import ModelSpec
from paceline.core.profile import Durations
from paceline.core.tensor import TensorSpec
from paceline.dispatch.machines import MachinePool
from paceline.dispatch.route import route_chain

NAMES = ("m0", "m1", "m2")
MODELS = ("a", "b")
X = TensorSpec("x", "UINT8", (1,))
CHAIN = Chain(
    "c",
    1.0,
    (X,),
    tuple(Module(model, model, {"x": Source(None, "x")}) for model in MODELS),
    {f"y_{model}": Source(model, "x") for model in MODELS},
)
DURATIONS = {
    model: {kind: Durations(((1, 0.1 * place), (8, 0.3 * place))) for kind in ("gpu", "cpu")}
    for place, model in enumerate(MODELS, start=1)
}
BOUND = bind(CHAIN, {model: ModelSpec(model, 8, (X,), (X,)) for model in MODELS})
ROUTES = {route.name: route for route in route_chain(BOUND, None, DURATIONS).modules}


class Pools(RuleBasedStateMachine):
    """A pool, and what was done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = MachinePool()
        self.now_s = 0.0
        self.running: list[tuple[str, str, int]] = []
        """Machine, model and batch."""
        self.batches = 0

    @rule(
        name=st.sampled_from(NAMES),
        slots=st.integers(0, 3),
        instances=st.dictionaries(st.sampled_from(MODELS), st.integers(0, 2)),
    )
    def up(self, name: str, slots: int, instances: dict[str, int]) -> None:
        self.pool.up(name, "cpu" if name == NAMES[0] else "gpu", slots, instances)

    @precondition(lambda self: not self.running)
    @rule(name=st.sampled_from(NAMES))
    def down(self, name: str) -> None:
        self.pool.down(name)

    @rule(seconds=st.sampled_from((0.0, 0.05, 0.3, 40.0)))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(model=st.sampled_from(MODELS), place=st.integers(0, 2), rows=st.integers(1, 8))
    def start(self, model: str, place: int, rows: int) -> None:
        free = self.pool.free(model, self.now_s)
        if place < len(free):
            machine = free[place][2]
            self.batches += 1
            self.pool.started(machine, ROUTES[model], rows, self.batches, self.now_s)
            self.running.append((machine.name, model, self.batches))

    @precondition(lambda self: bool(self.running))
    @rule(place=st.integers(0, 20), well=st.booleans())
    def end(self, place: int, well: bool) -> None:
        name, model, batch = self.running.pop(place % len(self.running))
        machine = self.pool.get(name)
        assert machine is not None
        self.pool.ended(machine, model, batch)
        if well:
            self.pool.succeeded(machine, ROUTES[model], 1, 0.2)
        else:
            self.pool.broke(machine, model, self.now_s)

    def slots(self, model: str, other: str) -> int:
        """Of machines that can run both."""
        return sum(
            machine.slots
            for machine in self.pool.all()
            if all(m in machine.lanes and machine.lanes[m].instances for m in (model, other))
        )

    @invariant()
    def answers_are_those_of_looking_at_every_machine(self) -> None:
        for model in MODELS:
            holding = [(m, m.lanes[model]) for m in self.pool.all() if model in m.lanes]
            free, probes_s = [], [inf]
            free_at_s: dict[str, list[float]] = {}
            for machine, lane in holding:
                idle = machine.slots - machine.busy
                if lane.quarantined:
                    probes_s += [at_s for at_s in [lane.blocked_until_s] if at_s > self.now_s]
                    can = lane.probed(self.now_s)
                else:
                    can = lane.running < lane.instances
                    most = min(machine.slots, lane.instances)
                    ends_s = sorted(max(self.now_s, end_s) for end_s in machine.ends_s.values())
                    now = min(most, max(0, idle))
                    rest = ends_s[max(0, -idle) : most - idle] if idle < most else []
                    if found := [self.now_s] * now + rest:
                        free_at_s.setdefault(machine.hardware, []).extend(found)
                if can and idle > 0:
                    free.append((machine.busy, machine.name))
            got = self.pool.free(model, self.now_s)
            assert [rank[:2] for rank in got] == sorted(free)
            by_kind = dict(self.pool.free_by_kind(model, self.now_s))
            assert by_kind == {kind: sorted(found) for kind, found in free_at_s.items()}
            whole = sorted(at_s for found in free_at_s.values() for at_s in found)
            assert list(self.pool.free_at_s(model, self.now_s)) == whole
            assert self.pool.next_probe_s(model, self.now_s) == min(probes_s)
            for other in MODELS:
                # A second of work of it is spread over the slots that can run it.
                both = self.slots(model, other)
                own = self.slots(model, model) * self.slots(other, other)
                part = self.pool.part_of((model, ()), (other, ()))
                assert part == pytest.approx(both / own if both else 0.0)


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
