"""Weights on a GPU, for ONNX Runtime's CUDA execution provider. NOT RUN ON A GPU.

What is tested is the layout, the staging and the errors, on memory that stands for a device's. The
calls of the CUDA runtime (`Cuda`) and of ONNX Runtime with it (`DeviceSession`) are not.

A fixed pool of device memory is taken once. Every object has one place in it for good, because
sessions refer to their weights by address; objects of different blocks may have the same place, and
the one that a run needs next is copied over the one that it is done with. Copies go from mapped
pages through two pinned buffers, asynchronously, on a stream of their own: those of the next block
while this one computes. Runs take turns.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from .manifest import Block, PoolError
from .mapping import Bytes, MappedObject
from .run import Sessions
from .skeleton import FOLDER

STAGE_BYTES = 8 << 20
_ALIGNMENT = 256
_STAGES = 2
_EVENTS = 64


class Driver(Protocol):
    """What is needed of a GPU; `Cuda` is one. Sizes in bytes, addresses of the device."""

    def allocate(self, size_bytes: int) -> int: ...

    def pinned(self, size_bytes: int) -> Bytes:
        """Host memory that can be copied from asynchronously."""

    def copy(self, address: int, source: Bytes) -> Any:
        """Begins to copy from pinned memory; an event to `wait` for."""

    def wait(self, event: Any) -> None: ...

    def close(self) -> None:
        """Frees all of it."""


def layout(
    needs: Sequence[Sequence[str]], sizes: Mapping[str, int], pool_bytes: int | None
) -> tuple[dict[str, int], int]:
    """Offsets in the pool of every object of `needs` (by block, in order), and the pool's size.

    Without a limit each has a place of its own. Within one, objects of several blocks have, and of
    the rest every other block lies at the one end of what is left and those between at the other:
    two that follow each other never overlap. Raises PoolError if the pool is too small for that.

    >>> layout([["a"], ["b"], ["c"]], {"a": 256, "b": 512, "c": 256}, 768)
    ({'a': 0, 'b': 256, 'c': 0}, 768)
    """
    uses = Counter(name for names in needs for name in set(names))
    offsets: dict[str, int] = {}
    kept = 0
    for name, count in sorted(uses.items()):
        if pool_bytes is None or count > 1:
            offsets[name] = kept
            kept += _aligned(sizes[name])
    if pool_bytes is None:
        return offsets, kept
    before = 0
    for number, names in enumerate(needs):
        own = [name for name in dict.fromkeys(names) if name not in offsets]
        size = sum(_aligned(sizes[name]) for name in own)
        least = kept + before + size
        if least > pool_bytes // _ALIGNMENT * _ALIGNMENT:
            raise PoolError(
                f"device_pool_mib is too small: two blocks in a row and what is shared take "
                f"{-(-least >> 20)} MiB"
            )
        at = kept if number % 2 == 0 else (pool_bytes - size) // _ALIGNMENT * _ALIGNMENT
        for name in own:
            offsets[name] = at
            at += _aligned(sizes[name])
        before = size
    return offsets, pool_bytes


class DevicePool:
    """Objects of one model on a device. Not for several threads at once."""

    def __init__(
        self,
        driver: Driver,
        needs: Sequence[Sequence[str]],
        objects: Mapping[str, MappedObject],
        pool_bytes: int | None,
    ) -> None:
        self._driver = driver
        self._needs = needs
        self._objects = objects
        sizes = {name: mapped.size_bytes for name, mapped in objects.items()}
        self._offsets, size = layout(needs, sizes, pool_bytes)
        self._base = driver.allocate(max(size, _ALIGNMENT))
        self._stages = [driver.pinned(STAGE_BYTES) for _ in range(_STAGES)]
        self._busy: list[Any] = [None] * _STAGES
        self._turn = 0
        self._present: dict[str, Any] = {}
        self._changes: dict[str, int] = {}
        """Of what was copied: `MappedObject.changes` then."""
        self.copied_bytes = 0

    def address(self, name: str, offset: int = 0) -> int:
        return self._base + self._offsets[name] + offset

    def fetch(self, block: int) -> None:
        """Begins to copy what of a block's objects is not there; they are in host memory."""
        for name in self._needs[block]:
            changes = self._objects[name].changes
            if name not in self._present or self._changes[name] != changes:
                self._evict(name)
                self._changes[name] = changes
                self._present[name] = self._copy(name)

    def ready(self, block: int) -> None:
        """Waits until the block's objects are there."""
        self.fetch(block)
        for name in self._needs[block]:
            if self._present[name] is not None:
                self._driver.wait(self._present[name])
                self._present[name] = None

    def close(self) -> None:
        self._driver.close()

    def _evict(self, name: str) -> None:
        """What overlaps is gone; a copy into it that is under way is on the same stream."""
        begin = self._offsets[name]
        end = begin + self._objects[name].size_bytes
        for other in list(self._present):
            start = self._offsets[other]
            if start < end and begin < start + self._objects[other].size_bytes:
                del self._present[other]

    def _copy(self, name: str) -> Any:
        source, address = self._objects[name].bytes, self.address(name)
        event = None
        for begin in range(0, len(source), STAGE_BYTES):
            part = source[begin : begin + STAGE_BYTES]
            turn, self._turn = self._turn, (self._turn + 1) % _STAGES
            if self._busy[turn] is not None:
                self._driver.wait(self._busy[turn])
            stage = self._stages[turn][: len(part)]
            stage[:] = part
            event = self._busy[turn] = self._driver.copy(address + begin, stage)
        self.copied_bytes += len(source)
        return event


