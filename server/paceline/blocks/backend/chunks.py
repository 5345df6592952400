"""Parts of a table that are usable before all of it is: which ones, in which requests. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from .manifest import Chunks, Weight

_REQUESTS = 64
"""Most for the rows of a batch: each is some work, for the store and for us."""
_GAP_BYTES = 512 << 10


def chunks_of(rows: Any, weight: Weight, chunks: Chunks) -> set[int]:
    """Numbers of the chunks in which these rows of a table lie.

    Indices may be negative; those that are out of range are for ONNX Runtime to refuse.
    """
    count = weight.shape[0]
    numbers = np.unique(np.where(rows < 0, rows + count, rows).clip(0, count - 1).ravel())
    row_bytes = weight.bytes // count
    starts = weight.offset + numbers * row_bytes
    firsts, lasts = starts // chunks.size_bytes, (starts + row_bytes - 1) // chunks.size_bytes
    return {
        number
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)
        for number in range(first, last + 1)
    }


def requests(wanted: Collection[int], size_bytes: int, *, most: int) -> Iterator[range]:
    """Chunks in few requests: what lies between two that are wanted comes along if it is little.

    No request is for more than `most` chunks, even if that makes it more requests.

    >>> list(requests({1, 2, 4, 90}, 64 << 10, most=16))
    [range(1, 5), range(90, 91)]
    >>> list(requests({1, 2, 4, 90}, 64 << 10, most=3))
    [range(1, 4), range(4, 5), range(90, 91)]
    """
    numbers = sorted(wanted)
    gaps = sorted((after - before for before, after in pairwise(numbers)), reverse=True)
    least = gaps[_REQUESTS - 1] if len(gaps) >= _REQUESTS else 0
    widest = max(least, _GAP_BYTES // size_bytes)
    start = 0
    for position, number in enumerate(numbers):
        last = position == len(numbers) - 1
        if last or numbers[position + 1] - number > widest:
            for first in range(numbers[start], number + 1, most):
                yield range(first, min(first + most, number + 1))
            start = position + 1
