"""Where to cut, by latency: the partition of a graph whose runs within a budget take least.

SwapNet's criterion (arXiv 2401.16757). The latency model is the backend's (`backend.plan`), over
pieces of the graph: blocks compute one after the other, each when its weights are there; one stream
of I/O fetches what is not pinned, in order, as far ahead as the budget has room; a block's memory
is free when it has been computed. What a block costs beside its nodes makes few blocks cheap;
waiting for all of a large one, and holding all of it to its end, makes small ones cheap.

Within a run two times say everything at a cut: when the block before it has ended (C), and when all
is fetched that there was room for by then (F). A block maps them to

    C' = max(C, F - lag) + execute        lag: what is fetched between its own last byte and F's
    F' = max(F, C') + fetch               fetch: what its end makes room for

which is linear in the algebra of (max, +): a partition is a product of 2x2 matrices, and of runs
back to back each takes the product's eigenvalue. A matrix that is nowhere less than another one
leads to no better end: dynamic programming over cuts with the others is exact. Pinned is a prefix;
each is tried that could still be better. Pure.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from paceline.blocks.backend.plan import READING_COST
from paceline.blocks.backend.window import CHUNK_BYTES

_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Partition:
    """Blocks end after pieces `stops`; the first `pinned` pieces stay; seconds of a run."""

    stops: tuple[int, ...]
    pinned: int
    latency_s: float


class _Way(NamedTuple):
    """How C and F at a cut depend on C and F at the run's start, and the cuts so far."""

    cc: float
    cf: float
    fc: float
    ff: float
    stop: int
    before: _Way | None

    @property
    def cycle_s(self) -> float:
        return max(self.cc, self.ff, (self.cf + self.fc) / 2)

    def least(self, other: _Way) -> bool:
        """Whether it is nowhere later than the other one."""
        return (
            self.cc <= other.cc
            and self.cf <= other.cf
            and self.fc <= other.fc
            and self.ff <= other.ff
        )


def partition(
    sizes: Sequence[int],
    execute_s: Sequence[float],
    *,
    limit_bytes: int,
    most_bytes: int,
    rate_bytes_s: float,
    block_s: float,
    chunk_bytes: int = CHUNK_BYTES,
) -> Partition:
    """The best one of pieces of these `sizes` (bytes), whose nodes take `execute_s`.

    `block_s`: what a block takes beside its nodes. A block has at most `most_bytes`, unless it is
    one piece; each piece must fit the limit.

    Two blocks come while others compute; as one they would have to be there before either.

    >>> partition([4, 4, 4], [4.0, 4.0, 4.0], limit_bytes=8, most_bytes=8, rate_bytes_s=1.0,
    ...           block_s=0.1)
    Partition(stops=(1, 2, 3), pinned=0, latency_s=12.3)

    What nobody waits for is not cut.

    >>> partition([4, 4, 4], [4.0, 4.0, 4.0], limit_bytes=12, most_bytes=12, rate_bytes_s=1.0,
    ...           block_s=0.1)
    Partition(stops=(3,), pinned=3, latency_s=12.1)
    """
    assert limit_bytes >= max(sizes, default=0), (limit_bytes, max(sizes))
    count = len(sizes)
    held = [0, *accumulate(sizes)]
    best, best_cost_s = Partition((), 0, float("inf")), float("inf")
    for pinned in range(count, -1, -1):
        window = limit_bytes - held[pinned]
        if window < max(sizes[pinned:], default=0):
            continue
        read_s = (held[count] - held[pinned]) / rate_bytes_s
        stops = _joined(sizes, pinned, most_bytes)
        start_s = sum(execute_s[:pinned]) + block_s * len(stops)
        least_s = max(read_s, start_s + sum(execute_s[pinned:]) + block_s * (pinned < count))
        reading_s = READING_COST * read_s
        if least_s + reading_s >= best_cost_s:
            if read_s + reading_s >= best_cost_s:
                break  # fewer pinned have more to read
            continue
        pipeline = _Pipeline(
            sizes[pinned:], execute_s[pinned:], window, most_bytes, rate_bytes_s, block_s
        )
        found = pipeline.best(start_s, best_cost_s - reading_s, chunk_bytes)
        if found is not None and found.cycle_s + reading_s < best_cost_s:
            best_cost_s = found.cycle_s + reading_s
            rest = tuple(pinned + stop for stop in _stops(found))
            best = Partition((*stops, *rest), pinned, round(found.cycle_s, 9))
    return best


