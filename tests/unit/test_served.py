"""Chains as they are served: when runs are loaded, left out and let go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import pytest
from tests.unit.test_runtime import Hands

from paceline.core.bind import BoundChain, bind
from paceline.core.chain import Chain, Module, Source
from paceline.core.errors import PlanError, ResidencyError
from paceline.core.model import ModelSpec
from paceline.core.ports import ModelState
from paceline.core.profile import Hardware, ProfileRow
from paceline.core.request import InferRequest
from paceline.core.runs import runs_of
from paceline.core.tensor import Tensor, TensorSpec
from paceline.dispatch import route_chain
from paceline.planner.problem import Options
from paceline.planner.replan import Traffic
from paceline.planner.task import PlanTask
from paceline.runtime.catalogue import Catalogue
from paceline.runtime.controller import Controller
from paceline.runtime.engine import Engine
from paceline.runtime.machines import Machine, Machines
from paceline.runtime.placement import Share, Site
from paceline.runtime.plan_process import Planned, perform
from paceline.runtime.provisioning import Provisioning
from paceline.runtime.served import Provision, ServedChains
from paceline.runtime.statistics import Statistics

X, Y = TensorSpec("x", "INT8", (1,)), TensorSpec("y", "INT8", (1,))
SPECS = {name: ModelSpec(name, 4, (X,), (Y,)) for name in ("one", "two")}
CHAIN = Chain(
    "pair",
    60.0,
    (X,),
    (
        Module("first", "one", {"x": Source(None, "x")}),
        Module("second", "two", {"x": Source("first", "y")}),
    ),
    {"y": Source("second", "y")},
    rate_rps=1.0,
    runs="auto",
)
(RUN,) = runs_of(CHAIN)


@dataclass
class Repository:
    """One Triton's models, which all take as long."""

    refused: set[str] = field(default_factory=set)
    loaded: dict[str, int] = field(default_factory=dict)
    composed: set[str] = field(default_factory=set)
    unloaded: list[str] = field(default_factory=list)

    async def index(self) -> tuple[ModelState, ...]:
        return tuple(ModelState(name, "1", "READY") for name in SPECS)

    async def instances(self) -> Mapping[str, int]:
        return self.loaded

    async def spec(self, model: str) -> ModelSpec:
        return SPECS[model]

    def compose(self, run: Module, spec: ModelSpec) -> None:
        self.composed.add(run.model)

    async def load(self, model: str, *, instances: int) -> None:
        assert model in SPECS or model in self.composed
        if model in self.refused:
            raise ResidencyError(f"{model} is not for loading")
        self.loaded[model] = instances

    async def unload(self, model: str) -> None:
        del self.loaded[model]
        self.unloaded.append(model)

    def members(self, model: str) -> tuple[str, ...]:
        return ()

    async def repair(self, model: str, *, instances: int | None) -> None:
        raise AssertionError("nothing breaks here")

    async def measure(
        self, model: ModelSpec, hardware: str, *, on_progress: object = None
    ) -> tuple[ProfileRow, ...]:
        return (ProfileRow(model.name, hardware, 4, 0.01),)


class Server:
    """What a controller has, with one Triton that executes nothing by itself."""

    def __init__(self, repository: Repository) -> None:
        self.hands = Hands()
        self.engine = Engine(self.hands)
        self.machines = Machines(self.engine, Share())
        self.machines.add(Machine(Site("m", "cpu", 1), repository, repository))
        self.catalogue = Catalogue()
        for spec in SPECS.values():
            self.catalogue.add_model(spec)
        self.provisioning = Provisioning(
            self.machines, {"cpu": Hardware("cpu", 1.0)}, Options(), lambda step: None
        )
        self.changing = asyncio.Lock()
        self.served = ServedChains(
            self.engine, self.machines, self.provisioning, self.catalogue, self.changing
        )

    async def provide(self, chain: Chain) -> Provision:
        """`chain`, planned, loaded and installed."""
        async with self.changing:
            declared: BoundChain = bind(chain, SPECS)
            await self.provisioning.profile([declared])
            traffic = self.provisioning.assumed([chain])
            provision = await self.served.provide([declared], traffic, first=True)
            assert provision is not None
            self.catalogue.add(declared)
            (bound,) = provision.chains
            self.engine.install(route_chain(bound, provision.plan.chain(chain.name)))
            self.machines.announce("m")
            self.served.install(provision.chains)
            return provision


def modules(provision: Provision) -> list[str]:
    return [module.name for module in provision.chains[0].modules]


async def test_a_run_that_a_triton_does_not_load_is_left_out_and_loaded_where_it_can_be() -> None:
    repository = Repository(refused={RUN.model})
    server = Server(repository)
    assert modules(await server.provide(CHAIN)) == ["first", "second"]
    assert repository.loaded == {"one": 1, "two": 1}
    repository.refused.clear()
    server.provisioning.refused.clear()
    assert modules(await server.provide(CHAIN)) == [RUN.name]
    assert repository.loaded == {"one": 1, "two": 1, RUN.model: 1}
    assert server.served.runs() == [RUN]
    await server.engine.close()


