"""The other processes of `bench_gateway.py`: load generator, bare gRPC echo servers, front servers.

`load` reads one JSON object a line (see `Load`), keeps `in_flight` requests outstanding for
`duration_s` and answers with one JSON line: latencies, rate, and the CPU time that the processes
in `pids` used meanwhile. `echo` answers every message with itself: what grpc.aio costs at least;
`own` does so on Paceline's server. `relay` hands each message on to Triton as it came, by
Paceline's server and client of HTTP/2 with nothing between them: what any front on these costs.
Both work on serialized messages; the generator's own work is the same for whatever it measures.
`naive` is the front server as one writes it first: grpc.aio's server, protobuf objects,
`tritonclient.grpc.aio`, no shared memory; Triton batches. `paceline` takes the arguments of the
`paceline` command.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import grpc
import grpc.aio
import numpy as np
import psutil
import uvloop
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.grpc.aio import InferenceServerClient, InferInput

from paceline.core.tensor import Buffer
from paceline.rpc import wire
from paceline.rpc.call import UnaryCall
from paceline.rpc.listener import GrpcServer
from paceline.rpc.stream import InferStream
from paceline.triton.http2 import Http2Transport
from paceline.triton.transport import INFER, CallFailed, ChannelClosed

SERVICE = "inference.GRPCInferenceService"
UNLIMITED = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)
GIVE_UP_S = 60.0
MOST_BYTES = 64 << 20
"""Of a message, for Paceline's server."""
DESCRIBING = ("ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics")
"""What perf_analyzer asks before it sends requests; `relay` and `naive` have Triton answer."""


@dataclass(frozen=True, slots=True)
class Load:
    """One measurement. `least_bytes` is how long an answer must be at least to be one."""

    target: str
    message: str
    least_bytes: int
    in_flight: int
    duration_s: float
    warmup_s: float = 0.2
    stream: bool = False
    pids: tuple[int, ...] = ()


@dataclass(slots=True)
class Observed:
    """Answers of the measured window; those of the warm-up are counted nowhere."""

    begin_s: float
    latencies_s: list[float] = field(default_factory=list)
    first: asyncio.Event = field(default_factory=asyncio.Event)

    def answer(self, response: bytes, least_bytes: int, sent_s: float) -> None:
        if len(response) < least_bytes:
            raise RuntimeError(f"answer of {len(response)} bytes: {response[:300]!r}")
        now_s = perf_counter()
        if now_s >= self.begin_s:
            self.latencies_s.append(now_s - sent_s)
            self.first.set()


async def measure(load: Load) -> dict[str, float]:
    """Median and p99 latency, answers a second, CPU seconds of `pids` per answer."""
    message = await asyncio.to_thread(Path(load.message).read_bytes)
    processes = [psutil.Process(pid) for pid in load.pids]
    async with grpc.aio.insecure_channel(load.target, options=UNLIMITED) as channel:
        begin_s = perf_counter() + load.warmup_s
        observed = Observed(begin_s)
        window = asyncio.create_task(_window(processes, observed, load))
        run = _stream if load.stream else _unary
        # A server that hangs ends the benchmark, not the night.
        async with asyncio.timeout(load.duration_s + load.warmup_s + GIVE_UP_S):
            await run(channel, message, load, observed, begin_s + load.duration_s)
        cpu_s, answers, window_s = await window
    if not answers:
        raise RuntimeError(f"no answer from {load.target} within {load.duration_s:g} s")
    latencies_s = sorted(observed.latencies_s)
    return {
        "p50_ms": statistics.median(latencies_s) * 1e3,
        "p99_ms": latencies_s[int(0.99 * (len(latencies_s) - 1))] * 1e3,
        "rps": answers / window_s,
        "cpu_us": cpu_s / answers * 1e6,
    }


async def _window(
    processes: list[psutil.Process], observed: Observed, load: Load
) -> tuple[float, int, float]:
    """CPU seconds, answers and length of the measured window."""
    await asyncio.sleep(observed.begin_s - perf_counter())
    before_s, started_s = _cpu_s(processes), perf_counter()
    already = len(observed.latencies_s)
    await asyncio.sleep(load.duration_s)
    # Slow answers: wait for one, so that there is something to tell.
    if len(observed.latencies_s) == already:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(observed.first.wait(), GIVE_UP_S)
    answers = len(observed.latencies_s) - already
    return _cpu_s(processes) - before_s, answers, perf_counter() - started_s


