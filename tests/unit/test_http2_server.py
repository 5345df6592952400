"""The gRPC server at the level of frames: bytes in, bytes out, without a socket."""

from __future__ import annotations

import asyncio
import gzip
import struct
import zlib
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from tests.http2_peer import (
    CONTINUATION,
    DATA,
    GOAWAY,
    HEADERS,
    PING,
    PRIORITY,
    PUSH,
    RST,
    SETTINGS,
    WINDOW,
    Client,
    Frame,
    call,
    frame,
    message,
    only,
    request_block,
    settings,
    word,
)

from paceline.core.tensor import Buffer
from paceline.http2 import frames, hpack
from paceline.http2.frames import ErrorCode
from paceline.http2.server import ServerLimits
from paceline.rpc.call import UnaryCall
from paceline.rpc.listener import GrpcServer
from paceline.rpc.status import Status

LIMITS = ServerLimits(streams=4, stream_window_bytes=100_000, frame_bytes=50_000, resets=10)
MAX_MESSAGE_BYTES = 1_000_000
HEADERS_OF_ANSWER = {":status": "200", "content-type": "application/grpc"}


class Service:
    """`/t/Echo` answers at once; `/t/Wait` when the test does; `/t/Big` with as much as asked."""

    def __init__(self, limits: ServerLimits = LIMITS, max_held_bytes: int = 1 << 30) -> None:
        self.server = GrpcServer(
            max_message_bytes=MAX_MESSAGE_BYTES, max_held_bytes=max_held_bytes, limits=limits
        )
        self.waiting: list[UnaryCall] = []
        self.cancelled: list[UnaryCall] = []
        self.one_cancelled = asyncio.Event()
        self.seen: list[UnaryCall] = []
        self.server.add_unary("/t/Echo", self._echo)
        self.server.add_unary("/t/Wait", self._wait)
        self.server.add_unary("/t/Big", lambda call, data: call.answer([bytes(int(data))]))

    def _echo(self, call: UnaryCall, data: Buffer) -> None:
        self.seen.append(call)
        call.answer([data])

    def _wait(self, call: UnaryCall, data: Buffer) -> None:
        def on_cancel() -> None:
            self.cancelled.append(call)
            self.one_cancelled.set()

        self.waiting.append(call)
        call.on_cancel = on_cancel


@pytest.fixture
async def service() -> Service:
    return Service()


def goaway(found: list[Frame]) -> tuple[int, int]:
    """Last stream and code of the one GOAWAY."""
    (one,) = only(found, GOAWAY)
    return struct.unpack(">II", one.payload[:8])


def reset_codes(found: list[Frame]) -> dict[int, int]:
    return {one.stream: int.from_bytes(one.payload, "big") for one in only(found, RST)}


async def test_the_server_greets_with_its_limits_and_acknowledges_the_clients(
    service: Service,
) -> None:
    client = Client(service.server)
    first, second = client.greeted
    assert first.kind == SETTINGS and first.flags == 0
    assert dict(struct.iter_unpack(">HI", first.payload)) == {
        3: LIMITS.streams,
        4: LIMITS.stream_window_bytes,
        5: LIMITS.frame_bytes,
        6: LIMITS.header_bytes,
    }
    assert (second.kind, second.stream) == (WINDOW, 0)
    assert client.take() == [Frame(SETTINGS, 1, 0, b"")]


async def test_a_call_is_answered_with_headers_a_message_and_trailers(service: Service) -> None:
    client = Client(service.server)
    client.take()
    client.send(call(1, b"abc"))
    headers, data, trailers = client.take()
    assert (headers.kind, headers.flags, headers.stream) == (HEADERS, 0x4, 1)
    assert client.decoder.decode(headers.payload) == [
        (":status", "200"),
        ("content-type", "application/grpc"),
    ]
    assert data == Frame(DATA, 0, 1, message(b"abc"))
    assert (trailers.kind, trailers.flags) == (HEADERS, 0x5)
    assert client.decoder.decode(trailers.payload) == [("grpc-status", "0")]


