"""The gRPC server: KServe v2, paceline.v1, health and reflection on one port.

Invariant: `stop` refuses new calls at once, lets accepted requests finish within its grace period,
and ends streams that only wait, so that they don't use that period up.
"""

from __future__ import annotations

import asyncio
import errno
import socket

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tritonclient.grpc import service_pb2_grpc

from paceline.core.errors import ConfigError
from paceline.core.ports import Control, Inference
from paceline.rpc import control as control_service
from paceline.rpc import service
from paceline.rpc.control import ControlService, ParseChain
from paceline.rpc.health import HealthService
from paceline.rpc.service import InferenceService
from paceline.v1 import control_pb2_grpc

MAX_MESSAGE_BYTES = 64 << 20


class RpcServer:
    """A started server."""

    def __init__(self, server: grpc.aio.Server, *, port: int, stopping: asyncio.Event) -> None:
        self._server = server
        self._stopping = stopping
        self.port = port

    async def stop(self, grace_s: float | None = None) -> None:
        """Refuse new calls, answer the accepted ones for up to `grace_s` seconds, then cut."""
        self._stopping.set()
        await self._server.stop(grace_s)

    async def wait_for_termination(self) -> None:
        """Until `stop` has finished."""
        await self._server.wait_for_termination()


async def start_grpc(
    inference: Inference,
    control: Control,
    *,
    parse_chain: ParseChain,
    host: str = "127.0.0.1",
    port: int = 8001,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    raw: bool = True,
    shared_port: bool = False,
) -> RpcServer:
    """Serve on `host:port` (0: a free one; see `RpcServer.port`).

    A longer request ends with RESOURCE_EXHAUSTED. `raw` false lets protobuf read and write every
    inference message, for comparison. `shared_port`: other processes listen there too and the
    kernel deals connections out (SO_REUSEPORT). Raises ConfigError when it cannot listen there.
    """
    stopping = asyncio.Event()
    server = grpc.aio.server(options=_options(max_message_bytes, shared_port=shared_port))
    services = frozenset({service.SERVICE, control_service.SERVICE})
    inference_service = InferenceService(inference, control, stopping=stopping)
    if raw:
        # The first handler registered for a method is the one that is called.
        server.add_generic_rpc_handlers((inference_service.raw_handlers(),))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(inference_service, server)
    control_pb2_grpc.add_ControlServicer_to_server(
        ControlService(control, parse_chain=parse_chain, stopping=stopping), server
    )
    health_pb2_grpc.add_HealthServicer_to_server(
        HealthService(control, services=services, stopping=stopping), server
    )
    names = (*sorted(services), health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    bound = _listen(server, host, port)
    await server.start()
    return RpcServer(server, port=bound, stopping=stopping)


def _options(max_message_bytes: int, *, shared_port: bool) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        # An answer may be longer than any request: the client's own limit decides.
        ("grpc.max_send_message_length", -1),
        # Unless meant, a second server on a port would take half of the first one's clients.
        ("grpc.so_reuseport", int(shared_port)),
        # Clients may ping as often as they like, also without a call.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def _listen(server: grpc.aio.Server, host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        return server.add_insecure_port(address)
    except RuntimeError:
        failure = _why_not(host, port)
    if failure is not None and failure.errno == errno.EADDRINUSE:
        raise ConfigError(f"port {port} is in use; choose another with --grpc-port")
    why = f": {failure.strerror}" if failure is not None else ""
    raise ConfigError(f"cannot listen on {address}{why}; see --host and --grpc-port")


def _why_not(host: str, port: int) -> OSError | None:
    """How an ordinary socket fails there; gRPC says no more than that it did."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        return error
    return None
