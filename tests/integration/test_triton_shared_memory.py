"""Large batches on a real Triton: through shared memory, and through messages where that fails."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
import pytest_asyncio
from tests.integration.models import write_model

from paceline.core.errors import BackendError, ErrorKind
from paceline.core.ports import ModelCall
from paceline.core.tensor import BatchTensor, Tensor
from paceline.triton.client import CHANNEL_OPTIONS, TritonClient
from paceline.triton.execution import Execution
from paceline.triton.http2 import Http2Transport
from paceline.triton.launcher import LocalTriton, LocalTritonSettings
from paceline.triton.shared_memory import DIRECTORY
from paceline.triton.transport import GrpcTransport

pytestmark = pytest.mark.integration

# `wanted` says how many bytes to give back of `x` (more than there are: zeros), after `wait_ms`.
CONFIG = """
max_batch_size: 0
input [{name: "x" data_type: TYPE_UINT8 dims: [-1]}]
input [{name: "wanted" data_type: TYPE_INT32 dims: [1]}]
input [{name: "wait_ms" data_type: TYPE_INT32 dims: [1]}]
output [{name: "y" data_type: TYPE_UINT8 dims: [-1]}]
output [{name: "size" data_type: TYPE_INT32 dims: [1]}]
"""
CODE = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            wanted = int(pb_utils.get_input_tensor_by_name(request, "wanted").as_numpy()[0])
            time.sleep(pb_utils.get_input_tensor_by_name(request, "wait_ms").as_numpy()[0] / 1e3)
            y = np.zeros(wanted, dtype=np.uint8)
            y[: x.size] = x[:wanted]
            size = np.array([x.size], dtype=np.int32)
            responses.append(pb_utils.InferenceResponse(
                [pb_utils.Tensor("y", y), pb_utils.Tensor("size", size)]))
        return responses
"""
TIMEOUT_S = 30.0
SIZE = 700_000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalTriton]:
    models = tmp_path_factory.mktemp("models")
    write_model(models, "cut", CONFIG, CODE)
    settings = LocalTritonSettings(
        state_directory=tmp_path_factory.mktemp("triton"),
        model_repositories=(models,),
        stop_timeout_s=0.5,
    )
    async with LocalTriton(settings) as local:
        yield local


@pytest_asyncio.fixture
async def client(server: LocalTriton) -> AsyncIterator[TritonClient]:
    made = await TritonClient.connect(server.url)
    await made.load("cut", timeout_s=60)
    yield made
    await made.close()


def call(x: bytes, wanted: int, wait_ms: int = 0) -> ModelCall:
    half = len(x) // 2
    return ModelCall(
        "cut",
        (
            BatchTensor("x", "UINT8", (len(x),), (x[:half], memoryview(x)[half:])),
            BatchTensor("wanted", "INT32", (1,), (struct.pack("<i", wanted),)),
            BatchTensor("wait_ms", "INT32", (1,), (struct.pack("<i", wait_ms),)),
        ),
        ("size", "y"),
    )


def check(outputs: tuple[Tensor, ...], x: bytes, wanted: int) -> None:
    size, y = outputs
    assert (size.name, size.shape, bytes(size.data)) == ("size", (1,), struct.pack("<i", len(x)))
    assert (y.name, y.datatype, y.shape) == ("y", "UINT8", (wanted,))
    assert bytes(y.data) == x[:wanted].ljust(wanted, b"\0")


def regions() -> list[str]:
    return [path.name for path in DIRECTORY.glob(f"paceline-*-{os.getpid()}-*")]


def pool_of(client: TritonClient) -> tuple[int, int]:
    """(regions made, bytes held)."""
    pool = client.shared_memory
    assert pool.on
    return pool.regions, pool.size_bytes


async def begun(
    client: TritonClient, batch: ModelCall, timeout_s: float = 30
) -> tuple[Tensor, ...] | BackendError:
    """The outcome of a batch that is executed without a task."""
    ended: asyncio.Future[tuple[Tensor, ...] | BackendError] = asyncio.Future()
    assert client.begin(batch, ended.set_result, timeout_s=timeout_s)
    return await ended


def unexpected(outcome: tuple[Tensor, ...] | BackendError) -> None:
    raise AssertionError(f"nothing was begun, and it ended: {outcome}")


