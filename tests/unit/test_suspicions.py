"""Answers that may be another request's: what was sent before a process was found dead."""

from __future__ import annotations

import time
from pathlib import Path

from paceline.runtime.suspicions import Suspicions


def test_what_was_sent_before_is_suspected_and_nothing_else() -> None:
    known = Suspicions()
    before_s = time.monotonic()
    assert not known.any("t", "m", before_s)
    known.tell("t", ["m", "n"])
    after_s = time.monotonic() + 1e-6
    assert known.any("t", "m", before_s) and known.any("t", "n", before_s)
    assert not known.any("t", "m", after_s)
    assert not known.any("t", "other", before_s) and not known.any("u", "m", before_s)


def test_several_processes_know_of_each_other_by_a_machines_address(tmp_path: Path) -> None:
    shared = tmp_path / "suspicions"
    Suspicions.create(shared)
    one, other = Suspicions(shared), Suspicions(shared)
    one.know("triton-0", "10.0.0.7:8001")
    other.know("triton-3", "10.0.0.7:8001")
    sent_s = time.monotonic()
    one.tell("triton-0", ["m"])
    assert other.any("triton-3", "m", sent_s) and not other.any("triton-0", "m", sent_s)
    Suspicions.create(shared)
    assert not Suspicions(shared).any("10.0.0.7:8001", "m", sent_s)
