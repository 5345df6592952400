"""Chains as they are served now: a stage for every module of a route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf

from paceline.dispatch.arrivals import Arrivals
from paceline.dispatch.collector import Collector, Offer
from paceline.dispatch.policy import collector
from paceline.dispatch.route import ChainRoute, ModuleRoute


@dataclass(slots=True, eq=False)
class Stage:
    """A module's waiting rows under one route, and what is on its way to it.

    `ahead` is `admission`'s: rows of admitted requests that were not launched yet, by priority.
    What follows is `waiting`'s.
    """

    route: ModuleRoute
    collector: Collector
    ahead: dict[int, float] = field(default_factory=dict)
    offer: Offer | None = None
    """The batch to launch next, as `waiting` last saw it."""
    look_s: float = -inf
    """When time alone could change that; -inf where other rows wait since."""
    version: int = -1
    """Of the machines that were seen then (`MachinePool.versions`)."""
    arrivals: dict[int, Arrivals] = field(default_factory=dict)
    """`admission`'s, by priority: when what is admitted now can start here."""
    parts: dict[Stage, float] = field(default_factory=dict)
    """Also `admission`'s: what a second of work of other stages takes of each of its slots, with
    these machines (`MachinePool.layout`)."""
    layout: int = -1

    def ahead_of(self, priority: int) -> float:
        """Rows that go before one of this priority."""
        ahead = self.ahead
        if not ahead:
            return 0.0
        if len(ahead) == 1 and priority in ahead:
            return ahead[priority]
        return sum(rows for other, rows in ahead.items() if other <= priority)

    def waiting_before(self, priority: int) -> float:
        """The same, but of more urgent rows those alone that wait here now."""
        own, rows = self.ahead.get(priority, 0.0), self.ahead_of(priority)
        return own if rows <= own else own + min(rows - own, self.collector.rows)


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """A chain's route with its stages, in the order of its modules.

    `parents` are indices of modules; `above` of all that have to end before; `beside` of those that
    wait for neither this one nor it for them, and are launched first where they wait together;
    `fan_outs` the rows a request is expected to have at each, `many` whether they are more than one
    anywhere, `sometimes` those that run for some requests only;
    `load` is how many machines the planned rate keeps busy with full batches; `alone_s` the machine
    time of a request that shares no batch.
    """

    name: str
    route: ChainRoute
    stages: tuple[Stage, ...]
    parents: tuple[tuple[int, ...], ...]
    above: tuple[frozenset[int], ...]
    beside: tuple[tuple[int, ...], ...]
    fan_outs: tuple[float, ...]
    many: bool
    sometimes: tuple[int, ...]
    load: float
    alone_s: float


def served(route: ChainRoute, known: dict[int, Stage]) -> Served:
    """`route` with the stages that `known` holds (by the route's identity), or new ones."""
    stages = []
    for module in route.modules:
        stage = known.get(id(module))
        if stage is None:
            stage = known[id(module)] = Stage(module, collector(route, module))
        stages.append(stage)
    places = {module.name: place for place, module in enumerate(route.modules)}
    parents = tuple(tuple(places[p] for p in m.bound.module.parents) for m in route.modules)
    above: list[frozenset[int]] = []
    for known_parents in parents:
        above.append(frozenset(known_parents).union(*(above[parent] for parent in known_parents)))
    return Served(
        route.bound.name,
        route,
        tuple(stages),
        parents,
        tuple(above),
        _beside(route, above),
        tuple(module.fan_out for module in route.modules),
        any(module.fan_out > 1.0 for module in route.modules),
        tuple(place for place, module in enumerate(route.modules) if module.fan_out < 1.0),
        sum(module.rate_rps * module.row_s for module in route.modules),
        sum(_alone_s(module) for module in route.modules),
    )


def _beside(route: ChainRoute, above: Sequence[frozenset[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(
            other
            for other, beside in enumerate(route.modules)
            if other not in above[place]
            and place not in above[other]
            and (-beside.tail_s, other) < (-module.tail_s, place)
        )
        for place, module in enumerate(route.modules)
    )


def _alone_s(module: ModuleRoute) -> float:
    rows, full = module.fan_out, module.full_rows
    if rows <= full:
        return min(1.0, rows) * module.best_s(max(1, ceil(rows)))
    return rows / full * module.best_s(full)
