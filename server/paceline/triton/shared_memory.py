"""Tensors to and from a Triton on the same machine through memory that both have mapped.

Above about half a megabyte a copy into shared memory is several times cheaper than a message. A
pool holds regions that are made and registered once, when first needed, and used again.

Invariants: a region is written or lent to one batch at a time, and comes back when the last view
of it is gone, so that what a model wrote can be read where it lies, by clients and by the next
models of a chain (`found`); all regions together stay below `limit_bytes`; the name of a region is
gone as soon as Triton has mapped it, so whatever ends Paceline leaves nothing in /dev/shm. Where
memory or registration is refused (another machine, a full /dev/shm), the pool is off for good and
messages carry everything.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import uuid
import weakref
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from paceline.core.errors import BackendError
from paceline.core.tensor import BatchTensor
from paceline.triton.messages import Place

logger = logging.getLogger(__name__)

DIRECTORY = Path("/dev/shm")
LEAST_BYTES = 500_000
"""Below this a message is as cheap."""
LIMIT_BYTES = 1 << 30
_LEAST_REGION_BYTES = 1 << 20
_SHARE_OF_FREE = 4
_ALIGNMENT = 64

Register = Callable[[str, str, int], Awaitable[None]]
"""`(region, key, size_bytes)`; raises BackendError."""
Unregister = Callable[[str], Awaitable[None]]
Registered = Callable[[], Awaitable[list[str]]]
"""Names of all regions that the Triton has mapped."""


_lent: dict[str, weakref.ref[object]] = {}
"""By region: what its views hold on to."""


class Region:
    """One mapped file."""

    __slots__ = ("_memory", "name", "size_bytes", "usable", "view")

    def __init__(self, name: str, memory: mmap.mmap, size_bytes: int) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.usable = True
        """Whether it may be used again when it comes back."""
        self._memory = memory
        self.view = memoryview(memory)

    def write(self, tensors: Sequence[BatchTensor]) -> tuple[Place, ...]:
        """Join each tensor's parts into the region, one tensor behind the other."""
        places: list[Place] = []
        at = 0
        for tensor in tensors:
            begin = at
            for part in tensor.parts:
                self.view[at : at + len(part)] = part
                at += len(part)
            places.append(Place(self.name, begin, at - begin))
            at = _aligned(at)
        return tuple(places)

    def places(self, sizes: Sequence[int]) -> tuple[Place, ...]:
        """Room for outputs of these sizes, one behind the other."""
        places: list[Place] = []
        at = 0
        for size in sizes:
            places.append(Place(self.name, at, size))
            at = _aligned(at + size)
        return tuple(places)

    def lend(self, on_returned: Callable[[], object]) -> memoryview:
        """A view of the region; calls `on_returned` when no slice of it is left."""
        lent = np.frombuffer(self._memory, "B")

        def returned(_: object) -> None:
            del _lent[self.name]
            on_returned()

        # By hand, as `weakref.finalize` costs several times as much.
        _lent[self.name] = weakref.ref(lent, returned)
        return lent.data

    def close(self) -> None:
        """Unmap; a region with views still out stays mapped until they are gone."""
        self.view.release()
        with suppress(BufferError):
            self._memory.close()


Found = tuple[Region, Place]
"""Where a tensor is, and the region that has to stay what it is while a batch reads it."""


