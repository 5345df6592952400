"""Failures as gRPC statuses.

Invariant: this is the only place that knows which code a failure travels as. Codes are Triton's
where Triton has the case (`Request for unknown model` is NOT_FOUND, a full queue UNAVAILABLE).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from dataclasses import dataclass
from math import ceil
from typing import NoReturn, Protocol, TypeVar

import grpc

from paceline.core.errors import (
    ConfigError,
    ErrorKind,
    PlanError,
    Rejected,
    RequestError,
    ResidencyError,
)
from paceline.rpc.head import Metadata

log = logging.getLogger(__name__)

T = TypeVar("T")

CODES: dict[ErrorKind, grpc.StatusCode] = {
    ErrorKind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorKind.UNKNOWN_MODEL: grpc.StatusCode.NOT_FOUND,
    ErrorKind.NOT_READY: grpc.StatusCode.NOT_FOUND,
    ErrorKind.UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    ErrorKind.QUEUE_FULL: grpc.StatusCode.UNAVAILABLE,
    ErrorKind.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorKind.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    ErrorKind.CANCELLED: grpc.StatusCode.CANCELLED,
    ErrorKind.DRAINING: grpc.StatusCode.UNAVAILABLE,
    ErrorKind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorKind.BACKEND: grpc.StatusCode.INTERNAL,
    ErrorKind.INTERNAL: grpc.StatusCode.INTERNAL,
}

_DETAILS_CHARACTERS = 4096
"""What of a message is sent: HTTP/2 headers have a limit (8 KiB by default), and a message may
quote what the client sent, percent-encoded."""


@dataclass(frozen=True, slots=True)
class Status:
    """How a failed call ends."""

    code: grpc.StatusCode
    details: str
    metadata: Metadata = ()


def status_of(error: Exception) -> Status:
    """The status of any failure; one that nobody raised on purpose is logged with its traceback."""
    if isinstance(error, RequestError):
        return Status(CODES[error.kind], _cut(error.message), _request_metadata(error))
    if isinstance(error, ConfigError):
        return Status(grpc.StatusCode.INVALID_ARGUMENT, _cut(str(error)))
    if isinstance(error, PlanError):
        return Status(grpc.StatusCode.FAILED_PRECONDITION, _cut(str(error)), _plan_metadata(error))
    if isinstance(error, ResidencyError):
        return Status(grpc.StatusCode.FAILED_PRECONDITION, _cut(str(error)))
    log.error("unexpected failure in a call", exc_info=error)
    return Status(
        grpc.StatusCode.INTERNAL,
        f"internal error ({type(error).__name__}); the server's log has the details",
    )


class Context(Protocol):
    """A call that can be ended."""

    async def abort(self, code: grpc.StatusCode, details: str, metadata: Metadata, /) -> NoReturn:
        """End it; raises."""
        ...


async def answered(context: Context, work: Awaitable[T]) -> T:
    """The result of `work`, or the call ended with the status of its failure.

    Cancellation passes through: gRPC cancels a handler whose client went away.
    """
    try:
        return await work
    except Exception as error:
        status = status_of(error)
    await abort(context, status)


async def abort(context: Context, status: Status) -> NoReturn:
    """End the call with `status`; does not return."""
    await context.abort(status.code, status.details, status.metadata)


def _request_metadata(error: RequestError) -> Metadata:
    found = [("paceline-reason", error.kind.value)]
    if isinstance(error, Rejected) and error.shortfall_s > 0:
        found.append(("paceline-shortfall-ms", f"{error.shortfall_s * 1e3:.3f}"))
    if isinstance(error, Rejected) and error.retry_after_s > 0:
        found.append(("retry-after-ms", str(max(1, ceil(error.retry_after_s * 1e3)))))
    return tuple(found)


def _plan_metadata(error: PlanError) -> Metadata:
    if not error.module:
        return ()
    lacking = ("paceline-lacking-ms", f"{error.lacking_s * 1e3:.3f}")
    return (("paceline-chain", error.chain), ("paceline-module", error.module), lacking)


def _cut(text: str) -> str:
    if len(text) <= _DETAILS_CHARACTERS:
        return text
    return f"{text[:_DETAILS_CHARACTERS]}..."
