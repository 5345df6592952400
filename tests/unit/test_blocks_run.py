"""One inference through blocks: the order of computation, what is left out, what goes together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from paceline.blocks.backend import batching
from paceline.blocks.backend.manifest import Block, Member, PoolError, Tensor
from paceline.blocks.backend.run import Durations, compute, needed_blocks


def block(inputs: str, outputs: str) -> Block:
    return Block(
        key="0" * 64,
        graph="0" * 64,
        nodes=1,
        inputs=tuple(inputs.split()),
        outputs=tuple(outputs.split()),
        weights=(),
        weights_bytes=0,
        paged_bytes=0,
        live=(),
        live_bytes=0,
        execute_s={},
        swap_in_s=None,
    )


def member(*blocks: Block, name: str = "", inputs: str = "x", outputs: str = "y z") -> Member:
    def tensors(names: str) -> tuple[Tensor, ...]:
        prefix = f"{name}/" if name else ""
        return tuple(Tensor(prefix + value, value, "FP32", (-1, 2)) for value in names.split())

    return Member(name, tensors(inputs), tensors(outputs), True, (), blocks[0], blocks)


# x -> a -> (left, right) -> y; z from the left branch alone.
BRANCHES = (block("x", "a"), block("a", "l"), block("a", "r"), block("l", "z"), block("l r", "y"))


class Weights:
    """Weights that arrive in a given order, one whenever a run has nothing to compute with."""

    def __init__(self, arrivals: Sequence[int], *, fails_at: int | None = None) -> None:
        self._arrivals = list(arrivals)
        self._fails_at = fails_at
        self.here: set[int] = set()
        self.orders: list[list[int]] = []
        self.under_way = 0

    def begin(self, order: Sequence[int]) -> int:
        self.orders.append(list(order))
        self.under_way += 1
        return len(self.orders) - 1

    def take(self, run: int, candidates: Sequence[int]) -> int:
        while not self.here.intersection(candidates):
            arrived = self._arrivals.pop(0)
            if arrived == self._fails_at:
                raise PoolError("the store is gone")
            self.here.add(arrived)
        return next(number for number in candidates if number in self.here)

    def finish(self, run: int, block: int) -> None: ...

    def end(self, run: int) -> None:
        self.under_way -= 1


class Sessions:
    """A block's outputs say what they were computed from."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self.computed: list[int] = []

    def run(self, block: int, values: list[Any]) -> list[Any]:
        self.computed.append(block)
        return [f"{name}({' '.join(values)})" for name in self._blocks[block].outputs]


def run(
    outputs: Sequence[str], weights: Weights, blocks: Sequence[Block] = BRANCHES
) -> tuple[dict[str, Any], list[int]]:
    sessions = Sessions(blocks)
    values = compute(
        member(*blocks), 0, {"x": "x"}, outputs, rows=1, weights=weights, sessions=sessions
    )
    assert weights.under_way == 0
    return values, sessions.computed


def test_blocks_compute_in_order_when_their_weights_come_in_order() -> None:
    values, computed = run(["y", "z"], Weights([0, 1, 2, 3, 4]))
    assert computed == [0, 1, 2, 3, 4]
    assert values == {"y": "y(l(a(x)) r(a(x)))", "z": "z(l(a(x)))"}


def test_a_branch_whose_weights_come_first_computes_first() -> None:
    values, computed = run(["y", "z"], Weights([0, 2, 4, 3, 1]))
    assert computed == [0, 2, 1, 3, 4]
    assert values["y"] == "y(l(a(x)) r(a(x)))"


def test_only_what_the_requested_outputs_need_is_computed() -> None:
    weights = Weights([0, 1, 3])
    values, computed = run(["z"], weights)
    assert computed == weights.orders[0] == [0, 1, 3]
    assert values == {"z": "z(l(a(x)))"}
    assert needed_blocks(BRANCHES, ["l"]) == (0, 1)


def test_a_run_without_weights_fails_and_is_over() -> None:
    weights = Weights([0, 1, 2], fails_at=2)
    with pytest.raises(PoolError, match="the store is gone"):
        run(["y"], weights)
    assert weights.under_way == 0


def test_durations_are_those_of_the_nearest_batch_size_and_follow_what_is_observed() -> None:
    durations = Durations([block("x", "a")])
    assert durations.at(1) == [0.0]
    durations.observe(0, 8, 1.0)
    assert durations.at(1) == durations.at(100) == [1.0]
    for _ in range(40):
        durations.observe(0, 8, 2.0)
    assert durations.at(8) == [pytest.approx(2.0, rel=1e-3)]


FUSED = (
    member(block("x", "y"), name="a", outputs="y"),
    member(block("x", "y"), name="b", outputs="y"),
)


def array(rows: int, columns: int = 2, start: int = 0) -> Any:
    return np.arange(start, start + rows * columns, dtype=np.float32).reshape(rows, columns)


def test_requests_of_several_members_become_calls_and_batches() -> None:
    both = batching.calls_of(0, FUSED, {"a/x": array(1), "b/x": array(1)}, ["a/y", "b/y"])
    assert [(call.member, call.outputs) for call in both] == [("a", ("a/y",)), ("b", ("b/y",))]
    one = batching.calls_of(1, FUSED, {"a/x": array(2)}, ["a/y", "b/y"])
    assert [call.member for call in one] == ["a"], "the other member's inputs were not brought"
    wide = batching.calls_of(2, FUSED, {"a/x": array(1, 3)}, ["a/y"])
    batches = batching.batches([*both, *one, *wide], {"a": True, "b": True})
    assert [[call.request for call in batch] for batch in batches] == [[0, 1], [0], [2]]
    assert len(batching.batches([*both, *one], {"a": False, "b": True})) == 3


def test_rows_of_a_batch_go_back_to_their_requests() -> None:
    calls = [
        batching.Call(number, "", {"x": array(rows, start=10 * number)}, ("y",))
        for number, rows in enumerate((1, 3, 2))
    ]
    joined = batching.join(calls)["x"]
    assert joined.shape == (6, 2)
    parts = batching.split(calls, {"y": joined * 2})
    for call, part in zip(calls, parts, strict=True):
        np.testing.assert_array_equal(part["y"], call.feed["x"] * 2)
    with pytest.raises(batching.RequestError, match=r"has no row for each of 6"):
        batching.split(calls, {"y": joined[:5]})


def test_a_member_without_a_batch_axis_has_one_row() -> None:
    calls = [batching.Call(number, "a", {"x": array(3)}, ("y",)) for number in range(2)]
    assert batching.rows_together(calls, {"a": True}) == 6
    assert batching.rows_together(calls[:1], {"a": False}) == 1


def test_a_request_without_an_input_says_which() -> None:
    with pytest.raises(batching.RequestError, match="lacks the input of member 'b' b/x"):
        batching.calls_of(0, FUSED, {"a/x": array(1)}, ["b/y"])
    with pytest.raises(batching.RequestError, match="name the outputs that you want"):
        batching.calls_of(0, FUSED, {}, ["a/y", "b/y"])
