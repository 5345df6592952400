"""Replaying traffic without serving: files in, what happened and a plot of it out.

Invariant: what is printed and drawn follows from the files, the options and the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from paceline.advice import save_figure
from paceline.core.chain import Chain
from paceline.core.errors import ConfigError
from paceline.core.plan import Plan
from paceline.core.runs import modules_in
from paceline.plan_file import planned_modules, planned_rates, read_plan
from paceline.planner.replan import Replanning
from paceline.planning import Demand, Offline
from paceline.sim import workload
from paceline.sim.recorder import Depth, Stretch
from paceline.sim.rental import Rented
from paceline.sim.replan import LivePlanner
from paceline.sim.replay import Replay, replay
from paceline.sim.results import ChainResult, ModuleResult

SHARES = (0.5, 0.9, 0.95, 0.99, 1.0)
"""Latencies are told as these percentiles."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What comes: a `trace`, scaled to `scale_rps` (0: as recorded; None: to the planned rate), or
    `kind` (poisson, uniform) at the planned rate for `seconds`.
    """

    trace: Path | None = None
    window: str = ""
    scale_rps: float | None = None
    kind: str = "poisson"
    seconds: float = 60.0

    @property
    def name(self) -> str:
        return self.kind if self.trace is None else self.trace.name

    def instants(self, chain: Chain, rate_rps: float, seed: int) -> list[float]:
        """Arrivals of one chain. Raises ConfigError with the trace's file and line."""
        rng = Random(f"{seed} {chain.name}")
        if self.trace is not None:
            scale_rps = rate_rps if self.scale_rps is None else self.scale_rps or None
            found = workload.read_trace(self.trace, rng, rate_rps=scale_rps, window=self.window)
        else:
            count = round(rate_rps * self.seconds)
            if count > workload.MOST_REQUESTS:
                raise ConfigError(
                    f"{count} requests for chain {chain.name!r}, more than "
                    f"{workload.MOST_REQUESTS}; take a lower rate",
                    key="--seconds",
                )
            if self.kind == "uniform":
                found = workload.uniform(rate_rps, count)
            else:
                found = workload.poisson(rate_rps, count, rng)
        if not found:
            raise ConfigError(
                f"no request comes for chain {chain.name!r}", where=str(self.trace or "")
            )
        return found


def rates_of_trace(traffic: Traffic) -> Callable[[str], float | None]:
    """What a chain that declares no rate is planned for: the mean of the trace, as it is scaled."""

    def rate_rps(chain: str) -> float | None:
        if traffic.trace is None or traffic.scale_rps:
            return traffic.scale_rps
        found = workload.read_trace(traffic.trace, Random(0), window=traffic.window)
        return len(found) / found[-1] if found[-1] > 0 else None

    return rate_rps


def rates_of_plan(path: Path) -> Callable[[str], float | None]:
    """What a chain that declares no rate was planned for in this file."""

    def rate_rps(chain: str) -> float | None:
        return planned_rates(path).get(chain)

    return rate_rps


def runs_of_plan(path: Path) -> Callable[[str], bool]:
    """Whether a chain was planned with runs in this file."""

    def with_runs(chain: str) -> bool:
        return any(len(modules_in(name)) > 1 for name in planned_modules(path).get(chain, ()))

    return with_runs


@dataclass(frozen=True, slots=True)
class Simulation:
    """A replay and what it was made of."""

    replay: Replay
    plan: Plan
    chains: tuple[Chain, ...]
    traffic: Traffic
    seed: int
    replanned: bool

    def as_json(self) -> dict[str, Any]:
        """Everything that is told, without a clock's time in it."""
        run = self.replay
        return {
            "seed": self.seed,
            "arrivals": self.traffic.name,
            "policy": self.plan.policy,
            "billing": self.plan.billing,
            "replanned": self.replanned,
            "duration_s": _round(run.duration_s),
            "cost": round(run.cost, 9),
            "cost_per_hour": _round(run.cost_per_hour),
            "chains": [
                _chain_json(run.result.chain(chain.name), chain, run.duration_s)
                for chain in self.chains
            ],
            "modules": [_module_json(m, run) for m in run.result.modules],
            "machines": [_machine_json(rented, run.duration_s) for rented in run.machines],
            "plans": [
                {
                    "at_s": _round(change.at_s),
                    "ready_s": _round(change.ready_s),
                    "reason": change.reason,
                    "cost_per_hour_before": _round(change.cost_before),
                    "cost_per_hour": _round(change.cost_after),
                    "machines_started": change.started,
                    "machines_ended": change.ended,
                }
                for change in run.changes
            ],
            "timeline": [_stretch_json(stretch) for stretch in run.stretches],
        }


def arrivals_of(wanted: Demand, traffic: Traffic, seed: int) -> dict[str, list[float]]:
    """Arrivals by chain. Raises ConfigError with the trace's file and line."""
    rates = {demand.name: demand.rate_rps for demand in wanted.chains}
    return {
        chain.name: traffic.instants(chain, rates[chain.name], seed) for chain in wanted.declared
    }


