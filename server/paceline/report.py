"""Plans, answers and states as tables that a person reads at a glance."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.status import Status
from rich.table import Table
from rich.text import Text

from paceline.core.plan import Allocation, Attainment, ChainPlan, ModulePlan, PackedMachine, Plan


def plan_report(plan: Plan, *, priced: bool = True) -> RenderableType:
    """One table per chain, the whole machines, then the total beside the lower bound."""
    busy = _Busy.of(plan.machines)
    parts: list[RenderableType] = [_chain_table(chain, busy) for chain in plan.chains]
    if plan.machines:
        parts += [_machines_table(plan.machines), Text(_idle_line(plan))]
    unit = "per hour" if priced else "machines (no prices declared: every machine counts 1)"
    total = f"cost {plan.cost_per_hour:.4g} {unit}; no plan can cost less than "
    parts.append(
        Text(
            f"{total}{plan.lower_bound_per_hour:.4g} (gap {_share(plan.gap)}); "
            f"policy {plan.policy}{_made_by(plan)}, {plan.billing} billing, "
            f"planned in {plan.solve_s * 1e3:.1f} ms"
        )
    )
    if plan.attainment is not None:
        parts += [Text(line) for line in _attainment_lines(plan, plan.attainment)]
    return Group(*parts)


def _share(share: float) -> str:
    """A percentage to a tenth; what rounds to nothing has no sign."""
    return f"{round(share, 3) + 0.0:.1%}"


def _made_by(plan: Plan) -> str:
    """By which other policies chains are planned, as these are cheaper once verified."""
    made = sorted({c.policy for c in plan.attainment.chains if c.policy}) if plan.attainment else []
    return f" (once verified the cheapest: {' and '.join(made)})" if made else ""


def _attainment_lines(plan: Plan, found: Attainment) -> list[str]:
    """What the headroom costs, then what each chain attained."""
    extra = plan.cost_per_hour - found.without_per_hour
    kinds = " and ".join(sorted({c.arrivals for c in found.chains}))
    holds = " and ".join(f"{target:.6g}" for target in sorted({c.target for c in found.chains}))
    if any((c.rate_factor, c.slo_factor, c.policy) != (1.0, 1.0, "") for c in found.chains):
        share = extra / found.without_per_hour
        lines = [f"{extra:+.3g}/h ({share:.1%}) so that {holds} hold under {kinds} arrivals"]
    else:
        lines = [f"{holds} hold under {kinds} arrivals without headroom"]
    for c in found.chains:
        headroom = ""
        if (c.rate_factor, c.slo_factor, c.policy) != (1.0, 1.0, ""):
            by = f"by {c.policy} " if c.policy else ""
            headroom = (
                f"; planned {by}for {c.rate_factor:.3g}x the rate in {c.slo_factor:.2g}x the "
                "objective"
            )
        lines.append(
            f"{c.chain}: {c.simulated:.2%} of {c.requests} simulated requests in time, "
            f"at least {floor(c.at_least * 1e4) / 1e4:.2%} with {found.confidence:.0%} confidence"
            f"{headroom}"
        )
    return lines


def _idle_line(plan: Plan) -> str:
    """What the machines cost that modules have, and the rest of them."""
    kinds = Counter(machine.hardware for machine in plan.machines)
    had = sum(chain.cost_per_hour for chain in plan.chains)
    rented = ", ".join(f"{count} x {hardware}" for hardware, count in sorted(kinds.items()))
    return (
        f"{rented}: {had:.4g} per hour for modules + {max(0.0, plan.cost_per_hour - had):.4g} idle"
    )


def _machines_table(machines: Sequence[PackedMachine]) -> Table:
    """All of them, those that run the same counted together; costs add up to the plan's."""
    table = _table(
        "own and shared machines",
        *_right("machines"),
        ("hardware", "left"),
        *_right("price/h", "cost/h", "busy", "memory MiB", "cycle ms"),
        ("runs", "left"),
    )
    alike: dict[tuple[str | float, ...], list[PackedMachine]] = {}
    for machine in machines:
        alike.setdefault((machine.hardware, machine.price_per_hour, *_order(machine)), []).append(
            machine
        )
    for group in alike.values():
        first, count = group[0], len(group)
        cycle, runs = _order(first)
        memory_bytes = max(machine.memory_bytes for machine in group)
        table.add_row(
            str(count),
            first.hardware,
            f"{first.price_per_hour:.3g}",
            f"{first.price_per_hour * count:.4g}",
            f"{sum(machine.utilisation for machine in group) / count:.0%}",
            f"{memory_bytes / (1 << 20):.0f}" if memory_bytes else "-",
            cycle,
            runs,
        )
    return table


