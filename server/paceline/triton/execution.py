"""Executing batches on one Triton: messages or shared memory, and what their failures mean.

Invariant: a region of shared memory is used again only when the server has ended the call that
used it; after a time-out, a cancellation or a lost connection it is given up, since Triton may
still write to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from paceline.core.errors import BackendError
from paceline.core.ports import ModelCall
from paceline.core.tensor import ITEM_BYTES, BatchTensor, Buffer, Tensor
from paceline.triton.messages import Place, infer_request, read_response
from paceline.triton.shared_memory import LEAST_BYTES, Found, Region, SharedMemoryPool
from paceline.triton.transport import INFER, CallFailed, ChannelClosed, Transport

_ALIKE_BEFORE_SHARED = 2
_KEPT = 1024

Key = tuple[Any, ...]
Outcome = dict[str, Tensor] | CallFailed | ChannelClosed | BackendError
"""Outputs by name, or what went wrong."""


class _Shared:
    """The shared memory of one call: a region with its inputs, one for its outputs, or both.

    `found`: inputs that are where other calls wrote them, in regions that their views keep.
    The first of `unused`, `failed` and `answered` says what becomes of them."""

    __slots__ = ("_found", "_over", "given", "places", "pool", "taken")

    def __init__(
        self,
        pool: SharedMemoryPool,
        given: Region | None,
        taken: Region | None,
        sizes: Sequence[int],
        found: Sequence[Found | None] = (),
    ) -> None:
        self.pool = pool
        self._found = found
        self.given = given
        self.taken = taken
        self.places = taken.places(sizes) if taken is not None else ()
        self._over = False

    def request(self, call: ModelCall) -> list[Buffer]:
        """The call's message, its inputs written where they belong. Raises BackendError."""
        try:
            return infer_request(call, self._inputs(call), self.places)
        except BaseException:
            self.unused()
            raise

    def _inputs(self, call: ModelCall) -> Sequence[Place]:
        if not self._found:
            return self.given.write(call.inputs) if self.given is not None else ()
        missing = _missing(call, self._found)
        written = iter(self.given.write(missing) if self.given is not None else ())
        return [found[1] if found is not None else next(written) for found in self._found]

    def unused(self) -> None:
        """The server was told nothing of it."""
        for region in self._regions():
            self.pool.release(region)

    def failed(self, error: BaseException) -> None:
        """The call has failed: unless the server said so, it may still use the regions."""
        ended = isinstance(error, CallFailed) and error.answered
        if not (ended or self._over):
            for found in self._found:
                if found is not None:
                    found[0].usable = False
        for region in self._regions():
            (self.pool.release if ended else self.pool.give_up)(region)

    def answered(self) -> memoryview | None:
        """The region with the outputs; it goes back when the last slice of it is gone."""
        view = None
        for region in self._regions():
            if region is self.taken:
                view = self.pool.lend(region)
            else:
                self.pool.release(region)
        return view

    def _regions(self) -> list[Region]:
        """Those there are, once."""
        if self._over:
            return []
        self._over = True
        return [region for region in (self.given, self.taken) if region is not None]


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
        """`run` without a task, where there is a connection and no region has to be made first;
        otherwise False. `on_end` is told what `run` would give or raise.
        """
        shared: _Shared | None = None
        if self._worth_sharing(call):
            shared = self._shared_now(call)
            if shared is None:
                return False

        def on_answer(answer: Buffer | CallFailed | ChannelClosed) -> None:
            if isinstance(answer, Exception):
                if shared is not None:
                    shared.failed(answer)
                if isinstance(answer, CallFailed) and (
                    answer.incompatible or self._unshare(answer, call, shared)
                ):
                    again = asyncio.get_running_loop().create_task(
                        self._again(call, timeout_s, on_end)
                    )
                    self._others.add(again)
                    again.add_done_callback(self._others.discard)
                else:
                    on_end(answer)
                return
            try:
                tensors = self._outputs(call, answer, shared)
            except BackendError as error:
                on_end(error)
            else:
                on_end(tensors)

        parts = infer_request(call) if shared is None else shared.request(call)
        try:
            begun = self._transport.begin(INFER, parts, on_answer, timeout_s)
        except BaseException as error:
            if shared is not None:
                shared.failed(error)
            raise
        if not begun and shared is not None:
            shared.unused()
        return begun

    async def _again(
        self, call: ModelCall, timeout_s: float, on_end: Callable[[Outcome], None]
    ) -> None:
        """Run by a transport that understands the server, or with less shared memory."""
        try:
            on_end(await self.run(call, timeout_s))
        except (CallFailed, ChannelClosed, BackendError) as error:
            on_end(error)

    async def run(self, call: ModelCall, timeout_s: float) -> dict[str, Tensor]:
        """Outputs by name. Raises CallFailed, ChannelClosed, BackendError."""
        shared = await self._shared(call) if self._worth_sharing(call) else None
        if shared is None:
            return self._outputs(call, await self._send(infer_request(call), timeout_s), None)
        parts = shared.request(call)
        try:
            data = await self._send(parts, timeout_s)
        except CallFailed as error:
            shared.failed(error)
            if not self._unshare(error, call, shared):
                raise
            return read_response(await self._send(infer_request(call), timeout_s))
        except BaseException as error:
            shared.failed(error)
            raise
        return self._outputs(call, data, shared)

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

    # -- shared memory ----------------------------------------------------------------------

    def _worth_sharing(self, call: ModelCall) -> bool:
        pool = self._pool
        if pool is None or not pool.on:
            return False
        return _size_bytes(call.inputs) >= LEAST_BYTES or bool(self._expected(call))

    def _shared_now(self, call: ModelCall) -> _Shared | None:
        """The regions that a call should have, from those that there are; None without them."""
        pool = self._pool
        assert pool is not None
        found, given_bytes = self._given(pool, call)
        expected = self._expected(call)
        given = pool.take(given_bytes) if given_bytes else None
        taken = pool.take(_room(expected)) if expected else None
        shared = _Shared(pool, given, taken, expected, found)
        if (given is None and given_bytes) or (taken is None and expected):
            shared.unused()
            return None
        return shared

    async def _shared(self, call: ModelCall) -> _Shared | None:
        """The regions that a call should have, as far as they can be had."""
        pool = self._pool
        assert pool is not None
        found, given_bytes = self._given(pool, call)
        expected = self._expected(call)
        given = await pool.acquire(given_bytes) if given_bytes else None
        try:
            taken = await pool.acquire(_room(expected)) if expected else None
        except BaseException:
            _Shared(pool, given, None, ()).unused()
            raise
        if given is None and given_bytes:
            found = ()
        some = found or given or taken
        return _Shared(pool, given, taken, expected, found) if some else None

    @staticmethod
    def _given(pool: SharedMemoryPool, call: ModelCall) -> tuple[Sequence[Found | None], int]:
        """Where inputs are already, and the bytes of a region for the others; 0: there are none,
        or a message is as cheap."""
        size_bytes = _size_bytes(call.inputs)
        if size_bytes < LEAST_BYTES:
            return (), 0
        found = pool.found(call.inputs)
        return found, _room([t.size_bytes for t in _missing(call, found)])

    def _unshare(self, error: CallFailed, call: ModelCall, shared: _Shared | None) -> bool:
        """Whether it was the shared memory that failed; it is used less from now on."""
        if shared is None or "shared memory" not in error.message.lower():
            return False
        # Outputs grew, or another process took the registration away.
        if shared.taken is not None:
            self._sizes[_key(call)] = ((), 0)
        else:
            shared.pool.on = False
        return True

    def _outputs(self, call: ModelCall, data: Buffer, shared: _Shared | None) -> dict[str, Tensor]:
        """What the server answered; the regions go back. Raises BackendError."""
        view = shared.answered() if shared is not None else None
        tensors = read_response(data)
        if view is not None:
            assert shared is not None
            return _placed(call, tensors, view, shared.places)
        if self._pool is not None and self._pool.on:
            self._learn(call, tensors)
        return tensors

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


def _missing(call: ModelCall, found: Sequence[Found | None]) -> Sequence[BatchTensor]:
    """Inputs that are in no region yet."""
    if not found:
        return call.inputs
    return [tensor for tensor, at in zip(call.inputs, found, strict=True) if at is None]


def _room(sizes: Sequence[int]) -> int:
    """Bytes of a region for tensors of these sizes."""
    return sum(sizes) + 64 * len(sizes)


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