def _cpu_s(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(spent.user + spent.system for spent in times)


async def _unary(
    channel: grpc.aio.Channel, message: bytes, load: Load, observed: Observed, end_s: float
) -> None:
    call: Any = channel.unary_unary(f"/{SERVICE}/ModelInfer", None, None)

    async def client() -> None:
        while (sent_s := perf_counter()) < end_s:
            observed.answer(await call(message), load.least_bytes, sent_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(load.in_flight):
            group.create_task(client())


async def _stream(
    channel: grpc.aio.Channel, message: bytes, load: Load, observed: Observed, end_s: float
) -> None:
    """One stream with `in_flight` requests on it; answers are matched to requests in order."""
    start: Any = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer", None, None)
    call = start()
    sent: deque[float] = deque()
    places = asyncio.Semaphore(load.in_flight)

    async def send() -> None:
        while True:
            await places.acquire()
            if perf_counter() >= end_s:
                break
            sent.append(perf_counter())
            await call.write(message)
        await call.done_writing()

    # Sending and reading go on at once: a server that cannot write its answers stops reading.
    async with asyncio.TaskGroup() as group:
        group.create_task(send())
        async for response in call:
            observed.answer(response, load.least_bytes, sent.popleft())
            places.release()


async def _serve_load() -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        request = json.loads(line)
        try:
            answer: dict[str, Any] = await measure(Load(**request))
        except BaseException as error:
            answer = {"error": _reason(error)}
        print(json.dumps(answer), flush=True)


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"


async def _echo_stream(requests: AsyncIterator[bytes], context: Any) -> None:
    async for request in requests:
        await context.write(request)


async def _own(port: int) -> None:
    server = GrpcServer(max_message_bytes=MOST_BYTES)
    server.add_unary(f"/{SERVICE}/ModelInfer", lambda call, data: call.answer([data]))
    stream = grpc.stream_stream_rpc_method_handler(_echo_stream)
    server.add_registered_method_handlers(SERVICE, {"ModelStreamInfer": stream})
    await server.listen("127.0.0.1", port)
    await server.wait_for_termination()


async def _relay(port: int, triton: str) -> None:
    upstream = Http2Transport(triton)
    # Makes the connection; what the method answers does not matter.
    await upstream.unary(f"/{SERVICE}/ServerLive", [b""], GIVE_UP_S)

    def ask(data: Buffer, on_answer: Callable[[Buffer], None], path: str = INFER) -> None:
        def answered(outcome: Buffer | CallFailed | ChannelClosed) -> None:
            if isinstance(outcome, CallFailed | ChannelClosed):
                sys.exit(f"relay: {outcome}")
            on_answer(outcome)

        if not upstream.begin(path, [data], answered, GIVE_UP_S):
            sys.exit("relay: Triton has closed the connection")

    def begin(stream: InferStream, data: Buffer) -> None:
        entry = stream.enter()
        ask(data, lambda answer: stream.leave(entry, wire.stream_parts([answer])))

    def hand_on(path: str) -> Callable[[UnaryCall, Buffer], None]:
        return lambda call, data: ask(data, lambda answer: call.answer([answer]), path)

    server = GrpcServer(max_message_bytes=MOST_BYTES)
    for path in (INFER, *(f"/{SERVICE}/{method}" for method in DESCRIBING)):
        server.add_unary(path, hand_on(path))
    stream = partial(InferStream, begin=begin, cancel=lambda number: None)
    server.add_calls(f"/{SERVICE}/ModelStreamInfer", stream)
    await server.listen("127.0.0.1", port)
    await server.wait_for_termination()


async def _echo(port: int) -> None:
    async def unary(request: bytes, context: Any) -> bytes:
        return request

    server = grpc.aio.server(options=UNLIMITED)
    handlers = {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(unary),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(_echo_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def _by_triton(method: str) -> Callable[[_Naive, Any, Any], Awaitable[Any]]:
    async def answer(naive: _Naive, request: Any, context: Any) -> Any:
        return await getattr(naive.triton, method)(request)

    return answer


class _Naive(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Every request to one model, by itself."""

    def __init__(self, client: Any, triton: Any, model: str) -> None:
        self._client, self.triton, self._model = client, triton, model

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        (given,) = request.inputs
        tensor = InferInput(given.name, list(given.shape), given.datatype)
        data = np.frombuffer(request.raw_input_contents[0], np.uint8)
        tensor.set_data_from_numpy(data.reshape(given.shape))
        made = (await self._client.infer(self._model, [tensor])).as_numpy("y")
        response = service_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
        response.outputs.add(name="y", datatype=given.datatype, shape=made.shape)
        response.raw_output_contents.append(made.tobytes())
        return response

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> None:
        """Answers in the order of the requests, which are under way at once."""
        begun: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue()

        async def begin() -> None:
            async with asyncio.TaskGroup() as group:
                async for request in requests:
                    begun.put_nowait(group.create_task(self.ModelInfer(request, context)))
            begun.put_nowait(None)

        async with asyncio.TaskGroup() as both:
            both.create_task(begin())
            while (task := await begun.get()) is not None:
                answer = service_pb2.ModelStreamInferResponse(infer_response=await task)
                await context.write(answer)


for _method in DESCRIBING:
    setattr(_Naive, _method, _by_triton(_method))


async def _naive(port: int, triton: str, model: str) -> None:
    server = grpc.aio.server(options=UNLIMITED)
    async with (
        InferenceServerClient(triton) as client,
        grpc.aio.insecure_channel(triton) as channel,
    ):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        naive = _Naive(client, stub, model)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(naive, server)
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await server.wait_for_termination()


def _front(arguments: list[str]) -> None:
    """`paceline ARGUMENTS`."""
    import paceline.cli

    sys.argv = ["paceline", *arguments]
    paceline.cli.main()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("role", choices=("load", "echo", "own", "relay", "naive", "paceline"))
    parser.add_argument("--port", type=int, default=0, help="where the others but `load` listen")
    parser.add_argument("--triton", default="", help="`naive`, `relay`: whom they ask")
    parser.add_argument("--model", default="", help="`naive`: for what")
    options, rest = parser.parse_known_args()
    if options.role == "paceline":
        _front(rest)
        return
    roles: dict[str, Callable[[], Awaitable[None]]] = {
        "load": _serve_load,
        "echo": lambda: _echo(options.port),
        "own": lambda: _own(options.port),
        "relay": lambda: _relay(options.port, options.triton),
        "naive": lambda: _naive(options.port, options.triton, options.model),
    }

    async def run() -> None:
        await roles[options.role]()

    uvloop.run(run())


if __name__ == "__main__":
    main()
