"""Blocks models share a machine's budget and I/O: the division, the turns, and their table."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.blocks.backend import turns
from paceline.blocks.backend.ledger import FORMAT, Ledger, Row
from paceline.blocks.backend.manifest import PoolError
from paceline.blocks.backend.shares import Claim, divide
from paceline.blocks.backend.turns import (
    TURN_S,
    URGENT_WEIGHT,
    Load,
    asked,
    began,
    ended,
    next_loads,
    weight,
)
from paceline.blocks.backend.window import CHUNK_BYTES

MIB = 2**20
CURVE = ((10 * MIB, 1.0), (20 * MIB, 0.5), (40 * MIB, 0.1))


def claims() -> st.SearchStrategy[Claim]:
    steps = st.lists(st.tuples(st.integers(1, 9), st.floats(0, 3)), min_size=1, max_size=5)

    def build(drawn: list[tuple[int, float]], rate: float) -> Claim:
        sizes = itertools.accumulate(size for size, _ in drawn)
        times = sorted((seconds for _, seconds in drawn), reverse=True)
        return Claim(tuple(zip(sizes, times, strict=True)), rate)

    return st.builds(build, steps, st.floats(0, 100))


@given(st.dictionaries(st.sampled_from("abcd"), claims(), min_size=1), st.integers(0, 60))
@settings(max_examples=100)
def test_a_division_keeps_the_budget_and_every_floor(by_name: dict[str, Claim], extra: int) -> None:
    total = sum(claim.floor_bytes for claim in by_name.values()) + extra
    grants = divide(total, by_name)
    assert sum(grants.values()) <= total
    for name, claim in by_name.items():
        assert claim.floor_bytes <= grants[name] <= claim.curve[-1][0]
    # Nothing is kept back while somebody could use it.
    assert sum(grants.values()) == min(total, sum(c.curve[-1][0] for c in by_name.values()))
    assert divide(total - extra - 1, by_name) == {}, "one byte less than the floors"


def test_memory_goes_where_it_saves_most_and_follows_the_load() -> None:
    busy, quiet = Claim(CURVE, 8.0), Claim(CURVE, 1.0)
    assert divide(50 * MIB, {"a": busy, "b": quiet}) == {"a": 40 * MIB, "b": 10 * MIB}
    assert divide(50 * MIB, {"a": quiet, "b": busy}) == {"a": 10 * MIB, "b": 40 * MIB}
    urgent = Claim(CURVE, 1.0, weight=64.0)
    assert divide(50 * MIB, {"a": busy, "b": urgent}) == {"a": 10 * MIB, "b": 40 * MIB}


def test_a_division_does_not_change_with_every_request() -> None:
    first = divide(50 * MIB, {"a": Claim(CURVE, 4.0), "b": Claim(CURVE, 4.1)})
    assert divide(50 * MIB, {"a": Claim(CURVE, 4.2), "b": Claim(CURVE, 3.9)}) == first


def serve(loads: dict[str, Load], turns: int) -> list[str]:
    """Who moved bytes, in order, while everybody keeps asking."""
    order = []
    for now in range(turns):
        for name, load in list(loads.items()):
            loads[name] = asked(loads, name, load.weight, turn=CHUNK_BYTES)
        (chosen,) = next_loads(loads, "disk", float(now))
        loads[chosen] = began(loads[chosen], float(now))
        assert not next_loads(loads, "disk", float(now)), "one at a time"
        loads[chosen] = ended(loads[chosen], CHUNK_BYTES)
        order.append(chosen)
    return order


def test_an_urgent_load_overtakes_at_once_and_starves_nobody() -> None:
    loads = {"slow": Load("disk")}
    serve(loads, 100)
    loads["urgent"] = Load("disk", weight=weight(urgent=True, priority=0))
    order = serve(loads, 170)
    assert order.index("urgent") <= 1
    assert 9 <= order.count("slow") <= 11, "one in seventeen"
    gaps = [b - a for a, b in itertools.pairwise(i for i, n in enumerate(order) if n == "slow")]
    assert max(gaps) <= 17


def test_a_load_that_was_idle_has_saved_up_no_turns() -> None:
    loads = {"a": Load("disk", virtual=1000.0 * CHUNK_BYTES), "b": Load("disk")}
    assert serve(loads, 20).count("a") >= 9


def test_a_turn_that_hangs_is_passed_over_and_other_channels_do_not_wait() -> None:
    loads = {"hangs": Load("disk", holding_since_s=0.0), "next": Load("disk", waiting=True)}
    assert next_loads(loads, "disk", 1.0) == []
    assert next_loads(loads, "disk", 2.5) == ["next"]
    assert next_loads(loads, "store", 1.0) == []
    loads["remote"] = Load("store", waiting=True)
    assert next_loads(loads, "store", 1.0) == ["remote"]


def test_who_is_next_begins_beside_the_last_piece_of_a_turn_that_is_over() -> None:
    """One at a time, and nobody who would not be next after that piece."""
    loads = {
        "ends": Load("disk", virtual=1.0, holding_since_s=0.0),
        "next": Load("disk", virtual=2.0, waiting=True),
        "later": Load("disk", virtual=3.0, waiting=True),
    }

    def following(now_s: float) -> list[str]:
        return next_loads(loads, "disk", now_s, piece=1.5)

    assert following(TURN_S / 2) == [] and following(TURN_S) == ["next"]
    urgent = {**loads, "ends": dataclasses.replace(loads["ends"], weight=URGENT_WEIGHT)}
    assert next_loads(urgent, "disk", TURN_S, piece=1.5) == []
    loads["next"] = began(loads["next"], TURN_S)
    assert following(3 * TURN_S) == [], "two are at it"
    loads["ends"] = ended(loads["ends"], 1.5)
    assert following(1.5 * TURN_S) == [] and following(2 * TURN_S) == ["later"]


def test_a_turn_that_is_over_is_not_waited_for(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last bytes may still be on their way when the other one begins."""
    monkeypatch.setattr(turns, "LEASE_S", 1e6)
    mine, other = (Ledger("disk", directory=directory) for _ in range(2))
    mine.begin(lambda: False)
    other.begin(lambda: False)
    assert mine.rows()[mine._name].load.holding_since_s is not None
    for ledger in (mine, other):
        ledger.end(1)
        ledger.close()