def _order(machine: PackedMachine) -> tuple[str, str]:
    """Its duty cycle, and what it runs."""
    runs = ", ".join(f"{s.chain}.{s.module} b{s.batch_size}" for s in machine.shares)
    if cycle_s := machine.shares[0].cycle_s:
        return f"{cycle_s * 1e3:.1f}", runs
    return ("by urgency" if len(machine.shares) > 1 else ""), runs


@dataclass(slots=True)
class _Busy:
    """How busy the whole machines are that a module's allocations run on, handed out in the order
    of the plan; `left` by chain, module, hardware and batch size.
    """

    left: dict[tuple[str, str, str, int], list[float]]

    @classmethod
    def of(cls, machines: Sequence[PackedMachine]) -> _Busy:
        left: dict[tuple[str, str, str, int], list[float]] = {}
        for machine in machines:
            for share in machine.shares:
                key = (share.chain, share.module, machine.hardware, share.batch_size)
                left.setdefault(key, []).append(machine.utilisation)
        return cls(left)

    def take(self, chain: str, module: ModulePlan, allocation: Allocation) -> float:
        """The share of time they work; of fractions, which are paid for only while they work, the
        share of what they serve that is asked for.
        """
        key = (chain, module.module, allocation.hardware, allocation.batch_size)
        own = self.left.get(key, [])
        count = max(1, ceil(allocation.machines - 1e-6))
        taken, own[:count] = own[:count], []
        if taken:
            return sum(taken) / len(taken)
        served_rps = sum(each.rate_rps for each in module.allocations)
        return module.rate_rps / served_rps if served_rps else 0.0


def _chain_table(chain: ChainPlan, busy: _Busy) -> Table:
    rate = f"{chain.rate_rps:g} requests/s"
    if chain.wanted is not None:
        wanted = f"{chain.wanted.rate_rps:g} requests/s"
        rate = f"{chain.rate_rps:g} of {wanted} (the machines suffice for no more)"
    table = _table(
        f"{chain.chain}: {rate} within {chain.slo_s * 1e3:g} ms "
        f"(worst case {chain.latency_worst_s * 1e3:.0f} ms)",
        ("module", "left"),
        ("requests/s", "right"),
        ("budget ms", "right"),
        ("worst ms", "right"),
        ("batch", "right"),
        ("hardware", "left"),
        ("machines", "right"),
        ("used", "right"),
        ("cost/h", "right"),
    )
    for module in chain.modules:
        for index, allocation in enumerate(module.allocations):
            table.add_row(
                *(_module_cells(module) if index == 0 else ("", "", "", "")),
                f"{allocation.batch_size} x {allocation.duration_s * 1e3:.1f} ms",
                allocation.hardware,
                f"{allocation.machines:.3g}",
                f"{busy.take(chain.chain, module, allocation):.0%}",
                f"{allocation.cost_per_hour:.3g}",
            )
    return table


def _module_cells(module: ModulePlan) -> tuple[str, str, str, str]:
    dummy = f" +{module.dummy_rps:.3g}" if module.dummy_rps else ""
    return (
        module.module,
        f"{module.rate_rps:.4g}{dummy}",
        f"{module.latency_budget_s * 1e3:.0f}",
        f"{module.latency_worst_s * 1e3:.0f}",
    )


def timeline_report(
    chain: str, latency_ms: float, spans: Sequence[Mapping[str, Any]], error: str = ""
) -> RenderableType:
    """Where one request's time went: a row per batch that held some of its rows.

    A span has the fields of `paceline.v1.Span`.
    """
    table = _table(
        f"{chain}: {latency_ms:.0f} ms" + (f", failed: {error}" if error else ""),
        ("module", "left"),
        ("at ms", "right"),
        ("queue ms", "right"),
        ("execution ms", "right"),
        ("items", "right"),
        ("batch size", "right"),
        ("machine", "left"),
    )
    for span in sorted(spans, key=lambda span: float(span["start_ms"])):
        table.add_row(
            str(span["module"]),
            f"{span['start_ms']:.1f}",
            f"{span['queue_ms']:.1f}",
            f"{span['execute_ms']:.1f}",
            str(span["rows"]),
            str(span["batch_size"]),
            str(span["machine"]),
        )
    return table


