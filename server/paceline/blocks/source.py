"""ONNX files as sources: what they are, and ONNX Runtime's optimised form of them.

Invariant: the weights of a model with external data are never in memory all at once; ONNX Runtime
maps them, and what is written is read in chunks. (A model in one file, 2 GiB at most, passes
through memory whole: that is how protobuf reads.)
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper
from onnx.external_data_helper import load_external_data_for_tensor

from paceline.blocks.backend.manifest import WEIGHT_TYPES
from paceline.blocks.subgraphs import external_tensors, hoist
from paceline.core.errors import ConfigError, ResidencyError

CHUNK_BYTES = 8 << 20
INLINE_BYTES = 1024
"""Tensors below stay in the graph."""

# ONNX's element types as KServe spells them.
DATATYPES: Mapping[int, str] = {
    TensorProto.BOOL: "BOOL",
    TensorProto.UINT8: "UINT8",
    TensorProto.UINT16: "UINT16",
    TensorProto.UINT32: "UINT32",
    TensorProto.UINT64: "UINT64",
    TensorProto.INT8: "INT8",
    TensorProto.INT16: "INT16",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.FLOAT16: "FP16",
    TensorProto.FLOAT: "FP32",
    TensorProto.DOUBLE: "FP64",
    TensorProto.STRING: "BYTES",
}
# And as ONNX Runtime's sessions spell them.
_ORT_TYPES = {
    "tensor(bool)": TensorProto.BOOL,
    "tensor(uint8)": TensorProto.UINT8,
    "tensor(uint16)": TensorProto.UINT16,
    "tensor(uint32)": TensorProto.UINT32,
    "tensor(uint64)": TensorProto.UINT64,
    "tensor(int8)": TensorProto.INT8,
    "tensor(int16)": TensorProto.INT16,
    "tensor(int32)": TensorProto.INT32,
    "tensor(int64)": TensorProto.INT64,
    "tensor(float16)": TensorProto.FLOAT16,
    "tensor(bfloat16)": TensorProto.BFLOAT16,
    "tensor(float)": TensorProto.FLOAT,
    "tensor(double)": TensorProto.DOUBLE,
    "tensor(string)": TensorProto.STRING,
}


@dataclass(frozen=True, slots=True)
class Value:
    """Type and shape of a value; an axis is a number, a symbol or unknown. `dtype` 0: no tensor.

    An empty shape is that of a scalar, or unknown: ONNX Runtime reports both alike.
    """

    dtype: int
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor's bytes in a file: all of it, or `start` to `stop` of its two axes' `axis`.

    With a `panel`, in the order in which a kernel reads them: of that many entries of `axis` those
    along the other axis, then of the next ones.
    """

    path: Path
    offset: int
    dtype: int
    full_shape: tuple[int, ...]
    axis: int = 0
    start: int = 0
    stop: int = -1
    panel: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        if self.stop < 0:
            return self.full_shape
        if self.panel:
            return (self.stop - self.start, self.full_shape[1 - self.axis], 1, 1)
        shape = list(self.full_shape)
        shape[self.axis] = self.stop - self.start
        return tuple(shape)

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * item_bytes(self.dtype)

    def part(self, axis: int, start: int, stop: int) -> Stored:
        """Rows (axis 0) or columns (axis 1) of a matrix."""
        return replace(self, axis=axis, start=start, stop=stop)

    def in_panels(self, axis: int, panel: int) -> Stored:
        """The matrix, or the part of it along `axis`, as a 1x1 convolution of that width has it."""
        stop = self.full_shape[axis] if self.stop < 0 else self.stop
        return replace(self, axis=axis, stop=stop, panel=panel)

    def chunks(self) -> Iterator[bytes]:
        """The bytes in C order, some MiB at a time. Raises ResidencyError if the file is short."""
        with self.path.open("rb") as file:
            if self.panel:
                yield from self._panels(file.fileno())
            elif self.stop < 0 or self.axis == 0:
                row = prod(self.full_shape[1:]) * item_bytes(self.dtype)
                yield from self._read(
                    file.fileno(), self.offset + self.start * row, self.size_bytes
                )
            else:
                step = max(1, CHUNK_BYTES // ((self.stop - self.start) * item_bytes(self.dtype)))
                rows = self.full_shape[0]
                for first in range(0, rows, step):
                    yield self._columns(
                        file.fileno(), range(first, min(first + step, rows)), self.start, self.stop
                    )

    def _panels(self, handle: int) -> Iterator[bytes]:
        other, item = self.full_shape[1 - self.axis], item_bytes(self.dtype)
        step = max(1, CHUNK_BYTES // (other * item * self.panel)) * self.panel
        for first in range(self.start, self.stop, step):
            last = min(first + step, self.stop)
            panels = (last - first) // self.panel
            if self.axis == 0:
                size = (last - first) * other * item
                data = b"".join(self._read(handle, self.offset + first * other * item, size))
                split = np.frombuffer(data, np.float32).reshape(panels, self.panel, other)
                yield split.transpose(0, 2, 1).tobytes()
            else:
                data = self._columns(handle, range(other), first, last)
                split = np.frombuffer(data, np.float32).reshape(other, panels, self.panel)
                yield split.transpose(1, 0, 2).tobytes()

    def _columns(self, handle: int, rows: range, start: int, stop: int) -> bytes:
        item, columns = item_bytes(self.dtype), self.full_shape[1]
        places = (self.offset + (row * columns + start) * item for row in rows)
        return b"".join(
            data for at in places for data in self._read(handle, at, (stop - start) * item)
        )

    def _read(self, handle: int, offset: int, count: int) -> Iterator[bytes]:
        while count:
            data = os.pread(handle, min(count, CHUNK_BYTES), offset)
            if not data:
                raise ResidencyError(f"{self.path}: ends before the weights do")
            offset += len(data)
            count -= len(data)
            yield data


@dataclass(frozen=True, slots=True)
class Source:
    """An ONNX file that was found well-formed, and the digest of it and its external data."""

    path: Path
    digest: str
    bytes: int
    external: bool
    initializer_inputs: frozenset[str]


@dataclass(frozen=True, slots=True)
class Optimised:
    """A model as ONNX Runtime optimised it for this machine; weights in a file beside it."""

    model: onnx.ModelProto
    path: Path
    stored: Mapping[str, Stored]


def item_bytes(dtype: int) -> int:
    """Of one element of ONNX's type `dtype`."""
    return int(np.dtype(helper.tensor_dtype_to_np_dtype(dtype)).itemsize)


def examine(path: Path) -> Source:
    """Reads all of the file and of its external data once. Raises ConfigError."""
    model = _read(path)
    locations = sorted(
        {
            entry.value
            for tensor in external_tensors(model)
            for entry in tensor.external_data
            if entry.key == "location"
        }
    )
    digest, size = hashlib.sha256(), 0
    for file in (path, *(_inside(path, location) for location in locations)):
        try:
            with file.open("rb", buffering=0) as opened:
                digest.update(hashlib.file_digest(opened, "sha256").hexdigest().encode())
                size += os.fstat(opened.fileno()).st_size
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror}", where=str(path)) from None
    names = {tensor.name for tensor in model.graph.initializer}
    inputs = frozenset(value.name for value in model.graph.input) & names
    return Source(path, digest.hexdigest(), size, bool(locations), inputs)


def input_axes(path: Path) -> dict[str, int | None]:
    """How many axes each input of the file has; None if it does not say. Raises ConfigError."""
    graph = _read(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return {
        value.name: (
            len(value.type.tensor_type.shape.dim)
            if value.type.tensor_type.HasField("shape")
            else None
        )
        for value in graph.input
        if value.name not in weights
    }


def _read(path: Path) -> onnx.ModelProto:
    """Without its external data."""
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise ConfigError("no such file", where=str(path)) from None
    except (OSError, DecodeError, ValueError) as error:
        raise ConfigError(f"not an ONNX file: {error}", where=str(path)) from None
    if not model.graph.node:
        raise ConfigError("not an ONNX file, or one without nodes", where=str(path))
    return model


def _inside(path: Path, location: str) -> Path:
    base = path.parent.resolve()
    file = (base / location).resolve()
    if not file.is_relative_to(base):
        raise ConfigError(
            f"external data {location!r} is outside the model's directory", where=str(path)
        )
    return file


def optimise(source: Source, stage: Path, *, portable: bool = False) -> Optimised:
    """ONNX Runtime's graph for this CPU, in the new directory `stage`; `portable`: for any device.

    Raises ConfigError for a model ONNX Runtime refuses, ResidencyError if the disk is full.
    """
    pool = stage.parent.parent.parent
    free = shutil.disk_usage(stage).free
    if free < source.bytes:
        raise ResidencyError(
            f"{pool}: {source.bytes >> 20} MiB are needed to compile "
            f"{source.path.name}, {free >> 20} MiB are free: make room or choose another --pool"
        )
    path = stage / "optimised.onnx"
    options = session_options()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_BASIC if portable else levels.ORT_ENABLE_ALL
    )
    options.optimized_model_filepath = str(path)
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", "optimised.bin"),
        ("session.optimized_model_external_initializers_min_size_in_bytes", str(INLINE_BYTES)),
    ):
        options.add_session_config_entry(key, value)
    try:
        ort.InferenceSession(_foldable(source, stage), options, ["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions share no useful base class
        said = " ".join(str(error).split())
        if path.stem in said:  # about what it writes, not about what it reads
            raise ResidencyError(
                f"{pool}: the optimised model could not be written "
                f"({shutil.disk_usage(stage).free >> 20} MiB free): make room or choose another "
                f"--pool; ONNX Runtime says: {said}"
            ) from None
        raise ConfigError(f"ONNX Runtime refuses it: {said}", where=str(source.path)) from None
    model = onnx.load(path, load_external_data=False)
    hoist(model)
    stored = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        if DATATYPES.get(tensor.data_type) in WEIGHT_TYPES:
            stored[tensor.name] = _stored(tensor, stage)
        else:
            load_external_data_for_tensor(tensor, str(stage))
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    for name, place in stored.items():
        # ONNX Runtime does not say so when it could not write everything.
        if place.offset + place.size_bytes > place.path.stat().st_size:
            raise ResidencyError(f"{pool}: the disk was full while writing {name!r}")
    return Optimised(model, path, stored)


def session_options() -> ort.SessionOptions:
    """What every session here has: one thread, no weights repacked, no talk."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def values_of(optimised: Optimised) -> dict[str, Value]:
    """Type and shape of every input, node output and output, as ONNX Runtime infers them."""
    probe = onnx.ModelProto()
    probe.CopyFrom(optimised.model)
    asked = {value.name for value in probe.graph.output}
    for node in probe.graph.node:
        for name in node.output:
            if name and name not in asked:
                probe.graph.output.add(name=name)
                asked.add(name)
    path = optimised.path.with_name("probe.onnx")
    path.write_bytes(probe.SerializeToString())
    session = ort.InferenceSession(path, session_options(), ["CPUExecutionProvider"])
    return {
        node.name: Value(_ORT_TYPES.get(node.type, 0), tuple(node.shape or ()))
        for node in (*session.get_inputs(), *session.get_outputs())
    }


def _foldable(source: Source, stage: Path) -> Path:
    """The model without weights among its inputs, which ONNX Runtime would not fold.

    One with external data is left as it is: that can only be read from where it lies.
    """
    if not source.initializer_inputs or source.external:
        return source.path
    model = onnx.load(source.path)
    kept = [value for value in model.graph.input if value.name not in source.initializer_inputs]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    path = stage / "foldable.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _stored(tensor: TensorProto, stage: Path) -> Stored:
    place = {entry.key: entry.value for entry in tensor.external_data}
    shape: Sequence[int] = tensor.dims
    path = stage / place["location"]
    return Stored(path, int(place.get("offset", "0")), tensor.data_type, tuple(shape))
