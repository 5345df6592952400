"""Looking after Tritons that somebody else runs, against gRPC servers that behave as asked."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from paceline.fleet import RemoteTritons
from paceline.triton.client import TritonClient, TritonFleet


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Alive; those of its models that are `ready`, or that it is going away (None)."""

    def __init__(self, ready: Sequence[str] | None) -> None:
        self.ready = ready

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        assert request.ready
        if self.ready is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
        lines = [
            service_pb2.RepositoryIndexResponse.ModelIndex(name=name, version="1", state="READY")
            for name in self.ready or ()
        ]
        return service_pb2.RepositoryIndexResponse(models=lines)


@dataclass
class Machines:
    """What the controller knows: one machine that is up and holds models, none that it names where
    they come and go.
    """

    come_and_go: bool = False
    told_down: list[str] = field(default_factory=list)
    told_lost: list[Sequence[str]] = field(default_factory=list)

    def models_on(self, name: str) -> dict[str, int]:
        return {} if self.come_and_go else {"m": 1, "n": 2}

    def missing(self, name: str, ready: Collection[str]) -> list[str]:
        return [model for model in self.models_on(name) if model not in ready]

    def lost(self, name: str, models: Sequence[str]) -> None:
        self.told_lost.append(models)

    def is_up(self, name: str) -> bool:
        return not self.told_down

    def down(self, name: str) -> None:
        self.told_down.append(name)


@dataclass
class Controller:
    """The part of it that is told of machines."""

    machines: Machines = field(default_factory=Machines)
    told_up: list[str] = field(default_factory=list)

    async def machine_up(self, name: str) -> None:
        self.told_up.append(name)


@pytest.mark.parametrize(
    ("ready", "down", "up"),
    [("mn", [], []), ("n", [], []), ("", ["a"], ["a"]), (None, ["a"], [])],
    ids=["has its models", "lost one", "restarted, empty", "goes between two questions"],
)
async def test_a_look_tells_what_became_of_a_machine(
    ready: str | None, down: list[str], up: list[str], tmp_path: Path
) -> None:
    controller = Controller()
    server = await serving(Server(ready), 0)
    client = TritonClient(f"127.0.0.1:{server.port}", name="a")
    async with asyncio.timeout(30):
        await looking(controller, tmp_path).look_after(client)
    assert (controller.machines.told_down, controller.told_up) == (down, up)
    await client.close()
    await server.stop()


async def test_what_is_missing_at_two_looks_is_loaded_again(tmp_path: Path) -> None:
    controller = Controller()
    server = Server("m")
    running = await serving(server, 0)
    client = TritonClient(f"127.0.0.1:{running.port}", name="a")
    tritons = looking(controller, tmp_path)
    told: list[list[Sequence[str]]] = []
    async with asyncio.timeout(30):
        for server.ready in ("m", "n", "n", "m", "mn", "m"):
            await tritons.look_after(client)
            told.append(list(controller.machines.told_lost))
            controller.machines.told_lost.clear()
    assert told == [[], [], [["m"]], [], [], []]
    assert not controller.machines.told_down
    await client.close()
    await running.stop()


@pytest.mark.parametrize("come_and_go", [False, True])
async def test_a_machine_that_did_not_answer_for_a_while_is_used_again(
    come_and_go: bool, tmp_path: Path
) -> None:
    controller = Controller(Machines(come_and_go))
    tritons = looking(controller, tmp_path)
    server = await serving(Server("mn"), 0)
    client = TritonClient(f"127.0.0.1:{server.port}", name="a")
    await server.stop()
    async with asyncio.timeout(60):
        await tritons.look_after(client)
        await tritons.look_after(client)
        assert (controller.machines.told_down, controller.told_up) == (["a"], [])
        server = await serving(Server("mn"), server.port)
        while not controller.told_up:  # its connection comes back when it does
            await tritons.look_after(client)
    assert (controller.machines.told_down, controller.told_up) == (["a"], ["a"])
    await client.close()
    await server.stop()


@dataclass
class Serving:
    server: Any
    port: int

    async def stop(self) -> None:
        await self.server.stop(None)


async def serving(servicer: Server, port: int) -> Serving:
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return Serving(server, port)


def looking(controller: Controller, state: Path) -> RemoteTritons:
    return RemoteTritons(
        (),
        cast(Any, controller),
        TritonFleet(),
        model_repositories=(),
        state_directory=state,
        slots=1,
        budget_bytes=lambda hardware: 0.0,
        on_note=lambda text: None,
    )
