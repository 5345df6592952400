"""Residency performed: the engine's requests, and repositories that load when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from math import inf

import pytest

from paceline.core.bind import BoundChain, bind, single_model_chain
from paceline.core.chain import Chain, Module, Source
from paceline.core.errors import ErrorKind, Rejected, RequestError, ResidencyError
from paceline.core.model import ModelSpec
from paceline.core.ports import ModelCall, ModelState, OnExecuted
from paceline.core.profile import ProfileRow
from paceline.core.request import InferAnswer, InferRequest
from paceline.core.tensor import Tensor, TensorSpec
from paceline.dispatch import route_chain
from paceline.runtime import residence
from paceline.runtime.engine import Engine
from paceline.runtime.interference import FORGOTTEN_S, LEAST_BATCHES, Interference
from paceline.runtime.machines import Machine, Machines
from paceline.runtime.placement import Share, Site

SPECS = {
    name: ModelSpec(name, 4, (TensorSpec("x", "INT8", (1,)),), (TensorSpec("x", "INT8", (1,)),))
    for name in ("a", "b", "c")
}
ENSEMBLE = ModelSpec("e", 4, SPECS["a"].inputs, SPECS["a"].outputs)
CHAIN = Chain(
    "chain",
    slo_s=60.0,
    inputs=(TensorSpec("x", "INT8", (1,)),),
    modules=(
        Module("first", "a", {"x": Source(None, "x")}),
        Module("second", "b", {"x": Source("first", "x")}),
    ),
    outputs={"x": Source("second", "x")},
)


class Echo:
    """An executor that answers what came in, when `gate` is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.running = asyncio.Event()

    def begin(self, machine: str, call: ModelCall, on_end: OnExecuted, *, timeout_s: float) -> bool:
        return False

    async def execute(
        self, machine: str, call: ModelCall, *, timeout_s: float
    ) -> tuple[Tensor, ...]:
        self.running.set()
        await self.gate.wait()
        given = call.inputs[0]
        return (Tensor("x", given.datatype, given.shape, b"".join(given.parts)),)


@dataclass
class Repository:
    """A Triton of models of ten bytes an instance; `told` is everything it was asked, in order."""

    told: list[str] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    processes: dict[str, int] = field(default_factory=dict)
    """Of each model, those that start too."""
    most: int = 0
    refused: set[str] = field(default_factory=set)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    made_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shared: dict[str, dict[str, int]] = field(default_factory=dict)
    """Blocks of each model, as far as they were found."""
    found: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()
        self.found.set()

    async def index(self) -> tuple[ModelState, ...]:
        return tuple(ModelState(name, "1", "READY") for name in sorted(self.held))

    async def instances(self) -> Mapping[str, int]:
        return dict.fromkeys(sorted(self.held), 1)

    async def spec(self, model: str) -> ModelSpec:
        return {**SPECS, "e": ENSEMBLE}[model]

    def compose(self, run: Module, spec: ModelSpec) -> None:
        raise AssertionError("there are no runs here")

    async def load(self, model: str, *, instances: int) -> None:
        self.told.append(f"load {model}" if instances == 1 else f"load {instances} {model}")
        self.held.add(model)
        self.processes[model] = instances
        self.changed.set()
        self.most = max(self.most, len(self.held))
        await self.gate.wait()
        if model in self.refused:
            self.held.discard(model)
            raise ResidencyError(f"{model} is not for loading")

    async def unload(self, model: str) -> None:
        self.told.append(f"unload {model}")
        await asyncio.sleep(0)
        self.held.discard(model)
        self.changed.set()

    def members(self, model: str) -> tuple[str, ...]:
        return self.made_of.get(model, ())

    async def repair(self, model: str, *, instances: int | None) -> None:
        raise AssertionError("nothing breaks here")

    async def measure(
        self, model: ModelSpec, hardware: str, *, on_progress: object = None
    ) -> tuple[ProfileRow, ...]:
        return ()

    def blocks(self, model: str) -> Mapping[str, int]:
        return self.shared.get(model, {}) if self.found.is_set() else {}

    async def find_blocks(self, model: str) -> None:
        await self.found.wait()

    def guessed_bytes(self, model: str, blocks: Mapping[str, int]) -> int:
        return 10

    def remember(self, model: str, own_bytes: int, blocks: Mapping[str, int]) -> None:
        pass

    async def measured_bytes(self, model: str, blocks: Mapping[str, int]) -> int | None:
        return 10 * self.processes.get(model, 1)

    async def server_bytes(self) -> int | None:
        return 10

    async def gone(self, model: str) -> bool:
        return model not in self.held


