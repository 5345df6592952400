"""Runs compiled models block by block in this process, to compare them.

Invariant: weights are mapped, never copied; after a block has run with `drop`, its pages are no
longer this process's.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from paceline.blocks.backend.manifest import Block, Member, PoolObject
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.source import session_options

Array = npt.NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]

_DTYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
_ROUNDING = 1e-4
# What axes of unknown length are tried with: images want many, indices of sequences little.
_GUESSES = (64, 32, 16, 8, 1, 224)


class BlockRunner:
    """Sessions over mapped objects of a pool."""

    def __init__(self, store: ObjectStore, objects: Mapping[str, PoolObject]) -> None:
        self._store = store
        self._objects = objects
        self._maps: dict[str, mmap.mmap] = {}

    def run(
        self, member: Member, feed: Mapping[str, Array], *, whole: bool = False, drop: bool = False
    ) -> dict[str, Array]:
        """The member's outputs by name; `whole`: as one block; `drop`: swapping each block out."""
        (answer,) = self.run_each(member, [feed], whole=whole, drop=drop)
        return answer

    def run_each(
        self,
        member: Member,
        feeds: Iterable[Mapping[str, Array]],
        *,
        whole: bool = False,
        drop: bool = False,
    ) -> list[dict[str, Array]]:
        """As `run` for each of `feeds`, of which a block takes all before the next one comes."""
        known = [{t.value: _value(feed[t.name]) for t in member.inputs} for feed in feeds]
        inputs = {tensor.value for tensor in member.inputs}
        for block in (member.whole,) if whole else member.blocks:
            with self.session(block) as session:
                known = [
                    _after(block, values, _step(session, block, values), inputs) for values in known
                ]
            if drop:
                self.drop(block)
        return [{t.name: values[t.value].numpy() for t in member.outputs} for values in known]

    @contextmanager
    def session(self, block: Block) -> Iterator[ort.InferenceSession]:
        options = session_options()
        kept = []
        for weight in block.weights:
            mapped = np.frombuffer(self._map(weight.object), np.uint8)
            array = mapped[weight.offset : weight.offset + weight.bytes].view(_DTYPES[weight.dtype])
            value = ort.OrtValue.ortvalue_from_numpy(array.reshape(weight.shape))
            options.add_initializer(weight.name, value)
            kept.append(value)
        path = self._store.verified(block.graph, self._objects[block.graph])
        yield ort.InferenceSession(path, options, ["CPUExecutionProvider"])
        del kept

    def drop(self, block: Block) -> None:
        """Gives the block's pages back, here and, where nobody else maps them, in the cache."""
        for name in {weight.object for weight in block.weights}:
            self._map(name).madvise(mmap.MADV_DONTNEED)
            handle = os.open(self._store.path(name), os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            path = self._store.verified(name, self._objects[name])
            with path.open("rb") as file:
                self._maps[name] = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        return self._maps[name]


def run_file(path: Path, member: Member, feed: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of an ONNX file as it is, without optimisation."""
    session = ort.InferenceSession(path, session_options(), ["CPUExecutionProvider"])
    answers = session.run(
        [tensor.value for tensor in member.outputs],
        {tensor.value: feed[tensor.name] for tensor in member.inputs},
    )
    return {tensor.name: array for tensor, array in zip(member.outputs, answers, strict=True)}


@dataclass(frozen=True, slots=True)
class Draw:
    """How inputs are drawn: integers up to `below`, without it; of real ones the deviation.

    By default indices and masks are of two values that fit every table.
    """

    seed: int = 0
    below: int = 2
    scale: float = 1.0


def sample(
    member: Member, batch: int, guess: int, given: Shapes, draw: Draw = Draw()
) -> dict[str, Array]:
    """Random inputs; dynamic axes are `batch`, as `given`, or `guess`."""
    random = np.random.default_rng(draw.seed)
    feed: dict[str, Array] = {}
    for tensor in member.inputs:
        shape = list(given.get(tensor.name) or (guess if d < 0 else d for d in tensor.shape))
        if member.batching:
            shape[0] = batch
        if tensor.dtype == "BYTES":
            feed[tensor.name] = np.full(shape, "a", dtype=np.object_)
        elif tensor.dtype.startswith("FP"):
            drawn = random.standard_normal(shape, dtype=np.float32) * np.float32(draw.scale)
            feed[tensor.name] = drawn.astype(_DTYPES[tensor.dtype])
        else:
            below = 2 if tensor.dtype == "BOOL" else draw.below
            feed[tensor.name] = random.integers(0, below, shape).astype(_DTYPES[tensor.dtype])
    return feed


def guess_axes(
    run: Callable[[Mapping[str, Array]], object], member: Member, given: Shapes
) -> int | None:
    """A length for the axes of unknown length with which `run` succeeds; None if none does."""
    unknown = any(
        size < 0 and not (member.batching and axis == 0)
        for tensor in member.inputs
        if tensor.name not in given
        for axis, size in enumerate(tensor.shape)
    )
    for guess in _GUESSES if unknown else (1,):
        try:
            run(sample(member, 1, guess, given))
        except Exception:  # ONNX Runtime's own exceptions share no useful base class
            continue
        return guess
    return None


def same(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    """Equal bit for bit?"""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and (
            one[name].tolist() == other[name].tolist()
            if one[name].dtype == np.object_
            else one[name].tobytes() == other[name].tobytes()
        )
        for name in one
    )


def close(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    """Equal but for rounding: to 1e-4 of each output's largest value?"""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and _within_rounding(one[name], other[name])
        for name in one
    )


def _within_rounding(one: Array, other: Array) -> bool:
    if one.dtype.kind != "f":
        return bool(one.tolist() == other.tolist())
    finite = np.isfinite(one)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return False
    largest = float(np.abs(one[finite]).max(initial=0.0))
    return bool(np.allclose(one[finite], other[finite], rtol=0.0, atol=_ROUNDING * largest))


def _value(array: Array) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _step(
    session: ort.InferenceSession, block: Block, values: Mapping[str, ort.OrtValue]
) -> dict[str, ort.OrtValue]:
    names = [node.name for node in session.get_inputs()]
    feed = {name: values[value] for name, value in zip(names, block.inputs, strict=True)}
    outputs = [node.name for node in session.get_outputs()]
    answers: Sequence[ort.OrtValue] = session.run_with_ort_values(outputs, feed)
    return dict(zip(block.outputs, answers, strict=True))


def _after(
    block: Block,
    values: Mapping[str, ort.OrtValue],
    made: Mapping[str, ort.OrtValue],
    inputs: Collection[str],
) -> dict[str, ort.OrtValue]:
    """What somebody still needs after the block."""
    known = {**values, **made}
    return {name: known[name] for name in (*inputs, *block.live)}
