"""HTTP/2 whatever the pieces it comes in, and header tables whatever their writer chooses."""

from __future__ import annotations

import asyncio
from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.http2_peer import (
    DATA,
    GOAWAY,
    HEADERS,
    PING,
    Client,
    call,
    frame,
    message,
    only,
    request_block,
)
from tests.http2_peer import settings as settings_frame

from paceline.http2 import frames, hpack
from paceline.http2.messages import Inbox
from paceline.http2.writer import data_frames
from paceline.rpc.listener import GrpcServer

TEXT = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=40)
HEADER = st.tuples(st.sampled_from(["a", "b-c", "content-type", "x" * 130]), TEXT)
LARGEST = 300_000


class Writer:
    """A header writer that remembers what it is told to, as the standard's encoder may."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.table: deque[hpack.Header] = deque()

    def write(self, header: hpack.Header, *, remember: bool) -> bytes:
        if header in self.table:
            # Small tables and few entries: an index above 62 + 64 takes a second byte.
            index = 62 + self.table.index(header)
            return bytes((0x80 | index,)) if index < 127 else bytes((0xFF, index - 127))
        literal = hpack.encode([header])
        if not remember:
            return literal
        self.table.appendleft(header)
        while sum(len(name) + len(value) + 32 for name, value in self.table) > self.limit_bytes:
            self.table.pop()
        return b"\x40" + literal[1:]


@given(
    st.lists(st.lists(st.tuples(HEADER, st.booleans()), max_size=8), max_size=8),
    st.sampled_from([0, 60, 200, 4096]),
)
def test_any_use_of_the_dynamic_table_is_read_back(
    blocks: list[list[tuple[hpack.Header, bool]]], limit_bytes: int
) -> None:
    writer, decoder = Writer(limit_bytes), hpack.Decoder(limit_bytes)
    for block in blocks:
        before = list(writer.table)
        changes = decoder.changes
        data = b"".join(writer.write(header, remember=told) for header, told in block)
        assert decoder.decode(data) == [header for header, _ in block]
        assert before == list(writer.table) or decoder.changes > changes


@given(
    st.lists(st.sampled_from([0, 1, 4, 5, 1000, 131_072, LARGEST]), max_size=6),
    st.lists(st.integers(1, 200_000), min_size=1, max_size=20),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_messages_are_whole_whatever_pieces_they_come_in(
    sizes: list[int], pieces: list[int], lazy: bool, direct: bool
) -> None:
    sent = [bytes([index % 251]) * size for index, size in enumerate(sizes)]
    stream = memoryview(b"".join(map(message, sent)))
    inbox = Inbox(LARGEST, lazy=lazy)
    # Not byte by byte to the end: that says nothing new, slowly.
    pieces = [*pieces, 50_000]
    turn = 0
    while stream:
        size = min(pieces[turn % len(pieces)], len(stream))
        turn += 1
        room = inbox.room(size) if direct else None
        if room is not None:
            room[:] = stream[: len(room)]
            inbox.filled(len(room))
            stream = stream[len(room) :]
        else:
            inbox.feed(stream[:size])
            stream = stream[size:]
    assert not inbox.partial
    got = [inbox.pop() for _ in range(len(inbox))]
    assert [(flag, bytes(data)) for flag, data in got] == [(0, data) for data in sent]
    assert inbox.unread_bytes == 0


@given(
    st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=6),
    st.integers(1, 40),
    st.sampled_from([0, frames.END_STREAM]),
)
def test_parts_of_any_size_make_frames_of_which_only_the_last_is_not_full(
    parts: list[bytes], most: int, flags: int
) -> None:
    size = sum(map(len, parts))
    chunks = data_frames(5, [memoryview(part) for part in parts], size, most, flags)
    sent, at, payload = b"".join(chunks), 0, b""
    while at < len(sent):
        high, low, kind, flagged, stream = frames.HEADER.unpack_from(sent, at)
        taken = high << 8 | low
        at += frames.HEADER_BYTES
        payload += sent[at : at + taken]
        at += taken
        last = len(payload) == size
        assert (kind, stream, flagged) == (frames.DATA, 5, flags if last else 0)
        assert taken == most or (last and 0 < taken < most)
    assert payload == b"".join(parts)


def test_a_connection_is_read_alike_wherever_it_is_cut() -> None:
    """Each byte boundary once; then the answers are compared with those to the whole."""
    block = request_block()
    stream = b"".join(
        (
            frames.PREFACE,
            settings_frame((4, 70_000)),
            frame(HEADERS, 0x8, 1, b"\x02" + block[:30] + bytes(2)),
            frame(9, 0x4, 1, block[30:]),
            frame(DATA, 0x8, 1, b"\x03" + message(b"ab")[:6] + bytes(3)),
            frame(PING, 0, 0, b"12345678"),
            frame(DATA, 0x1, 1, message(b"ab")[6:]),
            call(3, b"c"),
        )
    )

    async def run() -> None:
        server = GrpcServer(max_message_bytes=100)
        server.add_unary("/t/Echo", lambda call, data: call.answer([data]))
        expected = None
        for cut in range(len(stream)):
            client = Client(server, greeting=b"")
            client.send(stream[:cut])
            client.send(stream[cut:])
            found = client.take()
            assert [one.payload for one in only(found, DATA)] == [message(b"ab"), message(b"c")]
            expected = expected or found
            assert found == expected
            client.lose()

    asyncio.run(run())


BLOCKS = [request_block(), request_block("/t/Nix"), b"\x44\x07/t/Echo", b"\xbe", b"", b"\x3f\x00"]
PAYLOADS = st.one_of(
    st.binary(max_size=40), st.sampled_from([*BLOCKS, message(b"abc"), bytes(4), bytes(8)])
)
FRAMES = st.builds(
    frame,
    st.integers(0, 10),
    st.sampled_from([0, 1, 4, 5, 8, 9, 0xC, 0x24, 0x2D, 0xFF]),
    st.sampled_from([0, 1, 3, 5, 2, 7]),
    PAYLOADS,
)


@given(st.lists(FRAMES, max_size=25), st.integers(1, 60))
@settings(max_examples=300, deadline=None)
def test_whatever_a_client_sends_it_is_served_on_or_told_why_not(
    sent: list[bytes], step: int
) -> None:
    async def run() -> None:
        server = GrpcServer(max_message_bytes=30)
        server.add_unary("/t/Echo", lambda call, data: call.answer([data]))
        client = Client(server)
        client.take()
        client.send(b"".join(sent), step)
        ping = frame(PING, 0, 0, b"are you?")
        client.send(ping)
        found = client.take()
        if client.wire.closed:
            assert found[-1].kind == GOAWAY
        else:
            # It may stand in the middle of a frame or a header block; nothing was closed.
            assert all(one.kind != GOAWAY for one in found)
        client.lose()
        assert server.held_bytes == 0
        await server.stop(None)

    asyncio.run(run())


def test_of_many_small_messages_only_the_first_are_taken_apart_ahead() -> None:
    inbox = Inbox(100)
    inbox.feed(memoryview(message(b"x") * 500))
    inbox.feed(memoryview(message(b"y")))
    assert len(inbox) == 64
    got = []
    while len(inbox):
        got.append(inbox.pop())
    assert got == [(0, b"x")] * 500 + [(0, b"y")]
    assert inbox.unread_bytes == 0