class SharedMemoryPool:
    """The regions of one Triton. See the module docstring."""

    def __init__(
        self,
        register: Register,
        unregister: Unregister,
        registered: Registered,
        *,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        self._register = register
        self._unregister = unregister
        self._registered = registered
        self._limit_bytes = min(limit_bytes, _free_bytes() // _SHARE_OF_FREE)
        self._free: list[Region] = []
        self._lent: dict[int, Region] = {}
        """By the identity of what the views of a region hold on to."""
        self._bytes = 0
        self._making = asyncio.Lock()
        self.on = self._limit_bytes >= _LEAST_REGION_BYTES
        self.regions = 0

    @property
    def size_bytes(self) -> int:
        """Of all regions, in use or not."""
        return self._bytes

    async def acquire(self, size_bytes: int) -> Region | None:
        """A region of at least that size; None where there can be none now."""
        region = self.take(size_bytes)
        if region is not None or not self.on:
            return region
        async with self._making:
            return self.take(size_bytes) or await self._make(size_bytes)

    def take(self, size_bytes: int) -> Region | None:
        """The smallest free region that is large enough, None where there is none; of equal ones
        the one used last, which the processor's caches may still hold."""
        fitting = [region for region in reversed(self._free) if region.size_bytes >= size_bytes]
        if not fitting:
            return None
        region = min(fitting, key=lambda region: region.size_bytes)
        self._free.remove(region)
        return region

    def release(self, region: Region) -> None:
        """The batch that used it is done."""
        if self.on:
            self._free.append(region)
        else:
            region.close()

    def lend(self, region: Region) -> memoryview:
        """A view of what a batch wrote there; the region is free when no slice of it is left."""
        view = region.lend(lambda: self._returned(key, region))
        key = id(view.obj)
        self._lent[key] = region
        return view

    def _returned(self, key: int, region: Region) -> None:
        del self._lent[key]
        (self.release if region.usable else self.give_up)(region)

    def found(self, tensors: Sequence[BatchTensor]) -> tuple[Found | None, ...]:
        """Where these tensors are already, as batches wrote them; () where none of them is."""
        found = tuple(map(self._found, tensors)) if self._lent else ()
        return found if any(found) else ()

    def _found(self, tensor: BatchTensor) -> Found | None:
        """Parts that lie one behind the other in a region that is lent."""
        parts = [part for part in tensor.parts if len(part)]
        first = parts[0] if parts else b""
        if not isinstance(first, memoryview) or id(first.obj) not in self._lent:
            return None
        region, owner = self._lent[id(first.obj)], first.obj
        begin = end = _address(first)
        for part in parts:
            if not isinstance(part, memoryview) or part.obj is not owner or _address(part) != end:
                return None
            end += len(part)
        offset = begin - _address(region.view)
        # A model may compute where a tensor lies, and expect it where tensors begin.
        return None if offset % _ALIGNMENT else (region, Place(region.name, offset, end - begin))

    def give_up(self, region: Region) -> None:
        """Triton may still use it: it is never used again, and stays registered and counted."""
        region.close()

    async def close(self, *, unregister: bool) -> None:
        """Give everything back; `unregister` unless that Triton is gone."""
        self.on = False
        free, self._free = self._free, []
        for region in free:
            if unregister:
                try:
                    await self._unregister(region.name)
                except BackendError:
                    unregister = False
            region.close()

    async def _make(self, size_bytes: int) -> Region | None:
        wanted = _LEAST_REGION_BYTES
        while wanted < size_bytes:
            wanted *= 2
        if not self.on or not await self._make_room(wanted):
            return None
        self._bytes += wanted
        name = f"{_owner_prefix(os.getpid())}{uuid.uuid4().hex}"
        path = DIRECTORY / name
        try:
            memory = await asyncio.to_thread(_create, path, wanted)
            try:
                if not self.regions:
                    await self._forget_the_dead()
                await self._register(name, f"/{name}", wanted)
            finally:
                path.unlink(missing_ok=True)
        except (OSError, BackendError) as error:
            self._bytes -= wanted
            self.on = False
            logger.info("no shared memory with Triton, messages carry everything: %s", error)
            return None
        except BaseException:
            self._bytes -= wanted
            raise
        self.regions += 1
        return Region(name, memory, wanted)

    async def _forget_the_dead(self) -> None:
        """Regions of a Paceline that was killed are memory that only Triton holds on to."""
        family = _owner_prefix(0).removesuffix("0-")
        for name in await self._registered():
            owner = name.removeprefix(family).partition("-")[0]
            if name.startswith(family) and owner.isdigit() and not _alive(int(owner)):
                await self._unregister(name)

    async def _make_room(self, size_bytes: int) -> bool:
        """Give up free regions (too small, or they would have been taken) for a new one."""
        while self._bytes + size_bytes > self._limit_bytes and self._free:
            region = self._free.pop(0)
            self._bytes -= region.size_bytes
            with suppress(BackendError):
                await self._unregister(region.name)
            region.close()
        return self._bytes + size_bytes <= self._limit_bytes


def _create(path: Path, size_bytes: int) -> mmap.mmap:
    """Raises OSError, also where /dev/shm has no room: touching it would be a SIGBUS."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
        return mmap.mmap(descriptor, size_bytes)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, "B").__array_interface__["data"][0]
    return address


def _owner_prefix(pid: int) -> str:
    """Start of the names of a process's regions; process ids repeat in other namespaces."""
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    return f"paceline-{namespace}-{pid}-"


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _free_bytes() -> int:
    try:
        status = os.statvfs(DIRECTORY)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
