"""A gRPC server on Paceline's own HTTP/2: what it serves, its sockets, its connections.

Invariants: generated code registers its handlers here as with grpc.aio's server; the first handler
registered for a method is the one that is called. `stop` takes nothing new, lets what was accepted
end within the grace period, and leaves no connection and no task behind.

Why not grpc.aio: its server is half of what a request costs (docs/benchmarks/gateway.md, decision
0011).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from paceline.core.errors import ConfigError
from paceline.http2 import hpack
from paceline.http2.connection import Plug, ReadBuffer
from paceline.http2.server import ServerConnection, ServerLimits, ServerStream, Serving
from paceline.rpc.call import Begin, Call, Intake, UnaryCall
from paceline.rpc.context import run
from paceline.rpc.head import ENCODINGS, Head, Metadata, read_head
from paceline.rpc.status import Status
from paceline.rpc.task import TaskCall

MAX_HELD_BYTES = 1 << 30
"""Of requests that have come in part, or wait in a stream: all connections together."""
MAX_CONNECTIONS = 4096
_BACKLOG = 1024
_CHECK_EVERY_S = 20.0
_QUIET_CHECKS = 2
_STUCK_CHECKS = 3
_CLOSING_S = 1.0

Handler = Any
"""A grpc.RpcMethodHandler, which is generic to the type checker only."""
_STOPPED = Status(grpc.StatusCode.UNAVAILABLE, "the server has stopped")


Open = Callable[[ServerConnection[Any], int, Head[Any], Intake], Call]
"""Makes the call of a method that is served without a task."""


@dataclass(frozen=True, slots=True)
class _Method:
    """How a path is served: without a task, or by a coroutine."""

    open: Open | None = None
    handler: Handler | None = None


class _Details(grpc.HandlerCallDetails):
    """What generic handlers choose by."""

    def __init__(self, method: str, invocation_metadata: Any = ()) -> None:
        self.method = method
        self.invocation_metadata = invocation_metadata


class GrpcServer:
    """See the module docstring."""

    def __init__(
        self,
        *,
        max_message_bytes: int,
        max_held_bytes: int = MAX_HELD_BYTES,
        max_connections: int = MAX_CONNECTIONS,
        limits: ServerLimits | None = None,
    ) -> None:
        self._intake = Intake(max_message_bytes, max_held_bytes)
        self._max_connections = max_connections
        self._methods: dict[str, _Method] = {}
        self._generic: list[grpc.GenericRpcHandler[Any, Any]] = []
        self._serving: Serving[Head[_Method]] = Serving(
            head=partial(read_head, method=self._method),
            open_stream=self._open,
            closed=self._closed,
            limits=limits or ServerLimits(),
        )
        self._buffer = ReadBuffer()
        self._connections: set[ServerConnection[Head[_Method]]] = set()
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._check: asyncio.TimerHandle | None = None
        self._stopping = False
        self._stopped = asyncio.Event()

    @property
    def held_bytes(self) -> int:
        """Of requests that no handler has taken yet."""
        return self._intake.held_bytes

    # -- what is served ---------------------------------------------------------------------

    def add_unary(self, path: str, begin: Begin) -> None:
        """Serve a unary method without a task."""
        self.add_calls(path, partial(UnaryCall, begin=begin))

    def add_calls(self, path: str, open_call: Open) -> None:
        """Serve a method by calls of one's own."""
        self._methods.setdefault(path, _Method(open=open_call))

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """As grpc.aio.Server's."""
        for name, handler in handlers.items():
            self._methods.setdefault(f"/{service}/{name}", _Method(handler=handler))

    def add_generic_rpc_handlers(
        self, handlers: Iterable[grpc.GenericRpcHandler[Any, Any]]
    ) -> None:
        """As grpc.aio.Server's."""
        self._generic += handlers

    def _method(self, path: str, metadata: Metadata) -> _Method | None:
        found = self._methods.get(path)
        if found is not None:
            return found
        details = _Details(path, metadata)
        for generic in self._generic:
            handler = generic.service(details)
            if handler is not None:
                return _Method(handler=handler)
        return None

    def _open(
        self, connection: ServerConnection[Head[_Method]], stream: int, head: Head[_Method]
    ) -> ServerStream:
        method = head.method
        if method is None or head.http_status != 200 or head.encoding not in ENCODINGS:
            return RefusedCall(connection, stream, head, self._intake)
        if method.open is not None:
            return method.open(connection, stream, head, self._intake)
        assert method.handler is not None
        return TaskCall(connection, stream, head, self._intake, method.handler, self._tasks, run)

    # -- sockets ----------------------------------------------------------------------------

    async def listen(self, host: str, port: int, *, shared_port: bool = False) -> int:
        """The port listened on (0: a free one). `shared_port`: other processes listen there too
        and the kernel deals connections out. Raises ConfigError."""
        sockets: list[socket.socket] = []
        try:
            sockets = _bound(host, port, shared_port=shared_port)
            loop = asyncio.get_running_loop()
            for plug in sockets:
                server = await loop.create_server(
                    lambda: Plug(self.new_connection()), sock=plug, backlog=_BACKLOG
                )
                self._servers.append(server)
        except OSError as error:
            for plug in sockets:
                plug.close()
            if error.errno == errno.EADDRINUSE:
                text = f"port {port} is in use; choose another with --grpc-port"
                raise ConfigError(text) from None
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            why = error.strerror or str(error)
            text = f"cannot listen on {address}: {why}; see --host and --grpc-port"
            raise ConfigError(text) from None
        self._check_later()
        return int(sockets[0].getsockname()[1])

    def new_connection(self) -> ServerConnection[Head[_Method]]:
        """A connection that has come in."""
        refused = self._stopping or len(self._connections) >= self._max_connections
        connection = ServerConnection(self._buffer, self._serving, refused=refused)
        self._connections.add(connection)
        return connection

    def _closed(self, connection: ServerConnection[Head[_Method]]) -> None:
        self._connections.discard(connection)

    def _check_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._check = loop.call_later(_CHECK_EVERY_S, self.check_connections)

    def check_connections(self) -> None:
        """Ask clients that say nothing, drop those that do not answer or take nothing."""
        self._check_later()
        for connection in list(self._connections):
            heard = connection.heard and connection.greeted
            connection.quiet_checks = 0 if heard else connection.quiet_checks + 1
            stuck = connection.stuck and not connection.moved
            connection.stuck_checks = connection.stuck_checks + 1 if stuck else 0
            connection.heard = connection.moved = False
            if connection.quiet_checks >= _QUIET_CHECKS or connection.stuck_checks >= _STUCK_CHECKS:
                connection.abort()
            elif connection.quiet_checks:
                connection.ping()

    # -- the end ----------------------------------------------------------------------------

    async def stop(self, grace_s: float | None) -> None:
        """Take nothing new, let calls end for up to `grace_s` seconds, then end them."""
        self._stopping = True
        for server in self._servers:
            server.close()
        for connection in list(self._connections):
            connection.go_away()
            for stream in connection.open_streams:
                assert isinstance(stream, Call)
                stream.closing()
        await self._until_closed(grace_s or 0.0)
        for connection in list(self._connections):
            for stream in connection.open_streams:
                assert isinstance(stream, Call)
                stream.stop(_STOPPED)
        # What has been written last has to reach the clients.
        await self._until_closed(_CLOSING_S)
        for connection in list(self._connections):
            connection.abort()
        await self._until_closed(_CLOSING_S)
        if self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        if self._check is not None:
            self._check.cancel()
        self._stopped.set()

    async def wait_for_termination(self) -> None:
        """Until `stop` has finished."""
        await self._stopped.wait()

    async def _until_closed(self, limit_s: float) -> None:
        closing = [asyncio.ensure_future(c.lost.wait()) for c in self._connections]
        if closing:
            _, late = await asyncio.wait(closing, timeout=limit_s)
            for waiter in late:
                waiter.cancel()


