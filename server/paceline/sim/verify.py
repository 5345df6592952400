"""What a plan attains: the real dispatcher runs it in virtual time (algorithms.md 1.4.5).

The published bounds assume evenly spaced requests; on Poisson arrivals or a trace the only way to
know the share of requests that meet their objective is to run them. `simulate` does, and gives
the share with a confidence interval (Wilson's), latencies, queueing and utilisation.
Invariant: a function of its arguments; the same seed gives the same result.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from random import Random
from statistics import NormalDist

from paceline.core.chain import Chain
from paceline.core.errors import ConfigError
from paceline.core.plan import Plan
from paceline.core.profile import Profiles
from paceline.core.quantities import percentile
from paceline.core.request import Timeline
from paceline.dispatch import Action, Answer, Event, Fail, route_chain
from paceline.sim import workload
from paceline.sim.fleet import (
    BlankModels,
    RequestInputs,
    batch_limits,
    blank_chain,
    planned_durations,
    planned_machines,
)
from paceline.sim.stimuli import Arrive, Install
from paceline.sim.world import World

UNBOUNDED_S = 1e7
"""Added to every deadline without shedding: nothing is refused, the order stays."""


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """One module over a run: `batches` by size; times per row, mean or 99th percentile.

    `utilisation` is the share of the machines planned for it that its batches took.
    """

    chain: str
    module: str
    rows: int
    batches: Mapping[int, int]
    queue_s: float
    queue_p99_s: float
    execute_s: float
    utilisation: float

    @property
    def batch_size(self) -> float:
        """Mean rows of a batch."""
        count = sum(self.batches.values())
        return sum(size * n for size, n in self.batches.items()) / count if count else 0.0


@dataclass(frozen=True, slots=True)
class ChainResult:
    """One chain over a run. `missed`: answered too late; `rejected`: refused, or given up."""

    chain: str
    slo_s: float
    requests: int
    met: int
    missed: int
    rejected: int
    latencies_s: Sequence[float] = field(repr=False)
    """Of answered requests, in increasing order."""

    @property
    def attainment(self) -> float:
        """Share of all requests that were answered within the objective."""
        return self.met / self.requests if self.requests else 1.0

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval of the attainment."""
        return wilson(self.met, self.requests, confidence)

    def percentile_s(self, share: float) -> float:
        """A latency that `share` of the answered requests do not exceed; 0 without any."""
        return percentile(self.latencies_s, share) if self.latencies_s else 0.0


@dataclass(frozen=True, slots=True)
class SimResult:
    """A run. `duration_s` is virtual."""

    chains: tuple[ChainResult, ...]
    modules: tuple[ModuleResult, ...]
    duration_s: float
    events: int
    utilisation: float

    def chain(self, name: str) -> ChainResult:
        return next(c for c in self.chains if c.chain == name)

    @property
    def requests(self) -> int:
        return sum(c.requests for c in self.chains)

    @property
    def attainment(self) -> float:
        """The least of its chains."""
        return min((c.attainment for c in self.chains), default=1.0)


def simulate(
    chains: Sequence[Chain],
    plan: Plan,
    profiles: Profiles,
    *,
    arrivals: str | Mapping[str, Sequence[float]] = "",
    requests: int = 50_000,
    seed: int = 0,
    shed: bool = True,
    whole: bool = False,
) -> SimResult:
    """Serve `requests` requests by `plan`.

    `arrivals`: `poisson` or `uniform` at each chain's planned rate ("" is each chain's own), or
    instants by chain. Without `shed` every request is executed however late it is. `whole`:
    fractional machines are whole ones. Raises ConfigError for a chain without plan.
    """
    rng = Random(seed)
    durations = planned_durations(plan, profiles)
    limits = batch_limits(plan, chains)
    if missing := [chain.name for chain in chains if chain.name not in limits]:
        raise ConfigError(f"chain {missing[0]!r} is not in the plan")
    bounds = {chain.name: blank_chain(chain, limits[chain.name]) for chain in chains}
    specs = {m.spec.name: m.spec for bound in bounds.values() for m in bound.modules}
    machines = planned_machines(plan, whole=whole)
    tally = _Tally(chains, plan)
    world = World(
        machines, durations, BlankModels(specs), seed=rng.randrange(1 << 30), observers=(tally,)
    )
    routes = [route_chain(b, plan.chain(name), durations) for name, b in bounds.items()]
    world.run(Install(0.0, route) for route in routes)
    instants = _instants(chains, plan, arrivals, requests, rng)
    late_s = 0.0 if shed else UNBOUNDED_S
    world.run_stream(_requests(chains, instants, rng, late_s))
    return tally.result(world)


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share.

    >>> [round(bound, 4) for bound in wilson(990, 1000)]
    [0.9817, 0.9946]
    """
    if trials == 0:
        return (0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    share = successes / trials
    middle = share + z * z / (2 * trials)
    half = z * sqrt(share * (1.0 - share) / trials + z * z / (4 * trials * trials))
    scale = 1.0 + z * z / trials
    return (max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


def _instants(
    chains: Sequence[Chain],
    plan: Plan,
    arrivals: str | Mapping[str, Sequence[float]],
    requests: int,
    rng: Random,
) -> dict[str, Sequence[float]]:
    """When each chain's requests come; all chains are busy for the same time."""
    if not isinstance(arrivals, str):
        return {chain.name: arrivals.get(chain.name, ()) for chain in chains}
    rates: dict[str, float] = {}
    for chain in chains:
        planned = plan.chain(chain.name)
        assert planned is not None, chain.name
        rates[chain.name] = planned.rate_rps
    total_rps = sum(rates.values())
    found: dict[str, Sequence[float]] = {}
    for chain in chains:
        rate_rps = rates[chain.name]
        count = round(requests * rate_rps / total_rps)
        if (arrivals or chain.arrivals) == "uniform":
            found[chain.name] = workload.uniform(rate_rps, count)
        else:
            found[chain.name] = workload.poisson(rate_rps, count, rng)
    return found


