"""The exception tree. Expected outcomes are values; these are failures.

gRPC codes live in `rpc/status.py` alone: here a failure says *what kind* it is, not how it travels.
"""

from __future__ import annotations

from enum import Enum


class PacelineError(Exception):
    """Base of everything Paceline raises on purpose; `str()` is one clear line."""


class ConfigError(PacelineError):
    """A file, flag or message that the user wrote is wrong; nothing has been changed.

    `key` is a dotted path inside the document (`modules.detect.inputs.x`); the reader of the
    file adds `where` (`ocr.yaml:12`).
    """

    def __init__(self, message: str, *, key: str = "", where: str = "") -> None:
        self.message = message
        self.key = key
        self.where = where
        prefix = ": ".join(part for part in (where, key) if part)
        super().__init__(f"{prefix}: {message}" if prefix else message)


class BudgetError(ConfigError):
    """A memory budget is too small; `least_mib` would do, `activations_bytes` of it beside weights.

    The latter is 0 where it is not known.
    """

    def __init__(
        self, message: str, *, least_mib: int, activations_bytes: int = 0, where: str = ""
    ) -> None:
        self.least_mib = least_mib
        self.activations_bytes = activations_bytes
        super().__init__(message, where=where)


class PlanError(PacelineError):
    """No plan meets the objective; says which module of which chain lacks how many seconds.

    `key` is what the chain's file says that is too little or too much.
    """

    def __init__(
        self,
        message: str,
        *,
        chain: str = "",
        module: str = "",
        lacking_s: float = 0.0,
        key: str = "slo_ms",
    ) -> None:
        self.key = key
        self.chain = chain
        self.module = module
        self.lacking_s = lacking_s
        super().__init__(message)


class ResidencyError(PacelineError):
    """A model could not be loaded, unloaded or found where it should be."""


class LoadTimeoutError(ResidencyError):
    """A load took too long: whether it still comes, and what it holds, nobody knows."""


class RunError(ResidencyError):
    """Modules that are to be executed at once cannot be, on some Triton; `model` is the run's."""

    def __init__(self, message: str, *, model: str) -> None:
        self.model = model
        super().__init__(message)


class ErrorKind(Enum):
    """Why a request failed; `rpc.status` maps each to one gRPC code."""

    INVALID = "invalid"
    UNKNOWN_MODEL = "unknown_model"
    NOT_READY = "not_ready"
    UNSUPPORTED = "unsupported"
    QUEUE_FULL = "queue_full"
    OVERLOADED = "overloaded"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    DRAINING = "draining"
    UNAVAILABLE = "unavailable"
    BACKEND = "backend"
    INTERNAL = "internal"


class RequestError(PacelineError):
    """One request failed; the others are not affected."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        self.kind = kind
        self.message = message
        super().__init__(message)


class Rejected(RequestError):
    """A request that was refused before (more) work was spent on it.

    `shortfall_s` says by how much its deadline would be missed (0 when that is not the reason),
    `retry_after_s` when it would be worth trying again (0: no idea).
    """

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        shortfall_s: float = 0.0,
        retry_after_s: float = 0.0,
    ) -> None:
        self.shortfall_s = shortfall_s
        self.retry_after_s = retry_after_s
        super().__init__(kind, message)


class BackendError(RequestError):
    """The executor (Triton) failed; kind UNAVAILABLE when it could not be reached at all."""

    def __init__(self, message: str, *, kind: ErrorKind = ErrorKind.BACKEND) -> None:
        super().__init__(kind, message)
