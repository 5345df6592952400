"""The other end of an HTTP/2 connection, byte by byte: frames to send, and to find in what came."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from paceline.http2 import frames, hpack
from paceline.http2.connection import Connection
from paceline.rpc.listener import GrpcServer

DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
REQUEST = (
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/t/Echo"),
    (":authority", "here"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
)


class Frame(NamedTuple):
    """One frame as it came."""

    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame to send, valid or not."""
    size = struct.pack(">I", len(payload))[1:]
    return size + struct.pack(">BBI", kind, flags, stream) + payload


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def word(number: int) -> bytes:
    return struct.pack(">I", number)


def message(data: bytes, flag: int = 0) -> bytes:
    """A gRPC message as it stands in DATA."""
    return struct.pack(">BI", flag, len(data)) + data


def request_block(path: str = "/t/Echo", *more: tuple[str, str]) -> bytes:
    headers = [(name, path if name == ":path" else value) for name, value in REQUEST]
    return hpack.encode([*headers, *more])


def call(stream: int, data: bytes, path: str = "/t/Echo", *more: tuple[str, str]) -> bytes:
    """A whole unary call."""
    block = request_block(path, *more)
    return frame(HEADERS, 0x4, stream, block) + frame(DATA, 0x1, stream, message(data))


class Wire(asyncio.Transport):
    """A transport that keeps what is written, and how much each time."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.sizes: list[int] = []
        self.closed = self.aborted = False

    def write(self, data: Any) -> None:
        self.writelines([data])

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        before = len(self.written)
        for data in list_of_data:
            self.written += data
        self.sizes.append(len(self.written) - before)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1234) if name == "peername" else default

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True


class Client:
    """A client of `server` that says `settings` first, unless told to say nothing."""

    def __init__(self, server: GrpcServer, greeting: bytes | None = None) -> None:
        self.wire = Wire()
        self.connection: Connection = server.new_connection()
        self.connection.connection_made(self.wire)
        self.decoder = hpack.Decoder()
        self.greeted = self.take()
        if greeting is None:
            greeting = frames.PREFACE + settings()
        if greeting:
            self.send(greeting)

    def send(self, data: bytes, step: int | None = None) -> None:
        """As if it came from a socket, in pieces of `step` bytes."""
        while data and not self.wire.closed:
            view = self.connection.get_buffer(-1)
            taken = min(len(view), len(data), step or len(data))
            view[:taken] = data[:taken]
            self.connection.buffer_updated(taken)
            data = data[taken:]

    def lose(self) -> None:
        """The connection breaks."""
        self.connection.connection_lost(None)

    def take(self) -> list[Frame]:
        """The frames that the server has written since the last time."""
        self.connection.flush()
        found = []
        data = bytes(self.wire.written)
        while data:
            size = int.from_bytes(data[:3], "big")
            kind, flags, stream = struct.unpack_from(">BBI", data, 3)
            found.append(Frame(kind, flags, stream, data[9 : 9 + size]))
            assert len(data) >= 9 + size
            data = data[9 + size :]
        self.wire.written.clear()
        return found

    def answers(self) -> dict[int, tuple[bytes, dict[str, str]]]:
        """DATA and headers (trailers among them) by stream."""
        found: dict[int, tuple[bytes, dict[str, str]]] = {}
        for one in self.take():
            data, headers = found.get(one.stream, (b"", {}))
            if one.kind == DATA:
                found[one.stream] = (data + one.payload, headers)
            elif one.kind == HEADERS:
                found[one.stream] = (data, headers | dict(self.decoder.decode(one.payload)))
        return found


Check = Callable[[Frame], bool]


def only(found: Iterable[Frame], kind: int) -> list[Frame]:
    return [one for one in found if one.kind == kind]
