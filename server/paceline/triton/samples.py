"""Inputs to measure a model with: its first `model_warmup` sample, or random numbers.

Invariant: the same model gives the same bytes (the generator is seeded with its name). A sample's
`dims` are those of one row, as in Triton; `rows_of` stacks copies of the row along axis 0.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from paceline.core.errors import ConfigError
from paceline.core.model import ModelSpec
from paceline.core.tensor import (
    ITEM_BYTES,
    BatchTensor,
    Tensor,
    TensorSpec,
    byte_size_error,
    encode_bytes,
)
from paceline.triton.config import ModelConfig, datatype_of

WARMUP_DIRECTORY = "warmup"


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of every input, without batch axis; `advice` says when it was made up."""

    tensors: tuple[Tensor, ...]
    advice: str = ""


def sample_of(spec: ModelSpec, config: ModelConfig, directory: Path | None) -> Sample:
    """What to run `spec` with: what it needs; of a model that needs no single input, all it takes.

    Raises ConfigError when a declared sample is unusable: unknown input, missing file, wrong size.
    """
    rng = random.Random(spec.name)
    if config.model_warmup:
        return Sample(_declared(spec, config.model_warmup[0], directory, rng))
    needed = [wanted for wanted in spec.inputs if not wanted.optional] or spec.inputs
    tensors = tuple(
        _random_tensor(wanted, tuple(abs(axis) for axis in wanted.shape), rng) for wanted in needed
    )
    if not any(-1 in wanted.shape for wanted in needed):
        return Sample(tensors)
    return Sample(
        tensors,
        f"model {spec.name!r} has axes of any length, measured at length 1: declare a "
        "`model_warmup` sample in its config.pbtxt to measure what it will really be sent",
    )


def rows_of(sample: Sample, rows: int, *, batches: bool) -> tuple[BatchTensor, ...]:
    """The sample as inputs of one call: `rows` copies on axis 0, or as it is without batching."""
    if not batches:
        return tuple(BatchTensor(t.name, t.datatype, t.shape, (t.data,)) for t in sample.tensors)
    return tuple(
        BatchTensor(t.name, t.datatype, (rows, *t.shape), (t.data,) * rows) for t in sample.tensors
    )


def _declared(
    spec: ModelSpec, warmup: Any, directory: Path | None, rng: random.Random
) -> tuple[Tensor, ...]:
    where = f"{directory or spec.name}: model_warmup {warmup.name!r}"
    inputs = dict(warmup.inputs)
    tensors: list[Tensor] = []
    for name in sorted(inputs):
        wanted = spec.input(name)
        if wanted is None:
            raise ConfigError(f"the model has no input {name!r}", where=where)
        tensors.append(_declared_tensor(wanted, inputs[name], directory, rng, where))
    missing = [s.name for s in spec.inputs if not s.optional and s.name not in inputs]
    if missing:
        raise ConfigError(f"no sample of input {', '.join(missing)}", where=where)
    return tuple(tensors)


def _declared_tensor(
    wanted: TensorSpec, declared: Any, directory: Path | None, rng: random.Random, where: str
) -> Tensor:
    shape = tuple(declared.dims)
    datatype = datatype_of(declared.data_type)
    if datatype != wanted.datatype or not wanted.accepts(shape) or any(a < 0 for a in shape):
        raise ConfigError(
            f"input {wanted.name!r} is {wanted.datatype} {list(wanted.shape)}, the sample is "
            f"{datatype} {list(shape)}",
            where=where,
        )
    kind = declared.WhichOneof("input_data_type")
    if kind == "random_data":
        return _random_tensor(wanted, shape, rng)
    if kind != "input_data_file":
        elements = prod(shape)
        item = ITEM_BYTES.get(datatype)
        data = bytes(elements * item) if item else encode_bytes([b""] * elements)
        return Tensor(wanted.name, datatype, shape, data)
    file = str(declared.input_data_file)
    if directory is None:
        raise ConfigError(
            f"the sample of {wanted.name!r} is a file that only the server can read: give its "
            "directory with --model-repository",
            where=where,
        )
    try:
        data = (directory / WARMUP_DIRECTORY / file).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"no sample of {wanted.name!r} in {WARMUP_DIRECTORY}/{file}: {error.strerror}",
            where=where,
        ) from None
    tensor = Tensor(wanted.name, datatype, shape, data)
    if (sizes := byte_size_error(tensor)) is not None:
        raise ConfigError(
            f"{WARMUP_DIRECTORY}/{file} has {sizes[1]} bytes, {datatype} {list(shape)} takes "
            f"{sizes[0]}",
            where=where,
        )
    return tensor


def _random_tensor(wanted: TensorSpec, shape: tuple[int, ...], rng: random.Random) -> Tensor:
    """Floats in [0, 1), booleans, bytes of small integers: nothing that is NaN or overflows."""
    elements = prod(shape)
    datatype = wanted.datatype
    if datatype == "BYTES":
        data = encode_bytes(b"%016x" % rng.getrandbits(64) for _ in range(elements))
    elif datatype in _FLOAT_CODES:
        code = _FLOAT_CODES[datatype]
        data = struct.pack(f"<{elements}{code}", *(rng.random() for _ in range(elements)))
    elif datatype == "BF16":
        values = struct.pack(f"<{elements}f", *(rng.random() for _ in range(elements)))
        data = b"".join(values[at + 2 : at + 4] for at in range(0, len(values), 4))
    else:
        item = ITEM_BYTES[datatype]
        limit = 2 if datatype == "BOOL" else 128
        padding = bytes(item - 1)
        data = b"".join(bytes((rng.randrange(limit),)) + padding for _ in range(elements))
    return Tensor(wanted.name, datatype, shape, data)


_FLOAT_CODES = {"FP16": "e", "FP32": "f", "FP64": "d"}