@pytest.mark.parametrize("step", [1, 2, 5, 9, 10, 64, 1000])
async def test_frames_may_come_in_pieces_of_any_size_padded_and_continued(
    service: Service, step: int
) -> None:
    block = request_block()
    body = message(b"0123456789")
    stream = b"".join(
        (
            frames.PREFACE,
            settings((0x99, 7)),
            frame(0x77, 0xFF, 9, b"an unknown kind of frame"),
            frame(PRIORITY, 0, 5, bytes(5)),
            frame(HEADERS, 0x28, 1, b"\x03" + bytes(5) + block[:7] + bytes(3)),
            frame(CONTINUATION, 0, 1, block[7:20]),
            frame(CONTINUATION, 0, 1),
            frame(CONTINUATION, 0x4, 1, block[20:]),
            frame(DATA, 0x8, 1, b"\x04" + body[:3] + bytes(4)),
            frame(DATA, 0, 1),
            frame(DATA, 0, 1, body[3:9]),
            frame(DATA, 0x8, 1, b"\x01" + bytes(1)),
            frame(PING, 0, 0, b"12345678"),
            frame(DATA, 0x8 | 0x1, 1, b"\x00" + body[9:]),
            call(3, b"next"),
        )
    )
    client = Client(service.server, greeting=b"")
    client.send(stream, step)
    found = client.take()
    assert Frame(PING, 1, 0, b"12345678") in found
    assert [one.payload for one in only(found, DATA)] == [body, message(b"next")]
    assert not client.wire.closed


async def test_equal_header_blocks_are_read_once_but_only_while_they_mean_the_same(
    service: Service,
) -> None:
    client = Client(service.server)
    indexed = [(":method", "POST"), (":scheme", "http"), ("content-type", "application/grpc")]
    path = b"\x44\x07/t/Echo"  # remembered: entry 62
    other = b"\x44\x06/t/Nix"  # from now on the former is entry 63
    known = hpack.encode(indexed) + b"\xbe"
    with_path = hpack.encode(indexed[:2]) + path + hpack.encode(indexed[2:])
    body = frame(DATA, 1, 1, message(b"x"))

    def send(stream: int, block: bytes) -> None:
        client.send(frame(HEADERS, 4, stream, block))
        client.send(body[:5] + word(stream) + body[9:])

    send(1, with_path)
    # Pseudo-headers have to be in front.
    known = hpack.encode(indexed[:2]) + b"\xbe" + hpack.encode(indexed[2:])
    send(3, known)
    send(5, known)
    assert service.seen[1].head is service.seen[2].head
    assert service.seen[1].head.path == "/t/Echo"
    send(7, with_path)  # adds to the table again: entry 62 once more, 63 the old one
    send(9, hpack.encode(indexed[:2]) + other + hpack.encode(indexed[2:]))
    send(11, known)  # is /t/Nix now
    answers = client.answers()
    statuses = {
        stream: headers["grpc-status"] for stream, (_, headers) in answers.items() if stream
    }
    assert statuses == {1: "0", 3: "0", 5: "0", 7: "0", 9: "12", 11: "12"}


async def test_metadata_and_deadline_reach_the_handler(service: Service) -> None:
    client = Client(service.server)
    more = (("x-a", "1"), ("y-bin", "AP8"), ("y-bin", "AQ==,Ag"), ("grpc-timeout", "5S"))
    client.send(call(1, b"", "/t/Wait", *more))
    (waiting,) = service.waiting
    assert waiting.head.metadata == (
        ("x-a", "1"),
        ("y-bin", b"\x00\xff"),
        ("y-bin", b"\x01"),
        ("y-bin", b"\x02"),
    )
    remaining_s = waiting.time_remaining()
    assert remaining_s is not None and 4 < remaining_s <= 5
    assert waiting.peer == "ipv4:127.0.0.1:1234"


async def test_a_deadline_ends_the_call_and_its_work(service: Service) -> None:
    client = Client(service.server)
    client.send(call(1, b"", "/t/Wait", ("grpc-timeout", "1m")))
    await service.one_cancelled.wait()
    _, headers = client.answers()[1]
    assert headers["grpc-status"] == "4"
    service.waiting[0].answer([b"late"])
    assert client.take() == []