@dataclass
class Served:
    engine: Engine
    machines: Machines
    repository: Repository
    echo: Echo

    async def ask(self, name: str, *, budget_s: float | None = None) -> InferAnswer:
        shape = (1,) if name == "chain" else (1, 1)
        request = InferRequest(name, (Tensor("x", "INT8", shape, b"\7"),), budget_s=budget_s)
        async with asyncio.timeout(5):
            answer = await self.engine.infer(request)
        assert bytes(answer.outputs[0].data) == b"\7"
        return answer

    async def until(self, *held: str) -> None:
        """Until exactly one of these is in memory."""
        async with asyncio.timeout(5):
            while self.repository.held not in [{model} for model in held]:
                self.repository.changed.clear()
                await self.repository.changed.wait()


def bound() -> list[BoundChain]:
    return [*(single_model_chain(spec) for spec in SPECS.values()), bind(CHAIN, SPECS)]


async def serving(budget_bytes: float) -> Served:
    """A machine, and what is made of its models' requests."""
    echo, repository = Echo(), Repository()
    engine = Engine(echo)
    machines = Machines(engine, Share())
    site = Site("m", "cpu", 2)
    machines.add(
        Machine(site, repository, repository, budget_bytes=budget_bytes, memory=repository)
    )
    for model in sorted(SPECS):
        assert await machines.load(model) == SPECS[model]
    for chain in bound():
        engine.install(route_chain(chain))
    machines.announce("m")
    return Served(engine, machines, repository, echo)


async def test_an_ensemble_that_was_there_before_models_came_and_went_comes_back() -> None:
    served = await serving(inf)
    repository, machines = served.repository, served.machines
    repository.made_of["e"] = ("a", "b")
    await machines.load("e")
    served.engine.install(route_chain(single_model_chain(ENSEMBLE)))
    machines.announce("m")
    machines.residence.engage()
    assert machines.residence.needed_bytes("e") == 20, "what it is made of"
    assert "e" not in machines.residence.state.models
    machines.down("m")
    repository.held.clear()
    repository.told.clear()
    await machines.up("m")
    await served.ask("e")
    order = [repository.told.index(f"load {model}") for model in ("a", "b", "e")]
    assert max(order) == order[-1], repository.told
    await machines.close()
    await served.engine.close()


@pytest.fixture
async def one_fits() -> AsyncIterator[Served]:
    """A machine with room for one of three models."""
    served = await serving(15.0)
    yield served
    await served.machines.close()
    await served.engine.close()


@pytest.mark.parametrize("members", [("a",), ("a", "b")])
async def test_an_ensemble_comes_after_what_it_is_made_of_and_goes_before_it(
    members: tuple[str, ...],
) -> None:
    """As a fused model's members do, called by their own names; room for two of three models."""
    served = await serving(25.0)
    repository = served.repository
    repository.made_of["e"] = members
    assert await served.machines.load("e") == ENSEMBLE
    served.engine.install(route_chain(single_model_chain(ENSEMBLE)))
    for others in (("c", "b"), ("c", "a")):
        for name in (*others, "e"):
            await served.ask(name)
        assert {"e", *members} <= repository.held and len(repository.held - {"e"}) <= 2
    held: set[str] = set()
    for told in repository.told:
        match told.split():
            case ["load", model]:
                assert model != "e" or held.issuperset(members), repository.told
                held.add(model)
            case ["unload", model]:
                assert model not in members or "e" not in held, repository.told
                held.discard(model)
    assert repository.told.count("load e") >= 2, "it went, and came back"
    await served.machines.unload("e")
    assert "e" not in repository.held and held.issuperset(members)
    await served.machines.close()
    await served.engine.close()


async def test_more_models_than_fit_are_served_and_never_more_are_held_than_fit(
    one_fits: Served,
) -> None:
    await asyncio.gather(*(one_fits.ask(name) for name in ("a", "b", "c", "chain", "a", "chain")))
    assert one_fits.repository.most == 1
    counts = one_fits.machines.residence.state.counts
    assert counts.misses >= 3 and counts.evictions >= 3 and counts.refused == 0


async def test_a_model_that_does_not_load_fails_its_requests_with_the_reason(
    one_fits: Served,
) -> None:
    await one_fits.ask("a")
    one_fits.repository.refused.add("b")
    with pytest.raises(RequestError, match="b is not for loading") as caught:
        await one_fits.ask("b")
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    await one_fits.ask("a")


async def test_a_deadline_that_the_load_would_miss_is_refused_at_once_and_the_load_begun(
    one_fits: Served,
) -> None:
    await one_fits.ask("a")
    one_fits.machines.residence.state.models["b"].load_s = 3.0
    with pytest.raises(Rejected, match="loading model 'b' takes about 3000 ms") as caught:
        await one_fits.ask("b", budget_s=1.0)
    assert caught.value.retry_after_s == pytest.approx(3.0, abs=0.1)
    await one_fits.until("b")
    await one_fits.ask("b", budget_s=1.0)