async def test_large_batches_go_through_a_few_regions_and_leave_no_file(
    client: TritonClient,
) -> None:
    rng = random.Random(1)
    for _ in range(12):
        x = rng.randbytes(SIZE)
        check(await client.execute(call(x, SIZE), timeout_s=30), x, SIZE)
        gc.collect()
    assert pool_of(client) == (2, 2 << 20)  # one for inputs, one for outputs
    assert not regions()


async def test_answers_stay_what_they_were_while_others_are_computed(client: TritonClient) -> None:
    rng = random.Random(2)
    inputs = [rng.randbytes(SIZE) for _ in range(10)]
    answers = [await client.execute(call(x, SIZE), timeout_s=30) for x in inputs]
    answers += await asyncio.gather(*(client.execute(call(x, SIZE), timeout_s=30) for x in inputs))
    for outputs, x in zip(answers, inputs * 2, strict=True):
        check(outputs, x, SIZE)


async def test_outputs_may_shrink_and_grow_after_their_size_was_learned(
    client: TritonClient,
) -> None:
    x = random.Random(3).randbytes(SIZE)
    for wanted in (SIZE, SIZE, SIZE, SIZE, 1000, 0, 600_000, 2 * SIZE, 2 * SIZE, SIZE):
        check(await client.execute(call(x, wanted), timeout_s=30), x, wanted)
        gc.collect()


async def test_a_region_of_a_call_that_timed_out_is_not_used_again(client: TritonClient) -> None:
    x = random.Random(4).randbytes(SIZE)
    for _ in range(4):
        check(await client.execute(call(x, SIZE), timeout_s=30), x, SIZE)
        gc.collect()
    before, _ = pool_of(client)
    with pytest.raises(BackendError) as caught:
        await client.execute(call(b"\xff" * SIZE, SIZE, wait_ms=300), timeout_s=0.1)
    assert caught.value.kind is ErrorKind.DEADLINE
    outputs = await client.execute(call(x, SIZE), timeout_s=30)
    # By now the abandoned call has ended, too, and written its output.
    check(outputs, x, SIZE)
    assert pool_of(client)[0] == before + 2