async def test_refusals_are_trailers_only_with_encoded_message_and_metadata(
    service: Service,
) -> None:
    client = Client(service.server)
    client.send(call(1, b"", "/t/Wait"))
    client.take()
    details = "100 % of 'ä'\n"
    metadata = (("why", "because"), ("data-bin", b"\x00\xff"))
    service.waiting[0].refuse(Status(grpc.StatusCode.NOT_FOUND, details, metadata))
    (only_frame,) = client.take()
    assert (only_frame.kind, only_frame.flags) == (HEADERS, 0x5)
    assert client.decoder.decode(only_frame.payload) == [
        (":status", "200"),
        ("content-type", "application/grpc"),
        ("grpc-status", "5"),
        ("grpc-message", "100 %25 of '%C3%A4'%0A"),
        ("why", "because"),
        ("data-bin", "AP8"),
    ]


async def test_bugs_of_handlers_and_metadata_that_cannot_be_sent_end_only_their_call(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client(service.server)
    client.send(call(1, b"no number", "/t/Big") + call(3, b"", "/t/Wait"))
    assert client.answers()[1][1]["grpc-status"] == "13"
    service.waiting[0].answer([b"x"], (("näme", "1"),))
    assert client.answers()[3] == (message(b"x"), {**HEADERS_OF_ANSWER, "grpc-status": "0"})
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


@pytest.mark.parametrize(
    ("path", "more", "status"),
    [
        ("/t/Nothing", (), "12"),
        ("/t/Echo", (("grpc-encoding", "snappy"),), "12"),
    ],
)
async def test_what_is_not_served_is_unimplemented_and_names_the_encodings_that_are(
    service: Service, path: str, more: Any, status: str
) -> None:
    client = Client(service.server)
    client.send(frame(HEADERS, 0x4, 1, request_block(path, *more)))
    found = client.take()
    # The client has not ended its side: it is told that it need not.
    assert reset_codes(found) == {1: ErrorCode.NO_ERROR}
    headers = dict(client.decoder.decode(only(found, HEADERS)[0].payload))
    assert headers["grpc-status"] == status
    assert headers["grpc-accept-encoding"] == "identity,deflate,gzip"
    client.send(frame(DATA, 0x1, 1, message(b"on its way")))
    assert client.take() == [] and not client.wire.closed


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({":method": "GET"}, "405"),
        ({"content-type": "text/html"}, "415"),
        ({"content-type": "application/grpc-web"}, "415"),
    ],
)
async def test_what_is_no_grpc_gets_an_http_status(
    service: Service, headers: dict[str, str], status: str
) -> None:
    client = Client(service.server)
    asked = dict(hpack.Decoder().decode(request_block())) | headers
    client.send(frame(HEADERS, 0x5, 1, hpack.encode(asked.items())))
    assert client.answers()[1] == (b"", {":status": status})


COMPRESSED = {
    "gzip": gzip.compress(b"plain" * 100),
    "deflate": zlib.compress(b"plain" * 100),
}


@pytest.mark.parametrize("encoding", COMPRESSED)
async def test_compressed_messages_are_read(service: Service, encoding: str) -> None:
    client = Client(service.server)
    client.send(frame(HEADERS, 0x4, 1, request_block("/t/Echo", ("grpc-encoding", encoding))))
    client.send(frame(DATA, 0x1, 1, message(COMPRESSED[encoding], flag=1)))
    assert client.answers()[1][0] == message(b"plain" * 100)


@pytest.mark.parametrize(
    ("encoding", "data", "status"),
    [
        ("identity", message(b"x", flag=1), "13"),
        ("gzip", message(b"no gzip", flag=1), "13"),
        ("gzip", message(COMPRESSED["gzip"][:-4], flag=1), "13"),
        ("gzip", message(b"x", flag=2), "13"),
        ("gzip", message(gzip.compress(bytes(MAX_MESSAGE_BYTES + 1)), flag=1), "8"),
        ("identity", message(b"abc")[:-1], "13"),
        ("identity", message(b"abc")[:3], "13"),
        ("identity", message(b"a") + message(b"b"), "13"),
        ("identity", b"", "13"),
        ("identity", struct.pack(">BI", 0, MAX_MESSAGE_BYTES + 1), "8"),
    ],
)
async def test_messages_that_cannot_be_read_end_the_call_and_nothing_else(
    service: Service, encoding: str, data: bytes, status: str
) -> None:
    client = Client(service.server)
    client.send(frame(HEADERS, 0x4, 1, request_block("/t/Echo", ("grpc-encoding", encoding))))
    client.send(frame(DATA, 0x1, 1, data))
    client.send(call(3, b"fine"))
    answers = client.answers()
    assert answers[1][1]["grpc-status"] == status
    assert answers[3][0] == message(b"fine")


