"""How a chain is dispatched: its modules with the batch sizes and durations its plan gives them.

`tail_s` of a module is the time from its launch to the end of the chain along the slowest path,
at planned batch sizes: a batch must be launched `tail_s` before the deadline. `floor_s` is the
same with batches of one: what cannot finish even then is not worth starting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from paceline.core.bind import MOST_ROWS, BoundChain, BoundModule
from paceline.core.chain import Chain
from paceline.core.plan import Allocation, ChainPlan
from paceline.core.profile import Durations
from paceline.dispatch.walk import Walk, walk_of

MOST_WALKS = 64
"""Combinations of outputs of a chain that are kept compiled."""
ROOM = 3.0
"""How much longer than the p99 a second attempt may take and still be in time."""


@dataclass(frozen=True, slots=True)
class ModuleRoute:
    """One module. `batch_sizes` by hardware: the most rows a batch takes there.

    `rate_rps` is the rows per second it was planned for (0: unplanned), `fan_out` the expected
    rows per request, `allocations` what the plan gave it, `machines` this front's part of that by
    hardware. `collects_s`: by how much the plan lets what follows take longer than its batches
    alone: rows wait there until a batch is full, or until those have gone that came with them.
    """

    chain: str
    bound: BoundModule
    batch_sizes: Mapping[str, int]
    durations: Mapping[str, Durations]
    tail_s: float
    floor_s: float
    collects_s: float = 0.0
    rate_rps: float = 0.0
    fan_out: float = 1.0
    allocations: tuple[Allocation, ...] = ()
    machines: Mapping[str, float] = field(default_factory=dict)
    row_s: float = field(init=False)
    """Machine time one row costs in a full batch, on the best hardware that the plan has; 0 when
    unknown.
    """
    full_rows: int = field(init=False)
    """Rows of a full batch there."""
    best: Durations | None = field(init=False)
    """Durations there; None when unknown."""
    best_on: str = field(init=False)
    """That hardware."""
    single_s: float = field(init=False)
    """A batch of one, on the quickest hardware that the plan has; 0 when unknown."""
    beyond_s: float = field(init=False)
    """By how much what is left takes longer than the plan says, which may not exist."""
    model: str = field(init=False)
    home: tuple[str, tuple[tuple[str, float], ...]] = field(init=False)
    """The model, and by hardware the machines that the plan has for it, its main one first."""
    main: str = field(init=False)
    """The hardware that was planned for most of its rows; empty without a plan."""
    name: str = field(init=False)
    _limit: int = field(init=False, repr=False, compare=False)
    _sizes: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        limit = self.bound.spec.row_limit
        sizes = {hardware: min(size, limit) for hardware, size in self.batch_sizes.items()}
        object.__setattr__(self, "_limit", max(sizes.values(), default=limit))
        object.__setattr__(self, "_sizes", sizes)
        costs = [
            (known.at(self.batch_size(hardware)) / self.batch_size(hardware), hardware)
            for hardware, known in _planned(self.durations, sizes).items()
        ]
        row_s, hardware = min(costs, default=(0.0, ""))
        object.__setattr__(self, "row_s", row_s)
        object.__setattr__(self, "full_rows", self.batch_size(hardware))
        object.__setattr__(self, "best", self.durations.get(hardware))
        object.__setattr__(self, "best_on", hardware)
        object.__setattr__(self, "single_s", _single_s(self.durations, sizes))
        object.__setattr__(self, "beyond_s", max(0.0, self.floor_s - self.tail_s))
        object.__setattr__(self, "model", self.bound.spec.name)
        rates: dict[str, float] = {}
        for a in self.allocations:
            rates[a.hardware] = rates.get(a.hardware, 0.0) + a.rate_rps
        kinds = sorted(rates, key=lambda hardware: (-rates[hardware], hardware))
        machines = tuple((hardware, self.machines.get(hardware, 0.0)) for hardware in kinds)
        object.__setattr__(self, "home", (self.model, machines))
        object.__setattr__(self, "main", kinds[0] if kinds else "")
        object.__setattr__(self, "name", self.bound.name)

    def batch_size(self, hardware: str) -> int:
        """Rows per batch on `hardware`: the plan's, its largest where it has none there; without a
        plan all the model takes.
        """
        return self._sizes.get(hardware, self._limit)

    def helps(self, hardware: str) -> bool:
        """Whether the plan has other hardware for the module, but none of this."""
        return hardware not in self.batch_sizes and bool(self.batch_sizes)

    def best_s(self, rows: int) -> float:
        """Profiled duration of a batch on the hardware where a row costs least; 0 if unknown."""
        return self.best.at(rows) if self.best is not None else 0.0

    def again_s(self, rows: int) -> float:
        """How long before their launch-by time rows are tried once more: room for what another
        machine has just begun, or for a second straggler, and for what is beyond the plan.
        """
        if self.best is None:
            return 0.0
        return ROOM * self.best.slow_at(rows) + self.beyond_s

    def duration_s(self, hardware: str, rows: int) -> float | None:
        """Profiled duration of a batch; None where it was never measured."""
        known = self.durations.get(hardware)
        return known.at(rows) if known is not None else None


@dataclass(frozen=True, slots=True)
class ChainRoute:
    """One chain. `max_items` bounds a fan-out, `max_requests` what is under way at once."""

    bound: BoundChain
    modules: tuple[ModuleRoute, ...]
    policy: str = "pooled"
    max_requests: int = 4096
    max_items: int = MOST_ROWS
    longest: ModuleRoute = field(init=False, repr=False, compare=False)
    """The module from which the least time to the chain's end is the greatest."""
    _walks: dict[tuple[str, ...], Walk] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        longest = max(self.modules, key=lambda module: module.floor_s)
        object.__setattr__(self, "longest", longest)
        object.__setattr__(self, "_walks", {})

    def walk(self, outputs: tuple[str, ...]) -> Walk:
        """The walk that gives these outputs; empty means all."""
        found = self._walks.get(outputs)
        if found is None:
            found = walk_of(self.bound, outputs)
            if len(self._walks) < MOST_WALKS:
                self._walks[outputs] = found
        return found


