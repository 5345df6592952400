"""What a plan attains: the real dispatcher runs it in virtual time (algorithms.md 1.4.5).

The published bounds assume evenly spaced requests; on Poisson arrivals or a trace the only way to
know the share of requests that meet their objective is to run them. `simulate` does, and gives
the share with a confidence interval (Wilson's), latencies, queueing and utilisation.
Invariant: a function of its arguments; the same seed gives the same result.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from random import Random

from paceline.core.chain import Chain
from paceline.core.errors import ConfigError
from paceline.core.plan import Plan
from paceline.core.profile import Profiles
from paceline.dispatch import route_chain
from paceline.sim import workload
from paceline.sim.fleet import (
    BlankModels,
    RequestInputs,
    batch_limits,
    blank_chain,
    planned_durations,
    planned_machines,
)
from paceline.sim.results import ChainResult, ModuleResult, SimResult, wilson
from paceline.sim.stimuli import Arrive, Install
from paceline.sim.tally import Tally
from paceline.sim.world import World

__all__ = ["ChainResult", "ModuleResult", "SimResult", "simulate", "wilson"]

UNBOUNDED_S = 1e7
"""Added to every deadline without shedding: nothing is refused, the order stays."""


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
    decided: Callable[[Tally], bool] | None = None,
) -> SimResult:
    """Serve `requests` requests by `plan`.

    `arrivals`: `poisson` or `uniform` at each chain's planned rate ("" is each chain's own), or
    instants by chain. Without `shed` every request is executed however late it is. `whole`:
    fractional machines are whole ones. Once `decided`, no more requests come. Raises ConfigError
    for a chain without plan.
    """
    rng = Random(seed)
    durations = planned_durations(plan, profiles)
    limits = batch_limits(plan, chains)
    if missing := [chain.name for chain in chains if chain.name not in limits]:
        raise ConfigError(f"chain {missing[0]!r} is not in the plan")
    bounds = {chain.name: blank_chain(chain, limits[chain.name]) for chain in chains}
    specs = {m.spec.name: m.spec for bound in bounds.values() for m in bound.modules}
    machines = planned_machines(plan, whole=whole)
    seed = rng.randrange(1 << 30)
    instants = _instants(chains, plan, arrivals, requests, rng)
    tally = Tally(chains, plan, sum(map(len, instants.values())))
    world = World(machines, durations, BlankModels(specs), seed=seed, observers=(tally,))
    routes = [route_chain(b, plan.chain(name), durations) for name, b in bounds.items()]
    world.run(Install(0.0, route) for route in routes)
    late_s = 0.0 if shed else UNBOUNDED_S
    stream = requests_of(chains, instants, rng, late_s)
    if decided is not None:
        stream = takewhile(lambda _: not decided(tally), stream)
    world.run_stream(stream)
    return tally.result(world)


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


def requests_of(
    chains: Sequence[Chain],
    instants: Mapping[str, Sequence[float]],
    rng: Random,
    late_s: float = 0.0,
) -> Iterator[Arrive]:
    """Every chain's requests in the order of their arrival, numbered from 1."""
    by_name = {chain.name: chain for chain in chains}
    inputs = {chain.name: RequestInputs(chain, rng) for chain in chains}
    merged = heapq.merge(*([(at_s, name) for at_s in times] for name, times in instants.items()))
    for request, (at_s, name) in enumerate(merged, start=1):
        budget_s = by_name[name].slo_s + late_s
        yield Arrive(at_s, request, name, inputs[name].draw(), budget_s)
