"""Worst-case latency of one module on one machine, by dispatch policy (Harpagon, level 1).

Invariant: every bound is collection + execution, `d + b/w`; policies differ only in the rate `w` at
which a batch fills, and none fills faster than all of the module's requests arrive.

Deviation from the paper: a batch of one is full when its request arrives, so its collection time
is 0 and not 1/w (and 2d for round-robin becomes d). It makes batch size 1 usable at any rate.
"""

from __future__ import annotations

from typing import Literal, get_args

from paceline.core.profile import Configuration

Dispatch = Literal["throughput-cost", "round-robin", "pooled"]
DISPATCHES: tuple[str, ...] = get_args(Dispatch)


def collection_s(batch_size: int, rate_rps: float) -> float:
    """Time in which `batch_size` requests arrive at `rate_rps`; 0 for a batch of one.

    >>> collection_s(32, 160.0), collection_s(1, 0.01)
    (0.2, 0.0)
    """
    return 0.0 if batch_size == 1 else batch_size / rate_rps


def round_robin_s(configuration: Configuration) -> float:
    """A full machine that is fed one request at a time, at its own throughput: 2d.

    >>> round_robin_s(Configuration("gpu", 8, 0.25, 1.0))
    0.5
    """
    c = configuration
    return c.duration_s + collection_s(c.batch_size, c.throughput_rps)


def throughput_cost_s(configuration: Configuration, left_rps: float) -> float:
    """A full machine that is fed whole batches, best throughput-cost ratio first: d + b/w.

    `left_rps` is the rate left for the machine's rank and everything below it.

    >>> throughput_cost_s(Configuration("gpu", 32, 0.8, 1.0), 160.0)
    1.0
    """
    return configuration.duration_s + collection_s(configuration.batch_size, left_rps)


def pooled_s(configuration: Configuration, rate_rps: float) -> float:
    """Any machine, full or not, when all take batches from one queue: d + b/T (algorithms 1.4).

    >>> pooled_s(Configuration("gpu", 32, 0.8, 1.0), 200.0)
    0.9600000000000001
    """
    return configuration.duration_s + collection_s(configuration.batch_size, rate_rps)


def residual_s(configuration: Configuration, residual_rps: float) -> float:
    """The machine that is not filled and collects its own residual rate only: d + b/w_res.

    >>> residual_s(Configuration("gpu", 2, 0.1, 1.0), 8.0)
    0.35
    """
    return configuration.duration_s + collection_s(configuration.batch_size, residual_rps)


def full_machine_s(
    dispatch: Dispatch, configuration: Configuration, *, left_rps: float, rate_rps: float
) -> float:
    """Bound of a machine kept full; of `rate_rps` in all, `left_rps` are left from its rank on."""
    if dispatch == "round-robin":
        return round_robin_s(configuration)
    if dispatch == "pooled":
        return pooled_s(configuration, rate_rps)
    return throughput_cost_s(configuration, left_rps)


def residual_machine_s(
    dispatch: Dispatch, configuration: Configuration, *, residual_rps: float, rate_rps: float
) -> float:
    """Bound of the one machine that is not kept full."""
    if dispatch == "pooled":
        return pooled_s(configuration, rate_rps)
    return residual_s(configuration, residual_rps)
