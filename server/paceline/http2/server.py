"""The server's side of a connection: streams that the client opens, within limits.

Invariant: what a client can make the server hold or do without paying for it is bounded: streams,
header bytes, resets, frames that carry nothing. What goes beyond ends the connection with
ENHANCE_YOUR_CALM, or the stream with REFUSED_STREAM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from paceline.http2 import frames
from paceline.http2.connection import Connection, ReadBuffer
from paceline.http2.frames import ErrorCode, ProtocolError, Setting
from paceline.http2.hpack import FORGET, Decoder, Header, HpackError, TooLarge
from paceline.http2.writer import Stream

_KEPT_BLOCKS = 256
_LONGEST_KEPT_BYTES = 1024
_NOTHING = memoryview(b"")

H = TypeVar("H")


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds on one client; see ARCHITECTURE.md. A window's rates are per `window_s`."""

    streams: int = 4096
    header_bytes: int = 16_384
    stream_window_bytes: int = 4 << 20
    frame_bytes: int = 1 << 20
    chores: int = 20_000
    resets: int = 2000
    """Where they are also more than half of the streams that were opened."""
    window_s: float = 10.0


class ServerStream(Stream):
    """A stream that a client opened."""

    __slots__ = ()

    def aborted(self) -> None:
        """The client has reset it, or is gone: nobody reads an answer any more."""
        raise NotImplementedError


class Serving(Generic[H]):
    """What a connection serves: `head` reads a request's headers (equal ones once; ValueError for
    malformed ones), `open_stream` makes the stream, `closed` is told of the connection's end."""

    __slots__ = ("closed", "head", "limits", "open_stream")

    def __init__(
        self,
        head: Callable[[list[Header]], H],
        open_stream: Callable[[ServerConnection[H], int, H], ServerStream],
        closed: Callable[[ServerConnection[H]], object],
        limits: ServerLimits,
    ) -> None:
        self.head: Final = head
        self.open_stream: Final = open_stream
        self.closed: Final = closed
        self.limits: Final = limits