class Cuda:
    """The CUDA runtime through ctypes: what `Driver` says. Not run."""

    def __init__(self, number: int) -> None:
        """Raises PoolError on a machine without it."""
        try:
            self._library = ctypes.CDLL("libcudart.so.12")
        except OSError as error:
            raise PoolError(f"device cuda:{number}: no CUDA runtime here: {error}") from None
        self._device: list[int] = []
        self._host: list[int] = []
        self._stream = ctypes.c_void_p()
        # In turn: who waits for one that was used again waits for a later copy of the same stream.
        self._events = [ctypes.c_void_p() for _ in range(_EVENTS)]
        self._next = 0
        self._call("cudaSetDevice", ctypes.c_int(number))
        self._call("cudaStreamCreateWithFlags", ctypes.byref(self._stream), ctypes.c_uint(1))
        for event in self._events:
            self._call("cudaEventCreateWithFlags", ctypes.byref(event), ctypes.c_uint(2))

    def allocate(self, size_bytes: int) -> int:
        place = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(place), ctypes.c_size_t(size_bytes))
        self._device.append(place.value or 0)
        return place.value or 0

    def pinned(self, size_bytes: int) -> Bytes:
        place = ctypes.c_void_p()
        self._call(
            "cudaHostAlloc", ctypes.byref(place), ctypes.c_size_t(size_bytes), ctypes.c_uint(0)
        )
        self._host.append(place.value or 0)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(place.value or 0))

    def copy(self, address: int, source: Bytes) -> Any:
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(address),
            ctypes.c_void_p(source.ctypes.data),
            ctypes.c_size_t(source.nbytes),
            ctypes.c_int(1),  # host to device
            self._stream,
        )
        event, self._next = self._events[self._next], (self._next + 1) % _EVENTS
        self._call("cudaEventRecord", event, self._stream)
        return event

    def wait(self, event: Any) -> None:
        self._call("cudaEventSynchronize", event)

    def close(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)
        for place in self._device:
            self._call("cudaFree", ctypes.c_void_p(place))
        for place in self._host:
            self._call("cudaFreeHost", ctypes.c_void_p(place))
        self._device, self._host = [], []

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise PoolError(f"{name} failed with CUDA error {code}")


