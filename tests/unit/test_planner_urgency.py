"""Batches by urgency: what is accepted is in time whatever the phases, found out by running it."""

from __future__ import annotations

import random

import pytest
from tests.urgency import latest_s

from paceline.planner.urgency import Due, Stream


def drawn(rng: random.Random) -> Stream:
    duration_s = rng.randint(1, 10) / 1000
    return Stream(
        duration_s,
        duration_s * rng.choice((1.0, 1.5, 3.0, 8.0)),
        rng.choice((0.05, 0.2, 0.4, 0.7)),
        rng.choice((0.0, 0.0, duration_s)),
    )


def test_what_is_accepted_is_in_time_whatever_the_phases() -> None:
    accepted = 0
    for seed in range(600):
        rng = random.Random(seed)
        due = Due.of(tuple(drawn(rng) for _ in range(rng.randint(2, 4))))
        if due.in_time:
            accepted += 1
            assert latest_s(due.streams, rng) <= 1e-9, due
    assert accepted >= 40


@pytest.mark.parametrize(
    "streams",
    [
        # Blocked by a batch just begun; two that are due together; a machine asked for too much.
        (Stream(0.004, 0.010, 0.3), Stream(0.007, 0.050, 0.1)),
        (Stream(0.006, 0.010, 0.2), Stream(0.005, 0.010, 0.2)),
        (Stream(0.004, 0.040, 0.7), Stream(0.004, 0.040, 0.5)),
    ],
)
def test_what_is_refused_here_is_late_in_some_phase(streams: tuple[Stream, ...]) -> None:
    assert not Due.of(streams).in_time
    assert latest_s(streams, random.Random(1), runs=200) > 0


def test_room_is_the_most_that_is_still_in_time() -> None:
    some = 0
    for seed in range(400):
        rng = random.Random(seed)
        due = Due.of(tuple(drawn(rng) for _ in range(rng.randint(0, 3))))
        new = drawn(rng)
        if not due.in_time:
            continue
        room = due.room(new.duration_s, new.deadline_s, new.jitter_s)
        if room > 1e-6:
            some += 1
            fits = Stream(new.duration_s, new.deadline_s, room * (1 - 1e-9), new.jitter_s)
            assert due.joined(fits).in_time
        more = Stream(new.duration_s, new.deadline_s, room + 1e-4, new.jitter_s)
        assert not due.joined(more).in_time
    assert some >= 50


def test_room_is_found_where_rounding_leaves_a_hair_less_than_no_time() -> None:
    due = Due.of((Stream(0.01, 0.03, 0.2), Stream(0.01, 0.03, 0.2)))
    for hair_s in (0.0, 1e-13, -1e-13):
        assert due.room(0.01 + hair_s, 0.03, 0.0) == pytest.approx(0.6)
    assert due.room(0.0101, 0.03, 0.0) == 0.0
