"""Whether a model whose first axis has any length may be given several requests' rows along it.

Two questions, asked by running it. Does a row depend on the others? Runs of one shape that differ
in the other rows alone compute each row in the same order: it stays the same to the bit, however
sensitive to rounding the model is. And does a row get in a batch what it gets alone? Kernels round
in another order there, and some inputs make much of that (ids of a text in which all bytes are 0 or
1), in plain ONNX Runtime as well; so it is enough that the outputs agree for one kind of input,
provided that they tell its rows apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from paceline.blocks.backend.manifest import Member
from paceline.blocks.measure import Array, BlockRunner, Draw, Shapes, sample

_DRAWS = (Draw(), Draw(1, below=128, scale=0.1), Draw(2, below=8, scale=10.0))
_ALIGNMENT = 64
# Relative to the largest value of an output: for what is computed in another order, and for what is
# not, but may be where rows are sorted by what they contain (a mixture of experts).
_REORDERED, _SAME_ORDER = 1e-3, 1e-5
_HALF = 20.0
"""As many times as much for types of 16 bits."""

Answer = Mapping[str, Array]


def why_not_batched(runner: BlockRunner, member: Member, guess: int, given: Shapes) -> str:
    """What forbids to give several rows at once; empty if nothing does.

    `guess` and `given` are the lengths of the other axes, as for `sample`.
    """
    told: set[str] = set()
    differing: set[str] = set()
    for draw in _DRAWS:
        feeds = _feeds(sample(member, 3, guess, given, draw), draw)
        try:
            trial = _Trial(*runner.run_each(member, feeds, drop=True))
        except Exception:  # ONNX Runtime's own exceptions share no useful base class
            if draw is _DRAWS[0]:  # which ran as one row
                return "it does not run on a batch of two"
            continue  # indices that its tables do not have
        if not trial.has_rows():
            return "an output has no batch axis"
        if not trial.independent():
            return "rows of a batch are not independent"
        differing.update(name for name in trial.pair if not trial.agrees(name))
        told.update(name for name in trial.pair if trial.agrees(name) and trial.tells(name))
        if told == trial.pair.keys():
            break
    return "rows of a batch come out otherwise than alone" if differing - told else ""


@dataclass(frozen=True, slots=True)
class _Trial:
    """Outputs of the rows a and b together, of each beside another row c, and of each alone."""

    pair: Answer
    first_kept: Answer
    second_kept: Answer
    first: Answer
    second: Answer

    def has_rows(self) -> bool:
        return all(
            array.ndim > 0 and len(array) == rows
            for rows, answers in (
                (2, (self.pair, self.first_kept, self.second_kept)),
                (1, (self.first, self.second)),
            )
            for answer in answers
            for array in answer.values()
        )

    def independent(self) -> bool:
        """Is a row the same whatever row is beside it?"""
        return all(
            _like(array[row], kept[name][row], _SAME_ORDER)
            for name, array in self.pair.items()
            for row, kept in enumerate((self.first_kept, self.second_kept))
        )

    def agrees(self, name: str) -> bool:
        """Is the output in a batch what it is alone?"""
        return all(
            _like(self.pair[name][row], alone[name][0], _REORDERED)
            for row, alone in enumerate((self.first, self.second))
        )

    def tells(self, name: str) -> bool:
        """Does the output differ from row to row?"""
        first, second = self.pair[name]
        return not _like(first, second, _REORDERED)


def _feeds(rows: Mapping[str, Array], draw: Draw) -> list[dict[str, Array]]:
    """For a trial, from three rows by input."""
    rows = {name: array.copy() for name, array in rows.items()}
    for array in rows.values():
        # Of a few values, a third row could be the second again.
        if array.dtype.kind == "b":
            array[2] = ~array[1]
        elif array.dtype.kind in "iu":
            array[2] = draw.below - 1 - array[1]
    return [
        {name: _aligned(array[list(chosen)]) for name, array in rows.items()}
        for chosen in ((0, 1), (0, 2), (2, 1), (0,), (1,))
    ]


def _aligned(array: Array) -> Array:
    """A copy where every such copy begins alike: kernels add in an order that depends on it."""
    if array.dtype == np.object_:
        return array
    room = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _like(one: Array, other: Array, tolerance: float) -> bool:
    """Equal, or floating point and within that of the largest value?"""
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape:
        return False
    if one.dtype.kind != "f":
        return bool(one.tolist() == other.tolist())
    tolerance *= _HALF if one.dtype.itemsize == 2 else 1.0
    finite = np.isfinite(one)
    largest = float(np.abs(one[finite]).max(initial=0.0))
    return np.allclose(one, other, rtol=0.0, atol=tolerance * largest, equal_nan=True)
