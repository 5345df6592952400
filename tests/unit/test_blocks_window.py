"""What a blocks model keeps in memory: the window's order, bound and progress, and what to pin."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.blocks.backend.plan import choose, latency_s
from paceline.blocks.backend.window import Span, Window


def perform(window: Window) -> list[Span]:
    """Every step the window has; the spans in order."""
    spans = []
    while (step := window.next_step()) is not None:
        for span in step.fetch:
            window.fetched(span)
            spans.append(span)
    return spans


def run(window: Window, order: Sequence[int], limit_bytes: int | None) -> int:
    """One run; the bytes it had to fetch. The bound is held at every step."""
    number = window.begin(order)
    fetched = 0
    for block in order:
        while not window.ready(block):
            step = window.next_step()
            assert step is not None, f"block {block} never comes"
            assert limit_bytes is None or window.held_bytes <= limit_bytes
            for span in step.fetch:
                window.fetched(span)
                fetched += span.size_bytes
        window.start(number, block)
        fetched += sum(span.size_bytes for span in perform(window))  # prefetch beside it
        assert window.ready(block), "what is being computed stays"
        assert limit_bytes is None or window.held_bytes <= limit_bytes
        window.finish(number, block)
    window.end(number)
    return fetched


def test_everything_is_fetched_once_and_in_order_without_a_limit() -> None:
    window = Window(
        [["a"], ["b", "c"], ["a", "d"]], {"a": 5, "b": 3, "c": 1, "d": 2}, chunk_bytes=4
    )
    spans = perform(window)
    assert [span.name for span in spans] == ["a", "a", "b", "c", "d"]
    assert spans[0] == Span("a", 0, 4, False) and spans[1] == Span("a", 4, 1, True)
    assert window.complete and run(window, [0, 1, 2], None) == 0


def test_a_step_moves_no_more_than_a_chunk() -> None:
    window = Window([["a", "b", "c"]], {"a": 3, "b": 3, "c": 3}, chunk_bytes=4)
    steps = list(iter(window.next_step, None))
    assert [sum(span.size_bytes for span in step.fetch) for step in steps] == [4, 4, 1]


def test_pinned_blocks_are_read_once_and_the_others_once_a_run() -> None:
    names = [[str(block)] for block in range(6)]
    sizes = {str(block): 10 for block in range(6)}
    window = Window(names, sizes, limit_bytes=40, chunk_bytes=10)
    window.pin([0, 1], 40)
    run(window, range(6), 40)
    for _ in range(3):
        assert run(window, range(6), 40) == 40, "four blocks of ten bytes stream"


def test_what_a_run_waits_for_comes_before_what_was_expected() -> None:
    window = Window([["a"], ["b"], ["c"]], {"a": 4, "b": 4, "c": 4}, chunk_bytes=4)
    window.begin([2])
    step = window.next_step()
    assert step is not None and [span.name for span in step.fetch] == ["c"]


def test_a_lowered_limit_takes_the_latest_needed_first_and_never_what_computes() -> None:
    window = Window([["a"], ["b"], ["c"]], {"a": 4, "b": 4, "c": 4}, limit_bytes=12, chunk_bytes=4)
    perform(window)
    number = window.begin([0, 1, 2])
    window.start(number, 0)
    window.pin([], 8)
    step = window.next_step()
    assert step is not None and (step.drop, step.fetch) == (("c",), ())
    window.pin([], 2)
    step = window.next_step()
    assert step is not None and step.drop == ("b",)
    assert window.ready(0) and window.held_bytes == 4


def test_a_lost_object_is_fetched_again_from_its_start() -> None:
    window = Window([["a"]], {"a": 8}, chunk_bytes=4)
    first = window.next_step()
    window.lost("a")
    assert first is not None and window.held_bytes == 0
    assert [span.offset for span in perform(window)] == [0, 4]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    shared=st.booleans(),
    chunk=st.integers(1, 40),
    room=st.integers(0, 100),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_any_runs_get_through_within_any_limit(
    sizes: list[int], shared: bool, chunk: int, room: int, data: st.DataObject
) -> None:
    """Runs of any blocks in any order, pins and limits that change in between."""
    names = [[f"o{block}", *(["o0"] if shared else [])] for block in range(len(sizes))]
    by_name = {f"o{block}": size for block, size in enumerate(sizes)}
    needs = [sum(by_name[name] for name in set(block)) for block in names]
    window = Window(names, by_name, limit_bytes=max(needs) + room, chunk_bytes=chunk)
    blocks = st.lists(st.integers(0, len(sizes) - 1), unique=True)
    for _ in range(3):
        limit = max(needs) + data.draw(st.integers(0, 60))
        pinned: list[int] = []
        held = 0
        for block in data.draw(blocks):
            rest = max(
                (needs[b] for b in range(len(sizes)) if b not in [*pinned, block]), default=0
            )
            if held + needs[block] + rest <= limit:
                pinned.append(block)
                held += needs[block]
        window.pin(pinned, limit)
        run(window, data.draw(blocks), limit)


def test_of_two_runs_that_wait_the_earlier_one_takes_the_others_room() -> None:
    """Neither could go on if each kept what it has: the limit is one block's."""
    names = [["a"], ["b", "c"], ["d", "e"]]
    window = Window(names, dict.fromkeys("abcde", 4), limit_bytes=8, chunk_bytes=4)
    first = window.begin([0, 1])
    perform(window)
    window.start(first, 0)
    second = window.begin([2])
    perform(window)  # beside `a` there is room for a half of the second run's block
    window.finish(first, 0)
    perform(window)
    assert window.ready(1) and not window.ready(2)
    window.start(first, 1)
    window.finish(first, 1)
    window.end(first)
    perform(window)
    window.start(second, 2)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    shared=st.booleans(),
    chunk=st.integers(1, 40),
    room=st.integers(0, 60),
    orders=st.lists(st.lists(st.integers(0, 5), unique=True), min_size=2, max_size=4),
    chance=st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=100)
