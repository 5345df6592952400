"""Regions of shared memory are bounded, used by one batch at a time, and leave nothing behind."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from paceline.core.errors import BackendError
from paceline.core.ports import ModelCall
from paceline.core.tensor import BatchTensor, Buffer
from paceline.triton.execution import Execution
from paceline.triton.messages import Place
from paceline.triton.shared_memory import DIRECTORY, SharedMemoryPool
from paceline.triton.transport import CallFailed

MIB = 1 << 20
NAMESPACE = Path("/proc/self/ns/pid").stat().st_ino


class Registry:
    """What a Triton knows; `refuses` is how one on another machine answers."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.regions: dict[str, int] = {}
        self.seen: list[Path] = []

    async def register(self, name: str, key: str, size_bytes: int) -> None:
        path = DIRECTORY / key.lstrip("/")
        assert path.stat().st_size == size_bytes
        self.seen.append(path)
        if self.refuses:
            raise BackendError("Unable to open shared memory region")
        self.regions[name] = size_bytes

    async def unregister(self, name: str) -> None:
        self.regions.pop(name, None)

    async def registered(self) -> list[str]:
        return list(self.regions)

    def pool(self, limit_bytes: int = 8 * MIB) -> SharedMemoryPool:
        return SharedMemoryPool(
            self.register, self.unregister, self.registered, limit_bytes=limit_bytes
        )


def tensor(*parts: Buffer) -> BatchTensor:
    return BatchTensor("x", "UINT8", (sum(map(len, parts)),), parts)


async def test_a_region_is_made_once_and_used_again() -> None:
    registry = Registry()
    pool = registry.pool()
    first = await pool.acquire(700_000)
    assert first is not None and first.size_bytes == MIB
    second = await pool.acquire(700_000)
    assert second is not None and second is not first
    pool.release(first)
    assert await pool.acquire(1000) is first
    assert sorted(registry.regions.values()) == [MIB, MIB]
    assert not any(path.exists() for path in registry.seen)


async def test_of_equal_regions_the_one_used_last_is_taken() -> None:
    pool = Registry().pool()
    first, second = await pool.acquire(1000), await pool.acquire(1000)
    assert first is not None and second is not None
    pool.release(first)
    pool.release(second)
    assert pool.take(1000) is second and pool.take(1000) is first
    assert pool.take(1000) is None


class Unconnected:
    """A transport that has no connection yet."""

    def begin(self, *_: object) -> bool:
        return False

    async def unary(self, *_: object) -> bytes:
        raise AssertionError("nothing was begun")

    async def close(self) -> None:
        pass


async def test_a_batch_that_cannot_be_begun_takes_no_region() -> None:
    pool = Registry().pool()
    region = await pool.acquire(MIB)
    assert region is not None
    pool.release(region)
    transport = Unconnected()
    execution = Execution(transport, pool, lambda: transport)
    ended: list[object] = []
    call = ModelCall("m", (tensor(bytes(600_000)),), ("y",))
    assert not execution.begin(call, 30, ended.append)
    assert not ended and pool.take(MIB) is region


class Breaking(Unconnected):
    """A transport that breaks when part of the message may be on its way, and answers later."""

    def __init__(self) -> None:
        self.answers: list[Callable[[bytes], object]] = []

    def begin(self, *arguments: Any) -> bool:
        self.answers.append(arguments[2])
        raise OSError("broken")


async def test_a_region_of_a_batch_that_broke_while_it_was_sent_is_given_up() -> None:
    pool = Registry().pool()
    region = await pool.acquire(MIB)
    assert region is not None
    pool.release(region)
    transport = Breaking()
    execution = Execution(transport, pool, lambda: transport)
    with pytest.raises(OSError, match="broken"):
        execution.begin(ModelCall("m", (tensor(bytes(600_000)),), ()), 30, lambda _: None)
    assert pool.take(MIB) is None
    (answer,) = transport.answers
    answer(b"")
    assert pool.take(MIB) is None


async def test_what_a_batch_wrote_is_found_where_it_lies() -> None:
    pool = Registry().pool()
    region = await pool.acquire(1000)
    assert region is not None
    view = pool.lend(region)
    rows = [view[at : at + 64] for at in (64, 128, 192)]
    found = pool.found([tensor(*rows[:2]), tensor(rows[1], b"", rows[2]), tensor(b"else")])
    assert found == (
        (region, Place(region.name, 64, 128)),
        (region, Place(region.name, 128, 128)),
        None,
    )
    # A gap, another order, what is no row of it, where no tensor begins.
    for parts in (rows[::2], rows[::-1], [rows[0], bytes(64)], [view[1:2]], [b""], []):
        assert pool.found([tensor(*parts)]) == ()
    assert Registry().pool().found([tensor(*rows)]) == ()
    del view, rows
    gc.collect()
    assert pool.take(1000) is region
    assert pool.found([tensor(memoryview(region.view)[:64])]) == ()


class Open(Unconnected):
    """A transport that takes every call; its answers are given by hand."""

    def __init__(self) -> None:
        self.calls: list[tuple[bytes, Callable[[Any], object]]] = []

    def begin(self, *arguments: Any) -> bool:
        self.calls.append((b"".join(arguments[1]), arguments[2]))
        return True


SILENT = CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer within 30 s")
WRONG = CallFailed(grpc.StatusCode.INVALID_ARGUMENT, "not like this")


