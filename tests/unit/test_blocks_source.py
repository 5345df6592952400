"""A pool on this machine's disk: what is read into memory is what was asked for."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from paceline.blocks.backend.manifest import PoolObject
from paceline.blocks.backend.mapping import MappedObject
from paceline.blocks.backend.source import LocalSource
from paceline.blocks.backend.window import Span

MIB = 1 << 20
OBJECT_BYTES = 8 * MIB
TIMEOUT_S = 10.0
Opened = tuple[LocalSource, str, MappedObject]


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[], Opened]:
    """A source with one object, verified, none of it in memory."""

    def opened() -> Opened:
        text = os.urandom(OBJECT_BYTES)
        name = hashlib.sha256(text).hexdigest()
        path = tmp_path / "objects" / name
        path.parent.mkdir()
        with path.open("wb") as file:
            file.write(text)
            os.fsync(file.fileno())
        source = LocalSource(tmp_path, counted=True)
        (found,) = source.open({name: PoolObject(OBJECT_BYTES, blake3(text).hexdigest())}).values()
        source.check(name)
        found.drop(page_cache=True)
        if found.cached_bytes():
            pytest.skip("this file system keeps its files in memory")
        return source, name, found

    return opened


def test_no_more_is_read_than_a_span(opened: Callable[[], Opened]) -> None:
    """The kernel would read ahead, of sequential reads the more the larger they are."""
    source, name, found = opened()
    for offset in range(0, OBJECT_BYTES, 2 * MIB):
        source.expect(())
        source.fetch(Span(name, offset, 2 * MIB, offset + 2 * MIB == OBJECT_BYTES))
        assert found.cached_bytes() == offset + 2 * MIB
    source.close()


def test_of_what_is_expected_the_next_span_is_read_too(opened: Callable[[], Opened]) -> None:
    source, name, found = opened()
    spans = [
        Span(name, offset, 2 * MIB, offset + 2 * MIB == OBJECT_BYTES)
        for offset in range(0, OBJECT_BYTES, 2 * MIB)
    ]
    for number, span in enumerate(spans):
        source.expect(spans[number + 1 :])
        source.fetch(span)
        wanted = min(span.offset + 4 * MIB, OBJECT_BYTES)
        give_up_s = time.monotonic() + TIMEOUT_S
        while found.cached_bytes() < wanted and time.monotonic() < give_up_s:
            time.sleep(0.001)  # the disk is at it
        assert found.cached_bytes() == wanted
    source.close()