class _Pipeline:
    """Pieces that are all fetched anew in every run, through a window of so many bytes."""

    def __init__(
        self,
        sizes: Sequence[int],
        execute_s: Sequence[float],
        window: int,
        most_bytes: int,
        rate_bytes_s: float,
        block_s: float,
    ) -> None:
        self._sizes = sizes
        self._window = window
        self._most_bytes = most_bytes
        self._rate_bytes_s = rate_bytes_s
        self._block_s = block_s
        self._bytes = [0, *accumulate(sizes)]
        self._execute_s = [0.0, *accumulate(execute_s)]

    def best(self, start_s: float, below_s: float, chunk_bytes: int) -> _Way | None:
        """The way through all pieces with the least eigenvalue, if one is below `below_s`.

        `start_s`: what the run computes before.
        """
        count = len(self._sizes)
        if not count:
            return _Way(start_s, _NEVER, _NEVER, _NEVER, 0, None)
        reach = self._reach(chunk_bytes)
        ways: list[list[_Way]] = [[] for _ in range(count + 1)]
        ways[0] = [_Way(start_s, _NEVER, _NEVER, 0.0, 0, None)]
        for first in range(count):
            for stop in range(first + 1, count + 1):
                size = self._bytes[stop] - self._bytes[first]
                if size > (self._most_bytes if stop > first + 1 else self._window):
                    break
                if size > self._window:
                    break
                takes_s = self._execute_s[stop] - self._execute_s[first] + self._block_s
                lag_s = (reach[first] - self._bytes[stop]) / self._rate_bytes_s
                fetch_s = (reach[stop] - reach[first]) / self._rate_bytes_s
                rest_s = self._execute_s[count] - self._execute_s[stop]
                rest_s += self._block_s * (stop < count)
                to_fetch_s = (reach[count] - reach[stop]) / self._rate_bytes_s
                for way in ways[first]:
                    made = _after(way, stop, lag_s, takes_s, fetch_s)
                    if max(made.cc + rest_s, made.ff + to_fetch_s) < below_s:
                        _keep(ways[stop], made)
        found = min(ways[count], key=lambda way: way.cycle_s, default=None)
        return found if found is not None and found.cycle_s < below_s else None

    def _reach(self, chunk_bytes: int) -> list[int]:
        """By cut how far into this run and the next what is before it makes room to fetch: whole
        chunks, of which none crosses a cut."""
        ends: list[int] = []
        done = 0
        for size in (*self._sizes, *self._sizes):
            ends.extend(range(done + chunk_bytes, done + size, chunk_bytes))
            done += size
            ends.append(done)
        return [ends[bisect_right(ends, here + self._window) - 1] for here in self._bytes]


def _after(way: _Way, stop: int, lag_s: float, takes_s: float, fetch_s: float) -> _Way:
    cc = max(way.cc, way.fc - lag_s) + takes_s
    cf = max(way.cf, way.ff - lag_s) + takes_s
    if not fetch_s:
        return _Way(cc, cf, way.fc, way.ff, stop, way)
    return _Way(cc, cf, max(way.fc, cc) + fetch_s, max(way.ff, cf) + fetch_s, stop, way)


def _keep(ways: list[_Way], made: _Way) -> None:
    """Adds it unless another one is as good, which it replaces if it is better."""
    if not any(way.least(made) for way in ways):
        ways[:] = [way for way in ways if not made.least(way)]
        ways.append(made)


def _stops(way: _Way) -> list[int]:
    stops = []
    step: _Way | None = way
    while step is not None and step.before is not None:
        stops.append(step.stop)
        step = step.before
    return stops[::-1]


def _joined(sizes: Sequence[int], count: int, most_bytes: int) -> list[int]:
    """Ends of the fewest blocks of the first `count` pieces."""
    stops: list[int] = []
    size = 0
    for position in range(count):
        if position and size + sizes[position] > most_bytes:
            stops.append(position)
            size = 0
        size += sizes[position]
    return [*stops, count] if count else []
