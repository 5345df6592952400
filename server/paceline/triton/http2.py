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
import logging
from collections.abc import Sequence
from math import inf
from urllib.parse import unquote

import grpc

from paceline.core.tensor import Buffer
from paceline.http2 import frames, hpack
from paceline.http2.connection import Connection, Plug, ReadBuffer
from paceline.http2.frames import ErrorCode, ProtocolError, Setting
from paceline.http2.messages import PREFIX, PREFIX_BYTES, Inbox, MessageTooLarge
from paceline.http2.writer import Stream
from paceline.triton.transport import NO_TIMEOUT_S, CallFailed, ChannelClosed, OnAnswer

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 20.0
_TIMER_RESOLUTION_S = 0.001
_KEPT_BLOCKS = 64
_NOTHING = memoryview(b"")
_LONGEST_KEPT_BYTES = 256
_CODES = {str(code.value[0]): code for code in grpc.StatusCode}
_SETTINGS = frames.PREFACE + frames.settings(
    {
        Setting.HEADER_TABLE_SIZE: 0,
        Setting.ENABLE_PUSH: 0,
        Setting.INITIAL_WINDOW_SIZE: frames.MAX_WINDOW,
        Setting.MAX_FRAME_SIZE: frames.MAX_FRAME_BYTES,
    }
)