class ServerConnection(Connection, Generic[H]):
    """One client."""

    def __init__(self, buffer: ReadBuffer, serving: Serving[H], *, refused: bool = False) -> None:
        limits = serving.limits
        settings = {
            Setting.MAX_CONCURRENT_STREAMS: limits.streams,
            Setting.INITIAL_WINDOW_SIZE: limits.stream_window_bytes,
            Setting.MAX_FRAME_SIZE: limits.frame_bytes,
            Setting.MAX_HEADER_LIST_SIZE: limits.header_bytes,
        }
        super().__init__(buffer, expects=frames.PREFACE, settings=frames.settings(settings))
        self._serving = serving
        self._limits = limits
        self._takes_frame_bytes = limits.frame_bytes
        self._takes_header_bytes = limits.header_bytes
        self._decoder = Decoder(max_list_bytes=limits.header_bytes)
        self._heads: dict[bytes, H] = {}
        self._heads_of = 0
        self._last_stream = 0
        self._window_began_s = 0.0
        self._first_of_window = 0
        self._resets = self._chores = 0
        self._forget_table = FORGET
        self._going = False
        self._refused = refused
        self.lost = asyncio.Event()
        self.quiet_checks = self.stuck_checks = 0
        """For the keeper of connections: checks since something was heard, sent of what waits."""

    @property
    def peer(self) -> str:
        """The client's address, as gRPC writes it."""
        found = self._transport.get_extra_info("peername") if self._transport else None
        if not isinstance(found, tuple):
            return "unknown:"
        host, port = found[:2]
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

    @property
    def peer_window(self) -> int:
        """What may be sent on a new stream."""
        return self._stream_window

    @property
    def stream_credit(self) -> int:
        """What the client may send on a new stream."""
        return self._limits.stream_window_bytes

    @property
    def open_streams(self) -> list[Stream]:
        """Streams that have not ended."""
        return list(self._streams.values())

    @property
    def alone(self) -> bool:
        """Whether the client has just one call open."""
        return len(self._streams) == 1

    @property
    def stuck(self) -> bool:
        """Whether the client lets nothing through of what waits for it."""
        return self._paused or bool(self._blocked)

    @property
    def greeted(self) -> bool:
        """Whether the client has begun as HTTP/2 does."""
        return self._greeted

    def headers(self, stream: int, block: bytes, *, ends: bool = False) -> bytes:
        """Frames of a header block; the connection's first one gives the dynamic table up."""
        if self._forget_table:
            block, self._forget_table = self._forget_table + block, b""
        return frames.headers(stream, block, frames.END_STREAM if ends else 0)

    def stream_ended(self, stream: Stream) -> None:
        """The answer is written. A client that still sends is told to stop."""
        self.forget(stream)
        if not stream.remote_closed:
            self.write(frames.reset(stream.id, ErrorCode.NO_ERROR))
        if self._going and not self._streams:
            self._close()

    def go_away(self) -> None:
        """Take no further streams; close when those that are open have ended."""
        if self._going:
            return
        self._going = True
        self.write(frames.goaway(self._last_stream, ErrorCode.NO_ERROR))
        if not self._streams:
            self._close()

    def ping(self) -> None:
        """Ask whether the client is still there; any answer counts."""
        self.write(frames.header(frames.PING, 0, 0, 8) + b"paceline")

    def abort(self) -> None:
        """Drop the connection now."""
        self.over = True
        if self._transport is not None:
            self._transport.abort()

    def _close(self) -> None:
        self.flush()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `Connection`; one connection too many is closed at once."""
        super().connection_made(transport)
        if self._refused:
            self.write(frames.goaway(0, ErrorCode.ENHANCE_YOUR_CALM, "too many connections"))
            self._close()

    # -- what comes in ----------------------------------------------------------------------

    def on_block(self, stream: int, ends: bool, block: bytes) -> None:
        """A request's headers, or its trailers."""
        if not stream & 1:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a client's streams are odd")
        if stream <= self._last_stream:
            if self._decoded(stream, block) is not None:
                self._trailers(stream, ends)
            return
        head = self._heads.get(block) if self._heads_of == self._decoder.changes else None
        if head is None:
            head = self._new_head(stream, block)
        if self._going:
            # Above what GOAWAY named: the client knows that it was not looked at.
            return
        self._last_stream = stream
        if head is None:
            return
        if len(self._streams) >= self._limits.streams:
            self.write(frames.reset(stream, ErrorCode.REFUSED_STREAM))
            return
        opened = self._serving.open_stream(self, stream, head)
        self._streams[stream] = opened
        opened.remote_closed = ends
        opened.received(_NOTHING, ends)

    def _decoded(self, stream: int, block: bytes) -> list[Header] | None:
        """A block's headers; None where they are too many, and the stream is reset for it."""
        try:
            return self._decoder.decode(block)
        except TooLarge:
            self._stream_error(stream, ErrorCode.ENHANCE_YOUR_CALM)
        except HpackError as error:
            raise ProtocolError(ErrorCode.COMPRESSION_ERROR, str(error)) from None
        return None

    def _new_head(self, stream: int, block: bytes) -> H | None:
        """Headers that were not seen before; None where the stream is reset for them."""
        before = self._decoder.changes
        headers = self._decoded(stream, block)
        if headers is None:
            return None
        try:
            head = self._serving.head(headers)
        except ValueError:
            self._stream_error(stream, ErrorCode.PROTOCOL_ERROR)
            return None
        if self._heads_of != self._decoder.changes or len(self._heads) >= _KEPT_BLOCKS:
            self._heads.clear()
            self._heads_of = self._decoder.changes
        # A block that adds to the table has to be read every time.
        if before == self._decoder.changes and len(block) <= _LONGEST_KEPT_BYTES:
            self._heads[block] = head
        return head

    def _trailers(self, stream: int, ends: bool) -> None:
        opened = self._streams.get(stream)
        if opened is None:
            # Of a stream that was reset while they were on their way.
            return
        if opened.remote_closed:
            self._stream_error(stream, ErrorCode.STREAM_CLOSED)
        elif not ends:
            self._stream_error(stream, ErrorCode.PROTOCOL_ERROR)
        else:
            opened.remote_closed = True
            opened.received(_NOTHING, True)

    def on_reset(self, stream: int, code: int, *, by_peer: bool) -> None:
        """The client takes a request back."""
        if by_peer:
            self.on_idle_data(stream)
            # Rapid reset (CVE-2023-44487): to begin and take back costs the client nothing.
            self._count_window()
            self._resets += 1
            opened_lately = (self._last_stream - self._first_of_window) // 2
            if self._resets > self._limits.resets and self._resets * 2 > opened_lately:
                raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, "too many streams are reset")
        opened = self._streams.get(stream)
        if opened is not None:
            self.forget(opened)
            assert isinstance(opened, ServerStream)
            opened.aborted()
            if self._going and not self._streams:
                self._close()

    def on_idle_data(self, stream: int) -> None:
        """Frames for streams that have ended were on their way; others make no sense."""
        if not stream or stream > self._last_stream:
            if self._going:
                return
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"stream {stream} is not open")

    def on_chore(self) -> None:
        """Frames that carry nothing make the server work, and answer."""
        self._count_window()
        self._chores += 1
        # A client that does not read the answers must not fill the memory with them.
        if self._chores > (self._limits.chores // 10 if self._paused else self._limits.chores):
            raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that carry nothing")

    def on_error(self, error: ProtocolError) -> None:
        """Say why, and close."""
        if self._greeted or not self._expects:
            self.write(frames.goaway(self._last_stream, error.code, str(error)))
        self._end_streams()
        self._close()

    def on_lost(self, error: Exception | None) -> None:
        """Whoever works for this client stops."""
        self._end_streams()
        self.lost.set()
        self._serving.closed(self)

    def _end_streams(self) -> None:
        for stream in list(self._streams.values()):
            self.forget(stream)
            assert isinstance(stream, ServerStream)
            stream.aborted()

    def _count_window(self) -> None:
        now_s = self._loop.time()
        if now_s - self._window_began_s > self._limits.window_s:
            self._window_began_s, self._first_of_window = now_s, self._last_stream
            self._resets = self._chores = 0
