"""What is learned of the links through which a Triton's blocks models load."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from paceline.block_links import BlockLinks
from paceline.blocks.backend.ledger import Ledger

MIB = 1 << 20


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_links_rate_is_that_of_turns_not_of_the_instants_at_which_they_are_told(
    tmp_path: Path,
) -> None:
    """Turns of 8 MiB a second, looked at every 0.1 s; the first of a model are some KiB."""
    directory, clock = tmp_path / "ledger", Clock()
    links = BlockLinks(os.getppid, directory, clock)
    loading = Ledger("store", directory=directory)
    loading.expect("model", 100 * MIB)

    def rate() -> float | None:
        (found,) = links.moving().values()
        return found[0]

    assert rate() is None
    for tick in range(41):
        clock.now_s += 0.1
        if tick == 0:
            loading.moved(4096)
        elif tick % 10 == 0:
            loading.moved(8 * MIB)
        learned = rate()
        assert learned is None if tick < 10 else learned == pytest.approx(8 * MIB, rel=0.15)
    loading.close()