# Flow control


async def test_answers_keep_to_the_windows_of_stream_and_connection(service: Service) -> None:
    client = Client(service.server)
    client.send(settings((4, 1000)))
    client.take()
    client.send(call(1, b"3000", "/t/Big") + call(3, b"100", "/t/Big"))
    found = client.take()
    # The stream's window holds the first answer back, not the second.
    assert [(one.stream, len(one.payload)) for one in only(found, DATA)] == [(1, 1000), (3, 105)]
    client.send(frame(WINDOW, 0, 1, word(500)))
    assert [len(one.payload) for one in only(client.take(), DATA)] == [500]
    client.send(settings((4, 1500)))  # windows of open streams grow with it
    assert [len(one.payload) for one in only(client.take(), DATA)] == [500]
    client.send(settings((4, 100)))
    client.send(frame(WINDOW, 0, 1, word(1400)))
    assert only(client.take(), DATA) == []  # it was 1400 below zero
    client.send(frame(WINDOW, 0, 1, word(5000)))
    data, trailers = client.take()
    assert len(data.payload) == 3005 - 2000 and trailers.flags == 0x5


async def test_the_connections_window_is_shared_in_turns(service: Service) -> None:
    client = Client(service.server)
    client.send(settings((4, 1_000_000)))
    client.take()
    client.send(call(1, b"60000", "/t/Big") + call(3, b"60000", "/t/Big"))
    sent = sum(len(one.payload) for one in only(client.take(), DATA))
    assert sent == 65_535
    client.send(frame(WINDOW, 0, 0, word(1_000_000)))
    found = client.take()
    assert sum(len(one.payload) for one in only(found, DATA)) == 2 * 60_005 - 65_535
    assert [one.stream for one in only(found, HEADERS) if one.flags & 1] == [3]


async def test_frames_are_no_longer_than_the_client_takes(service: Service) -> None:
    client = Client(service.server)
    client.send(settings((4, 1_000_000), (5, 20_000)) + frame(WINDOW, 0, 0, word(1_000_000)))
    client.take()
    client.send(call(1, b"50000", "/t/Big"))
    sizes = [len(one.payload) for one in only(client.take(), DATA)]
    assert sizes == [20_000, 20_000, 10_005]


