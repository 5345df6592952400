"""Which runs of a model with a budget are under way at the same time. Pure.

A run takes its largest block, at least, and activations. Those are in an arena that all runs share,
and what a run has left there the next one may find no use for: after runs of several kinds it holds
at most what each kind takes, times as many of it as ran at once. So a kind that is new needs room
of its own, or an empty arena, and that can be had only while nothing is under way.

Invariant: the arena holds no more than `beside_bytes` as long as nobody begins without it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Need:
    """What a run takes: its largest block, and the activations of a batch of its `rows`.

    Runs of one `kind` compute the same with arrays of the same shapes.
    """

    kind: Hashable
    rows: int
    block_bytes: int
    beside_bytes: int


class Admission:
    """The runs under way, at most so many at a time, and what others before them have left."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._under_way: list[Need] = []
        self._kinds: dict[Hashable, int] = {}
        """Bytes in the arena, of each kind of run since it was emptied."""
        self._blocks_bytes = 0
        self._beside_bytes = 0

    @property
    def idle(self) -> bool:
        return not self._under_way

    @property
    def full(self) -> bool:
        """Whether one more would be too many."""
        return len(self._under_way) >= self._most

    @property
    def blocks_bytes(self) -> int:
        """The largest blocks of those that were under way together, at most, since `forget`."""
        return self._blocks_bytes

    @property
    def beside_bytes(self) -> int:
        """What the arena was let have since `forget`."""
        return self._beside_bytes

    def with_one_more(self, need: Need) -> tuple[int, int]:
        """Largest blocks of all under way and bytes in the arena, if this one began now."""
        blocks = need.block_bytes + sum(other.block_bytes for other in self._under_way)
        at_once = 1 + sum(other.kind == need.kind for other in self._under_way)
        kinds = self._kinds | {
            need.kind: max(self._kinds.get(need.kind, 0), at_once * need.beside_bytes)
        }
        return blocks, sum(kinds.values())

    def begin(self, need: Need) -> None:
        blocks, beside = self.with_one_more(need)
        self._kinds[need.kind] = beside - sum(
            size for kind, size in self._kinds.items() if kind != need.kind
        )
        self._blocks_bytes = max(self._blocks_bytes, blocks)
        self._beside_bytes = max(self._beside_bytes, beside)
        self._under_way.append(need)

    def end(self, need: Need) -> None:
        self._under_way.remove(need)

    def emptied(self) -> None:
        """The arena was; nothing is under way."""
        assert self.idle
        self._kinds.clear()

    def forget(self) -> None:
        """From now on only what comes counts; the arena was emptied."""
        self.emptied()
        self._blocks_bytes = self._beside_bytes = 0
