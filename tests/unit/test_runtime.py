"""The engine and the machines behind it, over executors and repositories driven by hand."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest

from paceline.config import parse_chain
from paceline.core.bind import single_model_chain
from paceline.core.chain import Module, Source
from paceline.core.errors import (
    BackendError,
    ErrorKind,
    Rejected,
    RequestError,
    ResidencyError,
    RunError,
)
from paceline.core.model import ModelSpec
from paceline.core.ports import ModelCall, ModelState, OnExecuted
from paceline.core.profile import ProfileRow
from paceline.core.request import InferAnswer, InferRequest
from paceline.core.tensor import Tensor, TensorSpec
from paceline.dispatch import route_chain
from paceline.runtime.engine import Engine, EngineLimits
from paceline.runtime.machines import Machine, Machines
from paceline.runtime.placement import Share, Site

ECHO = ModelSpec("echo", 4, (TensorSpec("x", "INT8", (1,)),), (TensorSpec("y", "INT8", (1,)),))


class Hands:
    """An executor whose batches end when the test says so."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[tuple[ModelCall, asyncio.Future[None]]] = asyncio.Queue()

    def begin(self, machine: str, call: ModelCall, on_end: OnExecuted, *, timeout_s: float) -> bool:
        return False

    async def execute(
        self, machine: str, call: ModelCall, *, timeout_s: float
    ) -> tuple[Tensor, ...]:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.calls.put_nowait((call, ended))
        await ended
        given = call.inputs[0]
        return (Tensor("y", given.datatype, given.shape, b"".join(given.parts)),)

    async def next(self) -> tuple[ModelCall, asyncio.Future[None]]:
        async with asyncio.timeout(5):
            return await self.calls.get()


class Begun(Hands):
    """An executor without tasks: what `outcome` says, one pass of the event loop later."""

    def __init__(self, outcome: bytes | Exception) -> None:
        super().__init__()
        self.outcome = outcome
        self.begun = 0

    def begin(self, machine: str, call: ModelCall, on_end: OnExecuted, *, timeout_s: float) -> bool:
        self.begun += 1
        outcome = self.outcome
        if isinstance(outcome, bytes):
            found = (Tensor("y", "INT8", call.inputs[0].shape, outcome),)
            asyncio.get_running_loop().call_soon(on_end, found)
        elif isinstance(outcome, BackendError):
            asyncio.get_running_loop().call_soon(on_end, outcome)
        else:
            raise outcome
        return True


@dataclass
class Repository:
    """One Triton's models, by the port; `may_end` is set when a repair may end."""

    may_end: asyncio.Event = field(default_factory=asyncio.Event)
    repairs: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    loaded: dict[str, int] = field(default_factory=dict)
    composed: list[str] = field(default_factory=list)
    made_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gone: bool = False

    async def index(self) -> tuple[ModelState, ...]:
        if self.gone:
            raise ResidencyError("it is gone")
        return (ModelState("echo", "1", "READY"),)

    async def instances(self) -> Mapping[str, int]:
        return self.loaded

    async def spec(self, model: str) -> ModelSpec:
        return ECHO

    def compose(self, run: Module, spec: ModelSpec) -> None:
        self.composed.append(run.model)

    async def load(self, model: str, *, instances: int) -> None:
        if model in self.refused:
            raise ResidencyError(f"{model} is not for loading")
        self.loaded[model] = instances

    async def unload(self, model: str) -> None:
        self.loaded.pop(model, None)

    def members(self, model: str) -> tuple[str, ...]:
        return self.made_of.get(model, ())

    async def repair(self, model: str, *, instances: int | None) -> None:
        self.repairs.append(model)
        await self.may_end.wait()

    async def measure(
        self, model: ModelSpec, hardware: str, *, on_progress: object = None
    ) -> tuple[ProfileRow, ...]:
        return ()


def request(value: int) -> InferRequest:
    return InferRequest("echo", (Tensor("x", "INT8", (1, 1), bytes([value])),))


def serving(hands: Hands, max_in_flight_bytes: int = 1 << 30) -> Engine:
    engine = Engine(hands, limits=EngineLimits(max_in_flight_bytes=max_in_flight_bytes))
    engine.install(route_chain(single_model_chain(ECHO)))
    engine.machine_up("m", "cpu", 1, {"echo": 1})
    return engine