async def test_a_model_is_unloaded_only_when_its_last_batch_has_ended(one_fits: Served) -> None:
    await one_fits.ask("a")
    one_fits.echo.gate.clear()
    one_fits.echo.running.clear()
    using = asyncio.create_task(one_fits.ask("a"))
    await one_fits.echo.running.wait()
    waiting = asyncio.create_task(one_fits.ask("b"))
    for _ in range(20):
        await asyncio.sleep(0)
    assert one_fits.repository.held == {"a"}
    one_fits.echo.gate.set()
    await asyncio.gather(using, waiting)
    assert one_fits.repository.told[-2:] == ["unload a", "load b"]


async def test_a_clients_unload_waits_for_others_requests_and_frees_the_memory(
    one_fits: Served,
) -> None:
    await one_fits.ask("c")
    one_fits.echo.gate.clear()
    one_fits.echo.running.clear()
    using = asyncio.create_task(one_fits.ask("c"))
    await one_fits.echo.running.wait()
    unloading = asyncio.create_task(one_fits.machines.unload("c"))
    await asyncio.sleep(0)
    one_fits.echo.gate.set()
    await using
    await unloading
    assert "c" not in one_fits.repository.held
    await one_fits.machines.load("c")
    await one_fits.ask("c")


async def test_a_machine_that_comes_back_empty_is_filled_again(one_fits: Served) -> None:
    await one_fits.ask("a")
    one_fits.machines.down("m")
    one_fits.repository.held.clear()
    waiting = asyncio.create_task(one_fits.ask("b"))
    await asyncio.sleep(0)
    await one_fits.machines.up("m")
    await waiting
    assert one_fits.repository.most == 1


async def test_a_load_under_way_fails_with_its_machine_so_that_it_keeps_nobody_waiting(
    one_fits: Served,
) -> None:
    one_fits.repository.gate.clear()
    loading = asyncio.create_task(one_fits.machines.load("b"))
    measuring = asyncio.create_task(_use(one_fits.machines, "a", "m"))
    await one_fits.until("a", "b")
    one_fits.machines.down("m")
    with pytest.raises(ResidencyError, match="no Triton is up; try again"):
        await asyncio.wait_for(loading, 5)
    with pytest.raises(ResidencyError, match="Triton m is down; try again"):
        await asyncio.wait_for(measuring, 5)
    with pytest.raises(ResidencyError, match="no Triton is up"):
        await asyncio.wait_for(one_fits.machines.load("a"), 5)
    one_fits.repository.held.clear()
    one_fits.repository.gate.set()
    await one_fits.machines.up("m")
    assert await one_fits.machines.load("b") == SPECS["b"]
    await one_fits.ask("b")


async def _use(machines: Machines, model: str, machine: str) -> None:
    async with machines.using(model, machine):
        pass


async def test_a_cold_model_has_one_instance_until_the_answer_and_serves_while_others_start() -> (
    None
):
    echo, repository = Echo(), Repository()
    engine = Engine(echo)
    machines = Machines(engine, Share())
    site = Site("m", "cpu", 2)
    machines.add(Machine(site, repository, repository, budget_bytes=30.0, memory=repository))
    await machines.load("a")
    engine.install(route_chain(single_model_chain(SPECS["a"])))
    machines.announce("m")
    served = Served(engine, machines, repository, echo)
    machines.down("m")
    repository.held.clear()
    await machines.grow_to({"m": {"a": 2}})
    echo.gate.clear()
    waiting = asyncio.create_task(served.ask("a"))
    await asyncio.sleep(0)
    await machines.up("m")
    await echo.running.wait()
    assert repository.told == ["load a", "load a"]
    repository.gate.clear()
    echo.gate.set()
    await waiting
    await served.ask("a")
    assert repository.told[2:] == ["load 2 a"] and machines.placed["m"] == {"a": 1}
    async with machines.using("a", "m"):
        pass
    assert machines.residence.state.models["a"].footprint.own_bytes == 10, "not two as one"
    loading = asyncio.create_task(machines.load("a"))  # as a client asks for it
    for _ in range(20):
        await asyncio.sleep(0)
    assert repository.told[2:] == ["load 2 a"], "one load of a model at a time"
    repository.gate.set()
    await loading
    assert repository.told[2:] == ["load 2 a"] * 2 and machines.placed["m"] == {"a": 2}
    await served.ask("a")
    await machines.close()
    await engine.close()


