"""Cutting graphs, held against brute force on random ones."""

from __future__ import annotations

import doctest
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.blocks import cut, member


@st.composite
def graphs(draw: st.DrawFn) -> list[cut.Step]:
    """Steps that read earlier values (or none) and up to two weights, perhaps shared."""
    steps: list[cut.Step] = []
    made: list[str] = []
    for index in range(draw(st.integers(1, 12))):
        reads = draw(st.lists(st.sampled_from(made), max_size=3, unique=True)) if made else []
        weights = draw(st.lists(st.integers(0, 9), max_size=2, unique=True))
        makes = tuple(f"v{index}.{part}" for part in range(draw(st.integers(1, 2))))
        steps.append(cut.Step(tuple(reads), makes, tuple(f"w{w}" for w in weights)))
        made.extend(makes)
    return steps


SIZES = {f"w{index}": index * 10 for index in range(10)}


@given(graphs(), st.sets(st.integers(0, 11)))
def test_what_lives_after_a_step_is_what_is_needed_later(
    steps: list[cut.Step], chosen: set[int]
) -> None:
    outputs = {steps[index].makes[0] for index in chosen if index < len(steps)}
    for position, live in enumerate(cut.live_after(steps, outputs)):
        made = {name for step in steps[: position + 1] for name in step.makes}
        later = {name for step in steps[position + 1 :] for name in step.reads}
        assert set(live) == made & (later | outputs)
        assert len(set(live)) == len(live)


@given(graphs(), st.integers(1, 100))
def test_pieces_are_the_graph_and_no_narrower_cut_would_keep_the_limit(
    steps: list[cut.Step], limit: int
) -> None:
    """In order, whole, every weight counted where it is first used; the width is the least."""
    pieces = cut.pieces(steps, SIZES, limit_bytes=limit)
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == len(steps)
    used = {name for step in steps for name in step.weights}
    assert sum(piece.bytes for piece in pieces) == sum(SIZES[name] for name in used)

    live = [len(names) for names in cut.live_after(steps, ())]
    width = max((live[piece.stop - 1] for piece in pieces), default=0)
    narrower = [at for at in range(len(steps)) if live[at] < width] if width > 1 else []
    if narrower:
        assert _largest(steps, narrower) > limit


def _largest(steps: list[cut.Step], cuts: list[int]) -> int:
    """Of the pieces between `cuts`, the bytes of weights first used there."""
    seen: set[str] = set()
    largest = current = 0
    for position, step in enumerate(steps):
        current += sum(SIZES[name] for name in step.weights if name not in seen)
        seen.update(step.weights)
        largest = max(largest, current)
        if position in cuts:
            current = 0
    return largest


@given(graphs(), st.integers(1, 100), st.integers(1, 200))
def test_blocks_join_neighbours_up_to_the_target(
    steps: list[cut.Step], limit: int, target: int
) -> None:
    pieces = cut.pieces(steps, SIZES, limit_bytes=limit)
    blocks = cut.blocks(pieces, target)
    ends = {piece.stop for piece in pieces}
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]
    assert blocks[-1].stop == len(steps) and all(block.stop in ends for block in blocks)
    largest = max(piece.bytes for piece in pieces)
    assert all(block.bytes <= max(target, largest) for block in blocks)
    for one, other in itertools.pairwise(blocks):
        first = next(piece.bytes for piece in pieces if piece.start == other.start)
        assert one.bytes + first > target and one.bytes and other.bytes


def test_a_value_that_must_not_be_cut_is_not() -> None:
    """A sequence between two steps keeps them in one piece, at any limit."""
    steps = [
        cut.Step((), ("a",), ("w1",)),
        cut.Step(("a",), ("b",), ("w2",)),
        cut.Step(("b",), ("c",), ("w3",)),
    ]
    pieces = cut.pieces(steps, SIZES, limit_bytes=1, uncut={"a"})
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 2), (2, 3)]


@pytest.mark.parametrize("module", [cut, member])
def test_the_examples_in_the_docstrings_hold(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]
