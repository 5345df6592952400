"""Traffic replayed against a plan, or against live replanning, by the real dispatcher.

Invariant: a function of its arguments; the same seed gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from random import Random

from paceline.core.chain import Chain
from paceline.core.errors import ConfigError
from paceline.core.plan import Plan
from paceline.core.profile import Durations, Profiles
from paceline.dispatch import route_chain
from paceline.sim.fleet import BlankModels, batch_limits, blank_chain, planned_durations
from paceline.sim.recorder import Depth, Recorder, Stretch
from paceline.sim.rental import Fleet, Rented, Transition
from paceline.sim.replan import Replanner
from paceline.sim.results import SimResult
from paceline.sim.stimuli import Install, Start, Stimulus, Withdraw
from paceline.sim.tally import Tally
from paceline.sim.verify import requests_of
from paceline.sim.world import World

LOOK_S = 1.0
"""How often queues are looked at, and replanning is thought of."""
MOST_LOOKS = 100_000
STRETCHES = 60
"""A run is told in so many parts at most."""


@dataclass(frozen=True, slots=True)
class PlanChange:
    """A plan that was followed: decided at `at_s`, in force from `ready_s`."""

    at_s: float
    ready_s: float
    reason: str
    cost_before: float
    cost_after: float
    started: int
    ended: int


@dataclass(frozen=True, slots=True)
class Replay:
    """A run: its result, when what happened, the machines, and the plans that followed."""

    result: SimResult
    stretches: tuple[Stretch, ...]
    depths: Mapping[tuple[str, str], Depth]
    machines: tuple[Rented, ...]
    changes: tuple[PlanChange, ...]
    duration_s: float

    @property
    def cost(self) -> float:
        return sum(stretch.cost for stretch in self.stretches)

    @property
    def cost_per_hour(self) -> float:
        return self.cost / self.duration_s * 3600 if self.duration_s else 0.0


def replay(
    chains: Sequence[Chain],
    plan: Plan,
    profiles: Profiles,
    instants: Mapping[str, Sequence[float]],
    *,
    seed: int = 0,
    replanner: Replanner | None = None,
    load_s: float = 0.0,
) -> Replay:
    """Serve the requests that come at `instants` (by chain) by `plan`, at first.

    New plans' machines load their models for `load_s`; the plan is in force, and other machines
    are given back, when they have. Raises ConfigError for a chain without plan.
    """
    return _Run(chains, plan, profiles, instants, seed, replanner, load_s).run()


class _Run:
    def __init__(
        self,
        chains: Sequence[Chain],
        plan: Plan,
        profiles: Profiles,
        instants: Mapping[str, Sequence[float]],
        seed: int,
        replanner: Replanner | None,
        load_s: float,
    ) -> None:
        for chain in chains:
            if plan.chain(chain.name) is None:
                raise ConfigError(f"chain {chain.name!r} is not in the plan")
        self._chains = chains
        self._plan = plan
        self._profiles = profiles
        self._replanner = replanner
        self._load_s = load_s
        self._fleet = Fleet.of(plan)
        last_s = max((times[-1] for times in instants.values() if times), default=0.0)
        self._look_s = max(LOOK_S, last_s / MOST_LOOKS)
        stretch_s = max(self._look_s, float(ceil(last_s / STRETCHES)))
        stretches = max(1, ceil(last_s / stretch_s))
        slo_s = {chain.name: chain.slo_s for chain in chains}
        self._recorder = Recorder(self._fleet, slo_s, stretch_s, stretches)
        self._tally = Tally(chains, plan, sum(map(len, instants.values())))
        rng = Random(seed)
        self._world = World(
            [rented.machine for rented in self._fleet.rented],
            self._durations(),
            BlankModels({}),
            seed=rng.randrange(1 << 30),
            observers=(self._tally, self._recorder),
        )
        self._requests = requests_of(chains, instants, rng)
        self._transition: tuple[float, Transition] | None = None
        self._changes: list[PlanChange] = []

    def run(self) -> Replay:
        world = self._world
        world.run(self._routes(0.0))
        look_s = self._look_s
        for request in self._requests:
            while look_s <= request.at_s:
                world.run(until_s=look_s)
                self._look(look_s)
                look_s += self._look_s
            world.run((request,), until_s=request.at_s)
        world.run()
        end_s = max(world.now_s, look_s - self._look_s)
        self._recorder.look(end_s, world.dispatcher.loads())
        return Replay(
            self._tally.result(world),
            tuple(self._recorder.stretches),
            self._recorder.depths,
            tuple(self._fleet.rented),
            tuple(self._changes),
            end_s,
        )

    def _look(self, now_s: float) -> None:
        self._recorder.look(now_s, self._world.dispatcher.loads())
        seen = self._recorder.take()
        if self._replanner is None:
            return
        if self._transition is not None:
            if now_s >= self._transition[0]:
                self._follow(self._transition[1], now_s)
            return
        before = self._plan.cost_per_hour
        plan = self._replanner.decide(now_s, seen, self._plan, self._transition_cost(now_s))
        if plan is None:
            return
        transition = self._fleet.towards(plan, now_s)
        self._fleet.begin(transition)
        for rented in transition.started:
            self._world.backend.add(rented.machine)
        ready_s = now_s + (self._load_s if transition.started else 0.0)
        self._changes.append(
            PlanChange(
                now_s,
                ready_s,
                self._replanner.reason,
                before,
                plan.cost_per_hour,
                len(transition.started),
                len(transition.ended),
            )
        )
        if ready_s <= now_s:
            self._follow(transition, now_s)
        else:
            self._transition = (ready_s, transition)

    def _follow(self, transition: Transition, now_s: float) -> None:
        """New machines serve, then the plan is in force, then the others go."""
        self._transition = None
        self._plan = transition.plan
        self._fleet.end(transition, now_s)
        changes: list[Stimulus] = [Start(now_s, r.machine.name) for r in transition.started]
        changes += self._routes(now_s)
        changes += [Withdraw(now_s, r.machine.name) for r in transition.ended]
        self._world.run(changes, until_s=now_s)

    def _routes(self, now_s: float) -> list[Stimulus]:
        durations = planned_durations(self._plan, self._profiles)
        limits = batch_limits(self._plan, self._chains)
        return [
            Install(
                now_s,
                route_chain(
                    blank_chain(chain, limits[chain.name]), self._plan.chain(chain.name), durations
                ),
            )
            for chain in self._chains
        ]

    def _durations(self) -> dict[str, dict[str, Durations]]:
        """Of every model wherever it was measured: another plan may choose other hardware."""
        found = planned_durations(self._plan, self._profiles)
        for model, known in found.items():
            for hardware in self._profiles.hardware_of(model):
                measured = self._profiles.durations(model, hardware)
                if measured is not None:
                    known.setdefault(hardware, measured)
        return found

    def _transition_cost(self, now_s: float) -> Callable[[Plan], float]:
        def cost(plan: Plan) -> float:
            started = self._fleet.towards(plan, now_s).started
            return sum(rented.cost_per_hour for rented in started) * self._load_s / 3600

        return cost
