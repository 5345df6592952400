"""Machines chosen among many patterns: by the rules of the packing, at no higher cost."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf

import numpy as np
import pytest
from tests.urgency import latest_s

from paceline.planner.columns import packed, repacked
from paceline.planner.cycle import Load, Size
from paceline.planner.pack import Machine, Packing, Shared, pack
from paceline.planner.patterns import Machines, Offers, Rounds, by_urgency, in_cycles
from paceline.planner.urgency import Due, Stream

MIB = 1 << 20


def drawn(rng: random.Random) -> Stream:
    duration_s = rng.randint(1, 10) / 1000
    deadline_s = duration_s * rng.choice((1.0, 1.5, 3.0, 8.0))
    jitter_s = rng.choice((0.0, 0.0, duration_s))
    return Stream(duration_s, deadline_s, rng.choice((0.05, 0.2, 0.4, 0.7)), jitter_s)


def offered(streams: list[Stream]) -> Offers:
    """As whole loads with their jitter, as parts with 2 ms more."""
    rows = [(s.duration_s, s.deadline_s, s.busy, s.jitter_s) for s in streams]
    duration_s, deadline_s, busy, jitter_s = np.array(rows).T
    at, nothing = np.arange(len(streams)), np.zeros(len(streams))
    return Offers(at, at, duration_s, deadline_s, busy, jitter_s, jitter_s + 0.002, nothing, at, at)


def test_rooms_of_many_machines_are_those_of_each_by_itself() -> None:
    rng, some = random.Random(1), 0
    streams = [drawn(rng) for _ in range(60)]
    offers = offered(streams)
    for count in range(4):
        dues = [Due.of(tuple(drawn(rng) for _ in range(count))) for _ in range(80)]
        dues = [due for due in dues if due.in_time]
        machines = Machines.empty(len(dues))
        for k in range(count):
            own = [due.streams[k] for due in dues]
            floats = np.array([(s.duration_s, s.deadline_s, s.busy, s.jitter_s) for s in own]).T
            machines = machines.joined(np.arange(len(dues)), *floats)
        rooms, parts = machines.rooms(offers)
        for i, due in enumerate(dues):
            for j, s in enumerate(streams):
                assert rooms[i, j] == pytest.approx(
                    due.room(s.duration_s, s.deadline_s, s.jitter_s), abs=1e-7
                )
                assert parts[i, j] == pytest.approx(
                    due.room(s.duration_s, s.deadline_s, s.jitter_s + 0.002), abs=1e-7
                )
                some += rooms[i, j] > parts[i, j] > 0
    assert some > 500


def loads_of(rng: random.Random, count: int, kinds: tuple[str, ...] = ("gpu",)) -> list[Load]:
    loads = []
    for i in range(count):
        first_s = rng.choice((0.002, 0.005, 0.01, 0.02))
        durations_s = {
            kind: [first_s * (1 + 0.6 * b) / (1 + at) for b in range(8)]
            for at, kind in enumerate(kinds)
        }
        rate_rps = rng.choice((0.05, 0.2, 0.4)) / first_s
        total_rps = rate_rps * rng.choice((1.0, 1.0, 3.0))
        budget_s = first_s * rng.choice((1.5, 3.0, 6.0, 12.0))
        memory_bytes = dict.fromkeys(kinds, (1 + i % 7 % 4) * MIB)
        model = f"m{i % 7}"
        load = Load(
            f"c{i}", "m", model, rate_rps, total_rps, budget_s, durations_s, memory_bytes, kinds[0]
        )
        loads.append(replace(load, jitter_s=0.0 if total_rps == rate_rps else 4 / total_rps))
    return loads


def check(shared: list[Shared], loads: list[Load], most_bytes: int, rng: random.Random) -> None:
    """Every load is served, and every machine keeps one of the two rules."""
    served = dict.fromkeys((load.chain for load in loads), 0.0)
    for each in shared:
        hardware = each.machine.hardware
        for load in each.loads:
            served[load.chain] += load.rate_rps
        assert len({load.chain for load in each.loads}) == len(each.loads)
        assert each.memory_bytes <= most_bytes
        if each.cycle is not None:
            rows = zip(each.loads, each.cycle.batch_sizes, strict=True)
            took_s = [load.durations_s[hardware][size - 1] for load, size in rows]
            assert sum(took_s) <= each.cycle.duration_s * (1 + 1e-9)
            for load, size, d_s in zip(each.loads, each.cycle.batch_sizes, took_s, strict=True):
                assert size >= load.rate_rps * each.cycle.duration_s - 1e-5
                assert load.worst_s(each.cycle.duration_s, d_s) <= load.budget_s + 1e-8
        elif each.due is not None:
            assert each.due.in_time
            if len(each.loads) > 1:
                assert latest_s(each.due.streams, rng, runs=4) <= 1e-9
        else:
            assert len(each.loads) == 1
    assert served == pytest.approx({load.chain: load.rate_rps for load in loads})


@pytest.mark.parametrize("seed", range(4))
def test_what_is_chosen_serves_every_load_in_time_for_no_more_than_before(seed: int) -> None:
    rng = random.Random(seed)
    loads = loads_of(rng, 30, ("gpu", "fast"))
    kinds = {"gpu": Machine("gpu", 1.0, 9 * MIB), "fast": Machine("fast", 2.5, 9 * MIB)}
    before = pack(loads, kinds, {}, thorough=False)
    assert before is not None
    then = repacked(before, loads)
    check(then.shared, loads, 9 * MIB, rng)
    assert then.cost_per_hour < before.cost_per_hour
    assert sum(then.used.values()) == len(then.shared)
    again = repacked(before, loads)
    assert [(each.loads, each.sizes, each.cycle) for each in again.shared] == [
        (each.loads, each.sizes, each.cycle) for each in then.shared
    ]


def test_no_more_machines_of_a_kind_are_chosen_than_there_are() -> None:
    rng = random.Random(5)
    loads = loads_of(rng, 24, ("gpu", "fast"))
    free = pack(loads, {"gpu": Machine("gpu", 1.0), "fast": Machine("fast", 2.5)}, {})
    assert free is not None
    limit = repacked(free, loads).used["gpu"] - 2
    kinds = {"gpu": Machine("gpu", 1.0, 0, limit + 3), "fast": Machine("fast", 2.5)}
    before = pack(loads, kinds, {"gpu": 3}, thorough=False)
    assert before is not None and before.used["gpu"] <= limit + 3
    then = repacked(before, loads)
    check(then.shared, loads, 1 << 40, rng)
    on = [each.machine.hardware for each in then.shared]
    assert then.used["gpu"] == on.count("gpu") + 3 <= limit + 3
    assert then.cost_per_hour <= before.cost_per_hour


def test_nothing_is_chosen_where_nothing_costs_less_than_what_is_asked_for() -> None:
    loads = loads_of(random.Random(1), 30, ("gpu", "fast"))
    kinds = {"gpu": Machine("gpu", 1.0), "fast": Machine("fast", 2.5)}
    before = pack(loads, kinds, {}, thorough=False)
    assert before is not None
    then = repacked(before, loads)
    assert then.cost_per_hour < before.cost_per_hour
    assert repacked(before, loads, then.cost_per_hour + 1e-6).cost_per_hour == then.cost_per_hour
    assert repacked(before, loads, then.cost_per_hour / 2) is before


def test_a_load_that_patterns_serve_twice_is_left_to_one_of_them() -> None:
    # Six that fill a machine by threes, in ten ways each: chosen are two of the twenty.
    durations_s = {"gpu": [0.01]}
    loads = [Load(f"c{i}", "m", f"m{i}", 30.0, 30.0, 0.05, durations_s) for i in range(6)]
    packing = Packing({"gpu": Machine("gpu", 1.0)}, {"gpu": 6})
    for load in loads:
        alone = packing.alone(load, Machine("gpu", 1.0))
        assert alone is not None
        packing.shared.append(alone)
    then = repacked(packing, loads)
    check(then.shared, loads, 1 << 40, random.Random(0))
    assert then.cost_per_hour == 2.0


def test_patterns_by_urgency_are_accepted_and_worth_more_than_a_machine() -> None:
    rng, some = random.Random(2), 0
    loads = loads_of(rng, 25)
    sizes: list[tuple[Size, ...]] = [load.sizes("gpu") for load in loads]
    offers = Offers.of(loads, sizes, [load.jitter_s + 0.001 for load in loads], "gpu")
    worth = np.array([rng.random() for _ in loads])
    for turn in range(4):
        for pattern in by_urgency(offers, worth, 1.0, 0, eager=0.7, turn=turn):
            streams = []
            for offer, share in pattern:
                load, jitter_s = loads[offers.load[offer]], 0.001 if share < 1 else 0.0
                size = sizes[offers.load[offer]][offers.size[offer]]
                busy = load.rate_rps * size.row_s * share
                stream = Stream(size.duration_s, size.deadline_s, busy, load.jitter_s + jitter_s)
                streams.append(stream)
            assert Due.of(tuple(streams)).in_time
            assert sum(share * worth[offers.load[offer]] for offer, share in pattern) > 1.0
            some += len(pattern) > 1
    assert some >= 20


def test_patterns_in_a_cycle_are_worth_more_than_a_machine() -> None:
    loads = loads_of(random.Random(3), 25)
    worth = np.array([random.Random(i).random() for i in range(25)])
    found = list(in_cycles(Rounds.of(loads, "gpu"), worth, 1.0, eager=0.5))
    assert found
    for cycle_s, members in found:
        assert sum(worth[members]) > 1.0
        took_s = [loads[at].durations_s["gpu"][loads[at].batch_size(cycle_s) - 1] for at in members]
        assert sum(took_s) <= cycle_s * (1 + 1e-9)


def test_few_loads_are_packed_without_patterns_as_before() -> None:
    loads = loads_of(random.Random(7), 8)
    kinds = {"gpu": Machine("gpu", 1.0, limit=inf)}
    one, other = packed(loads, kinds, {}), pack(loads, kinds, {})
    assert one is not None and other is not None
    assert [each.loads for each in one.shared] == [each.loads for each in other.shared]