@pytest.mark.parametrize(("outcome", "again"), [(SILENT, False), (WRONG, True), (None, True)])
async def test_a_region_that_is_handed_on_is_free_when_its_last_reader_has_ended(
    outcome: CallFailed | None, again: bool
) -> None:
    pool = Registry().pool()
    region = await pool.acquire(MIB)
    assert region is not None
    view = pool.lend(region)
    transport = Open()
    execution = Execution(transport, pool, lambda: transport)
    ended: list[object] = []
    call = ModelCall("m", (tensor(view[:300_000], view[300_000:600_000]),), ("y",))
    assert execution.begin(call, 30, ended.append)
    ((message, answer),) = transport.calls
    # By its place alone: no other region was there to copy it to.
    assert region.name.encode() in message and len(message) < 500
    del call, view
    gc.collect()
    assert pool.take(MIB) is None
    answer(service_pb2.ModelInferResponse().SerializeToString() if outcome is None else outcome)
    assert len(ended) == 1
    transport.calls.clear()
    del answer
    gc.collect()
    assert pool.take(MIB) is (region if again else None)


async def test_inputs_that_are_nowhere_yet_are_written_beside_those_that_are() -> None:
    pool = Registry().pool()
    made, other = await pool.acquire(MIB), await pool.acquire(MIB)
    assert made is not None and other is not None
    view = pool.lend(made)
    transport = Open()
    execution = Execution(transport, pool, lambda: transport)
    call = ModelCall("m", (tensor(b"few"), tensor(view[:600_000])), ("y",))
    # No region for the one: nothing is begun.
    assert not execution.begin(call, 30, lambda _: None)
    pool.release(other)
    assert execution.begin(call, 30, lambda _: None)
    request = service_pb2.ModelInferRequest.FromString(transport.calls[0][0])
    places = [
        (
            given.parameters["shared_memory_region"].string_param,
            given.parameters["shared_memory_offset"].int64_param,
            given.parameters["shared_memory_byte_size"].int64_param,
        )
        for given in request.inputs
    ]
    assert places == [(other.name, 0, 3), (made.name, 0, 600_000)]
    assert bytes(other.view[:3]) == b"few" and not request.raw_input_contents


async def test_tensors_are_joined_one_behind_the_other() -> None:
    region = await Registry().pool().acquire(1000)
    assert region is not None
    places = region.write((tensor(b"ab", b"cd"), tensor(), tensor(b"e")))
    assert places == (
        Place(region.name, 0, 4),
        Place(region.name, 64, 0),
        Place(region.name, 64, 1),
    )
    assert bytes(region.view[:4]) == b"abcd" and region.view[64] == ord("e")


async def test_a_lent_region_comes_back_with_its_last_view() -> None:
    pool = Registry().pool(limit_bytes=MIB)
    region = await pool.acquire(1000)
    assert region is not None
    returned: list[bool] = []
    view = region.lend(lambda: returned.append(True))
    region.view[2:4] = b"hi"
    piece = view[2:4]
    del view
    gc.collect()
    assert not returned and bytes(piece) == b"hi"
    del piece
    gc.collect()
    assert returned


async def test_all_regions_together_stay_below_the_limit() -> None:
    registry = Registry()
    pool = registry.pool(limit_bytes=4 * MIB)
    small = [await pool.acquire(MIB) for _ in range(4)]
    assert all(region is not None for region in small)
    assert await pool.acquire(MIB) is None
    for region in small:
        assert region is not None
        pool.release(region)
    large = await pool.acquire(3 * MIB)
    assert large is not None and large.size_bytes == 4 * MIB
    assert registry.regions == {large.name: 4 * MIB}
    assert await pool.acquire(5 * MIB) is None
    assert pool.size_bytes == 4 * MIB


async def test_a_region_that_triton_may_still_use_is_never_used_again() -> None:
    registry = Registry()
    pool = registry.pool(limit_bytes=2 * MIB)
    first = await pool.acquire(1000)
    assert first is not None
    pool.give_up(first)
    second = await pool.acquire(1000)
    assert second is not None and second.name != first.name
    assert await pool.acquire(1000) is None
    await pool.close(unregister=True)
    assert first.name in registry.regions


async def test_a_triton_elsewhere_turns_the_pool_off_for_good() -> None:
    registry = Registry(refuses=True)
    pool = registry.pool()
    assert await pool.acquire(1000) is None
    assert not pool.on and pool.size_bytes == 0
    assert await pool.acquire(1000) is None
    assert len(registry.seen) == 1 and not registry.seen[0].exists()


async def test_closing_unregisters_what_is_free() -> None:
    registry = Registry()
    pool = registry.pool()
    region = await pool.acquire(1000)
    assert region is not None
    pool.release(region)
    await pool.close(unregister=True)
    assert not registry.regions
    assert await pool.acquire(1000) is None


async def test_regions_of_a_paceline_that_was_killed_are_unregistered_first() -> None:
    registry = Registry()
    dead, alive = f"paceline-{NAMESPACE}-999999999-x", f"paceline-{NAMESPACE}-{os.getpid()}-x"
    foreign = ("somebody-elses", f"paceline-{NAMESPACE + 1}-999999999-x")
    registry.regions = dict.fromkeys((dead, alive, *foreign), MIB)
    region = await registry.pool().acquire(1000)
    assert region is not None
    assert set(registry.regions) == {alive, *foreign, region.name}
