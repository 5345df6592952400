"""A machine that runs what is due first, step by step: the oracle of `planner.urgency`."""

from __future__ import annotations

import random
from collections.abc import Sequence

from paceline.planner.urgency import Stream


def latest_s(streams: Sequence[Stream], rng: random.Random, runs: int = 20) -> float:
    """By how much the latest batch is late, over random phases and jitters, due first run first.

    Every run has one stream begin a batch just before the first batches of all others.
    """
    worst_s = -1.0
    for run in range(runs):
        first = streams[run % len(streams)]
        horizon_s = 12 * max(s.duration_s / s.busy + s.deadline_s for s in streams)
        batches: list[tuple[float, float, float]] = []
        for stream in streams:
            every_s = stream.duration_s / stream.busy
            at_s = rng.choice((0.0, rng.random() * every_s)) if stream is not first else -1e-9
            while at_s < horizon_s and len(batches) < 4000:
                release_s = at_s + rng.choice((0.0, rng.random(), 1.0)) * stream.jitter_s
                batches.append((release_s, release_s + stream.deadline_s, stream.duration_s))
                at_s += every_s
        worst_s = max(worst_s, run_s(sorted(batches)))
    return worst_s


def run_s(batches: list[tuple[float, float, float]]) -> float:
    """Lateness of the latest of (release, deadline, duration), sorted by release."""
    waiting: list[tuple[float, float]] = []
    now_s, worst_s = 0.0, -1.0
    while batches or waiting:
        if not waiting:
            now_s = max(now_s, batches[0][0])
        while batches and batches[0][0] <= now_s + 1e-12:
            _, deadline_s, duration_s = batches.pop(0)
            waiting.append((deadline_s, duration_s))
        waiting.sort(reverse=True)
        deadline_s, duration_s = waiting.pop()
        now_s += duration_s
        worst_s = max(worst_s, now_s - deadline_s)
    return worst_s