async def test_settled_waits_for_the_last_accepted_request_of_the_chain() -> None:
    hands = Hands()
    engine = serving(hands)
    assert await engine.settled("echo", timeout_s=0)
    one, two = (asyncio.create_task(engine.infer(request(value))) for value in (1, 2))
    _, first = await hands.next()
    engine.remove("echo")
    settled = asyncio.create_task(engine.settled("echo", timeout_s=5))
    first.set_result(None)
    await one
    assert not settled.done(), "the queued one was accepted too"
    _, second = await hands.next()
    second.set_result(None)
    assert bytes((await two).outputs[0].data) == b"\x02"
    assert await settled
    await engine.close()


async def test_batches_are_begun_without_a_task_and_reported_as_others() -> None:
    hands = Begun(b"\x09")
    engine = serving(hands)
    told: list[tuple[str, int]] = []
    engine.watch(on_batch=lambda model, rows, took_s: told.append((model, rows)))
    answer = await engine.infer(request(1))
    assert bytes(answer.outputs[0].data) == b"\x09"
    assert (told, hands.begun, hands.calls.empty()) == ([("echo", 1)], 1, True)
    hands.outcome = BackendError("the model says no")
    with pytest.raises(RequestError, match="the model says no"):
        await engine.infer(request(1))
    assert await engine.drain(timeout_s=0)
    await engine.close()


async def test_a_batch_that_cannot_be_begun_for_a_bug_is_executed_in_a_task() -> None:
    hands = Begun(RuntimeError("a bug"))
    engine = serving(hands)
    task = asyncio.create_task(engine.infer(request(3)))
    _, ended = await hands.next()
    ended.set_result(None)
    assert bytes((await task).outputs[0].data) == b"\x03"
    await engine.close()


async def test_settled_gives_up_when_its_time_is_over() -> None:
    hands = Hands()
    engine = serving(hands)
    task = asyncio.create_task(engine.infer(request(1)))
    _, ended = await hands.next()
    assert not await engine.settled("echo", timeout_s=0.01)
    ended.set_result(None)
    await task
    await engine.close()


async def test_more_bytes_than_the_limit_are_refused_and_given_back_when_answered() -> None:
    hands = Hands()
    engine = serving(hands, max_in_flight_bytes=1)
    task = asyncio.create_task(engine.infer(request(1)))
    _, ended = await hands.next()
    with pytest.raises(RequestError, match="maximum bytes") as refused:
        await engine.infer(request(2))
    assert refused.value.kind is ErrorKind.QUEUE_FULL
    assert isinstance(refused.value, Rejected) and refused.value.retry_after_s > 0
    ended.set_result(None)
    await task
    again = asyncio.create_task(engine.infer(request(3)))
    (await hands.next())[1].set_result(None)
    await again
    await engine.close()


async def test_draining_refuses_what_is_new_and_waits_for_what_was_accepted() -> None:
    hands = Hands()
    engine = serving(hands)
    task = asyncio.create_task(engine.infer(request(1)))
    _, ended = await hands.next()
    drained = asyncio.create_task(engine.drain(timeout_s=5))
    await asyncio.sleep(0)
    with pytest.raises(RequestError, match="shutting down"):
        await engine.infer(request(2))
    ended.set_result(None)
    await task
    assert await drained
    await engine.close()


async def test_a_begun_request_is_told_once_how_it_ended_and_a_cancelled_one_is_not() -> None:
    hands = Hands()
    engine = serving(hands, max_in_flight_bytes=3)
    told: dict[int, list[object]] = {value: [] for value in (1, 2, 3, 4)}
    numbers = {value: engine.begin(request(value), told[value].append) for value in told}
    (refused,) = told[4]
    assert isinstance(refused, RequestError) and refused.kind is ErrorKind.QUEUE_FULL
    engine.cancel(numbers[2])
    engine.cancel(numbers[2])
    _, ended = await hands.next()
    ended.set_result(None)
    call, ended = await hands.next()
    assert b"".join(call.inputs[0].parts) == b"\x03", "the cancelled one is not executed"
    drained = asyncio.create_task(engine.drain(timeout_s=5))
    ended.set_result(None)
    assert await drained
    for value in (1, 3):
        (answer,) = told[value]
        assert isinstance(answer, InferAnswer)
        assert bytes(answer.outputs[0].data) == bytes([value])
    engine.cancel(numbers[1])
    assert told[2] == [] and engine.dispatcher.in_flight == 0
    await engine.close()