def route_chain(
    bound: BoundChain,
    plan: ChainPlan | None = None,
    durations: Mapping[str, Mapping[str, Durations]] | None = None,
    *,
    workers: int = 1,
) -> ChainRoute:
    """The route of `bound` under `plan`; `durations` by model and hardware.

    `workers` front processes share the planned rate evenly.

    Without plan (a model called by its own name) batches are as large as the model takes and
    only the request's own deadline counts.
    """
    durations = durations or {}
    planned: dict[str, float] = {}
    single: dict[str, float] = {}
    sizes: dict[str, dict[str, int]] = {}
    allocations: dict[str, tuple[Allocation, ...]] = {}
    for module in bound.modules:
        table = durations.get(module.spec.name, {})
        sizes[module.name] = {}
        allocations[module.name] = ()
        if plan is not None:
            allocations[module.name] = plan.module(module.name).allocations
            for allocation in allocations[module.name]:
                known = sizes[module.name].get(allocation.hardware, 1)
                sizes[module.name][allocation.hardware] = max(known, allocation.batch_size)
        planned[module.name] = max(
            (table[hw].at(size) for hw, size in sizes[module.name].items() if hw in table),
            default=0.0,
        )
        single[module.name] = _single_s(table, sizes[module.name])
    tails = _longest_tails(bound.chain, planned)
    floors = _longest_tails(bound.chain, single)
    worst: dict[str, float] = {}
    if plan is not None:
        most = {m.name: plan.module(m.name).latency_worst_s for m in bound.modules}
        worst = _longest_tails(bound.chain, most)
    return ChainRoute(
        bound,
        tuple(
            ModuleRoute(
                chain=bound.name,
                bound=m,
                batch_sizes=sizes[m.name],
                durations=durations.get(m.spec.name, {}),
                tail_s=tails[m.name],
                floor_s=floors[m.name],
                collects_s=_collects_s(bound.chain, m.name, worst, tails),
                rate_rps=plan.module(m.name).rate_rps / workers if plan is not None else 0.0,
                fan_out=m.module.fan_out,
                allocations=allocations[m.name],
                machines=_machines(allocations[m.name], workers),
            )
            for m in bound.modules
        ),
        policy=bound.chain.dispatch,
    )


def _planned(
    durations: Mapping[str, Durations], sizes: Mapping[str, int]
) -> Mapping[str, Durations]:
    """On hardware that the plan has for the module; on all where it has none that is known."""
    found = {hardware: known for hardware, known in durations.items() if hardware in sizes}
    return found or durations


def _single_s(durations: Mapping[str, Durations], sizes: Mapping[str, int]) -> float:
    return min((known.at(1) for known in _planned(durations, sizes).values()), default=0.0)


def _machines(allocations: Sequence[Allocation], workers: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for allocation in allocations:
        known = found.get(allocation.hardware, 0.0)
        found[allocation.hardware] = known + allocation.machines / workers
    return found


def _collects_s(
    chain: Chain, module: str, worst: Mapping[str, float], tails: Mapping[str, float]
) -> float:
    children = chain.children(module)
    after_s = max((worst.get(child, 0.0) for child in children), default=0.0)
    return max(0.0, after_s - max((tails[child] for child in children), default=0.0))


def _longest_tails(chain: Chain, own_s: Mapping[str, float]) -> dict[str, float]:
    tails: dict[str, float] = {}
    for module in reversed(chain.modules):
        after = max((tails[child] for child in chain.children(module.name)), default=0.0)
        tails[module.name] = own_s[module.name] + after
    return tails
