"""Request parameters: which are Paceline's, which are Triton's, which go to the model.

Invariant: nothing that a client states about its deadline is dropped: the budget is the tightest
of the gRPC deadline, `slo_ms` and Triton's `timeout` (microseconds).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from paceline.core.errors import ErrorKind, RequestError
from paceline.core.request import Parameter

_DROPPED = frozenset({"headers", "binary_data_output"})
_INTEGERS = frozenset({"int64_param", "uint64_param"})


@dataclass(frozen=True, slots=True)
class RequestParameters:
    """`forwarded` are those that are nobody's but the model's."""

    budget_s: float | None = None
    priority: int | None = None
    forwarded: Mapping[str, Parameter] = field(default_factory=dict)
    stream_items: bool = False


_NONE = RequestParameters()
"""Of a request that states nothing, as most do."""


def read_parameters(parameters: Mapping[str, Any], remaining_s: float | None) -> RequestParameters:
    """Parameters of a ModelInferRequest; `remaining_s` is what the gRPC deadline leaves.

    Raises RequestError (INVALID, UNSUPPORTED) that names the parameter.
    """
    if not parameters:
        return RequestParameters(remaining_s) if remaining_s is not None else _NONE
    budget_s = remaining_s
    priority: int | None = None
    stream_items = False
    forwarded: dict[str, Parameter] = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise _invalid(f"parameter '{name}' has no value")
        value: Parameter = getattr(parameter, kind)
        if name == "slo_ms":
            budget_s = _tightest(budget_s, _slo_s(kind, value))
        elif name == "timeout":
            budget_s = _tightest(budget_s, _timeout_s(kind, value))
        elif name == "priority":
            priority = _priority(kind, value)
        elif name == "stream_items":
            if kind != "bool_param":
                raise _invalid(
                    "invalid value type for 'stream_items' parameter, expected bool_param."
                )
            stream_items = bool(value)
        elif name.startswith("sequence_"):
            if value:
                raise RequestError(
                    ErrorKind.UNSUPPORTED,
                    f"parameter '{name}': Paceline serves no stateful sequences",
                )
        elif name not in _DROPPED and not name.startswith("triton_"):
            forwarded[name] = value
    return RequestParameters(budget_s, priority, forwarded, stream_items)


def _slo_s(kind: str, value: Parameter) -> float:
    if kind not in _INTEGERS and kind != "double_param":
        raise _invalid(
            "invalid value type for 'slo_ms' parameter, "
            "expected int64_param, uint64_param or double_param."
        )
    if not (isfinite(float(value)) and float(value) > 0):
        raise _invalid("invalid value for 'slo_ms', expected value > 0.")
    return float(value) / 1e3


def _timeout_s(kind: str, value: Parameter) -> float | None:
    """Triton's: microseconds, 0 for none."""
    if kind not in _INTEGERS:
        raise _invalid("invalid value type for 'timeout' parameter, expected int64_param.")
    if float(value) < 0:
        raise _invalid("invalid value for 'timeout', expected value >= 0.")
    return float(value) / 1e6 if value else None


def _priority(kind: str, value: Parameter) -> int | None:
    """Triton's: 0 asks for the default, which is the chain's own."""
    if kind not in _INTEGERS:
        raise _invalid(
            "invalid value type for 'priority' parameter, expected int64_param or uint64_param."
        )
    if float(value) < 0:
        raise _invalid("invalid value for 'priority', expected value >= 0.")
    return int(value) or None


def _tightest(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return one if other is None else other
    return min(one, other)


def _invalid(message: str) -> RequestError:
    return RequestError(ErrorKind.INVALID, message)
