"""A block store over HTTP: bytes as asked for, and the next request out before an answer ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from tests.http_stores import StoreHandler, answering

from paceline.blocks.backend import store
from paceline.blocks.backend.manifest import PoolError
from paceline.blocks.backend.store import HttpStore

SIZE = 3 << 20
CONTENTS = {f"{name}": name.encode() * SIZE for name in "abcd"}


@dataclass
class Served:
    url: str = ""
    asked: list[str] = field(default_factory=list)
    seen: dict[str, threading.Event] = field(
        default_factory=lambda: {name: threading.Event() for name in CONTENTS}
    )
    cut_short: int = 0
    """So many answers end in the middle."""


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(store, "FIRST_PAUSE_S", 0.001)
    served = Served()

    class Handler(StoreHandler):
        def do_GET(self) -> None:
            name = self.path.lstrip("/")
            served.asked.append(name)
            served.seen[name].set()
            assert "Range" in self.headers, "a store is never asked for a whole object"
            body = self.part(CONTENTS[name])
            self.send_response(206)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if served.cut_short:
                served.cut_short -= 1
                body, self.close_connection = body[: len(body) // 2], True
            try:
                self.wfile.write(body)
            except OSError:  # its answer was not wanted any more
                self.close_connection = True

    with answering(Handler) as served.url:
        yield served


def copied(opened: HttpStore, name: str, offset: int = 0) -> bytes:
    text = bytearray(SIZE - offset)

    def write(position: int, piece: memoryview) -> None:
        text[position : position + len(piece)] = piece

    opened.copy(name, offset, SIZE - offset, write)
    return bytes(text)


def test_the_next_request_is_out_before_an_answer_ends(served: Served) -> None:
    """The store has it while the first piece of the answer before is being written."""
    opened = HttpStore(served.url)
    opened.expect("b", 0, SIZE)
    there = []
    opened.copy("a", 0, SIZE, lambda position, piece: there.append(served.seen["b"].wait(10)))
    assert there and all(there)
    assert copied(opened, "b") == CONTENTS["b"]
    assert sorted(served.asked) == ["a", "b"]
    opened.close()


def test_what_was_expected_in_vain_does_no_harm(served: Served) -> None:
    """Other bytes are asked for, or it is given up, or expected for now."""
    opened = HttpStore(served.url)
    opened.expect("b", 0, SIZE)
    assert copied(opened, "a") == CONTENTS["a"]
    assert copied(opened, "c") == CONTENTS["c"]
    opened.expect("d", 0, SIZE)
    assert copied(opened, "b", offset=5) == CONTENTS["b"][5:]
    opened.expect("d", 0, SIZE)
    assert copied(opened, "d") == CONTENTS["d"]
    opened.expect("a", 0, SIZE)
    assert copied(opened, "a") == CONTENTS["a"]
    assert (served.asked.count("a"), served.asked.count("d")) == (2, 1)
    opened.close()


@pytest.mark.parametrize("times", [1, 2, 3])
def test_answers_that_end_early_come_again(served: Served, times: int) -> None:
    """Also one that was asked for ahead; no piece is taken for another's."""
    opened = HttpStore(served.url)
    served.cut_short = times
    opened.expect("b", 0, SIZE)
    assert copied(opened, "a") == CONTENTS["a"]
    assert copied(opened, "b") == CONTENTS["b"]
    opened.close()


def test_a_store_that_never_answers_in_full_is_given_up(served: Served) -> None:
    opened = HttpStore(served.url)
    served.cut_short = 1000
    with pytest.raises(PoolError, match=r"/a: .*, 5 times in a row"):
        copied(opened, "a")
    opened.close()
