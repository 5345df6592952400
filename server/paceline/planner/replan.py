"""When to plan anew: measured traffic against the traffic that the plan in force was made for.

`TrafficEstimator` turns counts into rates and fan-outs, `propose` says whether they have left what
was planned for, `worth` whether a candidate plan pays for its transition. All pure: the caller
reads the clock, solves, and moves machines (algorithms.md 1.4.6).

Invariant: traffic within its band proposes nothing, so a plan is never changed for noise; a rate
that is planned for is `Replanning.headroom` above what was measured, so no change causes the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf, sqrt
from typing import Generic, Literal, TypeVar

from paceline.core.plan import Plan

Cause = Literal["infeasible", "cheaper"]
Key = TypeVar("Key", str, tuple[str, str])


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a plan is made for. What is left out is as the chain file and the profile say.

    `rates_rps` by chain; `fan_outs` by (chain, module), in sub-requests per request; `slowdowns`
    by (model, hardware), measured over profiled duration.
    """

    rates_rps: Mapping[str, float] = field(default_factory=dict)
    fan_outs: Mapping[tuple[str, str], float] = field(default_factory=dict)
    slowdowns: Mapping[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Replanning:
    """How eagerly to replan.

    A value more than `tolerance` above what was planned makes the plan infeasible; one below
    1 - `slack` of it makes a cheaper plan worth looking for. For slowdowns, which wander more, it
    is `slow_tolerance` above. Rates have to leave their Poisson noise as well, and new plans are
    for `headroom` more of them than was measured. An infeasible plan stays `settle_s` after the
    last change; a cheaper one has to wait for `window_s` after it, to save `least_saving` of the
    cost, and to earn its transition back within `horizon_s`. Rates are those of `window_s`.
    """

    window_s: int = 60
    tolerance: float = 0.05
    slow_tolerance: float = 0.25
    headroom: float = 0.1
    slack: float = 0.25
    least_saving: float = 0.05
    horizon_s: float = 600.0
    settle_s: float = 3.0

    def __post_init__(self) -> None:
        assert self.window_s >= 1, "rates need a window"
        assert 0 < self.slack < 1 and (1 + self.headroom) * (1 - self.slack) < 1, (
            "a plan made with this headroom would be proposed for a cheaper one at once"
        )


@dataclass(frozen=True, slots=True)
class Proposal:
    """Plan for `traffic`, because of `reason`."""

    cause: Cause
    reason: str
    traffic: Traffic


@dataclass(slots=True)
class Cadence:
    """When proposals are followed up: an urgent one `settle_s` after the last attempt, others a
    window after it. After an attempt that failed nothing is urgent, so that what is not possible
    is not tried every few seconds.
    """

    rules: Replanning
    tried_s: float = -inf
    failed: bool = False

    def due(self, proposal: Proposal, now_s: float) -> bool:
        urgent = proposal.cause == "infeasible" and not self.failed
        least_s = self.rules.settle_s if urgent else self.rules.window_s
        return now_s - self.tried_s >= least_s


class TrafficEstimator:
    """Rates and fan-outs of one chain from counts, second by second.

    The rate is the mean of the window, or that of a burst within it: the largest mean of a twelfth
    or a quarter of it (5 s and 15 s of a minute), less two standard deviations of a Poisson count,
    so that the noise of steady traffic is no burst. It rises within seconds and falls after a
    window. Before the first second it is taken to have been `assumed_rps`.

    >>> steady, burst = TrafficEstimator(10), TrafficEstimator(10)
    >>> for second in range(60):
    ...     steady.observe(second, 10, 10, {"m": 40})
    ...     burst.observe(second, 50 if 20 <= second < 30 else 10, 0, {})
    >>> steady.rate_rps(), round(burst.rate_rps(), 1), steady.fan_outs()
    (10.0, 43.7, {'m': 4.0})
    """

    LEAST_REQUESTS = 30
    """A fan-out is believed after that many requests."""
    FADING = 0.98
    """What a second's counts weigh in the fan-outs a second later."""

    def __init__(self, assumed_rps: float, window_s: int = 60) -> None:
        self._window_s = window_s
        self._bursts_s = (max(1, window_s // 12), max(1, window_s // 4))
        self._counts = deque([assumed_rps] * window_s, window_s)
        self._bursts_rps = deque([0.0], window_s)
        self._second: int | None = None
        self._answered = 0.0
        self._rows: dict[str, float] = {}

    def observe(self, now_s: float, requests: int, answered: int, rows: Mapping[str, int]) -> None:
        """In the second up to `now_s`, `requests` came (refused ones too) and `answered` ended
        well, for which `rows` sub-requests were executed, by module. About once a second.
        """
        second = int(now_s)
        if second == self._second:
            self._counts[-1] += requests
        else:
            skipped = 0 if self._second is None else second - self._second - 1
            self._counts.extend([0] * min(skipped, self._window_s))
            self._counts.append(requests)
            self._second = second
        self._bursts_rps.append(max(self._burst_rps(window_s) for window_s in self._bursts_s))
        self._answered = self._answered * self.FADING + answered
        for module in sorted({*self._rows, *rows}):
            faded = self._rows.get(module, 0.0) * self.FADING
            self._rows[module] = faded + rows.get(module, 0)

    def rate_rps(self) -> float:
        """Requests per second to plan for, at least one a window."""
        mean_rps = sum(self._counts) / self._window_s
        return max(mean_rps, 1 / self._window_s, *self._bursts_rps)

    def fan_outs(self) -> dict[str, float]:
        """Sub-requests per request by module; empty before `LEAST_REQUESTS`."""
        if self._answered < self.LEAST_REQUESTS:
            return {}
        return {module: rows / self._answered for module, rows in self._rows.items() if rows > 0}

    def _burst_rps(self, window_s: int) -> float:
        count = sum(self._counts[index] for index in range(-window_s, 0))
        return max(0.0, count - 2 * sqrt(count)) / window_s


def propose(planned: Traffic, measured: Traffic, rules: Replanning) -> Proposal | None:
    """Whether `measured` asks for another plan than the one made for `planned`.

    Every value of `measured` is compared with that of `planned`, which has them all. What is not
    measured stays as planned.

    >>> planned = Traffic({"ocr": 10.0})
    >>> propose(planned, Traffic({"ocr": 10.4}), Replanning())
    >>> propose(planned, Traffic({"ocr": 20.0}), Replanning())
    Proposal(cause='infeasible', reason='ocr: 20 requests/s, planned for 10', \
traffic=Traffic(rates_rps={'ocr': 22.0}, fan_outs={}, slowdowns={}))
    """
    wide = replace(rules, tolerance=rules.slow_tolerance)
    rates = _compare("requests/s", planned.rates_rps, measured.rates_rps, rules, counted=True)
    fans = _compare("sub-requests per request", planned.fan_outs, measured.fan_outs, rules)
    slow = _compare("times the profile", planned.slowdowns, measured.slowdowns, wide)
    above = [*rates.above, *fans.above, *slow.above]
    below = [*rates.below, *fans.below, *slow.below]
    moved = above or below
    if not moved:
        return None
    return Proposal(
        cause="infeasible" if above else "cheaper",
        reason=max(moved)[1],
        traffic=Traffic(rates.planned, fans.planned, slow.planned),
    )


def worth(
    proposal: Proposal,
    current: Plan,
    candidate: Plan,
    rules: Replanning,
    *,
    transition_cost: float,
    since_change_s: float,
) -> bool:
    """Whether to change from `current` to `candidate`, at a `transition_cost` in money.

    An infeasible plan is left whatever it costs, a feasible one only for a saving (`Replanning`).
    """
    if proposal.cause == "infeasible":
        return since_change_s >= rules.settle_s
    saving_per_hour = current.cost_per_hour - candidate.cost_per_hour
    return (
        since_change_s >= rules.window_s
        and saving_per_hour >= rules.least_saving * current.cost_per_hour
        and saving_per_hour * rules.horizon_s / 3600 > transition_cost
    )


@dataclass(slots=True)
class _Compared(Generic[Key]):
    """What to plan for, and (how far, in words) of what has left its band."""

    planned: dict[Key, float]
    above: list[tuple[float, str]] = field(default_factory=list)
    below: list[tuple[float, str]] = field(default_factory=list)


def _compare(
    what: str,
    before: Mapping[Key, float],
    now: Mapping[Key, float],
    rules: Replanning,
    *,
    counted: bool = False,
) -> _Compared[Key]:
    """What is within its band stays, so that one chain's change does not move the others.

    `counted` values are counts over a window per second: a count n varies by sqrt(n) by itself.
    """
    found = _Compared(dict(before))
    for key, value in sorted(now.items()):
        ratio = value / before[key]
        noise = 3 / sqrt(before[key] * rules.window_s) if counted else 0.0
        if 1 - max(rules.slack, noise) <= ratio <= 1 + max(rules.tolerance, noise):
            continue
        name = key if isinstance(key, str) else "/".join(key)
        text = f"{name}: {value:.4g} {what}, planned for {before[key]:.4g}"
        found.planned[key] = value * (1 + rules.headroom) if counted else value
        if ratio > 1:
            found.above.append((ratio, text))
        else:
            found.below.append((1 / ratio, text))
    return found