def test_of_two_cores_an_urgent_load_has_one_and_the_others_share_the_other() -> None:
    loads = {name: Load("cores") for name in "abc"}
    loads["urgent"] = Load("cores", weight=weight(urgent=True, priority=0))
    turns = []
    for now in range(48):
        for name, load in list(loads.items()):
            loads[name] = asked(loads, name, load.weight, turn=TURN_S)
        chosen = next_loads(loads, "cores", float(now), places=2)
        for name in chosen:
            loads[name] = began(loads[name], float(now))
        assert not next_loads(loads, "cores", float(now), places=2)
        for name in chosen:
            loads[name] = ended(loads[name], TURN_S)
        turns.append(chosen)
    assert sum("urgent" in chosen for chosen in turns) >= 47, "but when each has had its first"
    others = [name for chosen in turns for name in chosen if name != "urgent"]
    assert all(16 <= others.count(name) <= 17 for name in "abc")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "ledger"
    assert not (tmp_path / "ledger").exists(), "the last one to leave removes the table"


def test_limits_never_exceed_the_budget_while_it_moves(directory: Path) -> None:
    """A model that must give up memory keeps it in the books until it says that it is gone."""
    first, second = (Ledger("disk", directory=directory) for _ in range(2))
    first.join("g", 50 * MIB, 10 * MIB)
    assert first.exchange(Claim(CURVE, 1.0), 0) == 40 * MIB
    second.join("g", 50 * MIB, 10 * MIB)
    assert second.exchange(Claim(CURVE, 8.0), 0) == 10 * MIB, "what is free"
    assert first.exchange(Claim(CURVE, 1.0), 40 * MIB) == 10 * MIB, "the target"
    assert second.exchange(Claim(CURVE, 8.0), 10 * MIB) == 10 * MIB, "first still holds it"
    assert first.exchange(Claim(CURVE, 1.0), 10 * MIB) == 10 * MIB
    assert second.exchange(Claim(CURVE, 8.0), 10 * MIB) == 40 * MIB
    assert sum(row.limit_bytes for row in first.rows().values()) == 50 * MIB
    first.close()
    second.close()


