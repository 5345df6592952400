"""Requests become calls of members, and calls that can run as one become batches. Pure.

A request of a fused model may ask several members for outputs: one `Call` each. Calls of the same
member, outputs and item shapes run together along the batch axis; each gets its own rows back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .manifest import Member


class RequestError(ValueError):
    """A request that cannot be computed; says what to change."""


@dataclass(frozen=True, slots=True)
class Call:
    """What one request wants of one member. `request` is its position."""

    request: int
    member: str
    feed: Mapping[str, Any]
    outputs: tuple[str, ...]


def calls_of(
    request: int, members: Sequence[Member], given: Mapping[str, Any], outputs: Sequence[str]
) -> list[Call]:
    """Calls that give these outputs. Raises RequestError when an input of a member is missing.

    A request that names no outputs asks for all of them; of a fused model it gets those of the
    members whose inputs it brought.
    """
    wanted = set(outputs)
    everything = {tensor.name for member in members for tensor in member.outputs}
    calls = []
    for member in members:
        names = tuple(tensor.name for tensor in member.outputs if tensor.name in wanted)
        if not names:
            continue
        inputs = [tensor.name for tensor in member.inputs]
        missing = [name for name in inputs if name not in given]
        if missing and wanted == everything and len(missing) == len(inputs) and len(members) > 1:
            continue
        if missing:
            whose = f" of member '{member.name}'" if member.name else ""
            raise RequestError(f"the request lacks the input{whose} {', '.join(missing)}")
        calls.append(Call(request, member.name, {name: given[name] for name in inputs}, names))
    if wanted and not calls:
        raise RequestError("the request brings no inputs: name the outputs that you want")
    return calls


def batches(calls: Sequence[Call], batching: Mapping[str, bool]) -> list[list[Call]]:
    """Calls that can run together; `batching` says which members can batch."""
    found: dict[Any, list[Call]] = {}
    for position, call in enumerate(calls):
        key: Any = position
        if batching[call.member] and call.feed:
            shapes = tuple((name, array.shape[1:]) for name, array in call.feed.items())
            key = (call.member, call.outputs, shapes)
        found.setdefault(key, []).append(call)
    return list(found.values())


def rows_of(call: Call) -> int:
    """Length of the batch axis."""
    array = next(iter(call.feed.values()), None)
    return len(array) if array is not None and array.ndim else 1


def rows_together(batch: Sequence[Call], batching: Mapping[str, bool]) -> int:
    """Length of their batch axis; 1 of a member that has none, whose first axis is its own."""
    return sum(map(rows_of, batch)) if batching[batch[0].member] else 1


def join(batch: Sequence[Call]) -> dict[str, Any]:
    """The feed of all of them together."""
    if len(batch) == 1:
        return dict(batch[0].feed)
    return {name: np.concatenate([call.feed[name] for call in batch]) for name in batch[0].feed}


def split(batch: Sequence[Call], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each call's rows of the results. Raises RequestError when an output has other rows."""
    if len(batch) == 1:
        return [dict(results)]
    rows = [rows_of(call) for call in batch]
    for name, array in results.items():
        if array.ndim == 0 or len(array) != sum(rows):
            raise RequestError(f"output {name} {array.shape} has no row for each of {sum(rows)}")
    ends = np.cumsum(rows)[:-1]
    parts = {name: np.split(array, ends) for name, array in results.items()}
    return [{name: parts[name][index] for name in results} for index in range(len(batch))]