async def test_what_one_pass_answers_is_written_together_up_to_a_limit(service: Service) -> None:
    client = Client(service.server)
    room = 8_000_000
    client.send(settings((4, room), (5, room)) + frame(WINDOW, 0, 0, word(room)))
    client.take()
    client.wire.sizes.clear()
    client.send(b"".join(call(stream, b"1500000", "/t/Big") for stream in (1, 3, 5, 7)))
    # Three reach what is kept back, and the fourth goes when the pass ends.
    assert [size // 1_500_000 for size in client.wire.sizes] == [3, 1]
    assert [one.stream for one in only(client.take(), DATA)] == [1, 3, 5, 7]


async def test_a_slow_reader_holds_its_answers_back_until_the_socket_takes_more(
    service: Service,
) -> None:
    client = Client(service.server)
    client.take()
    client.connection.pause_writing()
    client.send(call(1, b"100", "/t/Big") + call(3, b"100", "/t/Big"))
    assert only(client.take(), DATA) == []
    client.connection.resume_writing()
    assert [one.stream for one in only(client.take(), DATA)] == [1, 3]


async def test_a_message_longer_than_the_window_gets_just_the_room_it_needs(
    service: Service,
) -> None:
    client = Client(service.server)
    client.take()
    body = message(bytes(range(256)) * 1000)
    client.send(frame(HEADERS, 0x4, 1, request_block()))
    client.send(frame(DATA, 0, 1, body[:40_000]))
    (update,) = client.take()
    assert update == Frame(WINDOW, 0, 1, word(len(body) - LIMITS.stream_window_bytes))
    for at in range(40_000, len(body), 50_000):
        last = at + 50_000 >= len(body)
        client.send(frame(DATA, int(last), 1, body[at : at + 50_000]), step=33_333)
    client.send(frame(WINDOW, 0, 0, word(1_000_000)) + frame(WINDOW, 0, 1, word(1_000_000)))
    assert client.answers()[1][0] == body


async def test_more_than_the_window_is_an_error_of_the_stream(service: Service) -> None:
    client = Client(service.server)
    client.take()
    client.send(frame(HEADERS, 0x4, 1, request_block()))
    for _ in range(3):
        client.send(frame(DATA, 0, 1, message(b"") * 8000))
    assert reset_codes(client.take())[1] == ErrorCode.FLOW_CONTROL_ERROR
    client.send(call(3, b"fine"))
    assert client.answers()[3][0] == message(b"fine")


async def test_the_memory_of_unfinished_requests_is_bounded_for_all_of_them_together() -> None:
    service = Service(max_held_bytes=250_000)
    clients = [Client(service.server) for _ in range(3)]
    for client in clients:
        client.send(frame(HEADERS, 0x4, 1, request_block()))
        client.send(frame(DATA, 0, 1, message(bytes(90_000))[:10]))
    first, second, third = clients
    assert third.answers()[1][1]["grpc-status"] == "8"
    for client in (first, second):
        client.send(frame(DATA, 0, 1, bytes(45_000)) + frame(DATA, 1, 1, bytes(44_995)))
        client.send(frame(WINDOW, 0, 0, word(1_000_000)) + frame(WINDOW, 0, 1, word(1_000_000)))
        assert len(client.answers()[1][0]) == 90_005
    assert service.server.held_bytes == 0


async def test_when_much_is_taken_announcing_large_messages_takes_nothing() -> None:
    service = Service(max_held_bytes=1_500_000)
    clients = [Client(service.server) for _ in range(10)]
    for size, client in zip([400_000] + [900_000] * 9, clients, strict=True):
        client.take()
        client.send(frame(HEADERS, 0x4, 1, request_block()))
        client.send(frame(DATA, 0, 1, message(bytes(size))[:1005]))
    assert all(only(client.take(), HEADERS) == [] for client in clients)
    assert service.server.held_bytes == 400_005 + 9 * 1005
    last = clients[-1]
    for at in range(1005, 900_005, 50_000):
        rest = bytes(min(50_000, 900_005 - at))
        last.send(frame(DATA, int(at + 50_000 >= 900_005), 1, rest), step=45_000)
    last.send(frame(WINDOW, 0, 0, word(1_000_000)) + frame(WINDOW, 0, 1, word(1_000_000)))
    assert last.answers()[1][0] == message(bytes(900_000))
    assert service.server.held_bytes == 400_005 + 8 * 1005


# Endings


async def test_a_client_that_resets_a_call_or_is_lost_cancels_its_work(service: Service) -> None:
    client = Client(service.server)
    client.send(call(1, b"", "/t/Wait") + call(3, b"", "/t/Wait"))
    client.take()
    client.send(frame(RST, 0, 1, word(ErrorCode.CANCEL)))
    assert service.cancelled == service.waiting[:1]
    client.lose()
    assert service.cancelled == service.waiting
    for waiting in service.waiting:
        waiting.answer([b"nobody reads this"])
    assert client.take() == []


async def test_a_stopping_server_answers_what_it_has_and_takes_nothing_new(
    service: Service,
) -> None:
    client = Client(service.server)
    idle = Client(service.server)
    client.send(call(1, b"", "/t/Wait"))
    client.take()
    stop = asyncio.ensure_future(service.server.stop(60))
    await asyncio.sleep(0)
    assert goaway(client.take()) == (1, ErrorCode.NO_ERROR)
    assert idle.wire.closed and not client.wire.closed
    client.send(call(3, b"too late"))
    assert client.take() == []
    service.waiting[0].answer([b"done"])
    assert client.answers()[1][0] == message(b"done")
    assert client.wire.closed
    for ended in (client, idle):
        ended.lose()
    await stop


async def test_calls_that_outlast_the_grace_period_are_unavailable(service: Service) -> None:
    client = Client(service.server)
    client.send(call(1, b"", "/t/Wait"))
    client.take()
    stop = asyncio.ensure_future(service.server.stop(0))
    await service.one_cancelled.wait()
    assert client.answers()[1][1]["grpc-status"] == "14"
    assert client.wire.closed
    client.lose()
    await stop


async def test_streams_above_the_limit_are_refused(service: Service) -> None:
    client = Client(service.server)
    client.take()
    for stream in range(1, 13, 2):
        client.send(call(stream, b"", "/t/Wait"))
    refused = reset_codes(client.take())
    assert refused == {9: ErrorCode.REFUSED_STREAM, 11: ErrorCode.REFUSED_STREAM}
    assert len(service.waiting) == LIMITS.streams


async def test_one_connection_too_many_is_told_so_and_closed() -> None:
    server = GrpcServer(max_message_bytes=100, max_connections=2)
    first, second = Client(server), Client(server)
    third = Client(server, greeting=b"")
    assert goaway(third.greeted)[1] == ErrorCode.ENHANCE_YOUR_CALM
    assert third.wire.closed and not (first.wire.closed or second.wire.closed)
    for client in (third, first):
        client.lose()
    assert not Client(server).wire.closed


async def test_clients_that_say_nothing_are_asked_and_then_dropped(service: Service) -> None:
    server = service.server
    quiet, alive = Client(server), Client(server)
    silent = Client(server, greeting=b"")
    server.check_connections()
    for client in (quiet, alive):
        client.take()
    server.check_connections()
    assert [one.kind for one in quiet.take()] == [PING]
    (ping,) = alive.take()
    alive.send(frame(PING, 0x1, 0, ping.payload))
    server.check_connections()
    assert quiet.wire.aborted and silent.wire.aborted and not alive.wire.aborted
    for client in (quiet, alive, silent):
        client.lose()
    await server.stop(None)


async def test_clients_that_take_nothing_of_what_waits_for_them_are_dropped(
    service: Service,
) -> None:
    server = service.server
    stuck, slow = Client(server), Client(server)
    for client in (stuck, slow):
        client.send(settings((4, 10)))
        client.send(call(1, b"1000", "/t/Big"))
    for _ in range(4):
        server.check_connections()
        stuck.send(frame(PING, 0, 0, bytes(8)))
        slow.send(frame(WINDOW, 0, 1, word(1)))
    assert stuck.wire.aborted and not slow.wire.aborted
    for client in (stuck, slow):
        client.lose()
    await server.stop(None)


# Peers that do not keep to the standard

HEADER = frame(HEADERS, 0x4, 1, request_block())
MALFORMED: dict[str, tuple[bytes, ErrorCode]] = {
    "DATA on an idle stream": (frame(DATA, 0, 1, b"x"), ErrorCode.PROTOCOL_ERROR),
    "DATA on stream 0": (frame(DATA, 0, 0, b"x"), ErrorCode.PROTOCOL_ERROR),
    "WINDOW_UPDATE of an idle stream": (frame(WINDOW, 0, 1, word(1)), ErrorCode.PROTOCOL_ERROR),
    "RST_STREAM of an idle stream": (frame(RST, 0, 1, word(8)), ErrorCode.PROTOCOL_ERROR),
    "RST_STREAM on stream 0": (frame(RST, 0, 0, word(8)), ErrorCode.PROTOCOL_ERROR),
    "RST_STREAM of 3 bytes": (HEADER + frame(RST, 0, 1, bytes(3)), ErrorCode.FRAME_SIZE_ERROR),
    "an even stream": (frame(HEADERS, 4, 2, request_block()), ErrorCode.PROTOCOL_ERROR),
    "HEADERS on stream 0": (frame(HEADERS, 4, 0, request_block()), ErrorCode.PROTOCOL_ERROR),
    "PUSH_PROMISE": (HEADER + frame(PUSH, 4, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "CONTINUATION of nothing": (frame(CONTINUATION, 4, 1, b""), ErrorCode.PROTOCOL_ERROR),
    "an interrupted header block": (
        frame(HEADERS, 0, 1, b"") + frame(PING, 0, 0, bytes(8)),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "DATA within a header block": (
        frame(HEADERS, 0, 1, b"") + frame(DATA, 0, 1, b""),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "another stream's CONTINUATION": (
        frame(HEADERS, 0, 1, b"") + frame(CONTINUATION, 4, 3, b""),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "more padding than DATA": (HEADER + frame(DATA, 8, 1, b"\x05abc"), ErrorCode.PROTOCOL_ERROR),
    "padding without a length": (HEADER + frame(DATA, 8, 1, b""), ErrorCode.FRAME_SIZE_ERROR),
    "more padding than HEADERS": (frame(HEADERS, 0xC, 1, b"\x05abc"), ErrorCode.PROTOCOL_ERROR),
    "too long a DATA": (
        HEADER + frame(DATA, 0, 1, bytes(LIMITS.frame_bytes + 1)),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "too long a PING": (frame(PING, 0, 0, bytes(9)), ErrorCode.FRAME_SIZE_ERROR),
    "PING on a stream": (frame(PING, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "SETTINGS on a stream": (frame(SETTINGS, 0, 1, b""), ErrorCode.PROTOCOL_ERROR),
    "SETTINGS of 5 bytes": (frame(SETTINGS, 0, 0, bytes(5)), ErrorCode.FRAME_SIZE_ERROR),
    "SETTINGS acknowledged with values": (
        frame(SETTINGS, 1, 0, bytes(6)),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "windows above 2 GiB": (settings((4, 2**31)), ErrorCode.FLOW_CONTROL_ERROR),
    "frames below 16 KiB": (settings((5, 1000)), ErrorCode.PROTOCOL_ERROR),
    "a strange ENABLE_PUSH": (settings((2, 2)), ErrorCode.PROTOCOL_ERROR),
    "a window that does not grow": (frame(WINDOW, 0, 0, word(0)), ErrorCode.PROTOCOL_ERROR),
    "a window that grows too far": (
        frame(WINDOW, 0, 0, word(2**31 - 1)),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "WINDOW_UPDATE of 5 bytes": (frame(WINDOW, 0, 0, bytes(5)), ErrorCode.FRAME_SIZE_ERROR),
    "an unreadable header block": (frame(HEADERS, 4, 1, b"\xbe"), ErrorCode.COMPRESSION_ERROR),
    "GOAWAY on a stream": (frame(GOAWAY, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "GOAWAY of 4 bytes": (frame(GOAWAY, 0, 0, bytes(4)), ErrorCode.FRAME_SIZE_ERROR),
    "too many header bytes in a frame": (
        frame(HEADERS, 0, 1, bytes(LIMITS.header_bytes + 1)),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "too many header bytes in CONTINUATIONs": (
        frame(HEADERS, 0, 1, b"") + frame(CONTINUATION, 0, 1, bytes(9000)) * 2,
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "endless empty CONTINUATIONs": (
        frame(HEADERS, 0, 1, b"") + frame(CONTINUATION, 0, 1, b"") * 100,
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("step", [None, 7])
async def test_a_peer_that_breaks_the_rules_is_told_which_and_dropped(
    service: Service, case: str, step: int | None
) -> None:
    data, code = MALFORMED[case]
    client = Client(service.server)
    client.send(data, step)
    assert goaway(client.take())[1] == code
    assert client.wire.closed


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nXX"])
async def test_other_protocols_are_dropped_without_a_word(
    service: Service, greeting: bytes
) -> None:
    client = Client(service.server, greeting=greeting)
    assert client.take() == [] and client.wire.closed


async def test_a_client_that_does_not_begin_with_settings_is_dropped(service: Service) -> None:
    client = Client(service.server, greeting=frames.PREFACE + frame(PING, 0, 0, bytes(8)))
    assert goaway(client.take())[1] == ErrorCode.PROTOCOL_ERROR


STREAM_ERRORS: dict[str, tuple[Callable[[], bytes], ErrorCode]] = {
    "DATA behind the end": (
        lambda: call(1, b"", "/t/Wait") + frame(DATA, 0, 1, b"x"),
        ErrorCode.STREAM_CLOSED,
    ),
    "HEADERS behind the end": (
        lambda: call(1, b"", "/t/Wait") + frame(HEADERS, 5, 1, request_block()),
        ErrorCode.STREAM_CLOSED,
    ),
    "trailers that do not end": (
        lambda: HEADER + frame(HEADERS, 4, 1, request_block()),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a window that does not grow": (
        lambda: call(1, b"", "/t/Wait") + frame(WINDOW, 0, 1, word(0)),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a window that grows too far": (
        lambda: call(1, b"", "/t/Wait") + frame(WINDOW, 0, 1, word(2**31 - 1)),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "no path": (
        lambda: frame(HEADERS, 5, 1, hpack.encode([(":method", "POST"), (":scheme", "http")])),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "an unknown pseudo-header": (
        lambda: frame(HEADERS, 5, 1, hpack.encode([(":odd", "")]) + request_block()),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a pseudo-header behind others": (
        lambda: frame(HEADERS, 5, 1, request_block() + hpack.encode([(":path", "/")])),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a name in capitals": (
        lambda: frame(HEADERS, 5, 1, request_block("/t/Echo", ("Name", ""))),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a header of connections": (
        lambda: frame(HEADERS, 5, 1, request_block("/t/Echo", ("connection", "close"))),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a timeout that is none": (
        lambda: frame(HEADERS, 5, 1, request_block("/t/Echo", ("grpc-timeout", "soon"))),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "binary metadata that is none": (
        lambda: frame(HEADERS, 5, 1, request_block("/t/Echo", ("a-bin", "!"))),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "headers that grow when they are read": (
        # 200 times a header of the table: 81 bytes of the list for one of the block.
        lambda: frame(HEADERS, 5, 1, b"\x40\x01a\x30" + b"x" * 48 + b"\xbe" * 210),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
}


@pytest.mark.parametrize("case", STREAM_ERRORS)
async def test_an_error_of_one_stream_resets_it_and_leaves_the_others(
    service: Service, case: str
) -> None:
    data, code = STREAM_ERRORS[case]
    client = Client(service.server)
    client.take()
    client.send(data())
    assert reset_codes(client.take()) == {1: code}
    assert service.cancelled == service.waiting
    client.send(call(3, b"fine"))
    assert client.answers()[3][0] == message(b"fine")


# Floods


async def test_rapid_resets_end_the_connection(service: Service) -> None:
    client = Client(service.server)
    client.take()
    for stream in range(1, 41, 2):
        client.send(call(stream, b"", "/t/Wait") + frame(RST, 0, stream, word(8)))
    assert goaway(client.take())[1] == ErrorCode.ENHANCE_YOUR_CALM
    assert len(service.waiting) == LIMITS.resets + 1
    assert service.cancelled == service.waiting


async def test_as_many_resets_among_many_calls_do_not(service: Service) -> None:
    client = Client(service.server)
    for stream in range(1, 301, 6):
        client.send(call(stream, b"", "/t/Wait") + frame(RST, 0, stream, word(8)))
        client.send(call(stream + 2, b"") + call(stream + 4, b""))
    assert len(service.cancelled) == 50
    assert not client.wire.closed


@pytest.mark.parametrize(
    "chore",
    [frame(PING, 0, 0, bytes(8)), settings(), frame(PRIORITY, 0, 1, bytes(5)), HEADER[:0]],
    ids=["PING", "SETTINGS", "PRIORITY", "empty DATA"],
)
async def test_floods_of_frames_that_carry_nothing_end_the_connection(chore: bytes) -> None:
    service = Service(ServerLimits(chores=50))
    client = Client(service.server)
    if not chore:
        client.send(HEADER)
        chore = frame(DATA, 0, 1, b"")
    client.send(chore * 40)
    assert not client.wire.closed
    client.send(chore * 20)
    assert goaway(client.take())[1] == ErrorCode.ENHANCE_YOUR_CALM


async def test_a_client_that_does_not_read_the_answers_may_ask_less(service: Service) -> None:
    service = Service(ServerLimits(chores=100))
    client = Client(service.server)
    client.connection.pause_writing()
    client.send(frame(PING, 0, 0, bytes(8)) * 15)
    assert goaway(client.take())[1] == ErrorCode.ENHANCE_YOUR_CALM
