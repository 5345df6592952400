"""One HTTP/2 connection, whichever side: frames in and out, flow control in both directions.

Invariants: nothing is sent beyond the peer's windows; what the peer sent is seen by its stream in
order, before anything that came later; a peer that breaks the rules ends its connection (GOAWAY
with the reason), or its stream where the standard says so, and nothing else.

The socket reads into one buffer per event loop, so streams copy what they keep; a large payload
goes where its stream wants it (`Stream.room`), without the buffer. Sending is in `writer`.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import cast

from paceline.http2 import frames
from paceline.http2.frames import ErrorCode, ProtocolError, Setting
from paceline.http2.writer import Stream, Writer

BUFFER_BYTES = 1 << 16
"""What has been read here is copied. Small messages come to less in a pass of the event loop."""
_DIRECT_BYTES = 1 << 15
"""A payload of which so much is missing is read straight to its place."""
_RENEW_WINDOW_BYTES = 1 << 26
_HIGH_WATER_BYTES = 1 << 20
_USER_TIMEOUT_MS = 20_000
_EMPTY = memoryview(b"")
_HEADERS_FLAGS = frames.END_HEADERS | frames.PADDED | frames.PRIORITIZED


class Plug(asyncio.BufferedProtocol):
    """A connection as an event loop wants it: with asyncio's base class, which a compiled class
    cannot have. The connection's own methods are called."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        for name in (
            *("connection_made", "connection_lost", "eof_received", "get_buffer"),
            *("buffer_updated", "pause_writing", "resume_writing"),
        ):
            setattr(self, name, getattr(connection, name))


class ReadBuffer:
    """What the connections of one event loop read into, one at a time."""

    __slots__ = ("data", "view")

    def __init__(self) -> None:
        self.data = bytearray(BUFFER_BYTES)
        self.view = memoryview(self.data)


