"""What a request is told that cannot be served, and what is remembered of it."""

from __future__ import annotations

from collections.abc import Mapping

from paceline.core.errors import ErrorKind, Rejected, RequestError
from paceline.core.request import Timeline
from paceline.dispatch.batch import Batch
from paceline.dispatch.events import Submit
from paceline.dispatch.route import ModuleRoute

LEAST_RETRY_S = 0.001


def too_late(route: ModuleRoute, now_s: float, deadline_s: float) -> Rejected:
    """A module and what follows cannot finish by the deadline."""
    shortfall_s = max(0.0, now_s + route.floor_s - deadline_s)
    if now_s >= deadline_s:
        message = "Request timeout expired"
    else:
        message = (
            f"Request timeout expired: module '{route.bound.name}' and what follows need "
            f"{route.floor_s * 1e3:.1f} ms, {shortfall_s * 1e3:.1f} ms more than are left"
        )
    return Rejected(ErrorKind.DEADLINE, message, shortfall_s=shortfall_s)


def queue_full(floor_s: float, limit: str = "queue size") -> Rejected:
    """As much is in flight as is let in; a request that began now would be over in `floor_s`, and
    some of those before it are.
    """
    message = f"Exceeds maximum {limit}"
    return Rejected(ErrorKind.QUEUE_FULL, message, retry_after_s=max(LEAST_RETRY_S, floor_s))


def overloaded(chain: str, excess_s: float) -> Rejected:
    """Its answer would come so much too late."""
    return Rejected(
        ErrorKind.OVERLOADED,
        f"'{chain}' is overloaded: the answer would come {excess_s * 1e3:.0f} ms too late",
        shortfall_s=excess_s,
        retry_after_s=max(LEAST_RETRY_S, excess_s),
    )


def too_cold(chain: str, cold: Mapping[str, float], excess_s: float) -> Rejected:
    """The same, as models have to be loaded that take so long until they are."""
    model, wait_s = max(cold.items(), key=lambda item: (item[1], item[0]))
    return Rejected(
        ErrorKind.OVERLOADED,
        f"'{chain}' is not in memory: loading model '{model}' takes about "
        f"{wait_s * 1e3:.0f} ms, the answer would come {excess_s * 1e3:.0f} ms too late",
        shortfall_s=excess_s,
        retry_after_s=wait_s,
    )


def timed_out(batch: Batch, now_s: float, deadline_s: float) -> Rejected:
    """The deadline of rows that a machine is executing has passed."""
    route = batch.stage.route
    return Rejected(
        ErrorKind.DEADLINE,
        f"Request timeout expired: module '{route.bound.name}' has been executing on "
        f"{batch.machine.name} for {(now_s - batch.started_s) * 1e3:.1f} ms",
        shortfall_s=max(0.0, now_s + route.floor_s - deadline_s),
    )


def never_entered(event: Submit, error: RequestError, now_s: float) -> Timeline:
    """The timeline of a request that was refused at the door."""
    return Timeline(
        request=event.request,
        request_id=event.request_id,
        chain=event.chain,
        arrived_s=now_s,
        ended_s=now_s,
        deadline_s=event.deadline_s,
        spans=(),
        error=error.message,
        rejected=True,
    )
