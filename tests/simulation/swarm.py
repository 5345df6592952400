"""A swarm: every seed draws its own chains, models, machines, load and faults, then is run.

`draw(seed)` is the configuration and the stimuli; `run(case, stimuli)` plays (some of) them
under the oracle. Loads go from idle to five times what the machines can do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from tests.simulation.book import Violation
from tests.simulation.checks import Oracle
from tests.simulation.memory import MemoryLog, MemoryOracle, draw_memory, is_calm

from paceline.core.bind import BoundChain, bind, single_model_chain
from paceline.core.chain import Chain, Module, Source
from paceline.core.model import ModelSpec
from paceline.core.plan import Allocation, ChainPlan, ModulePlan
from paceline.core.profile import Durations
from paceline.core.tensor import Tensor, TensorSpec
from paceline.dispatch import ChainRoute, Dispatcher, route_chain
from paceline.residency.residency import Residency
from paceline.sim import workload
from paceline.sim.backend import SimMachine
from paceline.sim.content import TracingModels, fill
from paceline.sim.resident import Memory, ResidentWorld
from paceline.sim.stimuli import (
    Arrive,
    ClockJump,
    Crash,
    Fault,
    GiveUp,
    Install,
    Mishap,
    Remove,
    Resize,
    Slow,
    Start,
    Stimulus,
    Withdraw,
)
from paceline.sim.world import EventLog, World

FOREVER_S = 1e6
"""A budget that no run uses up: such a request ends because it is served, not because of time."""
WIDTHS = {"BYTES": (1, 2), "UINT8": (10, 12), "INT32": (3, 4)}


@dataclass(frozen=True, slots=True)
class MachineSpec:
    name: str
    hardware: str
    slots: int
    instances: Mapping[str, int]

    def build(self) -> SimMachine:
        return SimMachine(self.name, self.hardware, self.slots, self.instances)


@dataclass(frozen=True, slots=True)
class Case:
    """What a seed draws. `setup` and `heal` are always played, `stimuli` may be left out."""

    seed: int
    models: TracingModels
    durations: Mapping[str, Mapping[str, Durations]]
    machines: tuple[MachineSpec, ...]
    setup: tuple[Stimulus, ...]
    stimuli: tuple[Stimulus, ...]
    heal: tuple[Stimulus, ...]
    noise: float
    settle_s: float | None
    memory: Memory | None = None
    residency: type[Residency] = Residency
    dispatcher: type[Dispatcher] = Dispatcher

    @property
    def calm(self) -> bool:
        """Whether nothing but requests and cancels happens."""
        quiet = all(isinstance(s, (Arrive, GiveUp)) for s in self.stimuli)
        return quiet and is_calm(self.memory)


def run(case: Case, stimuli: Sequence[Stimulus] | None = None, log: EventLog | None = None) -> None:
    """Play a case to its end. Raises Violation."""
    oracle = Oracle(
        case.models, case.durations, faults=not case.calm, settle_s=case.settle_s or 0.0
    )
    memory = MemoryOracle(case.memory) if case.memory is not None else None
    world = _world(case, oracle, memory, log)
    played = case.stimuli if stimuli is None else stimuli
    try:
        world.run([*case.setup, *played, *case.heal])
    except (
        AssertionError,
        KeyError,
        IndexError,
        ValueError,
        TypeError,
        ZeroDivisionError,
    ) as error:
        if isinstance(error, Violation):
            raise
        raise Violation(f"{type(error).__name__}", f"the dispatcher broke: {error!r}") from error
    oracle.finish(world.dispatcher)
    if memory is not None:
        memory.finish()
    quiet_s = max((s.at_s for s in (*case.heal, *played)), default=0.0)
    for stimulus in played:
        if isinstance(stimulus, Arrive) and stimulus.budget_s >= FOREVER_S:
            ended_s, how = oracle.ends[stimulus.request]
            if ended_s > quiet_s + FOREVER_S / 10:
                raise Violation("stuck", f"request {stimulus.request} {how} only at {ended_s}")
            if case.calm and how not in ("answered", "cancelled"):
                raise Violation("stuck", f"request {stimulus.request} had all time, but {how}")


def _world(case: Case, oracle: Oracle, memory: MemoryOracle | None, log: EventLog | None) -> World:
    machines = [machine.build() for machine in case.machines]
    options: dict[str, Any] = {
        "seed": case.seed,
        "noise": case.noise,
        "settle_s": case.settle_s,
        "dispatcher": case.dispatcher(),
        "observers": (log, oracle) if log is not None else (oracle,),
    }
    if case.memory is None or memory is None:
        return World(machines, case.durations, case.models, **options)
    watchers = (MemoryLog(log), memory) if log is not None else (memory,)
    return ResidentWorld(
        machines,
        case.durations,
        case.models,
        memory=case.memory,
        residency=case.residency(case.memory.limits),
        watchers=watchers,
        on_made=memory.watch,
        **options,
    )


def draw(seed: int) -> Case:
    """Everything about a seed."""
    rng = Random(seed)
    datatype = rng.choice(tuple(WIDTHS))
    specs = _models(rng, datatype)
    items = rng.choice(((0, 1, 2, 3, 5), (0,), (1,), (0, 0, 9), (2, 4), (0, 1, 13)))
    models = TracingModels(specs, items=items)
    kinds = ("gpu", "cpu")[: rng.choice((1, 1, 2))]
    durations = {name: {kind: _durations(rng) for kind in kinds} for name in specs}
    machines = _machines(rng, tuple(specs), kinds)
    bounds = _chains(rng, specs, datatype)
    setup = tuple(Install(0.0, _route(rng, b, durations, machines)) for b in bounds)
    slots = sum(m.slots for m in machines)
    arrivals = _arrivals(rng, bounds, durations, slots, datatype)
    end_s = arrivals[-1].at_s if arrivals else 0.0
    stimuli: list[Stimulus] = [*arrivals, *_cancels(rng, arrivals)]
    if rng.random() < 0.65:
        stimuli += _faults(rng, machines, end_s)
    if rng.random() < 0.2:
        stimuli += _operations(rng, machines, bounds, durations, end_s)
    stimuli.sort(key=lambda s: s.at_s)
    late_s = max((s.at_s for s in stimuli), default=0.0) + 1.0
    # After a jump everything is late at once: when which part was due cannot be told any more.
    jumps = any(isinstance(s, ClockJump) for s in stimuli)
    return Case(
        seed=seed,
        models=models,
        durations=durations,
        machines=machines,
        setup=setup,
        stimuli=tuple(stimuli),
        heal=tuple(
            step
            for m in machines
            for step in (Resize(late_s, m.name, m.slots, m.instances), Start(late_s, m.name))
        ),
        noise=rng.choice((0.0, 0.0, 0.1, 0.5)),
        settle_s=None if jumps else rng.choice((None, 0.0, 0.0005)),
        memory=draw_memory(seed, {m.name: m.instances for m in machines}, tuple(specs)),
    )


# -- models and chains --------------------------------------------------------------------------


def _models(rng: Random, datatype: str) -> dict[str, ModelSpec]:
    """One or two models of each shape that chains are made of."""
    vector, table, flag = (-1,), (-1, -1), TensorSpec("flag", "BOOL", (1,))

    def tensors(**shapes: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, datatype, shape) for name, shape in shapes.items())

    specs: dict[str, ModelSpec] = {}
    for index in range(rng.choice((1, 1, 2))):
        for name, inputs, outputs in (
            ("map", tensors(x=vector), (*tensors(y=vector), flag)),
            ("join", tensors(a=vector, b=vector), tensors(y=vector)),
            ("detect", tensors(x=vector), (*tensors(items=table, y=vector), flag)),
            ("reduce", tensors(x=vector, rows=table), tensors(y=vector)),
        ):
            batch = rng.choice((0, 1, 2, 3, 4, 8))
            batch = 0 if name == "detect" and rng.random() < 0.7 else batch
            specs[f"{name}{index}"] = ModelSpec(f"{name}{index}", batch, inputs, outputs)
    return specs


def _durations(rng: Random) -> Durations:
    base_s = rng.choice((0.01, 0.05, 0.2))
    row_s = base_s * rng.choice((0.0, 0.05, 0.3))
    return Durations(tuple((b, base_s + row_s * b) for b in (1, 2, 4, 8)))


def _chains(rng: Random, specs: Mapping[str, ModelSpec], datatype: str) -> list[BoundChain]:
    found = [_chain(rng, f"chain{i}", specs, datatype) for i in range(rng.choice((1, 1, 2, 3)))]
    batching = [spec for spec in specs.values() if spec.batches]
    if batching and rng.random() < 0.3:
        found.append(single_model_chain(rng.choice(batching)))
    return found


def _chain(rng: Random, name: str, specs: Mapping[str, ModelSpec], datatype: str) -> BoundChain:
    """A DAG grown module by module from whatever is there: forks, joins, fan-outs, conditions."""
    vectors = [Source(None, "image")]
    tables: list[Source] = []
    flags: list[Source] = []
    modules: list[Module] = []
    seen: set[tuple[str | Source, ...]] = set()
    for index in range(rng.choice((1, 2, 2, 3, 3, 4, 5))):
        kinds = ["map", "detect", "join"] + (["each", "each", "reduce"] if tables else [])
        kind = rng.choice(kinds)
        own = f"m{index}"
        model_kind = rng.choice(("map", "join")) if kind == "each" else kind
        model = rng.choice([m for m in specs if m.startswith(model_kind)])
        wanted = [spec.name for spec in specs[model].inputs]
        # The newest source is the likeliest, so that chains get long as well as broad.
        sources = [_recent(rng, vectors) for _ in wanted]
        each: Source | None = None
        if kind == "reduce":
            sources = [_recent(rng, vectors), _recent(rng, tables)]
        elif kind == "each":
            each = _recent(rng, tables)
            sources[0] = each
        if (model, *sources) in seen:
            continue  # twice the same work: nobody could tell whose row a batch holds
        seen.add((model, *sources))
        when = rng.choice(flags) if flags and rng.random() < 0.3 else None
        inputs = dict(zip(wanted, sources, strict=True))
        modules.append(Module(own, model, inputs, for_each=each, when=when))
        if kind == "each":
            tables.append(Source(own, "y"))
            continue
        vectors.append(Source(own, "y"))
        tables += [Source(own, "items")] if kind == "detect" else []
        flags += [Source(own, "flag")] if kind in ("map", "detect") else []
    if modules[-1].for_each is not None and rng.random() < 0.8:
        # Nobody goes on with its items, so that nulls among them show in the answer alone.
        modules[-1] = replace(modules[-1], on_error="skip")
    produced = [s for s in (*vectors, *tables) if s.module is not None]
    outputs = {f"o{i}": s for i, s in enumerate(rng.sample(produced, min(3, len(produced))))}
    outputs["last"] = produced[-1] if modules[-1].for_each is None else tables[-1]
    inputs_spec = (TensorSpec("image", datatype, (-1,)),)
    rng.shuffle(modules)
    chain = Chain(
        name,
        1.0,
        inputs_spec,
        tuple(modules),
        outputs,
        priority=rng.choice((0, 0, 1)),
        dispatch=rng.choice(("pooled", "pooled", "throughput-cost", "round-robin")),
    )
    return bind(chain, specs)


def _recent(rng: Random, sources: list[Source]) -> Source:
    return sources[-1] if rng.random() < 0.5 else rng.choice(sources)


def _route(
    rng: Random,
    bound: BoundChain,
    durations: Mapping[str, Mapping[str, Durations]],
    machines: tuple[MachineSpec, ...],
) -> ChainRoute:
    """A route with a plan, with durations alone, or with nothing."""
    how = rng.random()
    if how < 0.15:
        return route_chain(bound)
    if how < 0.3:
        return route_chain(bound, None, durations)
    rate_rps = rng.choice((1.0, 10.0, 100.0))
    modules = []
    for module in bound.modules:
        model, limit = module.spec.name, module.spec.row_limit
        homes = sorted({m.hardware for m in machines if model in m.instances})
        allocations = []
        for kind in rng.sample(homes, rng.randint(1, len(homes))):
            batch, share = rng.randint(1, limit), rng.choice((0.4, 1.0, 1.0, 2.5))
            took_s = durations[model][kind].at(batch)
            allocations.append(Allocation(kind, batch, took_s, share, 1.0))
        modules.append(ModulePlan(module.name, model, rate_rps, 0.0, 1.0, 1.0, tuple(allocations)))
    plan = ChainPlan(bound.name, bound.chain.slo_s, rate_rps, 1.0, tuple(modules))
    return route_chain(bound, plan, durations)


# -- machines, load and faults --------------------------------------------------------------------


def _machines(
    rng: Random, models: tuple[str, ...], kinds: tuple[str, ...]
) -> tuple[MachineSpec, ...]:
    """One to four machines; every model is on at least one of them."""
    machines = []
    count = rng.choice((1, 2, 2, 3, 4))
    for index in range(count):
        slots = rng.choice((1, 1, 2, 3))
        held = models if index == 0 else rng.sample(models, rng.randint(1, len(models)))
        instances = {model: rng.randint(1, slots) for model in held}
        machines.append(MachineSpec(f"m{index}", rng.choice(kinds), slots, instances))
    return tuple(machines)


def _arrivals(
    rng: Random,
    bounds: list[BoundChain],
    durations: Mapping[str, Mapping[str, Durations]],
    slots: int,
    datatype: str,
) -> list[Arrive]:
    count = rng.choice((3, 8, 15, 25, 40))
    load = rng.choice((0.05, 0.3, 0.8, 1.0, 2.0, 5.0))
    cost_s = sum(
        min(d.at(1) for d in durations[m.spec.name].values()) for b in bounds for m in b.modules
    ) / len(bounds)
    rate_rps = load * slots / cost_s
    shape = rng.choice(("uniform", "poisson", "bursts", "trace"))
    if shape == "uniform":
        instants = workload.uniform(rate_rps, count)
    elif shape == "poisson":
        instants = workload.poisson(rate_rps, count, rng)
    elif shape == "bursts":
        instants = workload.bursts(rate_rps, count, rng, size=rng.choice((2, 10)))
    else:
        counts = [rng.randint(0, 6) for _ in range(count // 3)]
        instants = workload.from_counts(counts, bucket_s=3.0 / rate_rps, rng=rng)
    slacks = rng.choice(((FOREVER_S,), (1.0, 1.5, 3.0, 10.0), (0.5, 1.5, FOREVER_S)))
    priorities = rng.choice(((None,), (None, 0, 1, 2)))
    return [
        _arrival(rng, at_s, request, rng.choice(bounds), cost_s, slacks, priorities, datatype)
        for request, at_s in enumerate(instants, start=1)
    ]


def _arrival(
    rng: Random,
    at_s: float,
    request: int,
    bound: BoundChain,
    cost_s: float,
    slacks: tuple[float, ...],
    priorities: tuple[int | None, ...],
    datatype: str,
) -> Arrive:
    width = rng.choice(WIDTHS[datatype])
    seed = request.to_bytes(4, "little")
    inputs: dict[str, Tensor] = {}
    rows = rng.choice((1, 1, 2, 3, 2 * bound.max_batch_size + 1))
    for index, spec in enumerate(bound.inputs):
        # A table needs a second axis of its own; `rows` is the batch axis of a model called alone.
        inner = tuple(width for axis in spec.shape if axis < 0)
        shape = (rows, *inner[1:]) if bound.direct else inner
        inputs[spec.name] = fill(spec, shape, seed + bytes([index]))
    outputs: tuple[str, ...] = ()
    if rng.random() < 0.2:
        names = list(bound.chain.outputs)
        outputs = tuple(rng.sample(names, rng.randint(1, len(names))))
    slack = rng.choice(slacks)
    if slack == FOREVER_S and bound.chain.dispatch != "pooled":
        slack = 10.0  # the published policies wait for a full batch for as long as there is time
    direct = bound.direct and rng.random() < 0.3
    return Arrive(
        at_s,
        request,
        bound.name,
        inputs,
        FOREVER_S if slack == FOREVER_S else slack * cost_s,
        outputs=outputs,
        priority=rng.choice(priorities),
        version="1" if direct else "",
        parameters={"beam": rng.randint(1, 2)} if direct else {},
        stream=rng.random() < 0.2,
    )


def _cancels(rng: Random, arrivals: list[Arrive]) -> list[Stimulus]:
    share = rng.choice((0.0, 0.0, 0.1, 0.5))
    found: list[Stimulus] = []
    for arrival in arrivals:
        if rng.random() < share:
            within_s = min(arrival.budget_s, 1.0)
            found.append(GiveUp(arrival.at_s + rng.random() * within_s, arrival.request))
    if arrivals and rng.random() < 0.1:  # a storm: everybody leaves at once
        at_s = rng.choice(arrivals).at_s + 0.001
        found += [GiveUp(at_s, a.request) for a in arrivals if a.at_s <= at_s]
    return found


def _faults(rng: Random, machines: tuple[MachineSpec, ...], end_s: float) -> list[Stimulus]:
    mix: list[str | Mishap] = rng.sample(
        ("crash", "withdraw", "slow", "jump", *Mishap), rng.randint(1, 4)
    )
    mix += [Mishap.ERROR] * rng.choice((0, 0, 1))
    found: list[Stimulus] = []
    for _ in range(rng.choice((1, 2, 3, 4, 5, 6, 15))):
        at_s, name = rng.random() * end_s, rng.choice(machines).name
        back_s = at_s + rng.choice((0.0, 0.1, 1.0, end_s))
        match rng.choice(mix):
            case "crash":
                notice_s = rng.choice((0.0, 0.0, 0.05, 1.0))
                found += [Crash(at_s, name, notice_s), Start(back_s, name)]
            case "withdraw":
                found += [Withdraw(at_s, name), Start(back_s, name)]
            case "slow":
                found.append(Slow(at_s, name, rng.choice((0.5, 3.0, 30.0))))
            case "jump":
                found.append(ClockJump(at_s, rng.choice((0.01, 0.3, 5.0))))
            case Mishap() as mishap:
                count = rng.choice((1, 1, 2, 5, 20 if mishap is Mishap.ERROR else 5))
                found.append(Fault(at_s, name, mishap, count))
    return found


def _operations(
    rng: Random,
    machines: tuple[MachineSpec, ...],
    bounds: list[BoundChain],
    durations: Mapping[str, Mapping[str, Durations]],
    end_s: float,
) -> list[Stimulus]:
    """What an operator does: plan anew, remove a chain, resize a machine."""
    found: list[Stimulus] = []
    for _ in range(rng.randint(1, 3)):
        at_s, bound = rng.random() * end_s, rng.choice(bounds)
        match rng.choice(("replan", "remove", "resize")):
            case "replan":
                found.append(Install(at_s, _route(rng, bound, durations, machines)))
            case "remove":
                found.append(Remove(at_s, bound.name))
            case _:
                machine = rng.choice(machines)
                slots = rng.choice((0, 1, 4))
                found.append(Resize(at_s, machine.name, slots, machine.instances))
    return found
