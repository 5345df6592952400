"""HTTP/2 by hand against gRPC's own server: what grpc.aio can do, this transport can do."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from paceline.core.ports import ModelCall
from paceline.core.tensor import BatchTensor, Buffer
from paceline.http2 import hpack
from paceline.triton.execution import Execution, Outcome
from paceline.triton.http2 import Http2Transport
from paceline.triton.transport import (
    CallFailed,
    ChannelClosed,
    GrpcTransport,
    OnAnswer,
    Transport,
)

UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
LONG_S = 30.0


class Server:
    """gRPC's server with methods to provoke each outcome; `gate` holds `/t/Wait` back."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.waiting = asyncio.Event()
        self.remaining_s: float | None = None
        self.server = grpc.aio.server(options=UNLIMITED)
        methods: dict[str, Callable[[bytes, Any], Awaitable[bytes]]] = {
            "Echo": self._echo,
            "Fail": self._fail,
            "Wait": self._wait,
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()
        }
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", handlers),))
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def _echo(self, data: bytes, context: Any) -> bytes:
        self.remaining_s = context.time_remaining()
        return data

    async def _fail(self, data: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, data.decode())
        raise AssertionError("abort raises")

    async def _wait(self, data: bytes, context: Any) -> bytes:
        self.waiting.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return data


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    await made.server.start()
    yield made
    made.gate.set()
    await made.server.stop(None)


@pytest_asyncio.fixture(params=["http2", "grpc"])
async def transport(request: pytest.FixtureRequest, server: Server) -> AsyncIterator[Transport]:
    if request.param == "http2":
        made = Http2Transport(server.target)
        yield made
        await made.close()
        return
    async with grpc.aio.insecure_channel(server.target, options=UNLIMITED) as channel:
        yield GrpcTransport(channel)


