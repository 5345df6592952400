"""How a serialized message gets to a Triton and its answer back: the port, and grpc.aio behind it.

`Http2Transport` (see `http2`) is the other implementation and the default. Both raise CallFailed
and ChannelClosed only; what these mean to a request is decided in `client`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grpc
import grpc.aio

from paceline.core.tensor import Buffer

INFER = "/inference.GRPCInferenceService/ModelInfer"
NO_TIMEOUT_S = 1e9
"""From here on a time-out is none."""


class CallFailed(Exception):
    """`unreachable`: it was not the server that said so. `incompatible`: the server speaks an
    HTTP/2 that this transport does not read, another one may."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        unreachable: bool = False,
        incompatible: bool = False,
    ) -> None:
        self.code = code
        self.message = message
        self.unreachable = unreachable
        self.incompatible = incompatible
        super().__init__(message)

    @property
    def answered(self) -> bool:
        """Whether the server has ended the call, and with it any use of its tensors."""
        silent = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
        return not (self.unreachable or self.incompatible or self.code in silent)


class ChannelClosed(Exception):
    """The caller's own side closed the channel; `during_call` when the call was under way."""

    def __init__(self, *, during_call: bool) -> None:
        self.during_call = during_call
        super().__init__("closed")


OnAnswer = Callable[[Buffer | CallFailed | ChannelClosed], None]
"""Called with the answer to a call, or how it failed."""


class Transport(Protocol):
    """Unary calls, bytes in and bytes out. Cancelling the caller cancels the call."""

    def begin(
        self, path: str, parts: Sequence[Buffer], on_answer: OnAnswer, timeout_s: float
    ) -> bool:
        """`unary` without a task: `on_answer` is called once, after this returned. False where
        that is not possible now: nothing was begun.
        """
        ...

    async def unary(self, path: str, parts: Sequence[Buffer], timeout_s: float) -> Buffer:
        """The answer to the message made of `parts`. Raises CallFailed, ChannelClosed."""
        ...

    async def close(self) -> None:
        """Calls under way and new ones fail with ChannelClosed."""
        ...


class GrpcTransport:
    """On a grpc.aio channel that somebody else closes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._methods: dict[str, Any] = {}

    def begin(
        self, path: str, parts: Sequence[Buffer], on_answer: OnAnswer, timeout_s: float
    ) -> bool:
        """See `Transport.begin`: grpc.aio has tasks of its own."""
        return False

    async def unary(self, path: str, parts: Sequence[Buffer], timeout_s: float) -> Buffer:
        """See `Transport.unary`."""
        method = self._methods.get(path)
        if method is None:
            method = self._methods[path] = self._channel.unary_unary(path, None, None)
        timeout = timeout_s if timeout_s < NO_TIMEOUT_S else None
        try:
            answer: bytes = await method(b"".join(parts), timeout=timeout)
            return answer
        except grpc.aio.AioRpcError as error:
            raise call_failed(error) from None
        except grpc.aio.UsageError:
            raise ChannelClosed(during_call=False) from None
        except asyncio.CancelledError:
            # grpc.aio also raises this when the channel is closed under a call.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ChannelClosed(during_call=True) from None

    async def close(self) -> None:
        """Nothing of its own to close."""


def call_failed(error: grpc.aio.AioRpcError) -> CallFailed:
    """The same failure; `unreachable` where gRPC made the status up for a lost connection."""
    code, details = error.code(), error.details() or error.code().name
    from_peer = "Error received from peer" in (error.debug_error_string() or "")
    return CallFailed(
        code, details, unreachable=code is grpc.StatusCode.UNAVAILABLE and not from_peer
    )