ROWS_OF_TIME = 12


def simulation_report(run: Mapping[str, Any]) -> RenderableType:
    """A simulated run: its chains, modules and hardware, plans that followed, and its course."""
    replanned = f", {len(run['plans'])} new plans" if run["replanned"] else ""
    head = Text(
        f"{run['duration_s']:.0f} s of {run['arrivals']} (seed {run['seed']}), policy "
        f"{run['policy']}, {run['billing']} billing{replanned}: "
        f"{run['cost_per_hour']:.4g} per hour, {run['cost']:.4g} in all"
    )
    chains = _table(
        "chains",
        ("chain", "left"),
        *_right("SLO ms", "requests", "met", "missed", "rejected", "attained", "target"),
        *_right("goodput/s", "p50 ms", "p99 ms", "max ms"),
    )
    for chain in run["chains"]:
        latency = chain["latency_ms"]
        chains.add_row(
            chain["chain"],
            f"{chain['slo_ms']:g}",
            *(str(chain[name]) for name in ("requests", "met", "missed", "rejected")),
            f"{floor(chain['attainment'] * 1e4) / 1e4:.2%}",
            f"{chain['target']:.6g}",
            f"{chain['goodput_rps']:.4g}",
            *(f"{latency[name]:.0f}" for name in ("p50", "p99", "p100")),
        )
    modules = _table(
        "modules",
        ("module", "left"),
        *_right("rows", "batch", "queue ms", "p99", "execution ms", "rows waiting", "most"),
    )
    for module in run["modules"]:
        modules.add_row(
            f"{module['chain']}.{module['module']}",
            str(module["rows"]),
            f"{module['batch_size']:.1f}",
            f"{module['queue_ms']:.1f}",
            f"{module['queue_p99_ms']:.1f}",
            f"{module['execute_ms']:.1f}",
            f"{module['waiting_rows']:.1f}",
            str(module["waiting_rows_most"]),
        )
    return Group(head, chains, modules, *_changes(run["plans"]), _course(run["timeline"]))