class RefusedCall(Call):
    """A call that nothing serves; answered before its message is looked at."""

    __slots__ = ()

    def received(self, data: memoryview, ended: bool) -> None:
        """See `Stream.received`."""
        if self.over:
            return
        head = self.head
        if head.http_status != 200:
            block = hpack.encode([(":status", str(head.http_status))])
            self._finish(self._connection.headers(self.id, block, ends=True))
        elif head.encoding not in ENCODINGS:
            text = f"messages compressed with {head.encoding!r} are not read"
            self.refuse(Status(grpc.StatusCode.UNIMPLEMENTED, text))
        else:
            self.refuse(Status(grpc.StatusCode.UNIMPLEMENTED, "Method not found!"))

    def abandoned(self) -> None:
        """See `Call.abandoned`."""


def _bound(host: str, port: int, *, shared_port: bool) -> list[socket.socket]:
    """Bound sockets for every address of `host`, on one port. Raises OSError."""
    found = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
    )
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, kind, protocol, _, where in dict.fromkeys(found):
        plug = socket.socket(family, kind, protocol)
        try:
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared_port:
                plug.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                # Every address there is, of both kinds; one address, of its own kind.
                plug.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
            taken = sockets[0].getsockname()[1] if sockets else port
            plug.bind((where[0], taken, *where[2:]))
            plug.listen(_BACKLOG)
            plug.setblocking(False)
        except OSError as error:
            plug.close()
            if error.errno == errno.EADDRINUSE:
                for other in sockets:
                    other.close()
                raise
            failure = error
        else:
            sockets.append(plug)
    if not sockets:
        assert failure is not None
        raise OSError(failure.errno, os.strerror(failure.errno or 0))
    return sockets
