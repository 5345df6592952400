"""Which blocks stay in memory when a model is larger than its budget (SwapNet's partition).

The latency model: blocks compute one after the other, each when its weights are there; one stream
of I/O fetches the blocks that are not pinned, in order, as far ahead as the rest of the budget (the
window) has room; a block's memory is free when it has been computed. With everything measured
(seconds per block, bytes a second) the best set to pin is searched among prefixes and evenly spread
sets of every size, and around the best of them: pinning much saves I/O, a large window hides it,
and which matters depends on the model. Pure functions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .window import CHUNK_BYTES

_SPREADS = 16
_STEPS = 4
_SWAPS = 4
READING_COST = 0.1
"""Seconds that a second of I/O beside it costs the computation: an estimate, to break near-ties."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Blocks that stay, and the latency that the model predicts for runs back to back."""

    pinned: frozenset[int]
    latency_s: float


def latency_s(
    sizes: Sequence[int],
    execute_s: Sequence[float],
    pinned: frozenset[int],
    *,
    limit_bytes: int,
    rate_bytes_s: float,
    chunk_bytes: int = CHUNK_BYTES,
) -> float:
    """Of one run among runs back to back. The largest block that streams must fit the window.

    Two blocks of 8 MiB in a window of 8, 1 s each to compute and 4 s to fetch: nothing overlaps.

    >>> round(latency_s([2**23] * 2, [1.0] * 2, frozenset(), limit_bytes=2**23,
    ...                 rate_bytes_s=2**23 / 4), 6)
    10.0

    With room for both, the next run's first block would come while the second one computes; with
    one of them pinned only one is fetched.

    >>> round(latency_s([2**23] * 2, [1.0] * 2, frozenset([0]), limit_bytes=2**24,
    ...                 rate_bytes_s=2**23 / 4), 6)
    5.0
    """
    window = limit_bytes - sum(sizes[block] for block in pinned)
    computed_s = fetched_s = 0.0
    streamed = 0
    freed_bytes: list[int] = []
    freed_at_s: list[float] = []
    ends: list[float] = []
    for _ in range(2):
        for block, size in enumerate(sizes):
            ready_s = 0.0
            if block not in pinned:
                left = size
                while left > 0:
                    take = min(left, chunk_bytes)
                    left -= take
                    streamed += take
                    room = streamed - window
                    index = bisect_left(freed_bytes, room) if room > 0 else -1
                    free_s = freed_at_s[index] if index >= 0 else 0.0
                    fetched_s = max(fetched_s, free_s) + take / rate_bytes_s
                ready_s = fetched_s
            computed_s = max(computed_s, ready_s) + execute_s[block]
            if block not in pinned and size:
                freed_bytes.append(streamed)
                freed_at_s.append(computed_s)
        ends.append(computed_s)
    return ends[1] - ends[0]


def choose(
    sizes: Sequence[int],
    execute_s: Sequence[float],
    *,
    limit_bytes: int,
    rate_bytes_s: float,
    chunk_bytes: int = CHUNK_BYTES,
) -> Plan:
    """The best plan found; `limit_bytes` must be at least the largest size.

    Everything fits: everything stays.

    >>> choose([5, 5], [1.0, 1.0], limit_bytes=10, rate_bytes_s=1.0)
    Plan(pinned=frozenset({0, 1}), latency_s=2.0)
    """
    assert limit_bytes >= max(sizes, default=0), (limit_bytes, max(sizes))

    def plan(pinned: frozenset[int]) -> Plan:
        took_s = latency_s(
            sizes,
            execute_s,
            pinned,
            limit_bytes=limit_bytes,
            rate_bytes_s=rate_bytes_s,
            chunk_bytes=chunk_bytes,
        )
        return Plan(pinned, took_s)

    cost_s = _cost(sizes, rate_bytes_s)
    best = min(map(plan, _candidates(sizes, limit_bytes)), key=cost_s)
    for _ in range(_STEPS):
        steps = (plan(pinned) for pinned in _neighbours(sizes, limit_bytes, best.pinned))
        better = min(steps, key=cost_s, default=best)
        if cost_s(better) >= cost_s(best) * (1 - 1e-3):
            break
        best = better
    return best


def _cost(sizes: Sequence[int], rate_bytes_s: float) -> Callable[[Plan], float]:
    """Latency, and a little for what is read behind it: that takes time from others."""
    total = sum(sizes)

    def cost_s(plan: Plan) -> float:
        read_bytes = total - sum(sizes[block] for block in plan.pinned)
        return plan.latency_s + READING_COST * read_bytes / rate_bytes_s

    return cost_s


def _neighbours(
    sizes: Sequence[int], limit_bytes: int, pinned: frozenset[int]
) -> Iterator[frozenset[int]]:
    """One block more, one less, or one instead of another one."""
    free = [block for block in range(len(sizes)) if block not in pinned]
    for block in free:
        if _leaves_room(sizes, limit_bytes, pinned | {block}):
            yield pinned | {block}
    for gone in sorted(pinned):
        fewer = pinned - {gone}
        if _leaves_room(sizes, limit_bytes, fewer):
            yield fewer
        # Swaps only among the largest: the others change little.
        for block in sorted(free, key=lambda block: -sizes[block])[:_SWAPS]:
            if _leaves_room(sizes, limit_bytes, fewer | {block}):
                yield fewer | {block}


def _leaves_room(sizes: Sequence[int], limit_bytes: int, pinned: frozenset[int]) -> bool:
    """Whether every block that is not pinned fits the window."""
    held = sum(sizes[block] for block in pinned)
    largest = max((size for block, size in enumerate(sizes) if block not in pinned), default=0)
    return limit_bytes - held >= largest


def _candidates(sizes: Sequence[int], limit_bytes: int) -> Iterator[frozenset[int]]:
    """Sets that leave a window which the largest of the other blocks fits, the largest first."""
    seen: set[frozenset[int]] = set()
    total = sum(sizes)
    sets = [frozenset(range(count)) for count in range(len(sizes), -1, -1)]
    sets += [_spread(sizes, total * part // _SPREADS) for part in range(_SPREADS - 1, 0, -1)]
    sets += [_spread(sizes, limit_bytes * part // _SPREADS) for part in range(_SPREADS - 1, 0, -1)]
    for pinned in sets:
        if pinned not in seen and _leaves_room(sizes, limit_bytes, pinned):
            seen.add(pinned)
            yield pinned


def _spread(sizes: Sequence[int], pinned_bytes: int) -> frozenset[int]:
    """About so many bytes pinned, evenly over the run, so that I/O has time between its blocks."""
    total = sum(sizes) or 1
    chosen = set()
    passed = held = 0
    for block, size in enumerate(sizes):
        passed += size
        if held + size <= pinned_bytes * passed / total:
            chosen.add(block)
            held += size
    return frozenset(chosen)
