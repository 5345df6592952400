"""Block stores: bytes as asked for, and the next requests out before an answer ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from tests.http_stores import StoreHandler, answering

from paceline.blocks.backend import s3, store
from paceline.blocks.backend.manifest import PoolError
from paceline.blocks.backend.store import (
    MOST_AHEAD,
    Pace,
    Part,
    Passing,
    Store,
    open_store,
)

SIZE = 3 << 20
NAMES = "abcdefghijkl"
CONTENTS = {name: name.encode() * SIZE for name in NAMES}


@dataclass
class Served:
    url: str = ""
    asked: list[str] = field(default_factory=list)
    seen: dict[str, threading.Event] = field(
        default_factory=lambda: {name: threading.Event() for name in CONTENTS}
    )
    cut_short: int = 0
    """So many answers end in the middle."""
    held: dict[str, threading.Event] = field(default_factory=dict)
    """Their bytes come when it is set."""
    silent: threading.Event | None = None
    """Not even a head comes before it is set."""
    drops: tuple[int, int] | None = None
    """Bytes come in pieces of so many, that number of them a second."""


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(store, "FIRST_PAUSE_S", 0.001)
    served = Served()

    class Handler(StoreHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            served.asked.append(name)
            served.seen[name].set()
            assert "Range" in self.headers or served.drops, "of an object parts are asked for"
            body = self.part(CONTENTS[name])
            if "Range" not in self.headers:
                body = body[:2000]
            if served.silent is not None:
                served.silent.wait(60)
            self.send_response(206)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if name in served.held:
                served.held[name].wait(10)
            if served.cut_short:
                served.cut_short -= 1
                body, self.close_connection = body[: len(body) // 2], True
            size, rate = served.drops or (len(body), 0)
            try:
                for start in range(0, len(body), size):
                    threading.Event().wait(1 / rate if rate else 0)
                    self.wfile.write(body[start : start + size])
            except OSError:  # its answer was not wanted any more
                self.close_connection = True

    with answering(Handler) as served.url:
        yield served


def part(name: str, offset: int = 0, size: int = SIZE) -> Part:
    return Part(name, offset, size - offset)


@pytest.fixture(params=["http", "s3"])
def opened(
    served: Served, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """Closed in the end."""
    if request.param == "http":
        opened = open_store(served.url)
    else:
        for key, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
            monkeypatch.setenv(f"AWS_{key}", value)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        opened = open_store("s3://bucket", s3_endpoint=served.url)
    yield opened
    opened.close()


def copied(opened: Store, wanted: Part) -> bytes:
    text = bytearray(wanted.size_bytes)

    def write(position: int, piece: memoryview) -> None:
        text[position : position + len(piece)] = piece

    opened.copy(wanted, write)
    return bytes(text)


def test_the_next_request_is_out_before_an_answer_ends(served: Served, opened: Store) -> None:
    """The store has it while the first piece of the answer before is being written."""
    opened.expect([part("b")])
    there = []
    opened.copy(part("a"), lambda position, piece: there.append(served.seen["b"].wait(10)))
    assert there and all(there)
    assert copied(opened, part("b")) == CONTENTS["b"]
    assert sorted(served.asked) == ["a", "b"]


def test_no_more_is_asked_for_ahead_than_fills_the_link(
    served: Served, opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the bytes of one that was asked for are still to come no other one is."""
    monkeypatch.setattr(store, "AHEAD_BYTES", SIZE - (1 << 16))  # of which a head has a part
    served.held["b"] = threading.Event()
    opened.expect([part("b"), part("c"), part("d")])
    pieces = []

    def write(position: int, piece: memoryview) -> None:
        assert not position or served.seen["b"].wait(10)
        assert "c" not in served.asked
        pieces.append(len(piece))

    opened.copy(part("a"), write)
    assert sum(pieces) == SIZE and len(pieces) >= 3
    served.held["b"].set()
    opened.expect([part("c"), part("d")])
    assert copied(opened, part("b")) == CONTENTS["b"]
    assert served.seen["c"].wait(10)
    opened.expect([])
    assert copied(opened, part("c")) == CONTENTS["c"]


def test_of_small_ones_many_are_out_but_no_more_than_is_said(served: Served, opened: Store) -> None:
    small = [part(name, size=100) for name in NAMES]
    for number, one in enumerate(small):
        opened.expect(small[number + 1 :])
        assert copied(opened, one) == CONTENTS[one.key][:100]
        # The store sees what was asked for a moment later, never more than that.
        assert len(served.asked) <= number + 1 + MOST_AHEAD
    assert sorted(served.asked) == list(NAMES)


