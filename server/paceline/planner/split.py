"""How much of a chain's objective each module gets (Harpagon, level 3).

Invariant: every state on the way keeps every path of the DAG within the objective.

A module's choices are schedules on its frontier of latency and cost, one for each budget that a
configuration needs. All modules start at their least latency; then the step that saves the most
per second of latency is taken, again and again, until no step fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import floor

from paceline.core.profile import Configuration
from paceline.planner.assemble import budgets_s
from paceline.planner.paths import Graph
from paceline.planner.residual import ModuleScheduler
from paceline.planner.schedule import TOLERANCE, Schedule, cheaper
from paceline.planner.worst_case import full_machine_s, residual_machine_s

State = tuple[int, ...]
"""For every module the index of its choice."""

NEAR_END = 8
"""From how many of the last states cost-direct continues by saving."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a module: the latency it takes (overhead included) and its schedule."""

    latency_s: float
    schedule: Schedule

    @property
    def cost_per_hour(self) -> float:
        return self.schedule.cost_per_hour


@dataclass(frozen=True, slots=True)
class Step:
    """A change of one module's choice, or of several siblings' at once."""

    saving_per_hour: float
    increase_s: float
    moves: tuple[tuple[int, int], ...]

    @property
    def efficiency(self) -> float:
        """Latency-cost efficiency: what a second of latency buys."""
        return self.saving_per_hour / self.increase_s


def choices(scheduler: ModuleScheduler, slo_s: float) -> tuple[Choice, ...]:
    """A module's choices, least latency first, each cheaper than the one before; never empty.

    The first is the least latency the module can have at all, even when that exceeds `slo_s`.
    """
    budgets_s = sorted(set(_budgets_s(scheduler)))
    found: list[Choice] = []
    for budget_s in budgets_s:
        if found and budget_s > slo_s + TOLERANCE:
            break
        option = scheduler.within(budget_s)
        if option is not None:
            found.append(Choice(scheduler.latency_s(option), option))
    assert found, f"{scheduler.module.name}: no schedule even within {budgets_s[-1]} s"
    found.sort(key=lambda c: (c.latency_s, c.cost_per_hour))
    # What serves in less time than any budget asked for: only mixes and dummy requests do.
    while (faster := scheduler.within(found[0].latency_s - 10 * TOLERANCE)) is not None:
        found.insert(0, Choice(scheduler.latency_s(faster), faster))
    frontier = found[:1]
    for choice in found[1:]:
        if cheaper(choice.cost_per_hour, frontier[-1].cost_per_hour):
            frontier.append(choice)
    return tuple(frontier)


def _budgets_s(scheduler: ModuleScheduler) -> Iterator[float]:
    """Budgets from which on a configuration can serve its full machines, or everything, also by
    whole machines that dummy requests fill.
    """
    module = scheduler.module
    for c in module.configurations:
        for budget_s in _bounds_s(module.rate_rps, c, scheduler):
            yield budget_s + module.overhead_s


def _bounds_s(rate_rps: float, c: Configuration, scheduler: ModuleScheduler) -> Iterator[float]:
    dispatch = scheduler.options.dispatch
    machines = rate_rps / c.throughput_rps
    full = floor(machines + TOLERANCE)
    remainder_rps = rate_rps - full * c.throughput_rps
    alone_s = 0.0
    if full:
        alone_s = full_machine_s(dispatch, c, left_rps=rate_rps, rate_rps=rate_rps)
        yield alone_s
    if remainder_rps > TOLERANCE * rate_rps:
        if scheduler.options.dummy:
            # Dummy requests fill one machine more, and every batch sooner.
            filled_rps = (full + 1) * c.throughput_rps
            yield full_machine_s(dispatch, c, left_rps=filled_rps, rate_rps=filled_rps)
        residual_s = residual_machine_s(dispatch, c, residual_rps=remainder_rps, rate_rps=rate_rps)
        yield max(alone_s, residual_s)