class Connection(Writer):
    """See the module docstring. Sides override the `on_` methods."""

    def __init__(self, buffer: ReadBuffer, *, expects: bytes, settings: bytes) -> None:
        super().__init__()
        self._buffer = buffer
        self._expects = expects
        self._settings = settings
        self._stream_credit = frames.FIRST_WINDOW
        self._takes_frame_bytes = frames.LEAST_FRAME_BYTES
        self._takes_header_bytes = 1 << 16
        self._consumed = 0
        self._greeted = False
        # Reading: the begin of a frame, a payload of DATA that is not all there, a header block.
        self._rest = b""
        self._data_stream: Stream | None = None
        self._data_left = self._data_padding = 0
        self._data_ends = False
        self._direct = False
        self._block: tuple[int, int, list[bytes]] | None = None
        self.heard = False
        """Set when something has been read."""
        self.over = False
        """Whether nothing that is read matters any more."""

    # -- for the sides ----------------------------------------------------------------------

    def on_block(self, stream: int, ends: bool, block: bytes) -> None:
        """A header block has come."""
        raise NotImplementedError

    def on_reset(self, stream: int, code: int, *, by_peer: bool) -> None:
        """RST_STREAM has come, or will be sent for what the peer did."""
        raise NotImplementedError

    def on_goaway(self, last_stream: int) -> None:
        """GOAWAY has come."""

    def on_error(self, error: ProtocolError) -> None:
        """The peer broke the rules; the connection is closed."""
        raise NotImplementedError

    def on_lost(self, error: Exception | None) -> None:
        """There is no connection any more."""
        raise NotImplementedError

    def on_idle_data(self, stream: int) -> None:
        """DATA or WINDOW_UPDATE on a stream that is not open."""

    def on_peer_streams(self, limit: int) -> None:
        """How many streams the peer allows at once."""

    def on_chore(self) -> None:
        """A frame has come that carries nothing: PING, SETTINGS, an empty DATA and the like."""

    # -- the connection ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The side's SETTINGS go first."""
        # uvloop's transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(_HIGH_WATER_BYTES)
        plug = transport.get_extra_info("socket")
        if plug is not None:
            with suppress(OSError):
                plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # A machine that vanished is noticed by what it does not acknowledge.
                plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
                plug.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20)
        more = frames.MAX_WINDOW - frames.FIRST_WINDOW
        self._transport.write(self._settings + frames.window_update(0, more))

    def connection_lost(self, exc: Exception | None) -> None:
        """Every stream ends."""
        self.over = True
        self._transport = None
        self._blocked.clear()
        self._out.clear()
        self.on_lost(exc)

    def eof_received(self) -> bool:
        """A peer that sends no more is gone."""
        return False

    # -- reading ----------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to read to: the stream's own memory in a long payload, else the shared buffer."""
        if self._data_left >= _DIRECT_BYTES and self._data_stream is not None:
            room = self._data_stream.room(self._data_left)
            if room is not None and len(room) >= _DIRECT_BYTES:
                self._direct = True
                return room
        self._direct = False
        rest = self._rest
        if not rest:
            return self._buffer.view
        self._buffer.view[: len(rest)] = rest
        return self._buffer.view[len(rest) :]

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes have been read to where `get_buffer` said."""
        if self.over:
            return
        self.heard = self._collecting = True
        try:
            if self._direct:
                self._direct = False
                stream = self._data_stream
                assert stream is not None
                self._data_left -= nbytes
                stream.filled(nbytes)
                if not self._data_left:
                    self._end_data()
                return
            end = len(self._rest) + nbytes
            self._rest = b""
            self._read(end)
        except ProtocolError as error:
            self._broken(error)
        finally:
            self._collecting = False
            self.flush()

    def _broken(self, error: ProtocolError) -> None:
        self.over = True
        self.on_error(error)

    def _read(self, end: int) -> None:
        """Take in `end` bytes of the buffer; what is no whole frame yet stays in `_rest`."""
        data, view = self._buffer.data, self._buffer.view
        at = self._greet(end) if self._expects else 0
        while at < end and not self.over:
            if self._data_left or self._data_padding:
                at = self._more_data(at, end)
                continue
            if end - at < frames.HEADER_BYTES:
                break
            high, low, kind, flags, stream = frames.HEADER.unpack_from(data, at)
            size = high << 8 | low
            stream &= frames.MAX_WINDOW
            begin = at + frames.HEADER_BYTES
            plain = self._greeted and self._block is None
            if plain and not kind and not flags & frames.PADDED:
                # DATA
                if size > self._takes_frame_bytes:
                    self._too_long(kind, size)
                ends = bool(flags & frames.END_STREAM)
                open_ = self._begin_data(stream, size, ends)
                if end - begin >= size:
                    at = begin + size
                    if open_ is not None:
                        if ends:
                            open_.remote_closed = True
                        open_.received(view[begin:at], ends)
                else:
                    at = begin
                    self._data_stream, self._data_left = open_, size
                    self._data_ends = ends
                continue
            if plain and end - begin >= size:
                # The two that come with every message, of the many that `_frame` knows.
                if (
                    kind == frames.HEADERS
                    and flags & _HEADERS_FLAGS == frames.END_HEADERS
                    and stream
                    and size <= self._takes_header_bytes
                    and size <= self._takes_frame_bytes
                ):
                    at = begin + size
                    self.on_block(stream, bool(flags & frames.END_STREAM), bytes(view[begin:at]))
                    continue
                if kind == frames.WINDOW_UPDATE and size == 4:
                    at = begin + 4
                    self._window_update(stream, frames.word(data, begin) & frames.MAX_WINDOW, 4)
                    continue
            taken = self._frame(kind, flags, stream, size, begin, end)
            if taken < 0:
                break
            at = begin + taken
        if at < end and not self.over:
            self._rest = bytes(view[at:end])

    def _greet(self, end: int) -> int:
        """The client's preface, as far as it has come."""
        expected = self._expects[:end]
        if self._buffer.data[: len(expected)] != expected:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "this is no HTTP/2")
        self._expects = self._expects[len(expected) :]
        return len(expected)

    def _frame(self, kind: int, flags: int, stream: int, size: int, at: int, end: int) -> int:
        """A frame other than plain DATA: bytes taken of its payload, -1 if it is not all there."""
        if not self._greeted and kind != frames.SETTINGS:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "HTTP/2 begins with SETTINGS")
        self._greeted = True
        if self._block is not None and (kind, stream) != (frames.CONTINUATION, self._block[0]):
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a header block is interrupted")
        if kind == frames.DATA:
            return self._padded_data(flags, stream, size, at, end)
        if size > self._longest(kind):
            self._too_long(kind, size)
        if end - at < size:
            return -1
        self._control(kind, flags, stream, bytes(self._buffer.view[at : at + size]))
        return size

    def _longest(self, kind: int) -> int:
        if kind in (frames.HEADERS, frames.CONTINUATION):
            return min(self._takes_frame_bytes, self._takes_header_bytes)
        return frames.LEAST_FRAME_BYTES

    def _too_long(self, kind: int, size: int) -> None:
        headers = kind in (frames.HEADERS, frames.CONTINUATION)
        code = ErrorCode.ENHANCE_YOUR_CALM if headers else ErrorCode.FRAME_SIZE_ERROR
        raise ProtocolError(code, f"a frame of {size} bytes")

    # DATA

    def _begin_data(self, stream: int, size: int, ends: bool) -> Stream | None:
        """Count `size` bytes against the windows; the stream, where it still takes them."""
        self._consumed += size
        if self._consumed >= _RENEW_WINDOW_BYTES:
            self.write(frames.window_update(0, self._consumed))
            self._consumed = 0
        if not size and not ends:
            self.on_chore()
        found = self._streams.get(stream)
        if found is None:
            self.on_idle_data(stream)
            return None
        if found.remote_closed:
            self._stream_error(stream, ErrorCode.STREAM_CLOSED)
            return None
        found.credit -= size
        if found.credit < 0:
            self._stream_error(stream, ErrorCode.FLOW_CONTROL_ERROR)
            return None
        return found

    def _padded_data(self, flags: int, stream: int, size: int, at: int, end: int) -> int:
        if size > self._takes_frame_bytes:
            self._too_long(frames.DATA, size)
        if not size:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "a padded frame without padding")
        if at >= end:
            return -1
        padding = self._buffer.data[at]
        if padding >= size:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "more padding than there is frame")
        self._data_ends = bool(flags & frames.END_STREAM)
        self._data_stream = self._begin_data(stream, size, self._data_ends)
        self._data_left, self._data_padding = size - 1 - padding, padding
        if not self._data_left + self._data_padding:
            self._end_data()
        return 1

    def _more_data(self, at: int, end: int) -> int:
        """The next bytes of a payload of which only the begin had come."""
        taken = min(self._data_left, end - at)
        stream = self._data_stream
        if taken:
            self._data_left -= taken
            if stream is not None:
                stream.received(self._buffer.view[at : at + taken], False)
        skipped = min(self._data_padding, end - at - taken) if not self._data_left else 0
        self._data_padding -= skipped
        if not self._data_left and not self._data_padding:
            self._end_data()
        return at + taken + skipped

    def _end_data(self) -> None:
        stream, self._data_stream = self._data_stream, None
        if stream is not None and self._data_ends:
            stream.remote_closed = True
            stream.received(_EMPTY, True)

    def forget(self, stream: Stream) -> None:
        """The stream takes and gives nothing more."""
        self._streams.pop(stream.id, None)
        self._drop(stream)
        if self._data_stream is stream:
            self._data_stream = None

    def on_its_way(self, stream: Stream) -> int:
        """Bytes that the peer may still send on a stream, or is sending in a frame that began."""
        return stream.credit + (self._data_left if self._data_stream is stream else 0)

    def renew(self, stream: Stream, increment: int) -> None:
        """Let the peer send so many more bytes on a stream."""
        if increment > 0 and not stream.remote_closed:
            stream.credit += increment
            self.write(frames.window_update(stream.id, increment))

    # everything else

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == frames.HEADERS:
            self._headers(flags, stream, payload)
        elif kind == frames.WINDOW_UPDATE:
            self._window_update(stream, frames.word(payload) & frames.MAX_WINDOW, len(payload))
        elif kind == frames.PING:
            self._ping(flags, stream, payload)
        elif kind == frames.SETTINGS:
            self._take_settings(flags, stream, payload)
        elif kind == frames.RST_STREAM:
            if not stream or len(payload) != 4:
                code = ErrorCode.FRAME_SIZE_ERROR if stream else ErrorCode.PROTOCOL_ERROR
                raise ProtocolError(code, "no valid RST_STREAM")
            self.on_reset(stream, frames.word(payload), by_peer=True)
        elif kind == frames.CONTINUATION:
            self._continuation(flags, stream, payload)
        elif kind == frames.GOAWAY:
            if stream:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
            frames.word(payload, 4)
            self.on_goaway(frames.word(payload) & frames.MAX_WINDOW)
        elif kind == frames.PUSH_PROMISE:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE is not wanted")
        else:
            # PRIORITY, and kinds from the future.
            self.on_chore()

    def _headers(self, flags: int, stream: int, payload: bytes) -> None:
        if not stream:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "HEADERS without a stream")
        if flags & (frames.PADDED | frames.PRIORITIZED):
            begin = (1 if flags & frames.PADDED else 0) + (5 if flags & frames.PRIORITIZED else 0)
            end = len(payload) - (payload[0] if flags & frames.PADDED and payload else 0)
            if begin > end:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "more padding than there is frame")
            payload = payload[begin:end]
        if flags & frames.END_HEADERS:
            self.on_block(stream, bool(flags & frames.END_STREAM), payload)
        else:
            self._block = (stream, flags, [payload])

    def _continuation(self, flags: int, stream: int, payload: bytes) -> None:
        if self._block is None:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        _, first_flags, pieces = self._block
        pieces.append(payload)
        # An empty piece costs as much as a full one: both are limited.
        if sum(map(len, pieces)) > self._takes_header_bytes or len(pieces) > 64:
            raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, "too long a header block")
        if flags & frames.END_HEADERS:
            self._block = None
            self.on_block(stream, bool(first_flags & frames.END_STREAM), b"".join(pieces))

    def _window_update(self, stream: int, increment: int, size: int) -> None:
        if size != 4:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "no valid WINDOW_UPDATE")
        if not stream:
            self._window += increment
            if not increment or self._window > frames.MAX_WINDOW:
                code = ErrorCode.FLOW_CONTROL_ERROR if increment else ErrorCode.PROTOCOL_ERROR
                raise ProtocolError(code, f"a window grows by {increment}")
        elif (found := self._streams.get(stream)) is None:
            self.on_idle_data(stream)
        else:
            found.window += increment
            if not increment:
                self._stream_error(stream, ErrorCode.PROTOCOL_ERROR)
            elif found.window > frames.MAX_WINDOW:
                self._stream_error(stream, ErrorCode.FLOW_CONTROL_ERROR)
        if self._blocked:
            self._resume()

    def _ping(self, flags: int, stream: int, payload: bytes) -> None:
        if stream or len(payload) != 8:
            code = ErrorCode.PROTOCOL_ERROR if stream else ErrorCode.FRAME_SIZE_ERROR
            raise ProtocolError(code, "no valid PING")
        if not flags & frames.ACK:
            self.on_chore()
            self.write(frames.header(frames.PING, frames.ACK, 0, 8) + payload)

    def _take_settings(self, flags: int, stream: int, payload: bytes) -> None:
        acknowledges = flags & frames.ACK
        if stream:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if len(payload) % frames.SETTING.size or (acknowledges and payload):
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "no valid SETTINGS")
        if acknowledges:
            return
        self.on_chore()
        for key, value in frames.SETTING.iter_unpack(payload):
            self._set(key, value)
        self.write(frames.header(frames.SETTINGS, frames.ACK, 0, 0))
        if self._blocked:
            self._resume()

    def _set(self, key: int, value: int) -> None:
        if key == Setting.INITIAL_WINDOW_SIZE:
            change = value - self._stream_window
            self._stream_window = value
            windows = [stream.window + change for stream in self._streams.values()]
            if max(windows, default=value) > frames.MAX_WINDOW or value > frames.MAX_WINDOW:
                raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, f"windows of {value} bytes")
            for stream in self._streams.values():
                stream.window += change
        elif key == Setting.MAX_FRAME_SIZE:
            if not frames.LEAST_FRAME_BYTES <= value <= frames.MAX_FRAME_BYTES:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"frames of {value} bytes")
            self._frame_bytes = value
        elif key == Setting.ENABLE_PUSH and value > 1:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"ENABLE_PUSH {value}")
        elif key == Setting.MAX_CONCURRENT_STREAMS:
            self.on_peer_streams(value)

    def _stream_error(self, stream: int, code: ErrorCode) -> None:
        """A stream breaks the rules: it ends, on both sides."""
        self.on_reset(stream, code, by_peer=False)
        self.reset(stream, code)
