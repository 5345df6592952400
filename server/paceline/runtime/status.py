"""The status document: what runs where, what waits, what was served. Units end the keys.

Its keys are the fields of `paceline.v1.StatusResponse`, with some more for which it has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from paceline import COMPILED, __version__
from paceline.core.bind import BoundChain
from paceline.core.plan import Plan
from paceline.dispatch.dispatcher import Dispatcher
from paceline.dispatch.loads import ModuleLoad
from paceline.runtime.machines import Placed
from paceline.runtime.placement import Site
from paceline.runtime.residence import Residence
from paceline.runtime.statistics import Counts, Statistics

if TYPE_CHECKING:
    from paceline.runtime.controller import Controller

MIB = 1 << 20

_STARTED_S = monotonic()


def describe(
    controller: Controller,
    dispatcher: Dispatcher,
    statistics: Statistics,
    sites: Sequence[Site],
    placed: Placed,
    *,
    now_s: float,
) -> dict[str, Any]:
    """A JSON-able picture of everything; `now_s` on the dispatcher's clock."""
    plan = controller.current_plan()
    chains = controller.served()
    return {
        "version": __version__,
        "compiled": COMPILED,
        "uptime_s": round(monotonic() - _STARTED_S, 1),
        "ready": controller.ready,
        "draining": controller.draining,
        "in_flight": dispatcher.in_flight,
        "cost_per_hour": round(plan.cost_per_hour, 6),
        "shortage": [
            {"hardware": hardware, "needed": round(needed, 3), "present": round(present, 3)}
            for hardware, (needed, present) in controller.shortage().items()
        ],
        "replanning": _replanning(controller),
        "residency": _residency(controller.machines.residence),
        "chains": [_chain(bound, dispatcher, statistics, plan) for bound in chains],
        "modules": _modules(chains, dispatcher, plan, placed, now_s),
        "machines": [
            _machine(site, dispatcher, placed)
            | _memory(controller.machines.residence, site.name, now_s)
            for site in sites
        ],
        "models": [
            {
                "model": state.name,
                "version": state.version,
                "state": state.state,
                "reason": state.reason,
                "machines": [
                    name for name, models in sorted(placed.items()) if state.name in models
                ],
            }
            for state in controller.repository_index()
        ],
    }


def _residency(residence: Residence) -> dict[str, Any]:
    """What models came and went, and why; nothing where they all stay."""
    if not residence.engaged:
        return {}
    return {
        **asdict(residence.state.counts),
        "evicted": [
            {
                "machine": gone.machine,
                "model": gone.model,
                "mib": round(gone.size_bytes / MIB, 1),
                "why": gone.why,
            }
            for gone in reversed(residence.state.recent)
        ],
    }


def _memory(residence: Residence, name: str, now_s: float) -> dict[str, Any]:
    """A machine's ledger."""
    machine = residence.state.machines.get(name) if residence.engaged else None
    if machine is None:
        return {}
    ledger = machine.ledger
    bounded = ledger.budget_bytes != inf
    factors = [round(factor, 3) for factor in residence.factors(name, now_s)]
    return {
        "memory_used_mib": round(ledger.used_bytes / MIB, 1),
        "memory_mib": round(ledger.budget_bytes / MIB, 1) if bounded else 0.0,
        "load_interference": factors[0],
        "load_interference_by_loads": factors,
        "held": [
            {
                "model": held.model,
                "state": "closing" if held.closing else held.phase.value,
                "mib": round(held.footprint.alone_bytes(held.instances) / MIB, 1),
                "instances": held.instances,
                "leases": residence.state.leases.pins(held.model),
            }
            for held in ledger.held()
        ],
    }


