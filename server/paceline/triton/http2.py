"""Unary gRPC calls over HTTP/2 on one connection, bytes in and bytes out.

Why not grpc.aio: it costs 0.3 ms of processor time and several context switches a call, more than
everything else that Paceline does for a batch; a message is copied three times on its way. Here
the parts of a message go to the socket as they are, and an answer is joined once.

Invariants: a call ends exactly once; whatever ends it early resets its stream, so that the server
stops too; nothing is sent beyond the peer's flow-control windows. Only plain text (h2c), which is
what Triton speaks by default; a peer that answers in a way that is not read here makes calls fail
as `incompatible`, and grpc.aio takes over.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import cast
from urllib.parse import unquote

import grpc

from paceline.core.tensor import Buffer
from paceline.triton import hpack
from paceline.triton.transport import NO_TIMEOUT_S, CallFailed, ChannelClosed

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = (
    *(0x0, 0x1, 0x3, 0x4, 0x6, 0x7, 0x8, 0x9),
)
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_SET_TABLE_SIZE, _SET_PUSH, _SET_STREAMS, _SET_WINDOW, _SET_FRAME = 1, 2, 3, 4, 5
_CANCEL = 8
_NO_ERROR = 0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEADER_BYTES = 9
_PREFIX_BYTES = 5
_MAX_WINDOW = 2**31 - 1
_MAX_FRAME_BYTES = 2**24 - 1
_FIRST_WINDOW = 65_535
_RENEW_WINDOW_BYTES = 2**26
_WRITE_AHEAD_BYTES = 2**20
_USER_TIMEOUT_MS = 20_000
_CONNECT_TIMEOUT_S = 20.0

_REFUSED = 7
_CODES = {str(code.value[0]): code for code in grpc.StatusCode}


class Http2Transport:
    """A connection to `host:port`, made by the first call and again after it was lost."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._authority = target
        self._connection: _Connection | None = None
        self._connections: set[_Connection] = set()
        self._connecting: asyncio.Task[_Connection] | None = None
        self._closed = False

    async def unary(self, path: str, parts: Sequence[Buffer], timeout_s: float) -> memoryview:
        """The answer to the message made of `parts`. Raises CallFailed, ChannelClosed."""
        connection = self._connection
        if connection is None or not connection.usable:
            connection = await self._connect(timeout_s)
        return await connection.call(path, parts, timeout_s)

    async def close(self) -> None:
        """Close the connection; calls under way fail with ChannelClosed."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait((self._connecting,))
        for connection in list(self._connections):
            connection.close()
            await connection.lost.wait()
            self._connections.discard(connection)

    async def _connect(self, timeout_s: float) -> _Connection:
        if self._closed:
            raise ChannelClosed(during_call=False)
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._open(), name="http2-connect")
            # Whoever waits is told; that nobody waits any more is no news.
            self._connecting.add_done_callback(lambda t: t.cancelled() or t.exception())
        try:
            async with asyncio.timeout(min(timeout_s, _CONNECT_TIMEOUT_S)):
                return await asyncio.shield(self._connecting)
        except TimeoutError:
            text = f"no connection within {min(timeout_s, _CONNECT_TIMEOUT_S):g} s"
            raise CallFailed(grpc.StatusCode.UNAVAILABLE, text, unreachable=True) from None
        except OSError as error:
            text = f"failed to connect: {error.strerror or error}"
            raise CallFailed(grpc.StatusCode.UNAVAILABLE, text, unreachable=True) from None
        except asyncio.CancelledError:
            if self._closed and self._connecting.cancelled():
                raise ChannelClosed(during_call=True) from None
            raise

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_connection(
            lambda: _Connection(self._authority), self._host, self._port
        )
        # One that is going away may still have calls to answer.
        self._connections = {old for old in self._connections if not old.lost.is_set()}
        self._connections.add(protocol)
        self._connection = protocol
        return protocol


class _Call:
    """A call on its stream: what is left to send, what has come."""

    __slots__ = ("answer", "chunks", "headers", "pending", "received", "stream", "timer", "window")

    def __init__(self, stream: int, answer: asyncio.Future[memoryview], window: int) -> None:
        self.stream = stream
        self.answer = answer
        self.window = window
        self.pending: deque[memoryview] = deque()
        self.chunks: list[Buffer] = []
        self.received = 0
        self.headers: dict[str | None, str | None] = {}
        self.timer: asyncio.TimerHandle | None = None


class _Connection(asyncio.Protocol):
    """One TCP connection. Never used again once `usable` is false."""

    def __init__(self, authority: str) -> None:
        self._authority = authority
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, _Call] = {}
        self._blocked: deque[_Call] = deque()
        self._next_stream = 1
        self._window = _FIRST_WINDOW
        self._stream_window = _FIRST_WINDOW
        self._frame_bytes = 16_384
        self._streams = _MAX_WINDOW
        self._consumed = 0
        self._greeted = False
        self._paused = False
        self._header_blocks: dict[str, bytes] = {}
        # The reader: a frame header in parts, or what is left of a frame's payload.
        self._head = b""
        self._frame: tuple[int, int, int] | None = None
        self._payload: list[Buffer] = []
        self._left = 0
        self._block: tuple[int, int, bytes] | None = None
        self.usable = True
        self.lost = asyncio.Event()

    # -- calls ------------------------------------------------------------------------------

    async def call(self, path: str, parts: Sequence[Buffer], timeout_s: float) -> memoryview:
        """See `Http2Transport.unary`."""
        if self._transport is None:
            text = "connection closed by the server"
            raise CallFailed(grpc.StatusCode.UNAVAILABLE, text, unreachable=True)
        if len(self._calls) >= self._streams:
            text = f"the server takes no more than {self._streams} calls at once"
            raise CallFailed(grpc.StatusCode.UNAVAILABLE, text)
        stream = self._next_stream
        self._next_stream += 2
        if self._next_stream > _MAX_WINDOW:
            self.usable = False
        call = _Call(stream, self._loop.create_future(), self._stream_window)
        self._calls[stream] = call
        if timeout_s < NO_TIMEOUT_S:
            call.timer = self._loop.call_later(timeout_s, self._expired, call, timeout_s)
        size = sum(map(len, parts))
        block = self._header_block(path, timeout_s)
        head = _frame(_HEADERS, _END_HEADERS, stream, len(block)) + block
        call.pending.append(memoryview(struct.pack(">BI", 0, size)))
        call.pending.extend(memoryview(part) for part in parts if len(part))
        self._pump(call, [head])
        try:
            return await call.answer
        except asyncio.CancelledError:
            self._abandon(call)
            raise
        finally:
            if call.timer is not None:
                call.timer.cancel()

    def close(self) -> None:
        """End every call with ChannelClosed."""
        self.usable = False
        for call in list(self._calls.values()):
            self._fail(call, ChannelClosed(during_call=True))
        if self._transport is not None:
            self._transport.abort()

    def _header_block(self, path: str, timeout_s: float) -> bytes:
        known = self._header_blocks.get(path)
        if known is None:
            known = self._header_blocks[path] = hpack.encode(
                [
                    (":method", "POST"),
                    (":scheme", "http"),
                    (":path", path),
                    (":authority", self._authority),
                    ("te", "trailers"),
                    ("content-type", "application/grpc"),
                    ("user-agent", "paceline"),
                ]
            )
        if timeout_s >= NO_TIMEOUT_S:
            return known
        # At most 8 digits.
        fine = timeout_s < 99
        timeout = f"{int(timeout_s * 1e6)}u" if fine else f"{min(int(timeout_s), 99_999_999)}S"
        return known + hpack.encode([("grpc-timeout", timeout)])

    def _expired(self, call: _Call, timeout_s: float) -> None:
        text = f"no answer within {timeout_s:g} s"
        self._abandon(call)
        self._fail(call, CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED, text))

    def _abandon(self, call: _Call) -> None:
        """Tell the server that nobody waits for this answer any more."""
        if self._calls.pop(call.stream, None) is not None and self._transport is not None:
            reset = _frame(_RST_STREAM, 0, call.stream, 4) + struct.pack(">I", _CANCEL)
            self._transport.write(reset)
        call.pending.clear()

    def _fail(self, call: _Call, error: Exception) -> None:
        self._forget(call)
        call.pending.clear()
        if not call.answer.done():
            call.answer.set_exception(error)

    def _forget(self, call: _Call) -> None:
        self._calls.pop(call.stream, None)
        if not (self.usable or self._calls) and self._transport is not None:
            self._transport.close()

    # -- sending ----------------------------------------------------------------------------

    def _pump(self, call: _Call, chunks: list[Buffer] | None = None) -> None:
        """Send what the windows allow; the rest waits in `_blocked`."""
        chunks = chunks if chunks is not None else []
        written = 0
        while call.pending and not self._paused and written < _WRITE_AHEAD_BYTES:
            room = min(call.window, self._window, self._frame_bytes)
            if room <= 0:
                break
            taken = 0
            at = len(chunks)
            while call.pending and taken < room:
                part = call.pending.popleft()
                if len(part) > room - taken:
                    call.pending.appendleft(part[room - taken :])
                    part = part[: room - taken]
                chunks.append(part)
                taken += len(part)
            flags = 0 if call.pending else _END_STREAM
            chunks.insert(at, _frame(_DATA, flags, call.stream, taken))
            call.window -= taken
            self._window -= taken
            written += taken
        if call.pending:
            self._blocked.append(call)
            if not self._paused and written >= _WRITE_AHEAD_BYTES:
                self._loop.call_soon(self._resume)
        if chunks and self._transport is not None:
            if written < 4096:
                self._transport.write(b"".join(chunks))
            else:
                self._transport.writelines(chunks)

    def _resume(self) -> None:
        for _ in range(len(self._blocked)):
            if self._paused:
                return
            call = self._blocked.popleft()
            if call.pending:
                self._pump(call)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._resume()

    # -- receiving --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        plug = transport.get_extra_info("socket")
        if plug is not None:
            with suppress(OSError):
                plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # A machine that vanished is noticed by what it does not acknowledge.
                plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
                plug.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20)
        settings = (
            (_SET_TABLE_SIZE, 0),
            (_SET_PUSH, 0),
            (_SET_WINDOW, _MAX_WINDOW),
            (_SET_FRAME, _MAX_FRAME_BYTES),
        )
        payload = b"".join(struct.pack(">HI", *pair) for pair in settings)
        self._transport.write(
            _PREFACE
            + _frame(_SETTINGS, 0, 0, len(payload))
            + payload
            + _frame(_WINDOW_UPDATE, 0, 0, 4)
            + struct.pack(">I", _MAX_WINDOW - _FIRST_WINDOW)
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self.lost.set()
        self._transport = None
        text = f"connection lost: {exc}" if exc else "connection closed by the server"
        for call in list(self._calls.values()):
            self._fail(call, CallFailed(grpc.StatusCode.UNAVAILABLE, text, unreachable=True))

    def data_received(self, data: bytes) -> None:
        view = memoryview(data)
        at, size = 0, len(data)
        while at < size or (self._frame is not None and not self._left):
            if self._frame is None:
                need = _FRAME_HEADER_BYTES - len(self._head)
                head = self._head + data[at : at + need]
                at += need
                if len(head) < _FRAME_HEADER_BYTES:
                    self._head = head
                    return
                self._head = b""
                high, low, kind, flags, stream = struct.unpack(">HBBBI", head)
                self._left = high << 8 | low
                self._frame = (kind, flags, stream & _MAX_WINDOW)
                if not self._greeted and kind != _SETTINGS:
                    self._broken("the server does not speak HTTP/2")
                    return
                self._greeted = True
            if self._left:
                taken = min(self._left, size - at)
                if taken <= 0:
                    return
                self._payload.append(view[at : at + taken])
                at += taken
                self._left -= taken
                if self._left:
                    return
            kind, flags, stream = self._frame
            payload, self._payload, self._frame = self._payload, [], None
            try:
                self._handle(kind, flags, stream, payload)
            except (hpack.HpackError, struct.error, IndexError, ValueError) as error:
                self._broken(f"the server does not keep to HTTP/2: {error}")
                return

    def _handle(self, kind: int, flags: int, stream: int, payload: list[Buffer]) -> None:
        if kind == _DATA:
            self._data(flags, stream, payload)
        elif kind == _HEADERS:
            self._headers(flags, stream, b"".join(payload))
        elif kind == _CONTINUATION:
            self._continue(flags, stream, b"".join(payload))
        elif kind == _WINDOW_UPDATE:
            self._window_update(stream, struct.unpack(">I", b"".join(payload))[0] & _MAX_WINDOW)
        elif kind == _SETTINGS and not flags & _ACK:
            self._settings(b"".join(payload))
        elif kind == _PING and not flags & _ACK:
            self._write(_frame(_PING, _ACK, 0, 8) + b"".join(payload))
        elif kind == _RST_STREAM:
            self._reset(stream, struct.unpack(">I", b"".join(payload))[0])
        elif kind == _GOAWAY:
            self._goaway(b"".join(payload))

    def _data(self, flags: int, stream: int, payload: list[Buffer]) -> None:
        size = sum(map(len, payload))
        if flags & _PADDED:
            whole = b"".join(payload)
            payload = [whole[1 : len(whole) - whole[0]]]
        self._consumed += size
        if self._consumed >= _RENEW_WINDOW_BYTES:
            self._write(_frame(_WINDOW_UPDATE, 0, 0, 4) + struct.pack(">I", self._consumed))
            self._consumed = 0
        call = self._calls.get(stream)
        if call is None:
            return
        call.chunks += payload
        call.received += size
        if flags & _END_STREAM:
            self._end(call)

    def _headers(self, flags: int, stream: int, block: bytes) -> None:
        if flags & _PADDED:
            block = block[1 : len(block) - block[0]]
        if flags & _PRIORITY:
            block = block[5:]
        if flags & _END_HEADERS:
            self._header_list(stream, flags, block)
        else:
            self._block = (stream, flags, block)

    def _continue(self, flags: int, stream: int, more: bytes) -> None:
        if self._block is None or self._block[0] != stream:
            raise ValueError("CONTINUATION without HEADERS")
        _, first_flags, begun = self._block
        self._block = (stream, first_flags, begun + more)
        if flags & _END_HEADERS:
            self._block = None
            self._header_list(stream, first_flags, begun + more)

    def _header_list(self, stream: int, flags: int, block: bytes) -> None:
        call = self._calls.get(stream)
        if call is None:
            return
        call.headers.update(hpack.decode(block))
        if flags & _END_STREAM:
            self._end(call)

    def _end(self, call: _Call) -> None:
        """The server has closed the stream: the status says whether the message is an answer."""
        if call.pending:
            # It answered before it had everything, and wants no more.
            self._abandon(call)
        number = call.headers.get("grpc-status")
        code = _CODES.get(number or "")
        message = call.headers.get("grpc-message", "")
        if code is grpc.StatusCode.OK:
            self._answer(call)
        elif code is not None and message is not None:
            self._fail(call, CallFailed(code, unquote(message)))
        else:
            text = f"no readable gRPC status (HTTP status {call.headers.get(':status')})"
            unknown = grpc.StatusCode.UNKNOWN
            self._fail(call, CallFailed(unknown, text, incompatible=True))

    def _answer(self, call: _Call) -> None:
        data = b"".join(call.chunks)
        if (
            len(data) < _PREFIX_BYTES
            or data[0]
            or len(data) - _PREFIX_BYTES != int.from_bytes(data[1:_PREFIX_BYTES], "big")
        ):
            self._fail(
                call,
                CallFailed(
                    grpc.StatusCode.INTERNAL, "the server's answer is not one plain message"
                ),
            )
            return
        self._forget(call)
        if not call.answer.done():
            call.answer.set_result(memoryview(data)[_PREFIX_BYTES:])

    def _window_update(self, stream: int, increment: int) -> None:
        if stream == 0:
            self._window += increment
        elif (call := self._calls.get(stream)) is not None:
            call.window += increment
        self._resume()

    def _settings(self, payload: bytes) -> None:
        for key, value in struct.iter_unpack(">HI", payload):
            if key == _SET_WINDOW:
                change = value - self._stream_window
                self._stream_window = value
                for call in self._calls.values():
                    call.window += change
            elif key == _SET_FRAME:
                self._frame_bytes = value
            elif key == _SET_STREAMS:
                self._streams = value
        self._write(_frame(_SETTINGS, _ACK, 0, 0))
        self._resume()

    def _reset(self, stream: int, reason: int) -> None:
        call = self._calls.get(stream)
        if call is None:
            return
        if reason == _NO_ERROR and "grpc-status" in call.headers:
            self._end(call)
            return
        text = f"the server reset the call (HTTP/2 error {reason})"
        if reason == _REFUSED:
            error = CallFailed(grpc.StatusCode.UNAVAILABLE, text, unreachable=True)
        elif reason == _CANCEL:
            error = CallFailed(grpc.StatusCode.CANCELLED, text)
        else:
            error = CallFailed(grpc.StatusCode.INTERNAL, text)
        self._fail(call, error)

    def _goaway(self, payload: bytes) -> None:
        """No new calls here; those that the server has not begun fail as unreachable."""
        self.usable = False
        last = struct.unpack_from(">I", payload)[0] & _MAX_WINDOW
        for call in list(self._calls.values()):
            if call.stream > last:
                text = "the server is going away"
                self._fail(call, CallFailed(grpc.StatusCode.UNAVAILABLE, text, unreachable=True))

    def _broken(self, text: str) -> None:
        self.usable = False
        for call in list(self._calls.values()):
            self._fail(call, CallFailed(grpc.StatusCode.INTERNAL, text, incompatible=True))
        if self._transport is not None:
            self._transport.abort()

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


def _frame(kind: int, flags: int, stream: int, size: int) -> bytes:
    return struct.pack(">HBBBI", size >> 8, size & 0xFF, kind, flags, stream)
