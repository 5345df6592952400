"""From a plan to a world: its machines, and chains whose models exist only as durations.

A planned chain is simulated without its models' declarations: every module becomes one whose rows
come from the request (so that the number of items can differ by request and items of all requests
still batch together), and which waits for the same parents. The number of rows of a module is 1,
or drawn: Bernoulli for an expected `fan_out` of at most 1, else Poisson; a fan-out over a fan-out
has as many items; below a condition that is false nothing runs.

A fraction of a machine is a machine that rests after every batch for as long as the others' share
of it takes, so that it works `share` of the time: nothing that is not paid for is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from random import Random

from paceline.core.bind import BoundChain, BoundInput, BoundModule, Carry
from paceline.core.chain import Chain, Module, Source
from paceline.core.model import ModelSpec
from paceline.core.plan import Plan
from paceline.core.ports import ModelCall
from paceline.core.profile import Durations, Profiles
from paceline.core.tensor import Tensor, TensorSpec
from paceline.sim.backend import SimMachine

_EPSILON = 1e-6
_ROW = TensorSpec("rows", "UINT8", (1,))
_OUT = TensorSpec("y", "UINT8", (1,))


class BlankModels:
    """Models that answer a zero byte a row."""

    def __init__(self, specs: Mapping[str, ModelSpec]) -> None:
        self.specs = specs

    def __call__(self, call: ModelCall, rows: int) -> tuple[Tensor, ...]:
        return (Tensor("y", "UINT8", (rows, 1), bytes(rows)),)


def planned_machines(plan: Plan, *, whole: bool = False) -> list[SimMachine]:
    """The machines of a plan: its packing, or else those of every module for itself.

    `whole`: fractions of one are had all the time.
    """
    models = {(c.chain, m.module): m.model for c in plan.chains for m in c.modules}
    machines = [
        SimMachine(
            f"{packed.hardware}.{index}",
            packed.hardware,
            1,
            {models[share.chain, share.module]: 1 for share in packed.shares},
        )
        for index, packed in enumerate(plan.machines)
    ]
    if machines:
        return machines
    for chain in plan.chains:
        for module in chain.modules:
            for rank, allocation in enumerate(module.allocations):
                left, index = allocation.machines, 0
                while left > _EPSILON:
                    share = 1.0 if whole else min(1.0, left)
                    share = 1.0 if share > 1.0 - _EPSILON else share
                    name = f"{chain.chain}/{module.module}/{rank}.{index}"
                    instances = {module.model: 1}
                    machines.append(SimMachine(name, allocation.hardware, 1, instances, share))
                    left, index = left - 1.0, index + 1
    return machines


def planned_durations(plan: Plan, profiles: Profiles) -> dict[str, dict[str, Durations]]:
    """Durations by model and hardware: as profiled, or else as the plan has them."""
    points: dict[tuple[str, str], dict[int, float]] = {}
    for chain in plan.chains:
        for module in chain.modules:
            for a in module.allocations:
                points.setdefault((module.model, a.hardware), {})[a.batch_size] = a.duration_s
    found: dict[str, dict[str, Durations]] = {}
    for (model, hardware), known in points.items():
        measured = profiles.durations(model, hardware)
        table = measured or Durations(tuple(sorted(known.items())))
        found.setdefault(model, {})[hardware] = table
    return found


def blank_chain(chain: Chain, batch_limits: Mapping[str, int]) -> BoundChain:
    """`chain` with models of which only the name and the batch limit (by module) matter."""
    modules = []
    for module in chain.modules:
        rows = Source(None, f"rows_{module.name}" if _varies(module) else "rows")
        after = {f"after_{parent}": Source(parent, "y") for parent in module.parents}
        blank = Module(
            module.name,
            module.model,
            {"rows": rows, **after},
            for_each=rows if _varies(module) else None,
            fan_out=module.fan_out,
            members=module.members,
        )
        modules.append(blank)
    names = {f"rows_{m.name}" for m in chain.modules if _varies(m)}
    inputs = (_ROW, *(TensorSpec(name, "UINT8", (-1, 1)) for name in sorted(names)))
    outputs = {name: Source(name, "y") for name in chain.sinks}
    blank_chain = replace(chain, inputs=inputs, modules=tuple(modules), outputs=outputs)
    bound = tuple(
        BoundModule(
            module,
            ModelSpec(module.model, batch_limits[module.name], (_ROW,), (_OUT,)),
            Carry.ITEMS if module.for_each else Carry.ONE,
            (BoundInput("rows", module.inputs["rows"], per_item=module.for_each is not None),),
            ("y",),
        )
        for module in blank_chain.modules
    )
    shapes = {m.name: (-1, 1) if m.for_each else (1,) for m in blank_chain.modules}
    return BoundChain(
        blank_chain,
        bound,
        inputs,
        tuple(TensorSpec(name, "UINT8", shapes[name]) for name in outputs),
    )


@dataclass(frozen=True, slots=True)
class _Draw:
    """How many rows a module gets: `name` is its input's, empty where it always gets one.

    As many as module `over`, else `expected` on average; none where a module `below` got none.
    """

    name: str
    below: tuple[int, ...]
    over: int | None
    expected: float


def _draws(chain: Chain) -> tuple[_Draw, ...]:
    runs = _run_probability(chain.modules)
    places = {module.name: place for place, module in enumerate(chain.modules)}
    found = []
    for module in chain.modules:
        below = [parent for parent in module.parents if runs[parent] < 1.0]
        over = module.for_each.module if module.for_each is not None else None
        fans_out = over is not None and chain.module(over).for_each is not None
        found.append(
            _Draw(
                f"rows_{module.name}" if _varies(module) else "",
                tuple(places[parent] for parent in below),
                places[over] if over is not None and fans_out else None,
                module.fan_out / min((runs[parent] for parent in below), default=1.0),
            )
        )
    return tuple(found)


class RequestInputs:
    """Draws requests of a blank chain: how many rows each module gets."""

    def __init__(self, chain: Chain, rng: Random) -> None:
        """`chain` as declared (not the blank one)."""
        self._rng = rng
        self._fixed = {"rows": Tensor("rows", "UINT8", (1,), b"\0")}
        self._known: dict[tuple[str, int], Tensor] = {}
        self._draws = _draws(chain)
        self._varying = any(draw.name for draw in self._draws)

    def draw(self) -> Mapping[str, Tensor]:
        """One request's inputs."""
        if not self._varying:
            return self._fixed
        rows: list[int] = []
        inputs = dict(self._fixed)
        for draw in self._draws:
            count = self._count(draw, rows)
            rows.append(count)
            if draw.name:
                inputs[draw.name] = self._tensor(draw.name, count)
        return inputs

    def _count(self, draw: _Draw, rows: Sequence[int]) -> int:
        for parent in draw.below:
            if rows[parent] == 0:
                return 0
        if not draw.name:
            return 1
        if draw.over is not None:
            return rows[draw.over]
        if draw.expected <= 1.0:
            return int(self._rng.random() < draw.expected)
        return _poisson(draw.expected, self._rng)

    def _tensor(self, name: str, count: int) -> Tensor:
        known = self._known.get((name, count))
        if known is None:
            known = Tensor(name, "UINT8", (count, 1), bytes(count))
            self._known[name, count] = known
        return known


def batch_limits(plan: Plan, chains: Iterable[Chain]) -> dict[str, dict[str, int]]:
    """The largest planned batch by chain and module."""
    return {
        chain.name: {m.module: m.batch_size for m in planned.modules}
        for chain in chains
        if (planned := plan.chain(chain.name)) is not None
    }


def _varies(module: Module) -> bool:
    """Whether the number of rows can differ from request to request."""
    return module.for_each is not None or module.when is not None or module.fan_out != 1.0


def _run_probability(modules: Sequence[Module]) -> dict[str, float]:
    """Probability that a module runs at all, for those that a condition decides about."""
    runs: dict[str, float] = {}
    for module in modules:
        above = min((runs[parent] for parent in module.parents), default=1.0)
        runs[module.name] = min(above, module.fan_out) if module.for_each is None else above
    return runs


def _poisson(mean: float, rng: Random) -> int:
    """Knuth's method, in pieces so that `exp` does not underflow."""
    total = 0
    while mean > 0.0:
        step = min(mean, 200.0)
        limit, product = exp(-step), rng.random()
        while product > limit:
            total += 1
            product *= rng.random()
        mean -= step
    return total
