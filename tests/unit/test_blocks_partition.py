"""Cutting by latency: the best of all partitions, as a simulation of single fetches has it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.blocks import cut
from paceline.blocks.backend.manifest import Block, Member
from paceline.blocks.backend.plan import READING_COST
from paceline.blocks.dividing import badness, best_division
from paceline.blocks.partition import Partition, partition
from paceline.blocks.trial import Took, Trial

MIB = 1 << 20
RUNS = 24


def simulated_s(
    sizes: Sequence[int],
    execute_s: Sequence[float],
    pinned: int,
    stops: Sequence[int],
    *,
    window: int,
    rate: float,
    block_s: float,
    chunk: int,
) -> float:
    """Of a run among many back to back; chunk by chunk, each when there is room for it."""
    streamed = 0
    fetched_s = ended_s = 0.0
    freed = [(0, 0.0)]  # bytes that computed blocks have given up, and when
    ends = []
    for _ in range(RUNS):
        for start, stop in itertools.pairwise((0, *stops)):
            fresh = sizes[max(start, pinned) : stop]
            for size in fresh:
                for take in [chunk] * (size // chunk) + [size % chunk] * (size % chunk > 0):
                    streamed += take
                    room_s = next(at_s for given, at_s in freed if given >= streamed - window)
                    fetched_s = max(fetched_s, room_s) + take / rate
            ready_s = fetched_s if sum(fresh) else 0.0
            ended_s = max(ended_s, ready_s) + sum(execute_s[start:stop]) + block_s
            freed.append((streamed, ended_s))
        ends.append(ended_s)
    half = RUNS // 2
    return (ends[-1] - ends[half - 1]) / (RUNS - half)


def brute_s(
    sizes: Sequence[int],
    execute_s: Sequence[float],
    *,
    limit: int,
    most: int,
    rate: float,
    block_s: float,
    chunk: int,
) -> float:
    """Least latency, and a little for what is read, of all partitions and pinned prefixes."""
    count = len(sizes)
    least_s = float("inf")
    for pinned in range(count + 1):
        window = limit - sum(sizes[:pinned])
        if window < 0:
            break
        for chosen in itertools.product((False, True), repeat=count - 1):
            stops = [*(n + 1 for n, cut_here in enumerate(chosen) if cut_here), count]
            blocks = list(itertools.pairwise((0, *stops)))
            if pinned and pinned not in stops:
                continue
            if any(
                (stop - start > 1 and sum(sizes[start:stop]) > most)
                or (start >= pinned and sum(sizes[start:stop]) > window)
                for start, stop in blocks
            ):
                continue
            took_s = simulated_s(
                sizes, execute_s, pinned, stops, window=window, rate=rate, block_s=block_s,
                chunk=chunk,
            )  # fmt: skip
            least_s = min(least_s, took_s + READING_COST * sum(sizes[pinned:]) / rate)
    return least_s


@given(st.data())
@settings(deadline=None)
def test_no_partition_takes_less(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 8]), min_size=1, max_size=6))
    execute_s = data.draw(
        st.lists(st.sampled_from([0.1, 0.5, 1.0, 4.0]), min_size=len(sizes), max_size=len(sizes))
    )
    limit = data.draw(st.integers(max(1, *sizes), sum(sizes) + 1))
    most = data.draw(st.integers(1, 10))
    rate = data.draw(st.sampled_from([0.5, 1.0, 5.0]))
    block_s = data.draw(st.sampled_from([0.0, 0.05, 0.5]))
    chunk = data.draw(st.sampled_from([1, 3, 100]))
    found = partition(
        sizes, execute_s, limit_bytes=limit, most_bytes=most, rate_bytes_s=rate, block_s=block_s,
        chunk_bytes=chunk,
    )  # fmt: skip
    assert found.stops[-1] == len(sizes)
    read_s = READING_COST * sum(sizes[found.pinned :]) / rate
    least_s = brute_s(
        sizes, execute_s, limit=limit, most=most, rate=rate, block_s=block_s, chunk=chunk
    )
    # A simulated run is a mean of some, of which the first may still be settling.
    assert found.latency_s + read_s == pytest.approx(least_s, rel=0.02)


def test_what_waits_is_cut_finely_and_what_computes_is_not() -> None:
    """The same pieces: from a slow disk every cut pays, from memory none does."""

    def found(rate_bytes_s: float) -> Partition:
        return partition(
            [4] * 12, [1.0] * 12, limit_bytes=20, most_bytes=8, rate_bytes_s=rate_bytes_s,
            block_s=0.1,
        )  # fmt: skip

    slow, fast = found(2.0), found(1e6)
    assert slow.pinned == 3  # the rest holds two: one comes while the other computes
    assert [stop for stop in slow.stops if stop > slow.pinned] == list(range(4, 13))
    assert len(fast.stops) == 6


BLOCK = Block("", "", 1, (), (), (), 4 * MIB, 0, (), 0, {}, None)
PIECES = [cut.Piece(number, number + 1, 4 * MIB) for number in range(12)]
BY_SIZE = [cut.Piece(start, start + 2, 8 * MIB) for start in range(0, 12, 2)]


def divided(
    swap_in_s: float,
    activations: dict[int, int],
    *,
    eight: int = 1000 * MIB,
    most_rows: int = 32,
    block_s: float = 0.1,
) -> list[int]:
    """Ends of the blocks of twelve pieces of 4 MiB and a second, for 20 MiB; `activations` by the
    number of blocks, in bytes. `eight` rows take so many and no longer than one."""

    def attempt(pieces: Sequence[cut.Piece]) -> tuple[Member, Trial]:
        blocks = tuple(replace(BLOCK, weights_bytes=p.bytes, live=(f"{p.stop}",)) for p in pieces)
        took = [
            Took(dict.fromkeys((1, 8), 1.0 * p.bytes / (4 * MIB)), swap_in_s, 0) for p in pieces
        ]
        member = Member("", (), (), True, (), BLOCK, blocks)
        beside = {1: activations.get(len(pieces), 0), 8: eight}
        return member, Trial(beside, [beside], took, block_s, 0.0)

    member, told = best_division(
        PIECES, BY_SIZE, attempt, budget_bytes=20 * MIB, most_bytes=8 * MIB, most_rows=most_rows,
        tables=False,
    )  # fmt: skip
    assert told["latency_s"][1] <= told["by_size_s"][1] * 1.02
    return [int(block.live[0]) for block in member.blocks]


def test_blocks_are_cut_by_what_their_pieces_took() -> None:
    by_size = [2, 4, 6, 8, 10, 12]
    assert divided(1e-6, {}) == by_size
    assert divided(2.0, {}) != by_size
    assert len(divided(2.0, {})) > len(by_size)


def test_a_division_whose_activations_leave_too_little_is_not_chosen() -> None:
    finer = len(divided(2.0, {}))
    assert divided(2.0, {finer: 11 * MIB}) == [2, 4, 6, 8, 10, 12]


def test_a_size_of_batch_that_nobody_can_ask_for_decides_nothing() -> None:
    """Eight rows leave room for one piece alone: they are cut as finely as there are pieces."""
    found = partial(divided, 1e-6, {}, eight=14 * MIB)
    assert found(block_s=0.01) == found(block_s=0.01, most_rows=8) == list(range(1, 13))
    for most_rows in (7, 1, 0):
        assert found(block_s=0.01, most_rows=most_rows) == [2, 4, 6, 8, 10, 12]
    assert found(block_s=0.1) == [2, 4, 6, 8, 10, 12], "that many would cost a row one in twenty"


@pytest.mark.parametrize(
    ("finer_s", "chosen"),
    [
        ({1: 1.0, 8: 7.0}, True),
        ({1: 1.02, 8: 7.0}, True),
        ({1: 1.03, 8: 7.0}, False),  # single rows would be slower
        ({1: 1.0, 8: 7.9}, False),  # eight rows one by one take 8.0
        ({1: 0.99}, False),  # closer than the model can tell
        ({1: 0.97}, True),
        ({8: 1.0}, False),
        ({}, False),
    ],
    ids=str,
)
def test_a_larger_batch_is_worth_what_it_gains(finer_s: dict[int, float], chosen: bool) -> None:
    """However it comes that only one of the ways takes it."""
    by_size, finer = (2,), (1, 2)
    ways = {by_size: {1: 1.0}, finer: finer_s}
    assert (min(ways, key=partial(badness, ways, before=by_size)) == finer) is chosen


def test_no_size_of_batch_is_given_up_and_any_is_better_than_none() -> None:
    by_size, finer = (2,), (1, 2)
    ways = {by_size: {1: 1.0, 8: 7.9}, finer: {1: 0.5}}
    assert min(ways, key=partial(badness, ways, before=by_size)) == by_size
    ways = {by_size: {}, finer: {1: 1.0}}
    assert min(ways, key=partial(badness, ways, before=by_size)) == finer