def _replanning(controller: Controller) -> dict[str, Any]:
    """Traffic as measured and as planned for, and what was changed for it."""
    replanner, planned = controller.replanner, controller.traffic
    measured = replanner.measured()
    return {
        "traffic": [
            {
                "chain": chain,
                "rate_rps": round(rate_rps, 3),
                "planned_rps": round(planned.rates_rps[chain], 3),
                "fan_outs": {
                    module: round(fan_out, 3)
                    for (of, module), fan_out in sorted(measured.fan_outs.items())
                    if of == chain
                },
            }
            for chain, rate_rps in sorted(measured.rates_rps.items())
            if chain in planned.rates_rps
        ],
        "slowdowns": [
            {
                "model": model,
                "hardware": hardware,
                "slowdown": round(ratio, 3),
                "planned": round(planned.slowdowns[model, hardware], 3),
            }
            for (model, hardware), ratio in sorted(measured.slowdowns.items())
        ],
        "changes": [
            {
                "at_s": round(change.at_s, 3),
                "reason": change.reason,
                "cost_before_per_hour": round(change.cost_before, 6),
                "cost_after_per_hour": round(change.cost_after, 6),
            }
            for change in replanner.changes
        ],
        "failure": replanner.failure,
    }


def _chain(
    bound: BoundChain, dispatcher: Dispatcher, statistics: Statistics, plan: Plan
) -> dict[str, Any]:
    counts = statistics.chains.get(bound.name, Counts())
    planned = plan.chain(bound.name)
    ended = counts.success_count + counts.fail_count
    described: dict[str, Any] = {
        "chain": bound.name,
        "slo_ms": round(bound.chain.slo_s * 1e3, 3),
        "rate_rps": planned.rate_rps if planned is not None else 0.0,
        "latency_worst_ms": round(planned.latency_worst_s * 1e3, 3) if planned is not None else 0.0,
        "cost_per_hour": round(planned.cost_per_hour, 6) if planned is not None else 0.0,
        "in_flight": dispatcher.in_flight_of(bound.name),
        "met": counts.met_count,
        "missed": counts.success_count - counts.met_count,
        "failed": counts.fail_count - counts.rejected_count,
        "rejected": counts.rejected_count,
    }
    if planned is not None and planned.wanted is not None:
        described["wanted_rps"] = planned.wanted.rate_rps
    if ended:
        described["attainment"] = round(counts.met_count / ended, 6)
    return described


def _modules(
    chains: Sequence[BoundChain],
    dispatcher: Dispatcher,
    plan: Plan,
    placed: Placed,
    now_s: float,
) -> list[dict[str, Any]]:
    loads = dispatcher.loads()
    found = []
    for bound in chains:
        planned = plan.chain(bound.name)
        for module in bound.modules:
            load = loads.get((bound.name, module.name), ModuleLoad())
            batch_size = planned.module(module.name).batch_size if planned is not None else 0
            found.append(
                {
                    "chain": bound.name,
                    "module": module.name,
                    "model": module.spec.name,
                    "queued": load.queued,
                    "oldest_ms": round((now_s - load.oldest_s) * 1e3, 3) if load.queued else 0.0,
                    "executing": load.executing,
                    "batch_size": batch_size,
                    "machines": [
                        n for n, held in sorted(placed.items()) if module.spec.name in held
                    ],
                }
            )
    return found


def _machine(site: Site, dispatcher: Dispatcher, placed: Placed) -> dict[str, Any]:
    up = {machine.name: machine for machine in dispatcher.machines()}
    instances = dict(sorted(placed.get(site.name, {}).items()))
    return {
        "machine": site.name,
        "hardware": site.hardware,
        "state": "up" if site.name in up else "down",
        "executing": up[site.name].busy if site.name in up else 0,
        "slots": site.slots,
        "models": list(instances),
        "instances": instances,
        "lanes": [
            {
                "model": model,
                "slowdown": round(lane.ratio, 3),
                "batches": lane.batches,
                "quarantined": lane.quarantined,
                "straggling": lane.straggling,
            }
            for model, lane in (sorted(up[site.name].lanes.items()) if site.name in up else ())
        ],
    }
