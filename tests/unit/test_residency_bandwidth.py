"""How concurrent loads split their link: who is in time, and what residency says of it when."""

from __future__ import annotations

from itertools import combinations
from math import inf
from random import Random

import pytest

from paceline.blocks.backend.turns import Load, asked, began, ended, next_loads, weight
from paceline.blocks.backend.window import CHUNK_BYTES
from paceline.residency import events as ev
from paceline.residency.bandwidth import AHEAD, Transfer, split
from paceline.residency.ledger import Footprint
from paceline.residency.residency import Residency

NOW_S = 100.0


def in_time(transfers: list[Transfer], shares: dict[str, float], link: float) -> set[str]:
    return {
        t.model
        for t in transfers
        if t.latest_s and t.left_bytes / (shares[t.model] * link) <= t.first_s - NOW_S
    }


def test_each_gets_what_it_needs_by_its_deadline_and_the_rest_in_proportion() -> None:
    transfers = [Transfer("a", 60, (NOW_S + 1,)), Transfer("b", 200, (NOW_S + 10,))]
    shares = split(transfers, NOW_S, 150.0)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["a"] / shares["b"] == pytest.approx(60 / 20), "B_k = D_k / a_k"
    assert in_time(transfers, shares, 150.0) == {"a", "b"}


def test_the_most_users_are_in_time_that_any_choice_could_serve() -> None:
    rng = Random(3)
    ours = best = 0
    for _ in range(200):
        transfers = [
            Transfer(f"m{i}", rng.randrange(1, 100), (NOW_S + rng.uniform(0.5, 5.0),))
            for i in range(5)
        ]
        link = 60.0
        ours += len(in_time(transfers, split(transfers, NOW_S, link), link))
        needs = [t.left_bytes / (AHEAD * (t.first_s - NOW_S)) for t in transfers]
        best += max(
            count
            for count in range(6)
            if count == 0 or any(sum(chosen) <= link for chosen in combinations(needs, count))
        )
    assert ours >= 0.98 * best, "loads that nobody waits for any more cost a fiftieth"


def test_given_the_same_users_the_cheapest_are_first_and_priorities_before_all() -> None:
    dear, cheap = Transfer("dear", 90, (NOW_S + 1,)), Transfer("cheap", 50, (NOW_S + 1,))
    shares = split([dear, cheap], NOW_S, 100.0)
    assert in_time([dear, cheap], shares, 100.0) == {"cheap"}
    low = Transfer("cheap", 50, (NOW_S + 1,), priority=1.0)
    assert in_time([dear, low], split([dear, low], NOW_S, 120.0), 120.0) == {"dear"}
    three = Transfer("dear", 90, (NOW_S + 1,) * 3)
    assert in_time([three, cheap], split([three, cheap], NOW_S, 120.0), 120.0) == {"dear"}


def test_who_is_late_gets_the_rest_and_nobody_stands_still() -> None:
    late, due = Transfer("late", 50, (NOW_S - 1,)), Transfer("due", 8, (NOW_S + 1,))
    unwanted = Transfer("unwanted", 50)
    shares = split([late, due, unwanted], NOW_S, 100.0)
    assert shares["late"] > shares["due"] >= 0.09 > shares["unwanted"] > 0.0
    alone = split([unwanted, Transfer("open", 9, (inf,))], NOW_S, 100.0)
    assert alone["unwanted"] == alone["open"] == pytest.approx(0.5)


def test_a_shared_block_is_needed_once_by_the_most_urgent() -> None:
    blocks = {"backbone": 90}
    first = Transfer("first", 100, (NOW_S + 2,), 0.0, {**blocks, "f": 10}, 100)
    second = Transfer("second", 100, (NOW_S + 4,), 0.0, {**blocks, "s": 10}, 100)
    shares = split([first, second], NOW_S, 1000.0)
    assert shares["first"] / shares["second"] == pytest.approx((100 / 2) / (10 / 4))


def test_residency_says_how_to_split_when_that_changes() -> None:
    made = Residency()
    for model in ("a", "b"):
        made.handle(ev.Declare(model, Footprint(0, {model: 100})), now_s=0.0)
    made.handle(ev.MachineUp("m", fill=False), now_s=0.0)
    need = ev.Need("a", after_s=1.0)
    made.handle(ev.Enter(1, (need,), NOW_S + 3.0), now_s=NOW_S)
    made.handle(ev.Enter(2, (ev.Need("b"),), NOW_S + 20.0), now_s=NOW_S)

    def moving(**left: int) -> list[ev.Split]:
        event = ev.Moving("m", (ev.Link("disk", 100.0, left),))
        return [a for a in made.handle(event, now_s=NOW_S) if isinstance(a, ev.Split)]

    (first,) = moving(a=100, b=100)
    assert first.machine == "m"
    assert first.shares["a"] / first.shares["b"] == pytest.approx(20 / (3 - 1)), (
        "a starts 1 s ahead"
    )
    assert not moving(a=99, b=99), "nothing has changed"
    (then,) = moving(b=90)
    assert then.shares == {"b": 1.0}
    assert not moving()
    made.handle(ev.Enter(3, (ev.Need("b"),), NOW_S + 0.5), now_s=NOW_S)
    (again,) = moving(a=50, b=50)
    assert again.shares["b"] > again.shares["a"], "somebody more urgent came"


def test_turns_at_the_link_follow_the_shares() -> None:
    loads = {
        name: Load("disk", weight=weight(urgent=True, priority=0, share=share), share=share)
        for name, share in {"a": 0.75, "b": 0.2, "c": 0.05}.items()
    }
    moved = dict.fromkeys(loads, 0)
    for _ in range(400):
        for name, load in list(loads.items()):
            urgent = weight(urgent=True, priority=0, share=load.share)
            loads[name] = asked(loads, name, urgent, turn=CHUNK_BYTES)
        (chosen,) = next_loads(loads, "disk", 0.0)
        loads[chosen] = ended(began(loads[chosen], 0.0), CHUNK_BYTES)
        moved[chosen] += 1
    assert moved["a"] == pytest.approx(300, abs=5)
    assert moved["b"] == pytest.approx(80, abs=5)
    assert moved["c"] == pytest.approx(20, abs=5)
