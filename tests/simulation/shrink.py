"""Delta debugging: the shortest list of stimuli that still shows a violation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def ddmin(items: Sequence[T], fails: Callable[[Sequence[T]], bool], *, runs: int = 500) -> list[T]:
    """A sublist that still fails and from which no single item can go (Zeller's ddmin).

    `fails` must hold for `items`; after `runs` calls of it the best so far is returned.

    >>> ddmin(range(20), lambda some: {3, 17} <= set(some))
    [3, 17]
    """
    kept = list(items)
    parts = 2
    while len(kept) > 1:
        size = -(-len(kept) // parts)
        for begin in range(0, len(kept), size):
            rest = kept[:begin] + kept[begin + size :]
            runs -= 1
            if runs < 0:
                return kept
            if fails(rest):
                kept, parts = rest, max(parts - 1, 2)
                break
        else:
            if size == 1:
                break
            parts = min(2 * parts, len(kept))
    return kept