async def test_what_a_triton_holds_already_counts_and_is_taken_over() -> None:
    echo, repository = Echo(), Repository(held={"b"})
    engine = Engine(echo)
    machines = Machines(engine, Share())
    site = Site("m", "cpu", 2)
    machines.add(Machine(site, repository, repository, budget_bytes=15.0, memory=repository))
    await machines.adopt(["m"])
    for model in ("a", "b", "c"):
        await machines.load(model)
    assert repository.most == 1, "another Paceline left b there: it goes before a comes"
    assert repository.told[:2] == ["unload b", "load a"]
    await machines.close()
    await engine.close()


async def test_models_that_come_and_go_from_now_on_keep_the_instances_that_were_planned() -> None:
    echo, repository = Echo(), Repository()
    engine = Engine(echo)
    machines = Machines(engine, Share())
    machines.add(Machine(Site("m", "cpu", 2), repository, repository, memory=repository))
    await machines.grow_to({"m": {"a": 2}}, first=True)
    machines.announce("m")
    machines.residence.engage()
    for _ in range(20):
        await asyncio.sleep(0)
    assert repository.told == ["load 2 a"] and machines.placed["m"] == {"a": 2}
    await machines.close()
    await engine.close()


@pytest.mark.parametrize("in_time", [True, False])
async def test_a_load_waits_a_moment_for_what_its_manifest_says_and_learns_it_later(
    in_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten bytes each, and a hundred that they share; a store that does not answer holds up none."""
    monkeypatch.setattr(residence, "FIND_WITHIN_S", 5.0 if in_time else 0.01)
    echo, repository = Echo(), Repository()
    repository.shared = {name: {"backbone": 100} for name in ("a", "b")}
    repository.found.clear()
    engine = Engine(echo)
    machines = Machines(engine, Share())
    site = Site("m", "cpu", 2)
    machines.add(Machine(site, repository, repository, budget_bytes=125.0, memory=repository))
    ledger = machines.residence.state.machines["m"].ledger
    if in_time:
        loading = asyncio.create_task(machines.load("a"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not repository.told, "what it takes is not known yet"
        repository.found.set()
        await loading
    else:
        repository.gate.clear()
        loading = asyncio.create_task(machines.load("a"))
        async with asyncio.timeout(5):
            await repository.changed.wait()
        assert ledger.used_bytes == 10, "it was not waited for"
        repository.found.set()
        for _ in range(20):
            await asyncio.sleep(0)
        assert ledger.used_bytes == 110, "while it loads"
        repository.gate.set()
        await loading
    await machines.load("b")
    assert repository.told == ["load a", "load b"] and ledger.used_bytes == 120
    await machines.close()
    await engine.close()


async def test_a_keep_alive_unloads_what_is_not_used_where_memory_has_no_bound() -> None:
    echo, repository = Echo(), Repository()
    engine = Engine(echo)
    machines = Machines(engine, Share())
    machines.add(Machine(Site("m", "cpu", 2), repository, repository, memory=repository))
    for model in sorted(SPECS):
        await machines.load(model)
    machines.announce("m")
    served = Served(engine, machines, repository, echo)
    assert not machines.residence.engaged
    kept = Chain("chain", 60.0, CHAIN.inputs, CHAIN.modules, CHAIN.outputs, keep_alive_s=0.02)
    engine.install(route_chain(bind(kept, SPECS)))
    machines.keep([kept])
    await served.until("c")
    assert repository.held == {"c"}, "c is no chain's: it stays"
    await served.ask("chain")
    await served.until("c")
    await machines.close()
    await engine.close()


def test_interference_is_how_long_the_slowest_batches_take_under_so_many_loads() -> None:
    seen = Interference()
    for _ in range(LEAST_BATCHES):
        seen.count("m", "a", 2, 0.1, 0, 1.0)
    assert seen.factors("m", 4, 1.0) == (1.0, 1.0, 1.0, 1.0)
    for turn in range(10 * LEAST_BATCHES):
        seen.count("m", "a", 2, 0.3 if turn % 10 == 0 else 0.1, 2, 2.0)
    assert seen.factors("m", 4, 2.0) == pytest.approx((2.0, 3.0, 4.0, 5.0)), "the mean is 1.2"
    for _ in range(LEAST_BATCHES):
        seen.count("m", "a", 2, 0.11, 1, 3.0)
    assert seen.factors("m", 4, 3.0) == pytest.approx((1.1, 3.0, 4.0, 5.0)), "one load has room"
    assert seen.factors("other", 2, 3.0) == (1.0, 1.0)
    assert seen.factors("m", 2, 2.0 + FORGOTTEN_S) == pytest.approx((1.1, 1.2)), "tried again"