class DeviceRuns:
    """`run.Sessions` on a device: weights are there before a block computes, one at a time.

    While it does, the next block's are copied, if `fetched` says that all of the model is in host
    memory: bytes that nobody checked are copied no more than computed with.
    """

    def __init__(
        self, sessions: Sessions, pool: DevicePool, blocks: int, fetched: Callable[[], bool]
    ) -> None:
        self._sessions = sessions
        self._pool = pool
        self._blocks = blocks
        self._fetched = fetched
        self._turn = threading.Lock()

    def run(self, block: int, values: list[Any]) -> list[Any]:
        with self._turn:
            self._pool.ready(block)
            if block + 1 < self._blocks and self._fetched():
                self._pool.fetch(block + 1)
            return self._sessions.run(block, values)


class DeviceSession:
    """A block's session on GPU `number`, its weights at their addresses in the pool. Not run."""

    def __init__(
        self,
        graph: bytes,
        block: Block,
        folder: Path,
        threads: int,
        pool: DevicePool,
        number: int,
    ) -> None:
        self._number = number
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry(FOLDER, str(folder))
        # A node on the CPU would read its weights at addresses of the device.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        self._weights = [
            _device_value(
                pool.address(weight.object, weight.offset), weight.dtype, weight.shape, number
            )
            for weight in block.weights
        ]
        for weight, value in zip(block.weights, self._weights, strict=True):
            options.add_initializer(weight.name, value)
        providers = [("CUDAExecutionProvider", {"device_id": str(number)})]
        try:
            self._session = ort.InferenceSession(graph, options, providers)
        except Exception as error:  # ONNX Runtime's own exceptions share no useful base class
            raise PoolError(
                f"graph {block.graph}: refused on the GPU: {' '.join(str(error).split())}"
            ) from None
        self._inputs = [node.name for node in self._session.get_inputs()]
        self._outputs = [node.name for node in self._session.get_outputs()]

    def run(self, values: list[Any]) -> list[Any]:
        """OrtValues in, OrtValues on the device out."""
        binding = self._session.io_binding()
        for name, value in zip(self._inputs, values, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cuda", self._number)
        self._session.run_with_iobinding(binding)
        results: list[Any] = binding.get_outputs()
        return results


def open_cuda(number: int, providers: Sequence[str]) -> Cuda:
    """GPU `number`. Raises PoolError, saying what is missing, on a machine that has none."""
    if "CUDAExecutionProvider" not in providers:
        raise PoolError(
            f"device cuda:{number}: ONNX Runtime here runs on {', '.join(providers)} alone: "
            "install onnxruntime-gpu, or leave the parameter device out (and set KIND_CPU)"
        )
    return Cuda(number)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT


_DLPACK = {"FP16": (2, 16), "FP32": (2, 32), "FP64": (2, 64)}
_DLPACK |= {
    f"{sign}INT{bits}": (int(bool(sign)), bits) for sign in ("", "U") for bits in (8, 16, 32, 64)
}


class _DLManagedTensor(ctypes.Structure):
    """DLPack's C struct, flattened; dlpack.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


_kept: list[Any] = []
_keep = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)  # the pool frees what is its own


def _device_value(
    address: int, dtype: str, shape: Sequence[int], number: int, device_type: int = 2
) -> Any:
    """An OrtValue over device memory at `address`; ONNX Runtime has no other way to make one.

    `device_type` 2 is CUDA, 1 the CPU. What it refers to is kept as long as the process lives, as
    sessions are.
    """
    if dtype not in _DLPACK:
        raise PoolError(f"weights of type {dtype} cannot be on a GPU")
    sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    code, bits = _DLPACK[dtype]
    tensor = _DLManagedTensor(
        address,
        device_type,
        number,
        len(shape),
        code,
        bits,
        1,
        sizes,
        None,
        0,
        None,
        ctypes.cast(_keep, ctypes.c_void_p),
    )
    _kept.append((tensor, sizes))
    make = ctypes.pythonapi.PyCapsule_New
    make.restype = ctypes.py_object
    make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = make(ctypes.addressof(tensor), b"dltensor", None)
    return ort.OrtValue.from_dlpack(capsule)
