"""Thousands of small worlds, each with chains, machines, load and faults of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.simulation.replay import explain, violation
from tests.simulation.swarm import draw, run

from paceline.sim.world import EventLog

ROOT = Path(__file__).parents[2]
PER_TEST = 250


@pytest.mark.parametrize("first", range(0, 8 * PER_TEST, PER_TEST))
def test_every_seed_keeps_every_safety_and_liveness_check(first: int) -> None:
    for seed in range(first, first + PER_TEST):
        case = draw(seed)
        found = violation(case)
        if found is not None:
            pytest.fail(explain(case, found), pytrace=False)


def test_the_same_seed_gives_the_same_bytes_in_any_process() -> None:
    told = [
        subprocess.run(
            [sys.executable, "-m", "tests.simulation.replay", "--seed", "2"],
            cwd=ROOT,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert told[0] == told[1]
    log = EventLog()
    run(draw(2), log=log)
    assert told[0].decode().startswith(log.text())
    assert len(log.lines) > 100
