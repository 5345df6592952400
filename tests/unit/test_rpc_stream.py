"""A stream of inferences at the level of frames: what is read, what waits, how it ends."""

from __future__ import annotations

import asyncio
from functools import partial

import grpc
import pytest
from tests.http2_peer import DATA, HEADERS, WINDOW, Client, frame, message, request_block, word

from paceline.core.tensor import Buffer
from paceline.rpc.call import WRITE_AHEAD_BYTES
from paceline.rpc.listener import GrpcServer
from paceline.rpc.status import Status
from paceline.rpc.stream import IN_FLIGHT, Entry, InferStream

FAILURE = Status(grpc.StatusCode.NOT_FOUND, "no such model")
ANSWER_BYTES = 100_000
CLIENT_WINDOW_BYTES = 65_535
ENDS = 0x1


class Service:
    """`/t/Held` answers when the test does, `/t/Big` at once with `ANSWER_BYTES`."""

    def __init__(self) -> None:
        self.server = GrpcServer(max_message_bytes=1000)
        self.entries: list[tuple[InferStream, Entry]] = []
        self.begun = 0
        self.cancelled: list[int] = []
        for path, begin in (("/t/Held", self._hold), ("/t/Big", self._big)):
            opened = partial(InferStream, begin=begin, cancel=self.cancelled.append)
            self.server.add_calls(path, opened)

    def _hold(self, stream: InferStream, data: Buffer) -> None:
        if data == b"malformed":
            raise ValueError("no message")
        entry = stream.enter()
        entry.number = self.begun
        self.begun += 1
        self.entries.append((stream, entry))

    def _big(self, stream: InferStream, data: Buffer) -> None:
        self.begun += 1
        stream.leave(stream.enter(), [bytes(ANSWER_BYTES)])

    def answer(self, index: int, data: bytes) -> None:
        stream, entry = self.entries[index]
        stream.leave(entry, [data])

    def fail(self, index: int) -> None:
        stream, entry = self.entries[index]
        stream.fail(entry, FAILURE, [b"failed"])


@pytest.fixture
async def service() -> Service:
    return Service()


def opened(service: Service, path: str = "/t/Held", *headers: tuple[str, str]) -> Client:
    client = Client(service.server)
    client.take()
    client.send(frame(HEADERS, 0x4, 1, request_block(path, *headers)))
    return client


def send(client: Client, *messages: bytes, ends: bool = False) -> None:
    client.send(frame(DATA, ENDS if ends else 0, 1, b"".join(map(message, messages))))


async def passes(count: int = 3) -> None:
    """So many passes of the event loop."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_answers_come_as_requests_finish_and_the_stream_ends_after_the_last(
    service: Service,
) -> None:
    client = opened(service)
    send(client, b"a", b"b", ends=True)
    service.answer(1, b"B")
    await passes()
    data, headers = client.answers()[1]
    assert (data, "grpc-status" in headers) == (message(b"B"), False)
    service.answer(0, b"A")
    await passes()
    data, headers = client.answers()[1]
    assert (data, headers["grpc-status"]) == (message(b"A"), "0")


async def test_a_stream_without_requests_ends_in_order(service: Service) -> None:
    client = opened(service)
    send(client, ends=True)
    ((data, headers),) = client.answers().values()
    assert (data, headers[":status"], headers["grpc-status"]) == (b"", "200", "0")


async def test_the_next_request_begins_after_the_end_of_another_not_within_it(
    service: Service,
) -> None:
    client = opened(service)
    send(client, *[b"x"] * (IN_FLIGHT + 2))
    assert service.begun == IN_FLIGHT
    service.answer(0, b"done")
    assert service.begun == IN_FLIGHT
    await passes()
    assert service.begun == IN_FLIGHT + 1


async def test_a_client_that_does_not_read_gets_no_more_than_its_requests_in_flight_served(
    service: Service,
) -> None:
    client = opened(service, "/t/Big")
    requests = 3 * IN_FLIGHT
    send(client, *[b"x"] * requests, ends=True)
    await passes()
    ahead = (WRITE_AHEAD_BYTES + CLIENT_WINDOW_BYTES) // ANSWER_BYTES + 1
    assert IN_FLIGHT <= service.begun <= IN_FLIGHT + ahead
    got, headers = client.answers()[1]
    while "grpc-status" not in headers:
        more = word(1_000_000)
        client.send(frame(WINDOW, 0, 0, more) + frame(WINDOW, 0, 1, more))
        await passes()
        data, headers = client.answers()[1]
        got += data
    assert service.begun == requests
    assert got == message(bytes(ANSWER_BYTES)) * requests


async def test_the_first_failure_ends_a_stream_that_wants_it_and_drops_the_others(
    service: Service,
) -> None:
    client = opened(service, "/t/Held", ("triton_grpc_error", "true"))
    send(client, b"a", b"b", b"c")
    service.fail(1)
    service.answer(0, b"too late")
    await passes()
    ((data, headers),) = client.answers().values()
    assert (data, headers["grpc-status"]) == (b"", str(FAILURE.code.value[0]))
    assert service.cancelled == [2]


async def test_a_failure_leaves_other_streams_open(service: Service) -> None:
    client = opened(service)
    send(client, b"a", b"b")
    service.fail(0)
    service.answer(1, b"B")
    await passes()
    data, headers = client.answers()[1]
    assert (data, "grpc-status" in headers) == (message(b"failed") + message(b"B"), False)


async def test_what_is_no_message_ends_the_stream_and_drops_its_requests(service: Service) -> None:
    client = opened(service)
    send(client, b"a", b"malformed", b"b")
    ((_, headers),) = client.answers().values()
    assert headers["grpc-status"] != "0"
    assert (service.begun, service.cancelled) == (1, [0])


async def test_a_stopping_server_answers_what_it_accepted_and_reads_no_more(
    service: Service,
) -> None:
    client = opened(service)
    send(client, b"a")
    stopping = asyncio.create_task(service.server.stop(10.0))
    await passes()
    send(client, b"b")
    assert service.begun == 1
    service.answer(0, b"A")
    await passes()
    data, headers = client.answers()[1]
    assert (data, headers["grpc-status"]) == (message(b"A"), "14")
    client.lose()
    await stopping
