"""One Triton over gRPC: executing batches, repository calls, what it says about its models.

Invariant: every failure of a call becomes one BackendError (ResidencyError while connecting)
that names the server; cancelling the caller cancels the call. Batches take the fast way
(`execution`: raw bytes, HTTP/2 by hand, shared memory), everything else goes through grpc.aio.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from paceline.core.errors import BackendError, ErrorKind, ResidencyError
from paceline.core.ports import ModelCall, ModelState, OnExecuted
from paceline.core.tensor import Tensor
from paceline.triton.execution import Execution, Outcome
from paceline.triton.http2 import Http2Transport
from paceline.triton.messages import INT32_MAX, decode_infer_response, encode_infer_request
from paceline.triton.shared_memory import SharedMemoryPool
from paceline.triton.transport import (
    NO_TIMEOUT_S,
    CallFailed,
    ChannelClosed,
    GrpcTransport,
    call_failed,
)

__all__ = [
    "ServerIdentity",
    "TritonClient",
    "TritonFleet",
    "checked_url",
    "decode_infer_response",
    "encode_infer_request",
    "error_kind",
]

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", INT32_MAX),
    ("grpc.max_receive_message_length", INT32_MAX),
    # Triton answers more than one ping in 300 s on a quiet connection with GOAWAY; the ping's
    # time-out is also the socket's TCP_USER_TIMEOUT, which is what finds a vanished machine.
    ("grpc.keepalive_time_ms", 300_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A restarted Triton is found again within a second, not within gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Machines are direct peers; a proxy from the environment is not meant for them.
    ("grpc.enable_http_proxy", 0),
    # Without this, channels of one process to one address share a connection (and its back-off).
    ("grpc.use_local_subchannel_pool", 1),
)
DEFAULT_TIMEOUT_S = 10.0
_PROBE_MODEL = "paceline-probe-of-model-control-mode"


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """What a server says it is."""

    name: str
    version: str
    extensions: tuple[str, ...]


class TritonClient:
    """A channel to one Triton. Use inside a running event loop; `close` when done."""

    def __init__(self, url: str, *, name: str = "") -> None:
        self._url = checked_url(url)
        self._name = name
        self._open()

    @classmethod
    async def connect(
        cls, url: str, *, name: str = "", timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> TritonClient:
        """A client of a Triton that answers and lets models be loaded.

        Raises ResidencyError (one line, with what to do) when it does neither within `timeout_s`.
        """
        client = cls(url, name=name)
        try:
            await client._await_live(timeout_s)
            await client._check_explicit_control()
        except BaseException:
            await client.close()
            raise
        return client

    @property
    def url(self) -> str:
        return self._url

    @property
    def name(self) -> str:
        """The machine's name, or the URL where none was given."""
        return self._name or self._url

    @property
    def shared_memory(self) -> SharedMemoryPool:
        """Through which large batches go, while it is `on`."""
        return self._pool

    async def retarget(self, url: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Talk to a restarted Triton, perhaps at another port; returns when it answers.

        Also for an unchanged `url`: the old connection may still wait out its back-off. Calls in
        flight on it fail. Raises ResidencyError when nothing answers within `timeout_s`.
        """
        old = (self._channel, self._execution, self._pool)
        self._url = checked_url(url)
        self._open()
        await _close(*old, unregister=False)
        await self._await_live(timeout_s)

    async def close(self) -> None:
        """Close the channel; calls in flight fail with BackendError."""
        await _close(self._channel, self._execution, self._pool, unregister=True)

    def begin(self, call: ModelCall, on_end: OnExecuted, *, timeout_s: float) -> bool:
        """See `Executor.begin`."""
        if timeout_s <= 0:
            return False

        def ended(outcome: Outcome) -> None:
            if isinstance(outcome, BackendError):
                on_end(outcome)
            elif isinstance(outcome, Exception):
                on_end(self._failure(outcome))
            else:
                try:
                    found = self._ordered(call, outcome)
                except BackendError as error:
                    on_end(error)
                else:
                    on_end(found)

        return self._execution.begin(call, timeout_s, ended)

    async def execute(self, call: ModelCall, *, timeout_s: float) -> tuple[Tensor, ...]:
        """Run one batch; outputs in the order of `call.outputs` (all, as sent, if it names none).

        Raises BackendError: DEADLINE, UNAVAILABLE (unreachable), or Triton's own kind and words.
        """
        if timeout_s <= 0:
            raise BackendError(
                f"deadline exceeded before model {call.model!r} was started",
                kind=ErrorKind.DEADLINE,
            )
        try:
            tensors = await self._execution.run(call, timeout_s)
        except (CallFailed, ChannelClosed) as error:
            raise self._failure(error) from None
        return self._ordered(call, tensors)

    def _ordered(self, call: ModelCall, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs that were asked for. Raises BackendError."""
        if not call.outputs:
            return tuple(tensors.values())
        try:
            return tuple([tensors[name] for name in call.outputs])
        except KeyError as error:
            raise BackendError(
                f"model {call.model!r} on {self.name} gave no output {error.args[0]!r}; "
                f"it gave {', '.join(sorted(tensors)) or 'none'}"
            ) from None

    async def live(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> bool:
        """Whether the server answers at all; unreachable is False."""
        return await self._flag(self._stub.ServerLive, service_pb2.ServerLiveRequest(), timeout_s)

    async def ready(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> bool:
        """Whether the server can serve; unreachable is False."""
        return await self._flag(self._stub.ServerReady, service_pb2.ServerReadyRequest(), timeout_s)

    async def model_ready(self, model: str, *, version: str = "") -> bool:
        """Whether a model is loaded; also True for one whose process has died (Triton's view)."""
        request = service_pb2.ModelReadyRequest(name=model, version=version)
        response = await self._call(self._stub.ModelReady, request, DEFAULT_TIMEOUT_S)
        return bool(response.ready)

    async def identity(
        self, *, timeout_s: float = DEFAULT_TIMEOUT_S, wait_for_ready: bool = False
    ) -> ServerIdentity:
        """Name, version and extensions; with `wait_for_ready` until the server can be reached."""
        response = await self._call(
            self._stub.ServerMetadata,
            service_pb2.ServerMetadataRequest(),
            timeout_s,
            wait_for_ready=wait_for_ready,
        )
        return ServerIdentity(response.name, response.version, tuple(response.extensions))

    async def metadata(self, model: str, *, version: str = "") -> Any:
        """`ModelMetadataResponse` of a loaded model. BackendError when it is not."""
        request = service_pb2.ModelMetadataRequest(name=model, version=version)
        return await self._call(self._stub.ModelMetadata, request, DEFAULT_TIMEOUT_S)

    async def config(self, model: str, *, version: str = "") -> Any:
        """`ModelConfig` of a loaded model, as completed by the server. BackendError otherwise."""
        request = service_pb2.ModelConfigRequest(name=model, version=version)
        response = await self._call(self._stub.ModelConfig, request, DEFAULT_TIMEOUT_S)
        return response.config

    async def index(self, *, ready: bool = False) -> tuple[ModelState, ...]:
        """Every model version the server knows, or only those that are ready; a model never loaded
        has no version or state.
        """
        request = service_pb2.RepositoryIndexRequest(ready=ready)
        response = await self._call(self._stub.RepositoryIndex, request, DEFAULT_TIMEOUT_S)
        return tuple(
            ModelState(line.name, line.version, line.state or "UNAVAILABLE", line.reason)
            for line in response.models
        )

    async def load(
        self,
        model: str,
        *,
        config: str = "",
        files: Mapping[str, bytes] = MappingProxyType({}),
        timeout_s: float,
    ) -> None:
        """RepositoryModelLoad; `config` (JSON) replaces the whole configuration, and sticks.

        `files` by `file:` and their path are the whole model directory, instead of one on disk.
        Names of 256 characters and more abort Triton 2.51.
        """
        request = service_pb2.RepositoryModelLoadRequest(model_name=model)
        if config:
            request.parameters["config"].string_param = config
        for name, content in files.items():
            request.parameters[name].bytes_param = content
        await self._call(self._stub.RepositoryModelLoad, request, timeout_s)

    async def unload(self, model: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """RepositoryModelUnload; returns when it has begun, not when it is done."""
        request = service_pb2.RepositoryModelUnloadRequest(model_name=model)
        await self._call(self._stub.RepositoryModelUnload, request, timeout_s)

    def _open(self) -> None:
        self._channel = grpc.aio.insecure_channel(self._url, options=CHANNEL_OPTIONS)
        self._stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        channel, url = self._channel, self._url
        self._pool = SharedMemoryPool(self._register, self._unregister, self._registered)
        self._execution = Execution(Http2Transport(url), self._pool, lambda: GrpcTransport(channel))

    async def _register(self, region: str, key: str, size_bytes: int) -> None:
        request = service_pb2.SystemSharedMemoryRegisterRequest(
            name=region, key=key, offset=0, byte_size=size_bytes
        )
        await self._call(self._stub.SystemSharedMemoryRegister, request, DEFAULT_TIMEOUT_S)

    async def _unregister(self, region: str) -> None:
        request = service_pb2.SystemSharedMemoryUnregisterRequest(name=region)
        await self._call(self._stub.SystemSharedMemoryUnregister, request, DEFAULT_TIMEOUT_S)

    async def _registered(self) -> list[str]:
        request = service_pb2.SystemSharedMemoryStatusRequest()
        response = await self._call(self._stub.SystemSharedMemoryStatus, request, DEFAULT_TIMEOUT_S)
        return list(response.regions)

    async def _flag(self, method: Any, request: Any, timeout_s: float) -> bool:
        try:
            response = await self._call(method, request, timeout_s)
        except BackendError:
            return False
        return bool(getattr(response, "live", False) or getattr(response, "ready", False))

    async def _call(
        self, method: Any, request: Any, timeout_s: float, *, wait_for_ready: bool = False
    ) -> Any:
        """One unary call; AioRpcError becomes BackendError."""
        timeout = timeout_s if timeout_s < NO_TIMEOUT_S else None
        try:
            return await method(request, timeout=timeout, wait_for_ready=wait_for_ready)
        except grpc.aio.AioRpcError as error:
            raise self._failure(call_failed(error)) from None
        except grpc.aio.UsageError:
            raise self._failure(ChannelClosed(during_call=False)) from None
        except asyncio.CancelledError:
            # grpc.aio also raises this when the channel is closed under a call.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise self._failure(ChannelClosed(during_call=True)) from None

    def _failure(self, error: CallFailed | ChannelClosed) -> BackendError:
        if isinstance(error, ChannelClosed):
            how = "was closed during a call" if error.during_call else "is closed"
            return BackendError(f"the connection to {self.name} {how}", kind=ErrorKind.UNAVAILABLE)
        if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return BackendError(
                f"deadline exceeded while waiting for {self.name}", kind=ErrorKind.DEADLINE
            )
        if error.unreachable:
            return BackendError(
                f"Triton at {self._url} is not reachable: {_one_line(error.message)}",
                kind=ErrorKind.UNAVAILABLE,
            )
        return BackendError(error.message, kind=error_kind(error.code, error.message))

    async def _await_live(self, timeout_s: float) -> None:
        try:
            request = service_pb2.ServerLiveRequest()
            await self._call(self._stub.ServerLive, request, timeout_s, wait_for_ready=True)
        except BackendError as error:
            if error.kind is ErrorKind.UNSUPPORTED:
                raise ResidencyError(
                    f"{self._url} answers gRPC but is not a Triton: give the URL of a "
                    "tritonserver's gRPC port (8001 unless changed)"
                ) from None
            reason = await self._reason_unreachable()
            raise ResidencyError(
                f"no Triton answered at {self._url} within {timeout_s:g} s ({reason}): is "
                "tritonserver running, and is this its gRPC port (8001 unless changed)?"
            ) from None

    async def _reason_unreachable(self) -> str:
        """Why connecting fails, in gRPC's words: a call that waits says only that time is up."""
        try:
            await self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=1.0)
        except grpc.aio.AioRpcError as error:
            return _one_line(error.details() or error.code().name)
        return "it answered too late"

    async def _check_explicit_control(self) -> None:
        """Unloading an unknown model is fine in explicit mode and refused in every other."""
        try:
            await self.unload(_PROBE_MODEL)
        except BackendError as error:
            if "explicit model load / unload is not allowed" not in error.message:
                raise ResidencyError(
                    f"Triton at {self._url} refused a repository call: {error.message}"
                ) from None
            raise ResidencyError(
                f"Triton at {self._url} does not let models be loaded: start it with "
                "--model-control-mode=explicit"
            ) from None


class TritonFleet:
    """Machines by name (an `Executor`)."""

    def __init__(self, clients: Mapping[str, TritonClient] | None = None) -> None:
        self._clients = dict(clients or {})

    def add(self, machine: str, client: TritonClient) -> None:
        """Execute on one more machine; the fleet closes its client."""
        assert machine not in self._clients, machine
        self._clients[machine] = client

    @property
    def machines(self) -> tuple[str, ...]:
        return tuple(sorted(self._clients))

    def client(self, machine: str) -> TritonClient:
        """The client of a machine. Raises BackendError for an unknown name."""
        client = self._clients.get(machine)
        if client is None:
            raise BackendError(
                f"unknown machine {machine!r}; known: {', '.join(self.machines) or 'none'}"
            )
        return client

    def begin(self, machine: str, call: ModelCall, on_end: OnExecuted, *, timeout_s: float) -> bool:
        """See `Executor.begin`."""
        client = self._clients.get(machine)
        return client is not None and client.begin(call, on_end, timeout_s=timeout_s)

    async def execute(
        self, machine: str, call: ModelCall, *, timeout_s: float
    ) -> tuple[Tensor, ...]:
        """See `Executor.execute`."""
        return await self.client(machine).execute(call, timeout_s=timeout_s)

    async def remove(self, machine: str) -> None:
        """Close a machine's client and forget it."""
        await self._clients.pop(machine).close()

    async def close(self) -> None:
        """Close every client."""
        for machine in self.machines:
            await self._clients[machine].close()


def checked_url(url: str) -> str:
    """`host:port`; a `grpc://` before it is dropped. Raises ResidencyError for anything else."""
    bare = url.removeprefix("grpc://").rstrip("/")
    host, colon, port = bare.rpartition(":")
    if "/" in bare or not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise ResidencyError(
            f"Triton URL {url!r} is not host:port of a gRPC port (for example 127.0.0.1:8001)"
        )
    return bare


PROCESS_DIED = "is not healthy"
"""What Triton says of a model whose process it has lost."""


def error_kind(code: grpc.StatusCode, details: str) -> ErrorKind:
    """The kind of a failure that Triton itself reported.

    UNAVAILABLE also for a model whose process died, which Triton calls INTERNAL: the request was
    not executed, and the model has to be repaired.
    """
    if code is grpc.StatusCode.INTERNAL and PROCESS_DIED in details:
        return ErrorKind.UNAVAILABLE
    if code is grpc.StatusCode.NOT_FOUND and "no available versions" in details:
        return ErrorKind.NOT_READY
    if code is grpc.StatusCode.UNAVAILABLE:
        for words, kind in _UNAVAILABLE_KINDS:
            if words in details:
                return kind
    return _KINDS.get(code, ErrorKind.BACKEND)


_KINDS = {
    grpc.StatusCode.INVALID_ARGUMENT: ErrorKind.INVALID,
    grpc.StatusCode.NOT_FOUND: ErrorKind.UNKNOWN_MODEL,
    grpc.StatusCode.UNIMPLEMENTED: ErrorKind.UNSUPPORTED,
    grpc.StatusCode.CANCELLED: ErrorKind.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ErrorKind.OVERLOADED,
}
_UNAVAILABLE_KINDS = (
    ("Exceeds maximum queue size", ErrorKind.QUEUE_FULL),
    ("Request timeout expired", ErrorKind.DEADLINE),
    ("Server is stopping", ErrorKind.DRAINING),
)


async def _close(
    channel: grpc.aio.Channel,
    execution: Execution,
    pool: SharedMemoryPool,
    *,
    unregister: bool,
) -> None:
    await execution.close()
    await pool.close(unregister=unregister)
    await channel.close(None)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
