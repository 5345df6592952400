"""Within a budget what is in memory is what was asked for, whatever the pool is: exact reads."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from tests.http_stores import StoreHandler, answering

from paceline.blocks.backend import store
from paceline.blocks.backend.loader import Loader
from paceline.blocks.backend.manifest import Chunks, PoolError, PoolObject
from paceline.blocks.backend.mapping import MappedObject
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.backend.remote import RemoteSource
from paceline.blocks.backend.settler import Settler
from paceline.blocks.backend.source import LocalSource, Source
from paceline.blocks.backend.store import HttpStore
from paceline.blocks.backend.window import Span, Window

MIB = 1 << 20
OBJECT_BYTES = 8 * MIB
CHUNK_BYTES = 64 << 10
TIMEOUT_S = 10.0
TEXT = os.urandom(OBJECT_BYTES)
NAME = hashlib.sha256(TEXT).hexdigest()
STATED = {NAME: PoolObject(OBJECT_BYTES, blake3(TEXT).hexdigest())}
SPANS = [
    Span(NAME, offset, 2 * MIB, offset + 2 * MIB == OBJECT_BYTES)
    for offset in range(0, OBJECT_BYTES, 2 * MIB)
]
Opened = tuple[Source, str, MappedObject]


class OneObject(StoreHandler):
    """A store that has it."""

    def do_GET(self) -> None:
        body = self.part(TEXT)
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A directory with the object, none of it in memory."""
    path = tmp_path / "pool" / "objects" / NAME
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.write(TEXT)
        os.fsync(file.fileno())
    written = MappedObject(path, OBJECT_BYTES)
    written.drop(page_cache=True)
    kept = written.cached_bytes()
    written.close()
    if kept:
        pytest.skip("this file system keeps its files in memory")
    return tmp_path / "pool"


@pytest.fixture
def remote(pool: Path, tmp_path: Path) -> Iterator[Callable[..., RemoteSource]]:
    """A source with an empty cache."""
    with answering(OneObject) as url:

        def remote(*, counted: bool = True) -> RemoteSource:
            return RemoteSource(lambda: HttpStore(url), tmp_path / "cache", counted=counted)

        yield remote


@pytest.fixture(params=["local", "remote"])
def opened(
    pool: Path, remote: Callable[..., RemoteSource], request: pytest.FixtureRequest
) -> Callable[[], Opened]:
    """A source with one object, verified, none of it in memory."""

    def opened() -> Opened:
        local = request.param == "local"
        source: Source = LocalSource(pool, counted=True) if local else remote()
        (found,) = source.open(STATED).values()
        source.check(NAME)
        assert found.cached_bytes() == 0
        return source, NAME, found

    return opened


def test_what_was_just_written_is_dropped_too(pool: Path) -> None:
    """The kernel keeps what is not on the disk yet, however it is advised."""
    path = pool / "objects" / NAME
    found = MappedObject(path, OBJECT_BYTES)
    path.write_bytes(TEXT)
    assert found.cached_bytes() == OBJECT_BYTES
    found.written = True
    found.drop(page_cache=True)
    assert found.cached_bytes() == 0
    found.close()


def test_what_is_fetched_from_a_store_is_held_and_goes(
    remote: Callable[[], RemoteSource],
) -> None:
    """The cache's file was written span by span: in memory as well, until it is on the disk."""
    source = remote()
    (found,) = source.open(STATED).values()
    for number, span in enumerate(SPANS):
        source.expect(SPANS[number + 1 :])
        source.fetch(span)
        assert found.cached_bytes() == span.offset + span.size_bytes
    assert found.bytes.tobytes() == TEXT
    found.drop(page_cache=True)
    assert found.cached_bytes() == 0
    source.expect(())
    source.fetch(SPANS[2])
    assert found.cached_bytes() == SPANS[2].size_bytes
    source.close()


def test_a_table_that_is_fetched_by_parts_is_not_held(
    remote: Callable[[], RemoteSource],
) -> None:
    """Who reads a row has its page read; the rest passes through memory in small pieces."""
    source = remote()
    hashes = (blake3(TEXT[at : at + CHUNK_BYTES]) for at in range(0, OBJECT_BYTES, CHUNK_BYTES))
    source._chunks = {NAME: Chunks(CHUNK_BYTES, tuple(each.digest() for each in hashes))}
    (found,) = source.open(STATED).values()
    found.expect_rows()
    source.check_part(NAME, {3, 4, 90})
    assert found.cached_bytes() == 0
    assert found.bytes[3 * CHUNK_BYTES] == TEXT[3 * CHUNK_BYTES]
    assert found.cached_bytes() == 4096
    source.check(NAME)
    assert found.cached_bytes() == 4096
    assert found.bytes.tobytes() == TEXT
    source.close()


def test_no_more_is_read_than_a_span(opened: Callable[[], Opened]) -> None:
    """The kernel would read ahead, of sequential reads the more the larger they are."""
    source, name, found = opened()
    for offset in range(0, OBJECT_BYTES, 2 * MIB):
        source.expect(())
        source.fetch(Span(name, offset, 2 * MIB, offset + 2 * MIB == OBJECT_BYTES))
        assert found.cached_bytes() == offset + 2 * MIB
    source.close()