def test_a_budget_that_is_too_full_or_contradicts_is_refused(directory: Path) -> None:
    first, second = (Ledger("disk", directory=directory) for _ in range(2))
    first.join("g", 15 * MIB, 10 * MIB)
    with pytest.raises(PoolError, match=r"cannot hold this model too: it needs 10.0 MiB"):
        second.join("g", 15 * MIB, 10 * MIB)
    with pytest.raises(PoolError, match=r"is 20 here and 15 in another model .* give one value"):
        second.join("g", 20 * MIB, 1 * MIB)
    second.join("other", 20 * MIB, 10 * MIB)
    first.close()
    second.close()


_VICTIM = """
import sys, time
from pathlib import Path
from paceline.blocks.backend.ledger import FORMAT, Ledger, Row
from paceline.blocks.backend.shares import Claim
ledger = Ledger("disk", directory=Path(sys.argv[1]))
ledger.join("g", 50 << 20, 10 << 20)
ledger.exchange(Claim(((10 << 20, 1.0), (40 << 20, 0.1)), 1.0), 0)
ledger.begin(lambda: False)
print("ready", flush=True)
while True:
    with ledger._table():
        pass
"""


def test_a_killed_process_leaves_neither_its_share_nor_its_turn(directory: Path) -> None:
    """It holds both, and is killed at some point of a transaction."""
    mine = Ledger("disk", directory=directory)
    mine.join("g", 50 * MIB, 10 * MIB)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for _ in range(3):
        victim = subprocess.Popen(
            [sys.executable, "-c", _VICTIM, str(directory)],
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"ready\n"
        assert mine.exchange(Claim(CURVE, 1.0), 0) == 10 * MIB
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        assert mine.exchange(Claim(CURVE, 1.0), 0) == 40 * MIB
        mine.exchange(Claim(CURVE[:1], 1.0), 0)
        mine.begin(lambda: False)
        mine.end(1)
        assert len(mine.rows()) == 1
    mine.close()


def test_turns_pass_from_one_to_the_next(directory: Path) -> None:
    """Two threads as two processes would; both get all their turns."""
    moved: list[str] = []

    def work(name: str) -> None:
        ledger = Ledger("disk", directory=directory)
        for _ in range(20):
            ledger.begin(lambda: False)
            moved.append(name)
            ledger.end(1)
        ledger.close()

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(moved) == ["a"] * 20 + ["b"] * 20


def test_an_urgent_load_that_goes_on_has_most_turns(directory: Path) -> None:
    """Not every second one: for a moment it would not wait, and the other one would."""
    urgent, other = (Ledger("disk", directory=directory) for _ in range(2))
    took: list[str] = []

    def work() -> None:
        for _ in range(2):
            other.begin(lambda: False)
            took.append("other")
            other.end(CHUNK_BYTES)

    urgent.begin(lambda: True)
    thread = threading.Thread(target=work)
    thread.start()
    while not other.rows()[other._name].load.waiting:
        pass
    while took.count("other") < 2:
        urgent.renew(CHUNK_BYTES, lambda: True)
        took.append("urgent")
    urgent.end(CHUNK_BYTES)
    thread.join()
    first, second = (number for number, name in enumerate(took) if name == "other")
    assert second - first > URGENT_WEIGHT / 2
    for ledger in (urgent, other):
        ledger.close()


def test_sessions_are_built_by_as_many_loads_at_a_time_as_there_are_cores(directory: Path) -> None:
    """The next one may when a turn ends, an urgent one first; I/O is another matter."""
    cores = len(os.sched_getaffinity(0))
    building = [Ledger("disk", directory=directory) for _ in range(cores)]
    assert building[0].building.begin(lambda: False), "nobody else loads: it needs no turn"
    building[0].building.end(TURN_S)
    other = Ledger("store", directory=directory)
    other.expect("other", MIB)
    for ledger in building:
        assert not ledger.building.begin(lambda: False)
    building[0].begin(lambda: False)
    began: list[str] = []

    def build(name: str, ledger: Ledger) -> None:
        ledger.building.begin(lambda: name == "urgent")
        began.append(name)

    assert not any(row.building.virtual for row in building[0].rows().values())
    waiting = {name: Ledger("disk", directory=directory) for name in ("slow", "urgent")}
    threads = []
    for name, ledger in waiting.items():
        threads.append(threading.Thread(target=build, args=(name, ledger)))
        threads[-1].start()
        while not building[0].rows()[ledger._name].building.waiting:
            pass
    assert not began
    building[0].building.end(TURN_S)
    threads[1].join()
    assert began == ["urgent"]
    waiting["urgent"].building.end(TURN_S)
    threads[0].join()
    assert began == ["urgent", "slow"]
    for ledger in (other, *building, *waiting.values()):
        ledger.close()


def test_a_turn_says_whether_others_load_through_the_same_channel(directory: Path) -> None:
    mine, other, elsewhere = (
        Ledger(channel, directory=directory) for channel in ("store", "store", "disk")
    )
    elsewhere.expect("elsewhere", 2 * MIB)

    def alone() -> bool:
        answer = mine.begin(lambda: False)
        mine.end(MIB)
        return answer

    assert alone(), "the other one has nothing to load"
    other.expect("other", 2 * MIB)
    assert not alone()
    other.begin(lambda: False)
    other.end(2 * MIB)
    assert alone(), "it has what it needs"
    for ledger in (mine, other, elsewhere):
        ledger.close()


def test_to_read_the_table_takes_no_more_memory_than_it_is_long(directory: Path) -> None:
    """It is read at every turn; within a budget nobody counts what that takes."""
    ledger = Ledger("disk", directory=directory)
    tracemalloc.start()
    rows = ledger.rows()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 1
    assert peak_bytes < MIB / 8
    ledger.close()


def test_another_version_of_the_table_is_neither_read_nor_removed(tmp_path: Path) -> None:
    """Its files lie beside ours, also when we are the last to leave."""
    directory = tmp_path / "ledger"
    directory.mkdir(mode=0o700)
    theirs = {directory / f"{kind}-{FORMAT + 1}" for kind in ("table", "fresh", "lock")}
    for path in theirs:
        path.write_text("of rows that we do not understand", encoding="utf-8")
    mine = Ledger("disk", directory=directory)
    mine.join("g", 50 * MIB, 10 * MIB)
    assert len(mine.rows()) == 1
    (directory / f"fresh-{FORMAT}").write_text("of one that was killed", encoding="utf-8")
    mine.close()
    assert set(directory.iterdir()) == theirs


def test_the_tables_format_changes_with_its_rows() -> None:
    """Whoever adds, drops or renames a field here raises `ledger.FORMAT`, and this number."""
    kinds = (Row, Load, Claim)
    fields = [" ".join(field.name for field in dataclasses.fields(kind)) for kind in kinds]
    assert (FORMAT, *fields) == (
        2,
        "pid started bell load building group total_bytes limit_bytes claim model loading_bytes "
        "moved_bytes",
        "channel virtual weight waiting holding_since_s share bell",
        "curve rate_rps weight",
    )