def in_proportion(
    graph: Graph, options: Sequence[tuple[Choice, ...]], slo_s: float
) -> tuple[State, ...]:
    """What fits into budgets in proportion to the modules' least latencies; none if nothing does.

    What splitting by efficiency is measured against.
    """
    least_s = [choice[0].latency_s for choice in options]
    if graph.longest(least_s) > slo_s + TOLERANCE:
        return ()
    budgets = budgets_s(graph, least_s, slo_s)
    return (
        tuple(
            sum(choice.latency_s <= budget_s + TOLERANCE for choice in own) - 1
            for own, budget_s in zip(options, budgets, strict=True)
        ),
    )


def split(
    graph: Graph,
    options: Sequence[tuple[Choice, ...]],
    slo_s: float,
    *,
    node_merger: bool,
    cost_direct: bool,
) -> tuple[State, ...]:
    """The states where climbing ends, the published rule's first; none if nothing fits `slo_s`.

    `node_merger` also moves siblings as one node. `cost_direct` also leaves the climb, at its
    start and near its end, to go on by saving alone: there that can beat the best ratio. Plain
    climbs are always among them, so that neither refinement can make a plan costlier.
    """
    start: State = (0,) * len(options)
    latencies_s = [choice[0].latency_s for choice in options]
    if graph.longest(latencies_s) > slo_s + TOLERANCE:
        return ()
    ends: list[State] = []
    for groups in dict.fromkeys((graph.siblings if node_merger else (), ())):
        climb = _Climb(graph, options, slo_s, groups)
        history = climb.states(start, by_saving=False)
        ends.append(history[-1])
        if cost_direct:
            turns = dict.fromkeys((*reversed(history[-NEAR_END:]), start))
            ends += [climb.states(state, by_saving=True)[-1] for state in turns]
    return tuple(dict.fromkeys(ends))


@dataclass(frozen=True, slots=True)
class _Climb:
    graph: Graph
    options: Sequence[tuple[Choice, ...]]
    slo_s: float
    groups: tuple[tuple[int, ...], ...]

    def states(self, start: State, *, by_saving: bool) -> list[State]:
        """Every state from `start` to where no step fits."""
        visited = [start]
        while True:
            state = visited[-1]
            latencies_s = [self.options[i][at].latency_s for i, at in enumerate(state)]
            slacks_s = self.graph.slacks(latencies_s, self.slo_s)
            best: Step | None = None
            for step in self._steps(state):
                if any(
                    self.options[i][to].latency_s - latencies_s[i] > slacks_s[i] + TOLERANCE
                    for i, to in step.moves
                ):
                    continue
                if best is None or _rank(step, by_saving) > _rank(best, by_saving):
                    best = step
            if best is None:
                return visited
            moved = list(state)
            for i, to in best.moves:
                moved[i] = to
            visited.append(tuple(moved))

    def _steps(self, state: State) -> Iterator[Step]:
        for i, at in enumerate(state):
            for to in range(at + 1, len(self.options[i])):
                yield self._step(state, ((i, to),))
        for group in self.groups:
            budgets_s = {
                choice.latency_s for i in group for choice in self.options[i][state[i] + 1 :]
            }
            for budget_s in sorted(budgets_s):
                moves = tuple(
                    (i, to) for i in group if (to := self._last_within(i, budget_s)) > state[i]
                )
                if len(moves) > 1:
                    yield self._step(state, moves)

    def _last_within(self, module: int, budget_s: float) -> int:
        """The cheapest choice within `budget_s`, -1 if none."""
        within = sum(choice.latency_s <= budget_s for choice in self.options[module])
        return within - 1

    def _step(self, state: State, moves: tuple[tuple[int, int], ...]) -> Step:
        changes = [(self.options[i][state[i]], self.options[i][to]) for i, to in moves]
        return Step(
            saving_per_hour=sum(now.cost_per_hour - then.cost_per_hour for now, then in changes),
            increase_s=max(then.latency_s - now.latency_s for now, then in changes),
            moves=moves,
        )


def _rank(step: Step, by_saving: bool) -> tuple[float, float]:
    pair = (step.efficiency, step.saving_per_hour)
    return pair[::-1] if by_saving else pair