def _changes(plans: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    if not plans:
        return []
    table = _table(
        "new plans",
        *_right("at s", "in force s", "cost/h before", "then", "machines +", "-"),
        ("because", "left"),
    )
    for plan in plans:
        table.add_row(
            f"{plan['at_s']:.0f}",
            f"{plan['ready_s']:.0f}",
            f"{plan['cost_per_hour_before']:.4g}",
            f"{plan['cost_per_hour']:.4g}",
            str(plan["machines_started"]),
            str(plan["machines_ended"]),
            plan["reason"],
        )
    return [table]


def _course(timeline: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The run in a few rows, each the sum or mean of some stretches."""
    hardware = sorted({name for stretch in timeline for name in stretch["machines"]})
    table = _table(
        "course",
        *_right("from s", "requests/s", "attained", "rows waiting", "cost/h"),
        *_right(*(text for name in hardware for text in (name, "used"))),
    )
    step = -(-len(timeline) // ROWS_OF_TIME)
    for start in range(0, len(timeline), step):
        part = timeline[start : start + step]
        span_s = sum(s["span_s"] for s in part) or 1.0
        requests = sum(s["requests"] for s in part)
        met = sum(s["met"] for s in part)
        cells = []
        for name in hardware:
            had = sum(s["machines"].get(name, 0.0) * s["span_s"] for s in part)
            busy = sum(
                s["machines"].get(name, 0.0) * s["span_s"] * s["utilisation"].get(name, 0.0)
                for s in part
            )
            cells += [f"{had / span_s:.3g}", f"{busy / had:.0%}" if had else "-"]
        table.add_row(
            f"{part[0]['at_s']:.0f}",
            f"{requests / span_s:.4g}",
            f"{met / requests:.2%}" if requests else "-",
            f"{sum(s['waiting_rows'] * s['span_s'] for s in part) / span_s:.1f}",
            f"{sum(s['cost_per_hour'] * s['span_s'] for s in part) / span_s:.4g}",
            *cells,
        )
    return table


def status_report(status: Mapping[str, Any]) -> RenderableType:
    """Chains, modules and machines of a running server, and models that are not ready."""
    state = "draining" if status["draining"] else "ready" if status["ready"] else "starting"
    head = Text(
        f"paceline {status['version']}: {state}, up {status['uptime_s']:.0f} s, "
        f"{status['in_flight']} requests in flight, {status['cost_per_hour']:.4g} per hour"
    )
    chains = _table(
        "chains", ("chain", "left"), *_right("SLO ms", "worst ms", *_OUTCOMES, "attained")
    )
    for chain in status["chains"]:
        attained = f"{chain['attainment']:.2%}" if "attainment" in chain else "-"
        numbers = (f"{chain['slo_ms']:g}", f"{chain['latency_worst_ms']:.0f}")
        outcomes = (str(chain[name]) for name in _OUTCOMES)
        chains.add_row(chain["chain"], *numbers, *outcomes, attained)
    modules = _table(
        "modules",
        ("module", "left"),
        ("model", "left"),
        *_right("batch", "waiting", "oldest ms", "executing"),
        ("machines", "left"),
    )
    for module in status["modules"]:
        modules.add_row(
            f"{module['chain']}.{module['module']}",
            module["model"],
            str(module["batch_size"]),
            str(module["queued"]),
            f"{module['oldest_ms']:.0f}",
            str(module["executing"]),
            ", ".join(module["machines"]),
        )
    machines = _table(
        "machines",
        ("machine", "left"),
        ("hardware", "left"),
        ("state", "left"),
        *_right("busy", "memory MiB"),
        ("models x instances", "left"),
    )
    for machine in status["machines"]:
        held = ", ".join(f"{name} x{n}" for name, n in machine["instances"].items())
        busy = f"{machine['executing']}/{machine['slots']}"
        bounded = machine.get("memory_mib")
        memory = f"{machine['memory_used_mib']:.0f}/{bounded:.0f}" if bounded else "-"
        machines.add_row(
            machine["machine"], machine["hardware"], machine["state"], busy, memory, held
        )
    notes = [
        Text(f"{model['model']}: {model['state']} {model['reason']}")
        for model in status["models"]
        if model["state"] != "READY"
    ]
    notes += [
        Text(
            f"{lane['model']} on {machine['machine']}: "
            + ("quarantined after failures" if lane["quarantined"] else "")
            + (f"takes {lane['slowdown']:.1f}x its profile" if lane["straggling"] else "")
        )
        for machine in status["machines"]
        for lane in machine["lanes"]
        if lane["quarantined"] or lane["straggling"]
    ]
    notes += [
        Text(
            f"the plan needs {s['needed']:g} machines of {s['hardware']}, "
            f"as many as {s['present']:g} are there"
        )
        for s in status["shortage"]
    ]
    return Group(head, chains, modules, machines, *notes)


_OUTCOMES = ("in_flight", "met", "missed", "failed", "rejected")


def _right(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, "right") for name in names)


def own_stdout() -> None:
    """From now on standard output is ours alone: HiGHS prints lines of its own there, past Python,
    whatever it is told.
    """
    if sys.stdout is not sys.__stdout__ or sys.stdout is None:
        return  # somebody reads what Python prints anyway
    sys.stdout.flush()
    own = os.dup(sys.stdout.fileno())
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def console(*, stderr: bool = False) -> Console:
    """A console that does not cut tables where there is no terminal."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=120)


def _table(title: str, *columns: tuple[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify="right" if justify == "right" else "left")
    return table


class Working:
    """What a long computation is at, on stderr: one changing line on a terminal, else a line for
    each new subject.
    """

    def __init__(self) -> None:
        self._console = console(stderr=True)
        self._status: Status | None = None
        self._subject = ""

    def __enter__(self) -> Working:
        if self._console.is_terminal:
            self._status = self._console.status("planning")
            self._status.start()
        return self

    def __call__(self, subject: str, detail: str) -> None:
        """It is at `detail` of `subject` now."""
        if self._status is not None:
            self._status.update(f"{subject}: {detail}")
        elif subject != self._subject:
            self._console.print(f"paceline: {subject}", markup=False, soft_wrap=True)
        self._subject = subject

    def __exit__(self, *raised: object) -> None:
        if self._status is not None:
            self._status.stop()
