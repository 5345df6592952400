"""Executing batches on one Triton: messages or shared memory, and what their failures mean.

Invariant: a region of shared memory is used again only when the server has ended the call that
used it; after a time-out, a cancellation or a lost connection it is given up, since Triton may
still write to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

from paceline.core.errors import BackendError
from paceline.core.ports import ModelCall
from paceline.core.tensor import ITEM_BYTES, BatchTensor, Buffer, Tensor
from paceline.triton.messages import Place, infer_request, read_response
from paceline.triton.shared_memory import LEAST_BYTES, Region, SharedMemoryPool
from paceline.triton.transport import INFER, CallFailed, ChannelClosed, Transport

_ALIKE_BEFORE_SHARED = 2
_KEPT = 1024

Key = tuple[Any, ...]
Outcome = dict[str, Tensor] | CallFailed | ChannelClosed | BackendError
"""Outputs by name, or what went wrong."""


class Execution:
    """See the module docstring. `other` makes the transport for a server that `transport` does
    not understand."""

    def __init__(
        self, transport: Transport, pool: SharedMemoryPool | None, other: Callable[[], Transport]
    ) -> None:
        self._transport = transport
        self._pool = pool
        self._other = other
        self._sizes: dict[Key, tuple[tuple[int, ...], int]] = {}
        self._others: set[asyncio.Task[None]] = set()

    def begin(self, call: ModelCall, timeout_s: float, on_end: Callable[[Outcome], None]) -> bool:
        """`run` without a task, for a batch that needs no shared memory and has a connection;
        otherwise False. `on_end` is told what `run` would give or raise.
        """
        pool = self._pool
        shares = pool is not None and pool.on
        if shares and (_size_bytes(call.inputs) >= LEAST_BYTES or self._expected(call)):
            return False

        def on_answer(answer: Buffer | CallFailed | ChannelClosed) -> None:
            if isinstance(answer, CallFailed) and answer.incompatible:
                again = asyncio.get_running_loop().create_task(self._again(call, timeout_s, on_end))
                self._others.add(again)
                again.add_done_callback(self._others.discard)
                return
            if isinstance(answer, Exception):
                on_end(answer)
                return
            try:
                tensors = read_response(answer)
            except BackendError as error:
                on_end(error)
                return
            if shares:
                self._learn(call, tensors)
            on_end(tensors)

        return self._transport.begin(INFER, infer_request(call), on_answer, timeout_s)

    async def _again(
        self, call: ModelCall, timeout_s: float, on_end: Callable[[Outcome], None]
    ) -> None:
        """Run by a transport that understands the server."""
        try:
            on_end(await self.run(call, timeout_s))
        except (CallFailed, ChannelClosed, BackendError) as error:
            on_end(error)

    async def run(self, call: ModelCall, timeout_s: float) -> dict[str, Tensor]:
        """Outputs by name. Raises CallFailed, ChannelClosed, BackendError."""
        pool = self._pool
        if pool is None or not pool.on:
            return read_response(await self._send(infer_request(call), timeout_s))
        given = await self._region(pool, call.inputs)
        expected = self._expected(call)
        taken = await pool.acquire(sum(expected) + 64 * len(expected)) if expected else None
        if given is None and taken is None:
            tensors = read_response(await self._send(infer_request(call), timeout_s))
            self._learn(call, tensors)
            return tensors
        try:
            tensors = await self._share(pool, call, timeout_s, given, taken, expected)
        except CallFailed as error:
            if "shared memory" not in error.message.lower():
                raise
            # Outputs grew, or another process took the registration away.
            if taken is not None:
                self._sizes[_key(call)] = ((), 0)
            else:
                pool.on = False
            return read_response(await self._send(infer_request(call), timeout_s))
        if taken is None:
            self._learn(call, tensors)
        return tensors

    async def close(self) -> None:
        """Calls under way fail with ChannelClosed."""
        await self._transport.close()

    async def _send(self, parts: Sequence[Buffer], timeout_s: float) -> Buffer:
        try:
            return await self._transport.unary(INFER, parts, timeout_s)
        except CallFailed as error:
            if not error.incompatible:
                raise
            refused, self._transport = self._transport, self._other()
            await refused.close()
            return await self._transport.unary(INFER, parts, timeout_s)

    async def _region(self, pool: SharedMemoryPool, inputs: Sequence[BatchTensor]) -> Region | None:
        size_bytes = _size_bytes(inputs)
        if size_bytes < LEAST_BYTES:
            return None
        return await pool.acquire(size_bytes + 64 * len(inputs))

    async def _share(
        self,
        pool: SharedMemoryPool,
        call: ModelCall,
        timeout_s: float,
        given: Region | None,
        taken: Region | None,
        expected: tuple[int, ...],
    ) -> dict[str, Tensor]:
        """Run with inputs in `given` and outputs in `taken`, where there are such regions."""
        inputs = given.write(call.inputs) if given is not None else ()
        places = taken.places(expected) if taken is not None else ()
        regions = [region for region in (given, taken) if region is not None]
        try:
            data = await self._send(infer_request(call, inputs, places), timeout_s)
        except CallFailed as error:
            for region in regions:
                if error.answered:
                    pool.release(region)
                else:
                    pool.give_up(region)
            raise
        except BaseException:
            for region in regions:
                pool.give_up(region)
            raise
        if given is not None:
            pool.release(given)
        if taken is None:
            return read_response(data)
        view = taken.lend(partial(pool.release, taken))
        return _placed(call, read_response(data), view, places)

    def _expected(self, call: ModelCall) -> tuple[int, ...]:
        """Sizes of the outputs of such a batch, () where unknown or not worth sharing."""
        if not self._sizes:
            return ()
        sizes, times = self._sizes.get(_key(call), ((), 0))
        return sizes if times >= _ALIKE_BEFORE_SHARED and sum(sizes) >= LEAST_BYTES else ()

    def _learn(self, call: ModelCall, tensors: dict[str, Tensor]) -> None:
        if sum([len(tensor.data) for tensor in tensors.values()]) < LEAST_BYTES:
            return
        found = [tensors.get(name) for name in call.outputs]
        known = [t for t in found if t is not None and t.datatype in ITEM_BYTES]
        sizes = tuple(len(tensor.data) for tensor in known)
        if len(known) < len(found) or sum(sizes) < LEAST_BYTES:
            return
        key = _key(call)
        before, times = self._sizes.get(key, (sizes, 0))
        if len(self._sizes) >= _KEPT:
            self._sizes.clear()
        self._sizes[key] = (sizes, times + 1 if before == sizes else 1)


def _size_bytes(inputs: Sequence[BatchTensor]) -> int:
    return sum([tensor.size_bytes for tensor in inputs])


def _key(call: ModelCall) -> Key:
    """Batches of equal key are expected to have outputs of equal size."""
    shapes = tuple((tensor.name, tensor.shape) for tensor in call.inputs)
    return (call.model, call.version, shapes, call.outputs)


def _placed(
    call: ModelCall, tensors: dict[str, Tensor], view: memoryview, places: Sequence[Place]
) -> dict[str, Tensor]:
    """`tensors` with what Triton wrote to `places`, without copying. Raises BackendError."""
    found: dict[str, Tensor] = {}
    for name, place in zip(call.outputs, places, strict=True):
        header = tensors.get(name)
        if header is None:
            continue
        size_bytes = prod(header.shape) * ITEM_BYTES.get(header.datatype, place.size_bytes + 1)
        if not 0 <= size_bytes <= place.size_bytes:
            raise BackendError(
                f"model {call.model!r} gave {header.datatype} {list(header.shape)} as {name!r}, "
                f"more than the {place.size_bytes} bytes there were for it"
            )
        data = view[place.offset : place.offset + size_bytes]
        found[name] = Tensor(name, header.datatype, header.shape, data)
    return found