async def test_modules_stay_apart_where_models_come_and_go() -> None:
    repository = Repository()
    server = Server(repository)
    assert modules(await server.provide(replace(CHAIN, keep_alive_s=60.0))) == ["first", "second"]
    assert repository.composed == set()
    await server.engine.close()


async def test_nothing_is_loaded_for_a_plan_that_is_not_worth_it() -> None:
    repository = Repository()
    server = Server(repository)
    declared = bind(CHAIN, SPECS)
    await server.provisioning.profile([declared])
    traffic = server.provisioning.assumed([CHAIN])
    found = await server.served.provide([declared], traffic, worth=lambda plan, cost: False)
    assert found is None and repository.loaded == {}
    await server.engine.close()


async def test_a_run_goes_after_the_requests_that_were_accepted_with_it() -> None:
    repository = Repository()
    server = Server(repository)
    await server.provide(CHAIN)
    request = InferRequest("pair", (Tensor("x", "INT8", (1,), b"\x07"),))
    answer = asyncio.create_task(server.engine.infer(request))
    call, ended = await server.hands.next()
    assert (call.model, [tensor.name for tensor in call.inputs]) == (RUN.model, ["inputs.x"])
    assert modules(await server.provide(replace(CHAIN, runs="off"))) == ["first", "second"]
    (going,) = [t for t in asyncio.all_tasks() if t.get_name() == f"unload {RUN.model}"]
    assert RUN.model in repository.loaded, "a request is under way with it"
    ended.set_result(None)
    assert bytes((await answer).outputs[0].data) == b"\x07"
    await going
    assert repository.loaded == {"one": 1, "two": 1}
    assert RUN.model not in server.machines.placed["m"] and server.served.runs() == []
    await server.engine.close()


async def test_a_run_that_is_wanted_again_before_it_went_stays() -> None:
    repository = Repository()
    server = Server(repository)
    for runs in ("auto", "off", "auto"):
        await server.provide(replace(CHAIN, runs=runs))
    for task in [t for t in asyncio.all_tasks() if t.get_name() == f"unload {RUN.model}"]:
        await task
    assert repository.loaded == {"one": 1, "two": 1, RUN.model: 1} and not repository.unloaded
    server.served.remove("pair")
    (going,) = [t for t in asyncio.all_tasks() if t.get_name() == f"unload {RUN.model}"]
    await going
    assert repository.loaded == {"one": 1, "two": 1}
    await server.served.close()
    await server.engine.close()


async def test_a_chain_is_deleted_also_where_the_others_cannot_be_planned_anew() -> None:
    repository, fails = Repository(), False

    async def planner(task: PlanTask) -> Planned:
        if fails:
            raise PlanError("no process to plan in")
        return perform(task)

    engine = Engine(Hands())
    controller = Controller(engine, Statistics(), hardware=None, planner=planner)
    controller.add_machine(Machine(Site("m", "cpu", 1), repository, repository))
    one, two = replace(CHAIN, name="one-chain"), replace(CHAIN, name="two-chain")
    await controller.start([one, two])
    fails = True
    assert await controller.delete("one-chain")
    assert [chain.name for chain in controller.chains()] == ["two-chain"]
    assert [chain.chain for chain in controller.current_plan().chains] == ["two-chain"]
    with pytest.raises(PlanError, match="no process"):
        await controller.plan([one])
    await controller.close()
    await engine.close()


class Disk:
    """Writes when it is let to."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.kept: list[str] = []

    def changed(self, applied: Iterable[Chain], deleted: Collection[str]) -> None:
        self.begun.set()
        assert self.may_end.wait(10)
        self.kept += [*(chain.name for chain in applied), *deleted]

    def traffic(self, chains: Iterable[Chain]) -> Traffic:
        return Traffic()

    def keep_traffic(self, traffic: Traffic, chains: Iterable[Chain]) -> None:
        raise AssertionError("nothing was replanned")


async def test_nobody_waits_for_the_disk_and_what_it_has_is_served_whoever_was_cancelled() -> None:
    repository, disk = Repository(), Disk()
    engine = Engine(Hands())
    controller = Controller(engine, Statistics(), hardware=None, memory=disk)
    controller.add_machine(Machine(Site("m", "cpu", 1), repository, repository))
    await controller.start([])
    applied = asyncio.create_task(controller.apply([CHAIN]))
    assert await asyncio.to_thread(disk.begun.wait, 10)
    applied.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not applied.done() and not controller.chains()
    disk.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await applied
    assert disk.kept == ["pair"] and [chain.name for chain in controller.chains()] == ["pair"]
    assert await controller.delete("pair") and disk.kept == ["pair", "pair"]
    assert not controller.chains()
    await controller.close()
    await engine.close()