class Http2Transport:
    """A connection to `host:port`, made by the first call and again after it was lost."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._authority = target
        self._buffer = ReadBuffer()
        self._connection: _Connection | None = None
        self._connections: set[_Connection] = set()
        self._connecting: asyncio.Task[_Connection] | None = None
        self._closed = False

    def begin(
        self, path: str, parts: Sequence[Buffer], on_answer: OnAnswer, timeout_s: float
    ) -> bool:
        """See `Transport.begin`: where there is a connection that takes another call."""
        connection = self._connection
        if connection is None or not connection.free:
            return False
        connection.begin(path, parts, on_answer, timeout_s)
        return True

    async def unary(self, path: str, parts: Sequence[Buffer], timeout_s: float) -> Buffer:
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
        connection = _Connection(self._buffer, self._authority)
        await loop.create_connection(lambda: Plug(connection), self._host, self._port)
        # One that is going away may still have calls to answer.
        self._connections = {old for old in self._connections if not old.lost.is_set()}
        self._connections.add(connection)
        self._connection = connection
        return connection


class _Call(Stream):
    """A call on its stream: what has come of its answer, and whom to give it to."""

    __slots__ = (
        *("_connection", "_inbox", "_on_answer", "_whole", "expires_s", "headers", "timeout_s"),
    )

    def __init__(
        self, connection: _Connection, stream: int, window: int, on_answer: OnAnswer
    ) -> None:
        super().__init__(stream, window, frames.MAX_WINDOW)
        self._connection = connection
        self._on_answer: OnAnswer | None = on_answer
        self._whole: bytes | None = None
        """A message that came in one piece."""
        self._inbox: Inbox | None = None
        """Whatever else has come."""
        self.headers: dict[str, str] = {}
        self.timeout_s = self.expires_s = inf

    def received(self, data: memoryview, ended: bool) -> None:
        """See `Stream.received`; most answers come in one piece."""
        if self._inbox is None and self._whole is None and len(data) >= PREFIX_BYTES:
            flag, size = PREFIX.unpack_from(data)
            if not flag and size == len(data) - PREFIX_BYTES:
                self._whole = bytes(data[PREFIX_BYTES:])
                data = _NOTHING
        if len(data):
            try:
                if self._inbox is None:
                    self._inbox = Inbox(frames.MAX_WINDOW)
                self._inbox.feed(data)
            except (MessageTooLarge, OSError, MemoryError) as error:
                # Nobody sends so much; the memory is not there.
                self._connection.fail(self, CallFailed(grpc.StatusCode.INTERNAL, str(error)))
                return
        if ended:
            self._connection.ended(self)

    def room(self, at_most: int) -> memoryview | None:
        """See `Stream.room`."""
        return self._inbox.room(at_most) if self._inbox is not None else None

    def filled(self, count: int) -> None:
        """See `Stream.filled`."""
        assert self._inbox is not None
        self._inbox.filled(count)

    def message(self) -> Buffer | None:
        """The answer; None where it is not one plain message."""
        inbox = self._inbox
        if inbox is None:
            return self._whole
        if self._whole is not None or len(inbox) != 1 or inbox.partial:
            return None
        flag, data = inbox.pop()
        return None if flag else data

    def end(self, outcome: Buffer | CallFailed | ChannelClosed) -> None:
        """Give it over; only the first outcome counts."""
        on_answer, self._on_answer = self._on_answer, None
        if on_answer is None:
            return
        try:
            on_answer(outcome)
        except Exception:
            # Not the connection's fault, nor that of its other calls.
            log.exception("taking the answer to a call")


class _Connection(Connection):
    """One TCP connection. Never used again once `usable` is false."""

    def __init__(self, buffer: ReadBuffer, authority: str) -> None:
        super().__init__(buffer, expects=b"", settings=_SETTINGS)
        self._takes_frame_bytes = frames.MAX_FRAME_BYTES
        self._decoder = hpack.Decoder(0)
        self._authority = authority
        self._calls: dict[int, _Call] = {}
        self._next_stream = 1
        self._peer_streams = frames.MAX_WINDOW
        self._header_blocks: dict[tuple[str, float], bytes] = {}
        self._known: dict[bytes, list[hpack.Header]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._expires_s = inf
        """When the timer is set to."""
        self.usable = True
        self.lost = asyncio.Event()

    @property
    def free(self) -> bool:
        """Whether it takes another call."""
        usable = self.usable and self._transport is not None
        return usable and len(self._calls) < self._peer_streams

    async def call(self, path: str, parts: Sequence[Buffer], timeout_s: float) -> Buffer:
        """See `Http2Transport.unary`."""
        if self._transport is None:
            text = "connection closed by the server"
            raise CallFailed(grpc.StatusCode.UNAVAILABLE, text, unreachable=True)
        if len(self._calls) >= self._peer_streams:
            text = f"the server takes no more than {self._peer_streams} calls at once"
            raise CallFailed(grpc.StatusCode.UNAVAILABLE, text)
        answer: asyncio.Future[Buffer] = self._loop.create_future()

        def on_answer(outcome: Buffer | CallFailed | ChannelClosed) -> None:
            if answer.done():
                return
            if isinstance(outcome, Exception):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)

        call = self.begin(path, parts, on_answer, timeout_s)
        try:
            return await answer
        except asyncio.CancelledError:
            self._abandon(call)
            raise

    def begin(
        self, path: str, parts: Sequence[Buffer], on_answer: OnAnswer, timeout_s: float
    ) -> _Call:
        """Send a call; `on_answer` is told how it ended."""
        call = _Call(self, self._next_stream, self._stream_window, on_answer)
        self._next_stream += 2
        if self._next_stream > frames.MAX_WINDOW:
            self.usable = False
        self._streams[call.id] = self._calls[call.id] = call
        if timeout_s < NO_TIMEOUT_S:
            self._expect(call, timeout_s)
        size = sum(map(len, parts))
        head = frames.headers(call.id, self._header_block(path, timeout_s))
        send = self.send_at_once if len(self._calls) == 1 else self.send
        send(call, head, (PREFIX.pack(0, size), *parts), PREFIX_BYTES + size, b"")
        return call

    def close(self) -> None:
        """End every call with ChannelClosed."""
        self.usable = False
        for call in list(self._calls.values()):
            self.fail(call, ChannelClosed(during_call=True))
        if self._transport is not None:
            self._transport.abort()

    def ended(self, call: _Call) -> None:
        """The server has closed the stream: the status says whether the message is an answer."""
        if call.pending:
            # It answered before it had everything, and wants no more.
            self._abandon(call)
        code = _CODES.get(call.headers.get("grpc-status", ""))
        if code is grpc.StatusCode.OK:
            self._answer(call)
        elif code is not None:
            self.fail(call, CallFailed(code, unquote(call.headers.get("grpc-message", ""))))
        else:
            text = f"no gRPC status (HTTP status {call.headers.get(':status')})"
            self.fail(call, CallFailed(grpc.StatusCode.UNKNOWN, text, incompatible=True))

    def fail(self, call: _Call, error: CallFailed | ChannelClosed) -> None:
        """End a call with an error."""
        self._forget(call)
        call.end(error)

    def _answer(self, call: _Call) -> None:
        data = call.message()
        if data is None:
            text = "the server's answer is not one plain message"
            self.fail(call, CallFailed(grpc.StatusCode.INTERNAL, text))
            return
        self._forget(call)
        call.end(data)

    def _header_block(self, path: str, timeout_s: float) -> bytes:
        known = self._header_blocks.get((path, timeout_s))
        if known is None:
            if len(self._header_blocks) >= _KEPT_BLOCKS:
                self._header_blocks.clear()
            headers = [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", path),
                (":authority", self._authority),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                ("user-agent", "paceline"),
            ]
            if timeout_s < NO_TIMEOUT_S:
                headers.append(("grpc-timeout", _timeout(timeout_s)))
            known = self._header_blocks[path, timeout_s] = hpack.encode(headers)
        # With the connection's first block.
        return hpack.FORGET + known if self._next_stream == 3 else known

    def _expect(self, call: _Call, timeout_s: float) -> None:
        """Have the call end in time. One timer serves all calls: nearly none is ever needed."""
        call.timeout_s = timeout_s
        call.expires_s = self._loop.time() + timeout_s
        if call.expires_s < self._expires_s:
            self._set_timer(call.expires_s)

    def _set_timer(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._expires_s = at_s
        self._timer = self._loop.call_at(at_s, self._expire) if at_s < inf else None

    def _expire(self) -> None:
        """End the calls whose time is over, and wait for the next one's end."""
        now_s = self._loop.time() + _TIMER_RESOLUTION_S
        for call in [call for call in self._calls.values() if call.expires_s <= now_s]:
            self._abandon(call)
            text = f"no answer within {call.timeout_s:g} s"
            self.fail(call, CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED, text))
        self._set_timer(min((call.expires_s for call in self._calls.values()), default=inf))

    def _abandon(self, call: _Call) -> None:
        """Tell the server that nobody waits for this answer any more."""
        if self._calls.pop(call.id, None) is not None:
            self.reset(call.id, ErrorCode.CANCEL)
        self.forget(call)

    def _forget(self, call: _Call) -> None:
        self._calls.pop(call.id, None)
        self.forget(call)
        if not (self.usable or self._calls) and self._transport is not None:
            self.flush()
            self._transport.close()

    # -- what comes in ----------------------------------------------------------------------

    def on_block(self, stream: int, ends: bool, block: bytes) -> None:
        """Headers or trailers of an answer."""
        headers = self._known.get(block)
        if headers is None:
            headers = self._decoded(block)
        call = self._calls.get(stream)
        if call is None:
            return
        call.headers.update(headers)
        if ends:
            call.remote_closed = True
            self.ended(call)

    def _decoded(self, block: bytes) -> list[hpack.Header]:
        """A block's headers, remembered: with a table of size 0 equal ones mean the same."""
        try:
            headers = self._decoder.decode(block)
        except hpack.HpackError as error:
            raise ProtocolError(ErrorCode.COMPRESSION_ERROR, str(error)) from None
        if len(block) <= _LONGEST_KEPT_BYTES:
            if len(self._known) >= _KEPT_BLOCKS:
                self._known.clear()
            self._known[block] = headers
        return headers

    def on_reset(self, stream: int, code: int, *, by_peer: bool) -> None:
        """The server gives a call up, or has broken the rules on it."""
        call = self._calls.get(stream)
        if call is None:
            return
        if code == ErrorCode.NO_ERROR and "grpc-status" in call.headers:
            self.ended(call)
            return
        text = f"the server reset the call (HTTP/2 error {code})"
        if code == ErrorCode.REFUSED_STREAM:
            error = CallFailed(grpc.StatusCode.UNAVAILABLE, text, unreachable=True)
        elif code == ErrorCode.CANCEL:
            error = CallFailed(grpc.StatusCode.CANCELLED, text)
        else:
            error = CallFailed(grpc.StatusCode.INTERNAL, text)
        self.fail(call, error)

    def on_goaway(self, last_stream: int) -> None:
        """No new calls here; those that the server has not begun fail as unreachable."""
        self.usable = False
        for call in list(self._calls.values()):
            if call.id > last_stream:
                text = "the server is going away"
                self.fail(call, CallFailed(grpc.StatusCode.UNAVAILABLE, text, unreachable=True))

    def on_peer_streams(self, limit: int) -> None:
        """How many calls the server takes at once."""
        self._peer_streams = limit

    def on_error(self, error: ProtocolError) -> None:
        """The server does not speak HTTP/2 as it is read here; another transport may."""
        self.usable = False
        text = f"the server does not keep to HTTP/2: {error}"
        for call in list(self._calls.values()):
            self.fail(call, CallFailed(grpc.StatusCode.INTERNAL, text, incompatible=True))
        if self._transport is not None:
            self._transport.abort()

    def on_lost(self, error: Exception | None) -> None:
        """Every call fails."""
        self.usable = False
        self.lost.set()
        self._set_timer(inf)
        text = f"connection lost: {error}" if error else "connection closed by the server"
        for call in list(self._calls.values()):
            self.fail(call, CallFailed(grpc.StatusCode.UNAVAILABLE, text, unreachable=True))


def _timeout(timeout_s: float) -> str:
    """As gRPC writes it: at most 8 digits."""
    if timeout_s < 99:
        return f"{int(timeout_s * 1e6)}u"
    return f"{min(int(timeout_s), 99_999_999)}S"
