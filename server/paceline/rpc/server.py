"""The gRPC server: KServe v2, paceline.v1, health and reflection on one port.

Invariant: `stop` refuses new calls at once, lets accepted requests finish within its grace period,
and ends streams that only wait, so that they don't use that period up.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer
from tritonclient.grpc import service_pb2_grpc

from paceline.core.ports import Control, Inference
from paceline.rpc import control as control_service
from paceline.rpc import edge as edge_service
from paceline.rpc.control import ControlService, ParseChain
from paceline.rpc.edge import EdgeService
from paceline.rpc.health import HealthService
from paceline.rpc.infer import SERVICE
from paceline.rpc.listener import GrpcServer
from paceline.rpc.service import InferenceService
from paceline.v1 import control_pb2_grpc, edge_pb2_grpc

MAX_MESSAGE_BYTES = 64 << 20


class RpcServer:
    """A started server."""

    def __init__(self, server: GrpcServer, *, port: int, stopping: asyncio.Event) -> None:
        self._server = server
        self._stopping = stopping
        self.port = port

    async def stop(self, grace_s: float | None = None) -> None:
        """Refuse new calls, answer the accepted ones for up to `grace_s` seconds, then cut."""
        self._stopping.set()
        await self._server.stop(grace_s)


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
    server = GrpcServer(max_message_bytes=max_message_bytes)
    services = frozenset({SERVICE, control_service.SERVICE, edge_service.SERVICE})
    inference_service = InferenceService(inference, control)
    # The first handler registered for a method is the one that is called.
    inference_service.calls.add_handlers(server, raw=raw)
    # Generated code names grpc's own servers as types.
    generated = cast(Any, server)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(inference_service, generated)
    control_pb2_grpc.add_ControlServicer_to_server(
        ControlService(control, parse_chain=parse_chain, stopping=stopping), generated
    )
    edge_pb2_grpc.add_EdgeServicer_to_server(
        EdgeService(inference_service.infer, max_message_bytes=max_message_bytes), generated
    )
    health_pb2_grpc.add_HealthServicer_to_server(
        HealthService(control, services=services, stopping=stopping), generated
    )
    names = (*sorted(services), health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(ReflectionServicer(names), generated)
    bound = await server.listen(host, port, shared_port=shared_port)
    return RpcServer(server, port=bound, stopping=stopping)