def test_runs_at_the_same_time_get_through_within_any_limit(
    sizes: list[int],
    shared: bool,
    chunk: int,
    room: int,
    orders: list[list[int]],
    chance: random.Random,
) -> None:
    """Whatever happens first: there is always something that can."""
    names = [[f"o{block}", *(["o0"] if shared else [])] for block in range(len(sizes))]
    by_name = {f"o{block}": size for block, size in enumerate(sizes)}
    limit = max(sum(by_name[name] for name in set(block)) for block in names) + room
    window = Window(names, by_name, limit_bytes=limit, chunk_bytes=chunk)
    rest = {}
    for order in orders:
        known = [block for block in order if block < len(sizes)]
        rest[window.begin(known)] = known
    active: set[int] = set()
    while any(rest.values()):
        moves = [number for number, blocks in rest.items() if blocks and window.ready(blocks[0])]
        if not moves or chance.random() < 0.5:
            step = window.next_step()
            for span in step.fetch if step is not None else ():
                window.fetched(span)
            assert window.held_bytes <= limit
            assert step is not None or moves, "every run waits, and nothing comes"
            continue
        number = chance.choice(moves)
        if number in active:
            window.finish(number, rest[number].pop(0))
        else:
            window.start(number, rest[number][0])
        active ^= {number}


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    room=st.integers(0, 20),
    rate=st.sampled_from([0.5, 2.0, 10.0]),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_the_chosen_plan_is_near_the_best_of_all_subsets(
    sizes: list[int], room: int, rate: float, data: st.DataObject
) -> None:
    execute_s = data.draw(
        st.lists(st.floats(0.1, 5), min_size=len(sizes), max_size=len(sizes)), label="execute_s"
    )
    limit = max(sizes) + room

    def predicted(pinned: frozenset[int]) -> float:
        return latency_s(
            sizes, execute_s, pinned, limit_bytes=limit, rate_bytes_s=rate, chunk_bytes=1
        )

    chosen = choose(sizes, execute_s, limit_bytes=limit, rate_bytes_s=rate, chunk_bytes=1)
    assert chosen.latency_s == pytest.approx(predicted(chosen.pinned))
    best = min(
        predicted(frozenset(pinned))
        for count in range(len(sizes) + 1)
        for pinned in itertools.combinations(range(len(sizes)), count)
        if limit - sum(sizes[block] for block in pinned)
        >= max((size for block, size in enumerate(sizes) if block not in pinned), default=0)
    )
    # The search is not exhaustive, and weighs what is read beside the computation.
    reading_s = sum(sizes) / rate
    assert chosen.latency_s <= 1.25 * best + 0.1 * reading_s


def test_a_run_that_will_need_more_waits_for_weights_while_it_computes() -> None:
    """Its load is urgent from its beginning until all is there; what is fetched ahead is not."""
    window = Window([["a"], ["b"]], {"a": 1, "b": 1}, chunk_bytes=1)

    def fetch() -> None:
        step = window.next_step()
        assert step is not None
        for span in step.fetch:
            window.fetched(span)

    assert not window.waited_for
    run = window.begin([0, 1])
    fetch()
    window.start(run, 0)
    assert window.waited_for, "its next block is not there"
    fetch()
    assert not window.waited_for
    window.finish(run, 0)
    window.lost("b")
    assert window.waited_for
    window.end(run)
    assert not window.waited_for


def test_what_is_on_its_way_is_not_dropped() -> None:
    """A step is decided while the one before it is performed."""
    window = Window([["a"], ["b"]], {"a": 4, "b": 4}, limit_bytes=4, chunk_bytes=4)
    first = window.next_step()
    assert first is not None and [span.name for span in first.fetch] == ["a"]
    window.begin([1])  # needs the room that `a` will have
    assert window.next_step() is None
    window.fetched(first.fetch[0])
    second = window.next_step()
    assert second is not None and second.drop == ("a",)


def test_a_span_of_what_was_lost_meanwhile_completes_nothing() -> None:
    """Its bytes were checked before something was found wrong."""
    window = Window([["a"]], {"a": 4}, limit_bytes=8, chunk_bytes=4)
    first = window.next_step()
    window.lost("a")
    again = window.next_step()
    assert first is not None and again is not None and first == again
    window.fetched(first.fetch[0])
    assert not window.ready(0)
    window.fetched(again.fetch[0])
    assert window.ready(0)
