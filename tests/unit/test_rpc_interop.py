"""The gRPC server in front of grpc's own clients, over sockets, on both event loops."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest
import uvloop

from paceline.core.tensor import Buffer
from paceline.rpc.call import UnaryCall
from paceline.rpc.context import CallContext
from paceline.rpc.listener import GrpcServer

UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
LARGE = random.Random(1).randbytes(5_000_000)
MIB = 1 << 20


class Methods:
    """What the clients call; `started` and `cancelled` tell of `Wait`."""

    def __init__(self, server: GrpcServer) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.server = server
        self.read = self.most_held_bytes = 0
        self.under_way = self.most_under_way = 0
        unary = grpc.unary_unary_rpc_method_handler
        handlers: dict[str, Any] = {
            "Told": unary(self._told),
            "Wait": unary(self._wait),
            "Buggy": unary(self._buggy),
            "Count": grpc.unary_stream_rpc_method_handler(self._count),
            "Join": grpc.stream_unary_rpc_method_handler(self._join),
            "Chat": grpc.stream_stream_rpc_method_handler(self._chat),
            "Slow": grpc.stream_stream_rpc_method_handler(self._slow),
        }
        server.add_unary("/t/Echo", self._echo)
        server.add_unary("/t/Later", self._later)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", handlers),))

    def _echo(self, call: UnaryCall, data: Buffer) -> None:
        call.answer([data])

    def _later(self, call: UnaryCall, data: Buffer) -> None:
        def answer() -> None:
            self.under_way -= 1
            call.answer([data, b"!"], (("n-bin", b"\x00"),))

        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        asyncio.get_running_loop().call_later(0.005, answer)

    async def _told(self, data: bytes, context: CallContext) -> bytes:
        await context.send_initial_metadata((("first", "1"),))
        found = [f"{k}={v!r}" for k, v in context.invocation_metadata() if k.startswith("m")]
        context.set_trailing_metadata((("last-bin", b"\xff\x00"),))
        return ", ".join([context.peer().split(":")[0], *found]).encode()

    async def _wait(self, data: bytes, context: CallContext) -> bytes:
        ended: list[CallContext] = []
        context.add_done_callback(ended.append)
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            assert context.cancelled()
            self.cancelled.set()
        return b""

    async def _buggy(self, data: bytes, context: CallContext) -> bytes:
        raise ZeroDivisionError("a bug")

    async def _count(self, data: bytes, context: CallContext) -> AsyncIterator[bytes]:
        for number in range(int(data)):
            yield b"%d" % number
        if data == b"3":
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, "three is enough")

    async def _join(self, requests: AsyncIterator[bytes], context: CallContext) -> bytes:
        return b",".join([request async for request in requests])

    async def _chat(self, requests: AsyncIterator[bytes], context: CallContext) -> None:
        async for request in requests:
            await context.write(request[::-1])

    async def _slow(self, requests: AsyncIterator[bytes], context: CallContext) -> None:
        async for request in requests:
            self.read += len(request)
            for _ in range(100):
                await asyncio.sleep(0)
                held_bytes = self.server.held_bytes
                self.most_held_bytes = max(self.most_held_bytes, held_bytes)


@dataclass(frozen=True, slots=True)
class Stand:
    """A server that listens, and a channel to it."""

    target: str
    channel: grpc.aio.Channel
    methods: Methods
    server: GrpcServer


Scenario = Callable[[Stand], Awaitable[None]]
scenarios: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    scenarios[function.__name__] = function
    return function


def method(stand: Stand, kind: str, name: str) -> Any:
    return getattr(stand.channel, kind)(f"/t/{name}", None, None)


@scenario
async def messages_of_every_size_come_back_whole(stand: Stand) -> None:
    echo = method(stand, "unary_unary", "Echo")
    for size in (0, 1, 4000, 16_384, 65_536, 131_071, 131_072, 600_000, 5_000_000):
        assert await echo(LARGE[:size]) == LARGE[:size]


@scenario
async def large_messages_at_once_share_the_connection(stand: Stand) -> None:
    echo = method(stand, "unary_unary", "Echo")

    async def one(index: int) -> bool:
        data = LARGE[index : index + 700_000 + index]
        return bool(await echo(data) == data)

    assert all(await asyncio.gather(*map(one, range(16))))


@scenario
async def a_thousand_requests_64_at_a_time(stand: Stand) -> None:
    later = method(stand, "unary_unary", "Later")
    numbers = iter(range(1000))

    async def worker() -> int:
        done = 0
        for number in numbers:
            call = later(b"%d" % number)
            assert await call == b"%d!" % number
            assert dict(await call.trailing_metadata())["n-bin"] == b"\x00"
            done += 1
        return done

    assert sum(await asyncio.gather(*(worker() for _ in range(64)))) == 1000
    assert stand.methods.most_under_way > 32


@scenario
async def metadata_goes_both_ways(stand: Stand) -> None:
    sent = (("m1", "a"), ("m2-bin", bytes(range(256))))
    call = method(stand, "unary_unary", "Told")(b"", metadata=sent)
    assert await call == f"ipv4, m1='a', m2-bin={bytes(range(256))!r}".encode()
    assert dict(await call.initial_metadata())["first"] == "1"
    assert dict(await call.trailing_metadata())["last-bin"] == b"\xff\x00"


@scenario
async def compressed_requests_are_read(stand: Stand) -> None:
    for how in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        for path in ("Echo", "Told"):
            call = method(stand, "unary_unary", path)(bytes(100_000), compression=how)
            assert await call in (bytes(100_000), b"ipv4")


@scenario
async def a_cancelled_call_and_a_deadline_cancel_the_handler(stand: Stand) -> None:
    wait = method(stand, "unary_unary", "Wait")
    call = wait(b"")
    await stand.methods.started.wait()
    call.cancel()
    await stand.methods.cancelled.wait()
    stand.methods.cancelled.clear()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await wait(b"", timeout=0.05)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await stand.methods.cancelled.wait()


@scenario
async def failures_have_their_codes(stand: Stand) -> None:
    for name, code in (("Buggy", "UNKNOWN"), ("Nothing", "UNIMPLEMENTED")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(stand, "unary_unary", name)(b"")
        assert caught.value.code().name == code
    call = method(stand, "unary_stream", "Count")(b"3")
    assert [await call.read() for _ in range(3)] == [b"0", b"1", b"2"]
    assert await call.code() is grpc.StatusCode.OUT_OF_RANGE
    assert await call.details() == "three is enough"


@scenario
async def streams_of_each_kind(stand: Stand) -> None:
    count = method(stand, "unary_stream", "Count")(b"500")
    assert [int(part) async for part in count] == list(range(500))
    join = method(stand, "stream_unary", "Join")
    assert await join(iter([b"a", b"", b"c"])) == b"a,,c"
    assert await join(iter([])) == b""
    chat = method(stand, "stream_stream", "Chat")()
    for data in (b"abc", LARGE, b"", b"xy"):
        await chat.write(data)
        assert await chat.read() == data[::-1]
    await chat.done_writing()
    assert await chat.read() == grpc.aio.EOF  # type: ignore[attr-defined]
    assert await chat.code() is grpc.StatusCode.OK


@scenario
async def a_stream_that_is_not_read_holds_the_client_back(stand: Stand) -> None:
    call = method(stand, "stream_stream", "Slow")()
    for _ in range(40):
        await call.write(bytes(MIB))
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK
    assert stand.methods.read == 40 * MIB
    # The window, and the rest of the message that its last byte belongs to.
    assert MIB < stand.methods.most_held_bytes <= 5 * MIB


@scenario
async def the_synchronous_client_is_served_from_many_threads(stand: Stand) -> None:
    def use(index: int) -> bytes:
        with grpc.insecure_channel(stand.target, options=UNLIMITED) as plain:
            call: Any = plain.unary_unary("/t/Later", None, None)
            joined: Any = plain.stream_unary("/t/Join", None, None)
            assert joined(iter([b"1", b"2"])) == b"1,2"
            answer: bytes = call(LARGE[: 100_000 * index], timeout=20)
            return answer

    answers = await asyncio.gather(*(asyncio.to_thread(use, index) for index in range(8)))
    assert answers == [LARGE[: 100_000 * index] + b"!" for index in range(8)]


@scenario
async def a_stopped_server_ends_its_calls_and_refuses_new_ones(stand: Stand) -> None:
    call = method(stand, "unary_unary", "Wait")(b"")
    await stand.methods.started.wait()
    await stand.server.stop(0.01)
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await method(stand, "unary_unary", "Echo")(b"")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def serve(name: str) -> None:
    server = GrpcServer(max_message_bytes=64 << 20)
    methods = Methods(server)
    target = f"127.0.0.1:{await server.listen('127.0.0.1', 0)}"
    try:
        async with grpc.aio.insecure_channel(target, options=UNLIMITED) as channel:
            stand = Stand(target, channel, methods, server)
            await asyncio.wait_for(scenarios[name](stand), 60)
    finally:
        await server.stop(None)
    names = {task.get_name() for task in asyncio.all_tasks()}
    assert not {name for name in names if name.startswith("/t/")}


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("name", scenarios)
def test_grpcs_clients_are_served(name: str, run: Callable[[Any], None]) -> None:
    run(serve(name))