def _requests(
    chains: Sequence[Chain], instants: Mapping[str, Sequence[float]], rng: Random, late_s: float
) -> Iterator[Arrive]:
    """Every chain's requests in the order of their arrival."""
    by_name = {chain.name: chain for chain in chains}
    inputs = {chain.name: RequestInputs(chain, rng) for chain in chains}
    merged = heapq.merge(*([(at_s, name) for at_s in times] for name, times in instants.items()))
    for request, (at_s, name) in enumerate(merged, start=1):
        budget_s = by_name[name].slo_s + late_s
        yield Arrive(at_s, request, name, inputs[name].draw(), budget_s)


class _Tally:
    """An observer that keeps what a result needs."""

    def __init__(self, chains: Sequence[Chain], plan: Plan) -> None:
        self._machines = {(c.chain, m.module): m.machines for c in plan.chains for m in c.modules}
        self._busy_s: dict[tuple[str, str], float] = {}
        self._slo_s = {chain.name: chain.slo_s for chain in chains}
        self._last_s = 0.0
        self._met = dict.fromkeys(self._slo_s, 0)
        self._rejected = dict.fromkeys(self._slo_s, 0)
        self._latencies: dict[str, list[float]] = {name: [] for name in self._slo_s}
        self._queues: dict[tuple[str, str], list[float]] = {}
        self._runs: dict[tuple[str, str], list[float]] = {}
        self._batches: dict[tuple[str, str], dict[int, float]] = {}

    def __call__(self, due_s: float, now_s: float, event: Event, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Answer):
                self._answered(action.timeline)
                self._spans(action.timeline)
            elif isinstance(action, Fail):
                self._rejected[action.timeline.chain] += 1
                self._spans(action.timeline)

    def _answered(self, timeline: Timeline) -> None:
        self._last_s = timeline.ended_s
        chain = timeline.chain
        latency_s = timeline.ended_s - timeline.arrived_s
        self._latencies[chain].append(latency_s)
        if latency_s <= self._slo_s[chain] + 1e-9:
            self._met[chain] += 1

    def _spans(self, timeline: Timeline) -> None:
        for span in timeline.spans:
            key = (timeline.chain, span.module)
            queues = self._queues.get(key)
            if queues is None:
                queues = self._queues[key] = []
                self._runs[key] = []
                self._batches[key] = {}
            queues.append(span.started_s - span.queued_s)
            self._runs[key].append(span.ended_s - span.started_s)
            # A batch shows up once for each of its requests, with its rows: weigh them.
            sizes = self._batches[key]
            part = span.rows / span.batch_size
            sizes[span.batch_size] = sizes.get(span.batch_size, 0.0) + part
            self._busy_s[key] = self._busy_s.get(key, 0.0) + part * (span.ended_s - span.started_s)

    def result(self, world: World) -> SimResult:
        """After the run."""
        span_s = max(self._last_s, 1e-9)
        busy_s = world.backend.busy_s
        shares = {name: machine.share for name, machine in world.backend.machines.items()}
        chains = []
        for name, latencies in self._latencies.items():
            met, rejected = self._met[name], self._rejected[name]
            answered = len(latencies)
            chains.append(
                ChainResult(
                    name,
                    self._slo_s[name],
                    answered + rejected,
                    met,
                    answered - met,
                    rejected,
                    sorted(latencies),
                )
            )
        modules = [self._module(key, span_s) for key in sorted(self._queues)]
        total = sum(shares.values())
        used = sum(busy_s.values()) / span_s / total if total else 0.0
        return SimResult(tuple(chains), tuple(modules), span_s, world.events, used)

    def _module(self, key: tuple[str, str], span_s: float) -> ModuleResult:
        queues, runs = sorted(self._queues[key]), self._runs[key]
        sizes = self._batches[key]
        batches = {size: round(n) for size, n in sorted(sizes.items())}
        had_s = self._machines[key] * span_s
        return ModuleResult(
            chain=key[0],
            module=key[1],
            rows=round(sum(size * n for size, n in sizes.items())),
            batches=batches,
            queue_s=sum(queues) / len(queues),
            queue_p99_s=percentile(queues, 0.99) if queues else 0.0,
            execute_s=sum(runs) / len(runs),
            utilisation=self._busy_s[key] / had_s if had_s else 0.0,
        )