def test_all_requests_ahead_are_out_once_there_are_connections(
    served: Served, opened: Store
) -> None:
    """Each answer opens one: so many are out after so many answers."""
    small = [part(name, size=100) for name in NAMES]
    for number in range(4):
        opened.expect(small[number + 1 :])
        copied(opened, small[number])
    assert all(served.seen[name].wait(10) for name in NAMES[:8])
    for number in range(4, len(NAMES)):
        assert copied(opened, small[number]) == CONTENTS[NAMES[number]][:100]
    assert sorted(served.asked) == list(NAMES)


def test_what_was_expected_in_vain_does_no_harm(served: Served, opened: Store) -> None:
    """Other bytes are asked for, or it is given up, or expected for now."""
    opened.expect([part("b")])
    assert copied(opened, part("a")) == CONTENTS["a"]
    assert served.seen["b"].wait(10)
    opened.expect([])
    assert copied(opened, part("c")) == CONTENTS["c"]
    opened.expect([part("d")])
    assert copied(opened, part("b", offset=5)) == CONTENTS["b"][5:]
    opened.expect([part("d")])
    assert copied(opened, part("d")) == CONTENTS["d"]
    opened.expect([part("a")])
    assert copied(opened, part("a")) == CONTENTS["a"]
    assert (served.asked.count("a"), served.asked.count("d")) == (2, 1)
    opened.close()


@pytest.mark.parametrize("times", [1, 2, 3])
def test_answers_that_end_early_come_again(served: Served, opened: Store, times: int) -> None:
    """Also one that was asked for ahead; no piece is taken for another's."""
    served.cut_short = times
    opened.expect([part("b"), part("c")])
    assert copied(opened, part("a")) == CONTENTS["a"]
    opened.expect([part("c")])
    assert copied(opened, part("b")) == CONTENTS["b"]
    opened.expect([])
    assert opened.read(part("c")) == CONTENTS["c"]


def test_a_store_that_never_answers_in_full_is_given_up(served: Served, opened: Store) -> None:
    served.cut_short = 1000
    with pytest.raises(PoolError, match=r"/a: .*, 5 times in a row"):
        copied(opened, part("a"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores that were opened before have the usual timeout."""
    for module in (store, s3):
        monkeypatch.setattr(module, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(store, "ATTEMPTS", 3)


@pytest.mark.parametrize("when", ["before the head", "before the bytes"])
@pytest.mark.usefixtures("impatient")
def test_a_store_that_hangs_is_asked_again_and_given_up(
    served: Served, opened: Store, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it has after that can be had."""
    going_on = threading.Event()
    if when == "before the head":
        served.silent = going_on
    else:
        served.held["a"] = going_on
    with pytest.raises(PoolError, match=r"/a: .*[Tt]ime.*, 3 times in a row"):
        copied(opened, part("a"))
    assert len(served.asked) <= 3
    going_on.set()
    monkeypatch.setattr(store, "ATTEMPTS", 50)
    assert copied(opened, part("a")) == CONTENTS["a"]


@pytest.mark.usefixtures("impatient")
def test_a_store_that_trickles_is_given_up(served: Served, opened: Store) -> None:
    """Bytes come all the time, but all of them would take 20 s."""
    served.drops = (1, 100)
    said = r"/a: .*(slower than 65536 bytes/s|[Tt]ime.*), 3 times in a row"
    with pytest.raises(PoolError, match=said):
        copied(opened, part("a", size=2000))
    with pytest.raises(PoolError, match=said):
        opened.all("a")


@pytest.mark.usefixtures("impatient")
def test_a_store_that_is_slow_but_steady_is_waited_for(
    served: Served, opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers take several times the timeout."""
    monkeypatch.setattr(store, "LEAST_BYTES_PER_S", 100)
    monkeypatch.setattr(store, "ATTEMPTS", 10)  # on a machine that stands still now and then
    served.drops = (12, 200)
    assert copied(opened, part("a", size=2000)) == CONTENTS["a"][:2000]


def test_an_answer_has_the_time_that_its_bytes_take_at_the_least_rate() -> None:
    pace = Pace()
    pace.came(0, store.TIMEOUT_S)
    pace.came(store.LEAST_BYTES_PER_S, 1.0)
    with pytest.raises(Passing, match="65536 bytes in 11.5 s: slower than 65536 bytes/s"):
        pace.came(0, 0.5)


@pytest.mark.usefixtures("impatient")
def test_who_is_stopped_waits_for_no_answer(
    served: Served, opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be asked for again and again; over S3 one wait for bytes is sat out."""
    monkeypatch.setattr(store, "ATTEMPTS", 1 << 30)
    served.silent = threading.Event()
    refused = []

    def ask() -> None:
        try:
            copied(opened, part("a"))
        except PoolError as error:
            refused.append(str(error))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    assert served.seen["a"].wait(10)
    opened.stop()
    asking.join(30)
    served.silent.set()
    (said,) = refused
    assert said.endswith("/a: given up: the model is being unloaded")