async def test_messages_of_every_size_arrive_whole_and_in_their_parts_order(
    transport: Transport,
) -> None:
    for size in (0, 1, 4095, 16_384, 65_535, 65_536, 1_000_003, 9_000_000):
        whole = bytes(index * 7 % 251 for index in range(251)) * (size // 251 + 1)
        parts: list[Buffer] = [b"ab", memoryview(whole)[:size], b"", whole[: size // 3]]
        answer = await transport.unary("/t/Echo", parts, LONG_S)
        assert bytes(answer) == b"".join(parts)


async def test_many_large_calls_at_once_share_the_windows(transport: Transport) -> None:
    async def one(index: int) -> bool:
        message = bytes([index]) * (300_000 + index)
        return bytes(await transport.unary("/t/Echo", [message], LONG_S)) == message

    assert all(await asyncio.gather(*(one(index) for index in range(40))))


async def test_a_status_keeps_its_code_and_message(transport: Transport) -> None:
    for text in ("plain", "50 % of 'ä', \n and 漢字", "x" * 3000):
        with pytest.raises(CallFailed) as caught:
            await transport.unary("/t/Fail", [text.encode()], LONG_S)
        assert caught.value.code is grpc.StatusCode.NOT_FOUND
        assert caught.value.message == text
        assert caught.value.answered


async def test_an_unknown_method_is_unimplemented(transport: Transport) -> None:
    with pytest.raises(CallFailed) as caught:
        await transport.unary("/t/Nothing", [b""], LONG_S)
    assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("timeout_s", [30.25, 98.9, 5000.0])
async def test_the_server_learns_how_long_it_may_take(
    server: Server, transport: Transport, timeout_s: float
) -> None:
    await transport.unary("/t/Echo", [b""], timeout_s)
    assert server.remaining_s is not None
    assert timeout_s / 2 < server.remaining_s <= timeout_s * 1.02  # gRPC rounds up


async def test_a_call_without_time_out_has_none(server: Server, transport: Transport) -> None:
    await transport.unary("/t/Echo", [b""], 1e9)
    assert server.remaining_s is None or server.remaining_s > 1e8


async def test_a_deadline_ends_the_call_on_both_sides(server: Server, transport: Transport) -> None:
    with pytest.raises(CallFailed) as caught:
        await transport.unary("/t/Wait", [b""], 0.1)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not caught.value.answered
    await asyncio.wait_for(server.cancelled.wait(), LONG_S)


async def test_cancelling_the_caller_cancels_the_call(server: Server, transport: Transport) -> None:
    task = asyncio.create_task(transport.unary("/t/Wait", [b"x" * 10_000], LONG_S))
    await server.waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(server.cancelled.wait(), LONG_S)
    assert bytes(await transport.unary("/t/Echo", [b"still here"], LONG_S)) == b"still here"


async def test_a_server_that_stops_fails_its_calls_and_is_found_again(server: Server) -> None:
    transport = Http2Transport(server.target)
    task = asyncio.create_task(transport.unary("/t/Wait", [b""], LONG_S))
    await server.waiting.wait()
    await server.server.stop(None)
    with pytest.raises(CallFailed):
        await task
    with pytest.raises(CallFailed) as caught:
        await transport.unary("/t/Echo", [b""], LONG_S)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE and caught.value.unreachable
    again = Server()
    again.server.add_insecure_port(server.target)
    await again.server.start()
    assert bytes(await transport.unary("/t/Echo", [b"back"], LONG_S)) == b"back"
    await transport.close()
    await again.server.stop(None)


async def test_closing_ends_calls_under_way_and_refuses_new_ones(server: Server) -> None:
    transport = Http2Transport(server.target)
    task = asyncio.create_task(transport.unary("/t/Wait", [b""], LONG_S))
    await server.waiting.wait()
    await transport.close()
    with pytest.raises(ChannelClosed) as caught:
        await task
    assert caught.value.during_call
    with pytest.raises(ChannelClosed) as caught:
        await transport.unary("/t/Echo", [b""], LONG_S)
    assert not caught.value.during_call


async def test_more_calls_than_connections_begin_with_wait_for_the_one_connection(
    server: Server,
) -> None:
    transport = Http2Transport(server.target)
    calls = (transport.unary("/t/Echo", [bytes([n])], LONG_S) for n in range(10))
    answers = await asyncio.gather(*calls)
    assert [bytes(answer) for answer in answers] == [bytes([n]) for n in range(10)]
    await transport.close()


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    size = struct.pack(">I", len(payload))[1:]
    return size + struct.pack(">BBI", kind, flags, stream) + payload


@asynccontextmanager
async def scripted(
    answer: Sequence[bytes], *, greeted: bool = True
) -> AsyncIterator[Http2Transport]:
    """A client of a server that says the same to whatever it hears first."""
    ended = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.read(65_536)
            # HTTP/2 begins with SETTINGS.
            for part in (frame(4, 0, 0), *answer) if greeted else answer:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
            await reader.read(-1)
        writer.close()
        ended.set()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    transport = Http2Transport(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield transport
    finally:
        await transport.close()
        await ended.wait()
        server.close()


STATUS = b"\x88"
TRAILERS = hpack.encode([("grpc-status", "0")])
MESSAGE = b"\0\0\0\0\x03abc"


async def test_frames_may_come_byte_by_byte_padded_and_in_continuations() -> None:
    stream = b"".join(
        (
            frame(0x77, 0xFF, 9, b"an unknown kind of frame"),
            frame(1, 0x28, 1, b"\x02" + b"\0" * 5 + b"" + b"\0\0"),
            frame(9, 0x4, 1, STATUS),
            frame(0, 0x8, 1, b"\x03" + MESSAGE[:2] + b"\0" * 3),
            frame(0, 0, 1),
            frame(0, 0, 1, MESSAGE[2:]),
            frame(6, 0, 0, b"12345678"),
            frame(1, 0x5, 1, TRAILERS),
        )
    )
    for step in (1, 2, 7, len(stream)):
        pieces = [stream[at : at + step] for at in range(0, len(stream), step)]
        async with scripted(pieces) as transport:
            assert bytes(await transport.unary("/t/Echo", [b"x"], LONG_S)) == b"abc"


@pytest.mark.parametrize(
    ("answer", "incompatible"),
    [
        (frame(1, 0x5, 1, b"\xbe"), True),  # an entry of the dynamic table
        (frame(1, 0x5, 1, STATUS + b"\x00\x0bgrpc-status\x81\x07"), False),  # OK, no message
        (frame(1, 0x5, 1, STATUS), True),  # no gRPC at all
        (frame(9, 0x4, 1, STATUS), True),  # CONTINUATION of nothing
        (frame(1, 0x4, 1, STATUS) + frame(0, 1, 1, MESSAGE), True),  # no trailers
        (frame(1, 0x4, 1, STATUS) + frame(0, 0, 1, MESSAGE[:-1]) + frame(1, 5, 1, TRAILERS), False),
        (
            frame(1, 0x4, 1, STATUS)
            + frame(0, 0, 1, b"\1" + MESSAGE[1:])
            + frame(1, 5, 1, TRAILERS),
            False,
        ),
        *(
            # Something behind the message: another one, the begin of one.
            (
                frame(1, 0x4, 1, STATUS)
                + frame(0, 0, 1, MESSAGE)
                + frame(0, 0, 1, more)
                + frame(1, 5, 1, TRAILERS),
                False,
            )
            for more in (MESSAGE, MESSAGE[:1], MESSAGE[:6])
        ),
        (frame(3, 0, 1, struct.pack(">I", 2)), False),  # RST_STREAM
    ],
)
async def test_what_is_no_grpc_answer_fails_the_call(answer: bytes, incompatible: bool) -> None:
    async with scripted([answer]) as transport:
        with pytest.raises(CallFailed) as caught:
            await transport.unary("/t/Echo", [b"x"], LONG_S)
    assert caught.value.incompatible is incompatible


async def test_a_server_of_another_protocol_is_noticed_at_its_first_bytes() -> None:
    async with scripted([b"HTTP/1.1 400 Bad Request\r\n\r\n"], greeted=False) as transport:
        with pytest.raises(CallFailed) as caught:
            await transport.unary("/t/Echo", [b"x"], LONG_S)
    assert caught.value.incompatible


@pytest.mark.parametrize(
    "answer",
    [
        frame(7, 0, 0, struct.pack(">II", 0, 0)),  # GOAWAY before this call
        frame(3, 0, 1, struct.pack(">I", 7)),  # REFUSED_STREAM
    ],
)
async def test_a_call_that_the_server_has_not_begun_is_unreachable(answer: bytes) -> None:
    async with scripted([answer]) as transport:
        with pytest.raises(CallFailed) as caught:
            await transport.unary("/t/Echo", [b"x"], LONG_S)
    assert caught.value.unreachable


class Outcomes:
    """What calls that were begun ended with, as they end."""

    def __init__(self) -> None:
        self.got: asyncio.Queue[Buffer | CallFailed | ChannelClosed] = asyncio.Queue()

    def take(self, outcome: Buffer | CallFailed | ChannelClosed) -> None:
        self.got.put_nowait(outcome)

    async def next(self) -> Buffer | CallFailed | ChannelClosed:
        async with asyncio.timeout(LONG_S):
            return await self.got.get()


async def test_calls_are_begun_without_a_task_once_there_is_a_connection(server: Server) -> None:
    transport, outcomes = Http2Transport(server.target), Outcomes()
    assert not transport.begin("/t/Echo", [b"x"], outcomes.take, LONG_S)
    await transport.unary("/t/Echo", [b"connect"], LONG_S)
    assert transport.begin("/t/Echo", [b"a", b"b"], outcomes.take, LONG_S)
    assert outcomes.got.empty()
    answer = await outcomes.next()
    assert not isinstance(answer, Exception)
    assert bytes(answer) == b"ab"
    assert transport.begin("/t/Fail", [b"not here"], outcomes.take, LONG_S)
    failure = await outcomes.next()
    assert isinstance(failure, CallFailed)
    assert (failure.code, failure.message) == (grpc.StatusCode.NOT_FOUND, "not here")
    await transport.close()


async def test_a_call_that_was_begun_ends_with_its_time_and_with_its_connection(
    server: Server,
) -> None:
    transport, outcomes = Http2Transport(server.target), Outcomes()
    await transport.unary("/t/Echo", [b"connect"], LONG_S)
    assert transport.begin("/t/Wait", [b"x"], outcomes.take, 0.01)
    late = await outcomes.next()
    assert isinstance(late, CallFailed) and late.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert transport.begin("/t/Wait", [b"x"], outcomes.take, LONG_S)
    await transport.close()
    assert isinstance(await outcomes.next(), ChannelClosed)
    assert outcomes.got.empty()
    assert not transport.begin("/t/Echo", [b"x"], outcomes.take, LONG_S)


async def test_who_cannot_take_an_answer_harms_no_other_call(server: Server) -> None:
    transport, outcomes = Http2Transport(server.target), Outcomes()
    await transport.unary("/t/Echo", [b"connect"], LONG_S)

    def refuse(outcome: object) -> None:
        raise RuntimeError("a bug")

    assert transport.begin("/t/Echo", [b"x"], refuse, LONG_S)
    assert transport.begin("/t/Echo", [b"y"], outcomes.take, LONG_S)
    assert await outcomes.next() == b"y"
    await transport.close()


class NoHttp2:
    """A transport that finds out, during a call, that it does not understand the server."""

    def begin(
        self, path: str, parts: Sequence[Buffer], on_answer: OnAnswer, timeout_s: float
    ) -> bool:
        asyncio.get_running_loop().call_soon(on_answer, self._failure())
        return True

    async def unary(self, path: str, parts: Sequence[Buffer], timeout_s: float) -> Buffer:
        raise self._failure()

    async def close(self) -> None:
        """Nothing to close."""

    def _failure(self) -> CallFailed:
        return CallFailed(grpc.StatusCode.INTERNAL, "what is this?", incompatible=True)


async def test_a_batch_that_was_begun_goes_another_way_where_http2_is_not_understood(
    server: Server,
) -> None:
    async with grpc.aio.insecure_channel(server.target, options=UNLIMITED) as channel:
        execution = Execution(NoHttp2(), None, lambda: ToEcho(channel))
        ended: asyncio.Queue[Outcome] = asyncio.Queue()
        call = ModelCall("m", (BatchTensor("x", "UINT8", (1,), (b"\x07",)),), ())
        assert execution.begin(call, LONG_S, ended.put_nowait)
        async with asyncio.timeout(LONG_S):
            outcome = await ended.get()
        assert outcome == {}
        assert not execution.begin(call, LONG_S, ended.put_nowait), "grpc.aio has its own tasks"
        await execution.close()


class ToEcho(GrpcTransport):
    """Calls `/t/Echo`, whatever is called: an empty message is an answer without outputs."""

    async def unary(self, path: str, parts: Sequence[Buffer], timeout_s: float) -> Buffer:
        return await super().unary("/t/Echo", [b""], timeout_s)