def handed_on(y: Tensor, wait_ms: int = 0) -> ModelCall:
    """What a model wrote, in two parts that lie together, to the model again."""
    size, data = len(y.data), memoryview(y.data)
    first, *others = call(bytes(2), size, wait_ms).inputs
    parts = (data[: size // 3], data[size // 3 :])
    return ModelCall(
        "cut", (BatchTensor("x", first.datatype, (size,), parts), *others), ("size", "y")
    )


async def test_what_a_model_wrote_is_read_by_the_next_one_where_it_lies(
    client: TritonClient,
) -> None:
    x = random.Random(9).randbytes(SIZE)
    for _ in range(3):
        # Until its size is known the answer is a message.
        _, y = await client.execute(call(x, SIZE), timeout_s=30)
    pool = client.shared_memory
    again = handed_on(y)
    ((region, place), *others) = (at for at in pool.found(again.inputs) if at is not None)
    assert not others and place.size_bytes == SIZE
    for _ in range(3):
        check(await client.execute(again, timeout_s=30), x, SIZE)
    outputs = await begun(client, again)
    assert not isinstance(outputs, BackendError)
    check(outputs, x, SIZE)
    del outputs
    # What woke this test holds on to them until it waits again.
    await asyncio.sleep(0)
    # Triton may read it still: it does not come back, whoever drops it.
    late = await begun(client, handed_on(y, wait_ms=300), timeout_s=0.1)
    assert isinstance(late, BackendError) and late.kind is ErrorKind.DEADLINE
    check(await client.execute(again, timeout_s=30), x, SIZE)
    del y, again
    gc.collect()
    with pytest.raises(ValueError, match="released"):
        bytes(region.view)
    assert region not in list(iter(lambda: pool.take(1), None))


async def test_a_failed_call_gives_its_regions_back(client: TritonClient) -> None:
    x = bytes(SIZE)
    for _ in range(3):
        wrong = call(x, SIZE)
        with pytest.raises(BackendError):
            await client.execute(ModelCall("cut", wrong.inputs[:2], wrong.outputs), timeout_s=30)
    assert pool_of(client)[0] == 1


async def test_a_batch_is_begun_with_regions_that_nobody_reads_any_more(
    client: TritonClient,
) -> None:
    rng = random.Random(6)
    await settled(client, bytes(SIZE))
    assert pool_of(client) == (2, 2 << 20)
    x, other = rng.randbytes(SIZE), rng.randbytes(SIZE)
    slow = await begun(client, call(x, SIZE))
    # Its reader has not taken it yet: the only region for outputs is not to be had.
    assert not client.begin(call(other, SIZE), unexpected, timeout_s=30)
    assert not isinstance(slow, BackendError)
    check(await client.execute(call(other, SIZE), timeout_s=30), other, SIZE)
    check(slow, x, SIZE)
    assert pool_of(client) == (3, 3 << 20)
    del slow
    for _ in range(6):
        x = rng.randbytes(SIZE)
        outputs = await begun(client, call(x, SIZE))
        assert not isinstance(outputs, BackendError)
        check(outputs, x, SIZE)
        del outputs
    assert pool_of(client) == (3, 3 << 20)


async def test_regions_of_a_begun_batch_that_timed_out_are_not_used_again(
    client: TritonClient,
) -> None:
    x = random.Random(7).randbytes(SIZE)
    await settled(client, x)
    outcome = await begun(client, call(b"\xff" * SIZE, SIZE, wait_ms=300), timeout_s=0.1)
    assert isinstance(outcome, BackendError) and outcome.kind is ErrorKind.DEADLINE
    # The late answer is still to be written: not to where the next batch is.
    assert not client.begin(call(x, SIZE), unexpected, timeout_s=30)
    check(await client.execute(call(x, SIZE), timeout_s=30), x, SIZE)
    assert pool_of(client)[0] == 4


async def test_a_begun_batch_that_fails_gives_its_regions_back(client: TritonClient) -> None:
    x = bytes(SIZE)
    await client.execute(call(x, SIZE), timeout_s=30)
    for _ in range(3):
        wrong = ModelCall("cut", call(x, SIZE).inputs[:2], ("size", "y"))
        assert isinstance(await begun(client, wrong), BackendError)
    assert pool_of(client)[0] == 1


async def test_a_begun_batch_whose_outputs_grew_is_executed_all_the_same(
    client: TritonClient,
) -> None:
    x = random.Random(8).randbytes(SIZE)
    await settled(client, x)
    outputs = await begun(client, call(x, 2 * SIZE))
    assert not isinstance(outputs, BackendError)
    check(outputs, x, 2 * SIZE)


async def test_without_shared_memory_messages_carry_the_same(
    server: LocalTriton, client: TritonClient
) -> None:
    """By either transport; the client makes sure that the model is loaded."""
    x = random.Random(5).randbytes(3 * SIZE)
    channel = grpc.aio.insecure_channel(server.url, options=CHANNEL_OPTIONS)
    for transport in (Http2Transport(server.url), GrpcTransport(channel)):
        execution = Execution(transport, None, lambda: GrpcTransport(channel))
        tensors = await execution.run(call(x, 2 * SIZE), 30)
        check((tensors["size"], tensors["y"]), x, 2 * SIZE)
        await execution.close()
    await channel.close(None)


async def test_closing_returns_the_memory_to_the_machine(server: LocalTriton) -> None:
    before = await asyncio.to_thread(mapped, server)
    client = TritonClient(server.url)
    await client.load("cut", timeout_s=60)
    check(await client.execute(call(bytes(SIZE), 10), timeout_s=30), bytes(SIZE), 10)
    assert len(await asyncio.to_thread(mapped, server)) == len(before) + 1
    await client.close()
    # A request that was answered may still hold the region, for as long as Triton tidies up.
    give_up_s = time.monotonic() + TIMEOUT_S
    while await asyncio.to_thread(mapped, server) != before:
        assert time.monotonic() < give_up_s
        await asyncio.sleep(0.01)


async def settled(client: TritonClient, x: bytes) -> None:
    """Runs until the client shares memory for outputs as well, and has it all back."""
    for _ in range(4):
        await client.execute(call(x, SIZE), timeout_s=30)
    gc.collect()


def mapped(server: LocalTriton) -> set[str]:
    """Regions of this process that the Triton has mapped."""
    assert server.pid is not None
    lines = Path(f"/proc/{server.pid}/maps").read_text().splitlines()
    own = f"-{os.getpid()}-"
    return {line.split()[5] for line in lines if "/paceline-" in line and own in line}