async def test_neither_answers_nor_refusals_leave_anything_to_the_garbage_collector() -> None:
    """It stops everything while it looks: for 15 ms every 400 refusals, when they were cycles."""
    engine = serving(Begun(b"\x09"))
    ended: list[str] = []

    def told(outcome: InferAnswer | RequestError) -> None:
        ended.append(outcome.kind.value if isinstance(outcome, RequestError) else "answered")

    def ask() -> None:
        engine.begin(request(1), told)
        engine.begin(replace(request(1), budget_s=1e-9), told)
        engine.begin(replace(request(1), chain="unknown"), told)

    ask()
    await asyncio.sleep(0.01)
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            ask()
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        left = gc.collect()
    finally:
        gc.enable()
    assert sorted(set(ended)) == ["answered", "deadline", "unknown_model"] and len(ended) == 63
    assert left < 20, "not a cycle each"
    await engine.close()


async def test_a_caller_that_breaks_when_told_does_not_keep_others_from_being_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hands = Hands()
    engine = serving(hands)
    told: list[object] = []

    def broken(outcome: object) -> None:
        raise ValueError("the connection is gone")

    engine.begin(request(1), told.append)
    engine.begin(request(2), broken)
    engine.begin(request(3), told.append)
    for _ in range(2):
        (await hands.next())[1].set_result(None)
    assert await engine.drain(timeout_s=5)
    assert [type(outcome) for outcome in told] == [InferAnswer, InferAnswer]
    assert "telling how request 2 to echo ended" in caplog.text
    await engine.close()


def machines(engine: Engine, repository: Repository) -> Machines:
    found = Machines(engine, Share())
    found.add(Machine(Site("m", "cpu", 1), repository, repository))
    found.placed["m"] = {"echo": 1}
    return found


async def test_no_batch_is_sent_to_a_model_while_it_is_repaired() -> None:
    hands, repository = Hands(), Repository()
    engine = serving(hands)
    repaired = machines(engine, repository)
    engine.watch(on_broken=repaired.broken)
    repaired.announce("m")
    lost = asyncio.create_task(engine.infer(request(1)))
    _, ended = await hands.next()
    ended.set_exception(BackendError("Stub is not healthy", kind=ErrorKind.UNAVAILABLE))
    with pytest.raises(RequestError, match="not healthy"):
        await lost
    waiting = asyncio.create_task(engine.infer(request(2)))
    await asyncio.sleep(0)
    assert repository.repairs == ["echo"] and hands.calls.empty()
    (known,) = engine.dispatcher.machines()
    assert known.lanes["echo"].instances == 0, "no back-off makes it a candidate"
    repository.may_end.set()
    _, ended = await hands.next()
    ended.set_result(None)
    assert bytes((await waiting).outputs[0].data) == b"\x02"
    await repaired.close()
    await engine.close()


async def test_a_triton_that_is_back_is_used_without_the_models_that_do_not_load_again() -> None:
    hands, repository = Hands(), Repository(refused={"bad"})
    engine = serving(hands)
    found = machines(engine, repository)
    found.placed["m"] = {"echo": 2, "bad": 1}
    assert await found.up("m") == ["bad"]
    assert repository.loaded == {"echo": 2} and found.placed["m"] == {"echo": 2}
    assert found.is_up("m")
    repository.refused.add("echo")
    found.down("m")
    with pytest.raises(ResidencyError):
        await found.up("m")
    assert not found.is_up("m") and found.placed["m"] == {"echo": 2}, "to be tried again"
    await engine.close()


async def test_a_triton_that_dies_while_it_loads_keeps_what_it_is_to_load() -> None:
    repository = Repository(refused={"bad"})
    engine = serving(Hands())
    found = machines(engine, repository)
    found.placed["m"] = {"bad": 1, "echo": 2}
    found.down("m")
    repository.gone = True
    with pytest.raises(ResidencyError, match="gone"):
        await found.up("m")
    assert not found.is_up("m") and found.placed["m"] == {"bad": 1, "echo": 2}
    repository.gone = False
    repository.refused.clear()
    assert await found.up("m") == [] and repository.loaded == {"bad": 1, "echo": 2}
    await engine.close()


RUN = Module(
    "first+second",
    "a-run",
    {"inputs.x": Source(None, "x")},
    members=(
        Module("first", "echo", {"x": Source(None, "x")}),
        Module("second", "more", {"x": Source("first", "y")}),
    ),
)
"""Its model's name is before those of its members."""

RUN_SPEC = ModelSpec("a-run", 4, ECHO.inputs, ECHO.outputs)


