"""grpc.health.v1: whether the server, or one chain, can be called now.

Invariant: nothing is remembered, so nothing can be stale: Check asks `Control`, Watch asks it
again whenever its status changed (at most once a second) and tells the client what is new.
grpcio's own servicer is not used: its Watch forgets the other watchers of a service when one
of them goes, and it would have to be told every chain's state.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from paceline.core.errors import ErrorKind, RequestError
from paceline.core.ports import Control
from paceline.rpc.context import CallContext
from paceline.rpc.status import Status, abort
from paceline.rpc.stopping import until

_SERVING: int = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: int = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN: int = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """`services` are the gRPC services that are healthy when the server is; "" is the server.

    Any other name is a chain's or a model's.
    """

    def __init__(
        self, control: Control, *, services: frozenset[str], stopping: asyncio.Event
    ) -> None:
        self._control = control
        self._services = services | {""}
        self._stopping = stopping

    async def Check(self, request: Any, context: CallContext) -> Any:
        state = self._state(request.service)
        if state == _UNKNOWN:
            details = f"unknown service {request.service!r}"
            await abort(context, Status(grpc.StatusCode.NOT_FOUND, details))
        return health_pb2.HealthCheckResponse(status=state)

    async def Watch(self, request: Any, context: CallContext) -> AsyncIterator[Any]:
        """Ends after NOT_SERVING when the server stops."""
        told = self._state(request.service)
        yield health_pb2.HealthCheckResponse(status=told)
        changes = until(self._stopping, self._control.watch_status())
        async with aclosing(changes):
            async for _ in changes:
                state = self._state(request.service)
                if state != told:
                    told = state
                    yield health_pb2.HealthCheckResponse(status=told)
        if self._stopping.is_set() and told == _SERVING:
            yield health_pb2.HealthCheckResponse(status=_NOT_SERVING)

    def _state(self, service: str) -> int:
        stopped = self._stopping.is_set() or self._control.draining
        if service in self._services:
            return _SERVING if self._control.ready and not stopped else _NOT_SERVING
        try:
            self._control.callable(service)
        except RequestError as error:
            return _UNKNOWN if error.kind is ErrorKind.UNKNOWN_MODEL else _NOT_SERVING
        return _NOT_SERVING if stopped else _SERVING
