"""Runs within a budget at the same time: who may begin beside whom, and what is kept for them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from paceline.blocks.backend.admission import Admission, Need
from paceline.blocks.backend.budget import Budget
from paceline.blocks.backend.ledger import Ledger
from paceline.blocks.backend.manifest import PoolError
from paceline.blocks.backend.settings import read_settings
from paceline.blocks.backend.shares import Claim

MIB = 1 << 20
BLOCKS = (10 * MIB, 20 * MIB, 20 * MIB)


def need(kind: str, beside: int = 8, block: int = 5) -> Need:
    return Need(kind, 1, block, beside)


def test_the_arena_holds_what_each_kind_took_as_often_as_it_ran_at_once() -> None:
    runs = Admission(3)
    a, b = need("a", 8), need("b", 3)
    runs.begin(a)
    runs.begin(a)
    runs.end(a)
    assert runs.with_one_more(b) == (10, 2 * 8 + 3), "the one that ended has left something"
    runs.begin(b)
    assert runs.beside_bytes == 19
    runs.end(a)
    runs.end(b)
    assert runs.with_one_more(a) == (5, 19), "there is room for it already"
    runs.emptied()
    assert runs.with_one_more(a) == (5, 8) and runs.beside_bytes == 19
    runs.forget()
    assert runs.beside_bytes == runs.blocks_bytes == 0


class Loader:
    """What a `Budget` tells its loader."""

    held_bytes = 0

    def __init__(self) -> None:
        self.pinned: frozenset[int] = frozenset()
        self.limit_bytes: int | None = None

    def rate(self) -> float:
        return 1e9

    def pin(self, pinned: Iterable[int], limit_bytes: int | None) -> None:
        self.pinned, self.limit_bytes = frozenset(pinned), limit_bytes

    def wait_within_limit(self) -> None: ...


class Durations:
    def at(self, rows: int) -> Sequence[float]:
        return [0.01] * len(BLOCKS)


class Case:
    """A budget, and runs under way in threads of their own."""

    def __init__(self, directory: Path, **parameters: str) -> None:
        texts = {"manifest": "0" * 64, "pool": "/pool", **parameters}
        given = {key: {"string_value": text} for key, text in texts.items()}
        self.ledger = Ledger("disk", directory=directory)
        self.emptied = 0
        self.loader = Loader()
        self.budget = Budget(
            "m",
            BLOCKS,
            tables=False,
            activations=lambda rows: 4 * MIB * rows,
            empty=self._empty,
            rate_bytes_s=None,
            settings=read_settings(given, directory),
            ledger=self.ledger,
            most=3,
        )
        self.budget.start(cast(Any, self.loader), cast(Any, Durations()))
        self.began: list[str] = []
        self._running = ExitStack()

    def _empty(self) -> None:
        self.emptied += 1

    def begin(self, kind: str, rows: int = 1, beside_mib: int = 4) -> threading.Event:
        """A run that ends when the event is set; returns when it has begun or waits."""
        over = threading.Event()
        need = self.budget.need(kind, range(len(BLOCKS)), rows, beside_mib * MIB * rows)

        def run() -> None:
            with self.budget.running(need):
                self.began.append(kind)
                over.wait(20)

        thread = threading.Thread(target=run)
        thread.start()
        self._running.callback(thread.join)
        self._running.callback(over.set)
        self.settled(lambda: kind in self.began or bool(self.budget._queue))
        return over

    def settled(self, what: Any) -> None:
        for _ in range(20000):
            if what():
                return
            threading.Event().wait(0.001)
        raise AssertionError("it never came about")

    def close(self) -> None:
        self._running.close()
        self.budget.close()
        self.ledger.close()


@contextmanager
def opened(directory: Path, **parameters: str) -> Iterator[Case]:
    case = Case(directory, **parameters)
    yield case
    case.close()


def test_runs_that_find_room_together_begin_together(tmp_path: Path) -> None:
    """48 MiB: two largest blocks and twice the activations are all of it. Then none is pinned."""
    with opened(tmp_path / "ledger", memory_budget_mib="48") as case:
        assert case.loader.limit_bytes == 44 * MIB and case.loader.pinned
        first = case.begin("a")
        second = case.begin("b")
        case.settled(lambda: case.began == ["a", "b"] and case.loader.limit_bytes == 40 * MIB)
        assert not case.loader.pinned
        first.set()
        second.set()
        # A look that finds nothing under way gives the room back to the weights.
        case.settled(lambda: case.loader.limit_bytes == 44 * MIB and case.loader.pinned)
        assert case.emptied == 1


def test_a_run_that_takes_less_than_the_largest_finds_room_sooner(tmp_path: Path) -> None:
    """41 MiB left beside one run: a block of 20, and not 4 beside it but 1."""
    with opened(tmp_path / "ledger", memory_budget_mib="45") as case:
        case.begin("a")
        case.begin("small", beside_mib=1)
        case.settled(lambda: case.began == ["a", "small"])
        assert case.loader.limit_bytes == 40 * MIB


def test_runs_that_do_not_find_room_together_begin_in_turn(tmp_path: Path) -> None:
    with opened(tmp_path / "ledger", memory_budget_mib="47") as case:
        first = case.begin("a")
        second = case.begin("b")
        case.begin("c")
        assert case.began == ["a"] and case.loader.limit_bytes == 43 * MIB
        first.set()
        case.settled(lambda: case.began == ["a", "b"])
        second.set()
        case.settled(lambda: case.began == ["a", "b", "c"])
        assert case.emptied == 2, "each found what the one before had left"


def test_a_larger_batch_waits_for_the_others_and_is_not_overtaken(tmp_path: Path) -> None:
    """More room than before is made for it alone, and refused before it has begun."""
    with opened(tmp_path / "ledger", memory_budget_mib="100") as case:
        with pytest.raises(PoolError, match="activations of a batch of 99 need"):
            case.budget._enter(case.budget.need("a", [0], 99, 99 * 4 * MIB))
        first = case.begin("a")
        case.begin("larger", rows=5)
        case.begin("b")
        assert case.began == ["a"]
        first.set()
        case.settled(lambda: case.began == ["a", "larger", "b"])
        assert case.loader.limit_bytes == (100 - 4 * 6) * MIB


def test_what_others_wait_for_is_given_back_when_the_runs_are_over(tmp_path: Path) -> None:
    """A shared budget is divided anew: what two runs hold stays in the books until they end."""
    shared = {"shared_budget_mib": "60", "budget_group": "g"}
    with opened(tmp_path / "ledger", **shared) as case:
        first, second = case.begin("a"), case.begin("b")
        case.settled(lambda: case.began == ["a", "b"] and case.loader.limit_bytes == 46 * MIB)
        other = Ledger("disk", directory=tmp_path / "ledger")
        other.join("g", 60 * MIB, 20 * MIB)
        busy = Claim(((20 * MIB, 1.0), (60 * MIB, 0.1)), 64.0)

        def granted() -> int:
            return other.exchange(busy, other.rows()[other._name].limit_bytes)

        case.settled(lambda: case.loader.limit_bytes == 40 * MIB)
        assert granted() <= 12 * MIB, "48 are held by two runs"
        first.set()
        case.begin("c")
        assert case.began == ["a", "b"] and granted() <= 12 * MIB
        second.set()
        case.settled(lambda: case.began == ["a", "b", "c"] and granted() == 36 * MIB)
        assert case.budget.bytes == 24 * MIB
        other.close()