def run_offline(
    wanted: Demand,
    made: Offline,
    traffic: Traffic,
    instants: Mapping[str, Sequence[float]],
    *,
    seed: int,
    replan: bool = False,
    load_s: float = 0.0,
) -> Simulation:
    """Replay `instants` of `traffic` against the plan; with `replan`, as the server would change
    it.
    """
    replanner = None
    if replan:
        replanner = LivePlanner(wanted.chains, wanted.options, made.headroom, Replanning())
    run = replay(
        wanted.declared,
        made.plan,
        wanted.profiles,
        instants,
        seed=seed,
        replanner=replanner,
        load_s=load_s,
    )
    return Simulation(run, made.plan, wanted.declared, traffic, seed, replan)


def planned_before(wanted: Demand, path: Path) -> Offline:
    """The plan of a file instead of a new one. ConfigError unless it is for these chains."""
    plan = read_plan(path, wanted.prices)
    for chain in wanted.declared:
        planned = plan.chain(chain.name)
        if planned is None:
            raise ConfigError(f"has no plan for chain {chain.name!r}", where=path.name)
        if {m.name: m.model for m in chain.modules} != {m.module: m.model for m in planned.modules}:
            raise ConfigError(
                f"was made for other modules of chain {chain.name!r}; plan it anew", where=path.name
            )
    return Offline(plan, wanted.chains, wanted.options)


def plot(simulation: Simulation, path: Path) -> None:
    """Draw attainment, cost, utilisation and queue over time. ConfigError unless PNG or SVG."""
    stretches = simulation.replay.stretches
    drawn: Sequence[tuple[str, Sequence[float]]] = (
        ("requests/s", [s.requests / s.span_s if s.span_s else 0.0 for s in stretches]),
        ("attainment", [s.attainment for s in stretches]),
        ("rows waiting", [s.queued for s in stretches]),
        ("utilisation", [s.utilisation() for s in stretches]),
        ("cost per hour", [s.cost_per_hour for s in stretches]),
    )
    at_s = [stretch.at_s for stretch in stretches]

    def draw(figure: Any) -> None:
        for axes, (label, values) in zip(figure.subplots(5, 1, sharex=True), drawn, strict=True):
            axes.plot(at_s, values, drawstyle="steps-post")
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
            if label == "attainment":
                for target in sorted({chain.attainment for chain in simulation.chains}):
                    axes.axhline(target, linestyle=":", color="black")
            else:
                axes.set_ylim(bottom=0)
        figure.axes[-1].set_xlabel("s")
        names = ", ".join(chain.name for chain in simulation.chains[:4])
        figure.suptitle(f"{names} under {simulation.traffic.name}, seed {simulation.seed}")

    save_figure(path, (9, 10), draw)


def _chain_json(own: ChainResult, chain: Chain, duration_s: float) -> dict[str, Any]:
    return {
        "chain": own.chain,
        "slo_ms": _round(own.slo_s * 1e3),
        "target": chain.attainment,
        "requests": own.requests,
        "met": own.met,
        "missed": own.missed,
        "rejected": own.rejected,
        "attainment": _round(own.attainment),
        "goodput_rps": _round(own.met / duration_s) if duration_s else 0.0,
        "latency_ms": {
            f"p{share * 100:g}": _round(own.percentile_s(share) * 1e3) for share in SHARES
        },
    }


def _module_json(module: ModuleResult, run: Replay) -> dict[str, Any]:
    depth = run.depths.get((module.chain, module.module), Depth())
    return {
        "chain": module.chain,
        "module": module.module,
        "rows": module.rows,
        "batch_size": _round(module.batch_size),
        "queue_ms": _round(module.queue_s * 1e3),
        "queue_p99_ms": _round(module.queue_p99_s * 1e3),
        "execute_ms": _round(module.execute_s * 1e3),
        "waiting_rows": _round(depth.mean),
        "waiting_rows_most": depth.most,
    }


def _machine_json(rented: Rented, duration_s: float) -> dict[str, Any]:
    until_s = min(rented.until_s, duration_s)
    had_s = (until_s - rented.from_s) * rented.share
    return {
        "machine": rented.machine.name,
        "hardware": rented.machine.hardware,
        "models": sorted(rented.machine.instances),
        "share": _round(rented.share),
        "from_s": _round(rented.from_s),
        "until_s": _round(until_s),
        "utilisation": _round(rented.busy_s / had_s) if had_s > 0 else 0.0,
    }


def _stretch_json(stretch: Stretch) -> dict[str, Any]:
    hardware = sorted(stretch.rented_s)
    return {
        "at_s": _round(stretch.at_s),
        "span_s": _round(stretch.span_s),
        "requests": stretch.requests,
        "met": stretch.met,
        "missed": stretch.missed,
        "rejected": stretch.rejected,
        "waiting_rows": _round(stretch.queued),
        "cost_per_hour": _round(stretch.cost_per_hour),
        "utilisation": {name: _round(stretch.utilisation(name)) for name in hardware},
        "machines": {
            name: _round(stretch.rented_s[name] / stretch.span_s) if stretch.span_s else 0.0
            for name in hardware
        },
    }


def _round(value: float) -> float:
    return round(value, 6)