def test_of_what_is_expected_the_next_span_is_read_too(opened: Callable[[], Opened]) -> None:
    source, _, found = opened()
    for number, span in enumerate(SPANS):
        source.expect(SPANS[number + 1 :])
        source.fetch(span)
        wanted = min(span.offset + 4 * MIB, OBJECT_BYTES)
        give_up_s = time.monotonic() + TIMEOUT_S
        while found.cached_bytes() < wanted and time.monotonic() < give_up_s:
            time.sleep(0.001)  # the disk is at it
        assert found.cached_bytes() == wanted
    source.close()


class Turns:
    """All are had at once; tells when one is given back."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.given_back = threading.Event()

    def begin(self, urgent: Callable[[], bool]) -> bool:
        self.told.append("begin")
        return False

    def renew(self, amount: float, urgent: Callable[[], bool]) -> bool:
        self.told.append("renew")
        return False

    def end(self, amount: float) -> None:
        self.told.append("end")
        self.given_back.set()

    def moved(self, size_bytes: int) -> None:
        self.told.append(f"moved {size_bytes >> 20} MiB")


def test_what_another_process_fetches_or_has_fetched_takes_no_turn(
    remote: Callable[..., RemoteSource],
) -> None:
    """The other one needs the turns; how much there is then is told."""
    other, source, third = (remote(counted=False) for _ in range(3))
    other.open(STATED)
    other.fetch(SPANS[0])
    turns = [Turns(), Turns()]
    window = Window([[NAME]], {NAME: OBJECT_BYTES}, chunk_bytes=2 * MIB)
    loaders = [Loader(window, source.open(STATED), source, turns=turns[0])]
    loaders[0].start()
    try:
        for span in SPANS[1:]:
            other.fetch(span)
        assert loaders[0].wait_complete(TIMEOUT_S)
        window = Window([[NAME]], {NAME: OBJECT_BYTES}, chunk_bytes=2 * MIB)
        loaders.append(Loader(window, third.open(STATED), third, turns=turns[1]))
        loaders[1].start()
        assert loaders[1].wait_complete(TIMEOUT_S)
    finally:
        other.close()  # whatever it has locked, so that nobody waits for it
        for loader in loaders:
            loader.close()
        source.close()
        third.close()
    assert [each.told for each in turns] == [["moved 8 MiB"]] * 2


def test_who_waits_for_what_another_process_fetches_gives_its_turn_back(
    remote: Callable[..., RemoteSource],
) -> None:
    """The other one needs a turn to go on: waiting for each other they would both stand still."""
    other, source = remote(), remote()
    other.open(STATED)
    other.fetch(SPANS[0])
    turns = Turns()
    window = Window([[NAME]], {NAME: OBJECT_BYTES}, chunk_bytes=2 * MIB)
    loader = Loader(window, source.open(STATED), source, turns=turns)
    loader.start()
    try:
        assert turns.given_back.wait(TIMEOUT_S) and turns.told == ["begin", "end"]
        for span in SPANS[1:]:
            other.fetch(span)
        assert loader.wait_complete(TIMEOUT_S)
        assert turns.told[2] == "begin"
    finally:
        other.close()  # whatever it has locked, so that nobody waits for it
        loader.close()
        source.close()


def test_who_cannot_fetch_leaves_it_to_who_waits(
    remote: Callable[..., RemoteSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process whose store fails in the middle of an object tries again later, not holding it."""
    monkeypatch.setattr(store, "FIRST_PAUSE_S", 0.001)
    failing, other = remote(), remote()
    opened = [source.open(STATED)[NAME] for source in (failing, other)]
    failing.fetch(SPANS[0])
    waiting = threading.Thread(target=other.check, args=(NAME,), daemon=True)
    waiting.start()
    failing._connect, failing._threads = lambda: HttpStore("http://127.0.0.1:1"), threading.local()
    with pytest.raises(PoolError, match="refused"):
        failing.fetch(SPANS[1])
    waiting.join(TIMEOUT_S)
    assert not waiting.is_alive()
    failing.check(NAME)
    assert [one.bytes.tobytes() for one in opened] == [TEXT] * 2
    failing.close()
    other.close()


def test_who_fetches_rows_leaves_a_table_alone_that_another_one_completes(
    remote: Callable[..., RemoteSource],
) -> None:
    """It may have lost its lock; what was written after the hash would look like a change."""
    hashes = (blake3(TEXT[at : at + CHUNK_BYTES]) for at in range(0, OBJECT_BYTES, CHUNK_BYTES))
    chunks = {NAME: Chunks(CHUNK_BYTES, tuple(each.digest() for each in hashes))}
    first, other = remote(), remote()
    opened = []
    for source in (first, other):
        source._chunks = chunks
        opened.append(source.open(STATED)[NAME])
    first.check_part(NAME, {3})
    first._parts[NAME].release()
    other.check(NAME)
    first.check_part(NAME, {7})
    assert opened[1].look() == opened[1].right
    first.check(NAME)
    assert opened[0].look() == opened[0].right == opened[1].right
    first.close()
    other.close()


def test_a_source_that_is_closed_as_soon_as_it_was_opened_ends(tmp_path: Path) -> None:
    """As when a manifest cannot be had: its threads may not be waiting yet."""

    def open_and_close() -> None:
        for _ in range(2000):
            Settler(ObjectStore(tmp_path)).close()

    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=open_and_close, daemon=True)
        thread.start()
        thread.join(60)
    finally:
        sys.setswitchinterval(before_s)
    assert not thread.is_alive(), "one was told before it listened, and never again"
