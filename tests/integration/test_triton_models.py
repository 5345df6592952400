"""Executing and managing models on a real Triton."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import psutil
import pytest
from tests.integration.models import DATATYPES

from paceline.core.errors import BackendError, ErrorKind, ResidencyError
from paceline.core.ports import ModelCall
from paceline.core.tensor import BatchTensor, Tensor, TensorSpec, encode_bytes
from paceline.triton.client import TritonClient, TritonFleet
from paceline.triton.config import instances_of
from paceline.triton.launcher import LocalTriton
from paceline.triton.repository import TritonRepository

pytest_plugins = ["tests.integration.triton_fixtures"]
pytestmark = pytest.mark.integration

ROWS = {
    "BOOL": bytes([0, 1, 1]),
    "FP16": struct.pack("<3e", 0.5, -2.0, 1024.0),
    "BF16": bytes([0x80, 0x3F, 0x00, 0xC0, 0x20, 0x41]),
    "FP32": struct.pack("<3f", 0.1, -2.5, 3e38),
    "FP64": struct.pack("<3d", 0.1, -2.5, 1e300),
    "UINT8": bytes([0, 1, 255]),
    "INT8": bytes([0, 127, 128]),
    "UINT16": struct.pack("<3H", 0, 1, 65535),
    "INT16": struct.pack("<3h", 0, -32768, 32767),
    "UINT32": struct.pack("<3I", 0, 1, 2**32 - 1),
    "INT32": struct.pack("<3i", 0, -(2**31), 2**31 - 1),
    "UINT64": struct.pack("<3Q", 0, 1, 2**64 - 1),
    "INT64": struct.pack("<3q", 0, -(2**63), 2**63 - 1),
    "BYTES": encode_bytes([b"", b"abc", bytes(range(256)) * 5]),
}


def add_call(rows: int = 1, *, a: int = 1, b: int = 2) -> ModelCall:
    inputs = tuple(
        BatchTensor(name, "INT32", (rows, 16), (struct.pack("<16i", *[value] * 16),) * rows)
        for name, value in (("a", a), ("b", b))
    )
    return ModelCall("add", inputs, ("sum",))


async def test_every_datatype_comes_back_as_it_was_sent_in_parts(
    triton_client: TritonClient, triton_repository: TritonRepository
) -> None:
    await triton_repository.load("identity", instances=1)
    names = tuple(f"x_{datatype.lower()}" for datatype in DATATYPES)
    inputs = tuple(
        BatchTensor(name, datatype, (2, 3), (ROWS[datatype], memoryview(ROWS[datatype])))
        for name, datatype in zip(names, DATATYPES, strict=True)
    )
    outputs = await triton_client.execute(
        ModelCall("identity", inputs, tuple(reversed(names))), timeout_s=10
    )
    assert [tensor.name for tensor in outputs] == list(reversed(names))
    for tensor in outputs:
        datatype = tensor.name.removeprefix("x_").upper()
        assert tensor == Tensor(tensor.name, datatype, (2, 3), ROWS[datatype] * 2)


async def test_a_model_without_batch_axis_takes_variable_axes_and_empty_tensors(
    triton_client: TritonClient, triton_repository: TritonRepository
) -> None:
    await triton_repository.load("transpose", instances=1)
    spec = await triton_repository.spec("transpose")
    assert not spec.batches
    assert spec.inputs == (TensorSpec("x", "FP32", (-1, -1)),)
    data = struct.pack("<6f", *range(6))
    call = ModelCall("transpose", (BatchTensor("x", "FP32", (2, 3), (data,)),), ("y",))
    (y,) = await triton_client.execute(call, timeout_s=10)
    assert (y.shape, struct.unpack("<6f", y.data)) == ((3, 2), (0, 3, 1, 4, 2, 5))
    empty = ModelCall("transpose", (BatchTensor("x", "FP32", (0, 3), ()),), ("y",))
    (y,) = await triton_client.execute(empty, timeout_s=10)
    assert (y.shape, y.data) == ((3, 0), b"")


async def test_a_large_tensor_is_above_grpcs_usual_limit_and_still_passes(
    triton_client: TritonClient, triton_repository: TritonRepository
) -> None:
    await triton_repository.load("transpose", instances=1)
    data = bytes(1500 * 1000 * 4)
    call = ModelCall("transpose", (BatchTensor("x", "FP32", (1500, 1000), (data,)),), ("y",))
    (y,) = await triton_client.execute(call, timeout_s=20)
    assert (y.shape, len(y.data)) == ((1000, 1500), len(data))


async def test_without_named_outputs_all_come_back(
    triton_client: TritonClient, triton_repository: TritonRepository
) -> None:
    await triton_repository.load("add", instances=1)
    call = add_call(2, a=40)
    (total,) = await triton_client.execute(ModelCall("add", call.inputs, ()), timeout_s=10)
    assert struct.unpack("<32i", total.data) == (42,) * 32


async def test_failures_keep_tritons_words_and_get_their_kind(
    triton_client: TritonClient, triton_repository: TritonRepository
) -> None:
    await triton_repository.load("add", instances=1)
    await triton_repository.load("failing", instances=1)
    good = add_call()
    x = BatchTensor("x", "FP32", (1, 4), (bytes(16),))
    cases = [
        (ModelCall("nope", good.inputs, ()), ErrorKind.UNKNOWN_MODEL, "unknown model: 'nope'"),
        (ModelCall("add", good.inputs[:1], ()), ErrorKind.INVALID, "expected 2 inputs but got 1"),
        (ModelCall("add", good.inputs, ("z",)), ErrorKind.INVALID, "unexpected inference output"),
        (add_call(9), ErrorKind.INVALID, "batch-size must be <= 8"),
        (
            ModelCall("add", good.inputs, ("sum",), version="7"),
            ErrorKind.UNKNOWN_MODEL,
            "version 7",
        ),
        (ModelCall("failing", (x,), ("y",)), ErrorKind.INVALID, "deliberate failure"),
    ]
    for call, kind, words in cases:
        with pytest.raises(BackendError, match=words) as caught:
            await triton_client.execute(call, timeout_s=10)
        assert caught.value.kind is kind, call


async def test_a_deadline_ends_a_call_and_one_in_the_past_never_starts(
    triton_client: TritonClient, triton_repository: TritonRepository
) -> None:
    await triton_repository.load("timed", instances=1)
    x = BatchTensor("x", "FP32", (8, 4), (bytes(128),))
    call = ModelCall("timed", (x,), ("y",))
    for timeout_s in (0.02, 0.0, -1.0):
        with pytest.raises(BackendError, match="deadline exceeded") as caught:
            await triton_client.execute(call, timeout_s=timeout_s)
        assert caught.value.kind is ErrorKind.DEADLINE


async def test_cancelling_the_caller_stays_a_cancellation_and_closing_is_a_backend_error(
    triton: LocalTriton, triton_repository: TritonRepository
) -> None:
    await triton_repository.load("timed", instances=1)
    x = BatchTensor("x", "FP32", (8, 4), (bytes(128),))
    call = ModelCall("timed", (x,), ("y",))
    client = TritonClient(triton.url, name="m2")
    task = asyncio.create_task(client.execute(call, timeout_s=10))
    await asyncio.wait((task,), timeout=0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    other = asyncio.create_task(client.execute(call, timeout_s=10))
    await asyncio.wait((other,), timeout=0.02)
    await client.close()
    with pytest.raises(BackendError, match="the connection to m2 was closed"):
        await other
    with pytest.raises(BackendError, match="the connection to m2 is closed"):
        await client.execute(call, timeout_s=10)


async def test_a_model_runs_with_the_wanted_instances_and_changes_them_in_place(
    triton_client: TritonClient, triton_repository: TritonRepository
) -> None:
    for instances in (1, 3, 2):
        await triton_repository.load("add", instances=instances)
        assert instances_of(await triton_repository.config("add")) == instances
        (total,) = await triton_client.execute(add_call(), timeout_s=10)
        assert struct.unpack("<16i", total.data) == (3,) * 16
    spec = await triton_repository.spec("add")
    assert spec == triton_repository.declaration("add")


async def test_a_model_that_is_held_from_the_same_files_is_adopted(
    triton: LocalTriton, triton_client: TritonClient, triton_repository: TritonRepository
) -> None:
    def processes() -> list[psutil.Process]:
        found = psutil.Process(triton.pid).children(recursive=True)
        return [p for p in found if "/add/" in " ".join(p.cmdline())]

    def stubs() -> set[int]:
        return {p.pid for p in processes()}

    # Those of the tests before end some time after they are no longer used.
    before = processes()
    await triton_repository.unload("add")
    _, left = await asyncio.to_thread(psutil.wait_procs, before, 10)
    assert not left
    await triton_repository.load("add", instances=2)
    first = stubs()
    assert len(first) == 2
    await triton_repository.load("add", instances=2)
    assert stubs() == first, "nothing was started again"
    directory = triton_repository.directory("add")
    assert directory is not None
    (directory / "1" / "model.py").touch()
    await triton_repository.load("add", instances=2)
    assert len(stubs() - first) == 2, "changed files are loaded"


async def test_the_same_works_when_only_the_server_can_read_the_directory(
    triton_client: TritonClient,
) -> None:
    remote = TritonRepository(triton_client)
    assert remote.names() == ()
    await remote.unload("add")
    for instances in (2, 1):
        await remote.load("add", instances=instances)
        assert instances_of(await remote.config("add")) == instances
        await triton_client.execute(add_call(), timeout_s=10)
    assert (await remote.spec("add")).input("a") == TensorSpec("a", "INT32", (16,))


async def test_an_unload_returns_when_the_model_is_gone_and_can_be_repeated(
    triton_client: TritonClient, triton_repository: TritonRepository
) -> None:
    await triton_repository.load("timed", instances=1)
    x = BatchTensor("x", "FP32", (8, 4), (bytes(128),))
    running = asyncio.create_task(
        triton_client.execute(ModelCall("timed", (x,), ("y",)), timeout_s=10)
    )
    await asyncio.wait((running,), timeout=0.02)
    await triton_repository.unload("timed")
    assert running.done() and not running.exception(), "what was running is finished first"
    states = {s.name: s for s in await triton_repository.index()}
    assert (states["timed"].state, states["timed"].reason) == ("UNAVAILABLE", "unloaded")
    await triton_repository.unload("timed")
    await triton_repository.unload("never-existed")
    with pytest.raises(BackendError) as caught:
        await triton_client.execute(ModelCall("timed", (x,), ("y",)), timeout_s=10)
    assert caught.value.kind in (ErrorKind.NOT_READY, ErrorKind.UNKNOWN_MODEL)
    with pytest.raises(ResidencyError, match="model 'timed' is not loaded on m1"):
        await triton_repository.spec("timed")


async def test_an_unload_that_takes_too_long_says_what_state_it_is_in(
    triton_client: TritonClient, tiny_models: Path
) -> None:
    hasty = TritonRepository(triton_client, (tiny_models,), unload_timeout_s=0.01)
    await hasty.load("timed", instances=1)
    with pytest.raises(ResidencyError, match=r"model 'timed' is still \w+ on m1 after 0.01 s"):
        await hasty.unload("timed")
    await TritonRepository(triton_client).unload("timed")


async def test_loads_that_fail_name_model_machine_and_reason(
    triton_client: TritonClient, triton_repository: TritonRepository, tiny_models: Path
) -> None:
    with pytest.raises(ResidencyError, match="'broken' did not load on m1: .*on purpose"):
        await triton_repository.load("broken", instances=1)
    with pytest.raises(ResidencyError, match="no readable directory 'nope'"):
        await triton_repository.load("nope", instances=1)
    with pytest.raises(ResidencyError, match="at least one instance"):
        await triton_repository.load("add", instances=0)
    hasty = TritonRepository(triton_client, (tiny_models,), load_timeout_s=0.05)
    with pytest.raises(ResidencyError, match=r"'slow_loading' did not load .* after 0.05 s"):
        await hasty.load("slow_loading", instances=1)
    await triton_repository.load("slow_loading", instances=1)
    assert await triton_client.model_ready("slow_loading")


async def test_a_fleet_sends_each_batch_to_its_machine(
    triton_client: TritonClient, triton_repository: TritonRepository
) -> None:
    await triton_repository.load("add", instances=1)
    fleet = TritonFleet({"m1": triton_client})
    (total,) = await fleet.execute("m1", add_call(a=5), timeout_s=10)
    assert struct.unpack("<16i", total.data) == (7,) * 16
    with pytest.raises(BackendError, match="unknown machine 'm9'; known: m1"):
        await fleet.execute("m9", add_call(), timeout_s=10)
    await fleet.close()


async def test_a_model_whose_process_was_killed_during_an_execution_is_repaired(
    triton: LocalTriton, triton_client: TritonClient, triton_repository: TritonRepository
) -> None:
    await triton_repository.load("timed", instances=1)
    assert triton.pid is not None
    stubs = [p for p in psutil.Process(triton.pid).children() if "/timed/" in str(p.cmdline())]
    assert len(stubs) == 1
    x = BatchTensor("x", "FP32", (8, 4), (bytes(128),))
    call = ModelCall("timed", (x,), ("y",))
    running = asyncio.create_task(triton_client.execute(call, timeout_s=20))
    await asyncio.wait((running,), timeout=0.04)
    stubs[0].kill()
    with pytest.raises(BackendError, match="is not healthy") as caught:
        await running
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    assert await triton_client.model_ready("timed"), "Triton has not noticed"
    await triton_repository.repair("timed", instances=1)
    await triton_client.execute(call, timeout_s=10)
    await triton_repository.unload("timed")