async def test_a_run_is_loaded_after_its_members_also_on_a_triton_that_joins_or_is_back() -> None:
    engine, repository, other = serving(Hands()), Repository(), Repository()
    found = machines(engine, repository)
    found.placed["m"] = {}
    found.compose(RUN, RUN_SPEC)
    wanted = {"a-run": 2, "echo": 2, "more": 3}
    found.announce("m")
    await found.grow_to({"m": wanted})
    assert list(repository.loaded) == ["echo", "more", "a-run"]
    assert found.placed["m"] == wanted and found.missing("m", {"more"}) == ["echo"]
    with pytest.raises(ResidencyError, match="no model of a repository"):
        await found.load("a-run")
    repository.loaded.clear()
    found.down("m")
    await found.up("m")
    assert list(repository.loaded) == ["echo", "more", "a-run"]
    found.add(Machine(Site("n", "cpu", 1), other, other))
    assert other.composed == repository.composed == ["a-run"]
    other.refused = {"a-run"}
    with pytest.raises(RunError) as refused:
        await found.grow_to({"n": wanted}, first=True)
    assert refused.value.model == "a-run"
    await found.drop("a-run")
    assert repository.loaded == {"echo": 2, "more": 3} and "a-run" not in found.placed["m"]
    await engine.close()


@pytest.mark.parametrize(("broken", "repaired"), [("a-run", ["echo", "more"]), ("more", ["more"])])
async def test_members_and_runs_are_out_of_use_while_any_of_them_is_repaired(
    broken: str, repaired: list[str]
) -> None:
    engine, repository = serving(Hands()), Repository()
    found = machines(engine, repository)
    found.compose(RUN, RUN_SPEC)
    found.placed["m"] = {"a-run": 1, "echo": 1, "more": 1}
    found.announce("m")
    found.broken("m", broken, "in ensemble 'a-run', Stub process 'more_0_0' is not healthy.")
    found.broken("m", broken, "is not healthy")
    await asyncio.sleep(0)
    (known,) = engine.dispatcher.machines()
    out_of_use = {name for name, lane in known.lanes.items() if not lane.instances}
    assert out_of_use == {*repaired, "a-run"}
    await asyncio.sleep(0)
    assert repository.repairs == repaired
    (task,) = [t for t in asyncio.all_tasks() if t.get_name() == f"repair {', '.join(repaired)}"]
    repository.may_end.set()
    await task
    assert "a-run" in repository.loaded, "loaded again, after its members"
    assert all(lane.instances for lane in known.lanes.values())
    await engine.close()


@pytest.mark.parametrize("placed", [{}, {"both": 1}], ids=["came with them", "by itself"])
async def test_where_a_fused_model_died_it_is_repaired_not_the_names_of_its_members(
    placed: dict[str, int],
) -> None:
    engine, repository = serving(Hands()), Repository()
    repository.made_of = {"first": ("both",), "second": ("both",)}
    found = machines(engine, repository)
    found.placed["m"] = {"first": 1, "second": 1, "more": 1, **placed}
    found.announce("m")
    found.broken("m", "first", "in ensemble 'first', Stub process 'both_0_0' is not healthy.")
    found.broken("m", "second", "in ensemble 'second', Stub process 'both_0_0' is not healthy.")
    (known,) = engine.dispatcher.machines()
    in_use = {name for name, lane in known.lanes.items() if lane.instances}
    assert in_use == {"more"}
    (task,) = [t for t in asyncio.all_tasks() if t.get_name() == "repair both"]
    repository.may_end.set()
    await task
    assert repository.repairs == ["both"]
    assert list(repository.loaded) == ["first", "second"], "after it"
    await engine.close()


async def test_what_a_machine_has_lost_is_loaded_again_and_not_used_before() -> None:
    engine, repository = serving(Hands()), Repository()
    found = machines(engine, repository)
    found.placed["m"] = {"echo": 2, "more": 1}
    found.announce("m")
    (known,) = engine.dispatcher.machines()
    found.lost("m", ["echo"])
    assert found.missing("m", ()) == ["more"], "the other is being loaded"
    assert {name for name, lane in known.lanes.items() if not lane.instances} == {"echo"}
    (task,) = [t for t in asyncio.all_tasks() if t.get_name() == "repair echo"]
    await task
    assert repository.loaded == {"echo": 2} and not repository.repairs
    assert known.lanes["echo"].instances == 2
    await engine.close()


def test_a_chain_knows_the_line_of_each_of_its_keys() -> None:
    chain = parse_chain(
        "chain: c\nslo_ms: 5\ninputs:\n  x: {dtype: INT8, shape: [1]}\nmodules:\n  a:\n"
        "    model: m\n    inputs: {x: inputs.x}\noutputs: {y: a.y}\n",
        name="c.yaml",
    )
    assert chain.where("modules.a.model") == "c.yaml:7"
    assert chain.where("modules.a.inputs.z") == "c.yaml:8"
    assert chain.where("nowhere") == "c.yaml:1"
