"""The status document: what runs where, what waits, what was served. Units end the keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from paceline import __version__
from paceline.core.plan import Plan
from paceline.runtime.placement import Site
from paceline.runtime.statistics import Counts, Statistics

if TYPE_CHECKING:
    from paceline.runtime.controller import Controller
    from paceline.runtime.engine import Engine

_STARTED = monotonic()


def describe(
    controller: Controller,
    engine: Engine,
    statistics: Statistics,
    sites: Sequence[Site],
    placed: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """A JSON-able picture of everything; see the keys below."""
    plan = controller.current_plan()
    return {
        "version": __version__,
        "uptime_s": round(monotonic() - _STARTED, 1),
        "ready": controller.ready,
        "draining": controller.draining,
        "in_flight": engine.dispatcher.in_flight,
        "cost_per_hour": round(plan.cost_per_hour, 6),
        "shortage": {
            hardware: {"needed": round(needed, 3), "present": present}
            for hardware, (needed, present) in controller.shortage().items()
        },
        "machines": _machines(engine, sites, placed),
        "chains": _chains(controller, engine, statistics, plan),
        "models": [
            {"model": s.name, "state": s.state, "reason": s.reason}
            for s in controller.repository_index()
        ],
    }


def _machines(
    engine: Engine, sites: Sequence[Site], placed: Mapping[str, Mapping[str, int]]
) -> list[dict[str, Any]]:
    up = {machine.name: machine for machine in engine.dispatcher.machines()}
    return [
        {
            "machine": site.name,
            "hardware": site.hardware,
            "slots": site.slots,
            "up": site.name in up,
            "busy": up[site.name].busy if site.name in up else 0,
            "instances": dict(sorted(placed.get(site.name, {}).items())),
        }
        for site in sites
    ]


def _chains(
    controller: Controller, engine: Engine, statistics: Statistics, plan: Plan
) -> list[dict[str, Any]]:
    waiting = engine.dispatcher.queue_rows()
    found = []
    for chain in controller.chains():
        counts = statistics.chains.get(chain.name, Counts())
        planned = plan.chain(chain.name)
        ended = counts.success_count + counts.fail_count
        modules = []
        for module in chain.modules:
            own = planned.module(module.name) if planned is not None else None
            modules.append(
                {
                    "module": module.name,
                    "model": module.model,
                    "queue_rows": waiting.get((chain.name, module.name), 0),
                    "batch_size": own.batch_size if own is not None else 0,
                    "machines": round(own.machines, 6) if own is not None else 0.0,
                }
            )
        found.append(
            {
                "chain": chain.name,
                "slo_ms": chain.slo_s * 1e3,
                "rate_rps": planned.rate_rps if planned is not None else 0.0,
                "priority": chain.priority,
                "cost_per_hour": round(planned.cost_per_hour, 6) if planned is not None else 0.0,
                "requests": ended,
                "failed": counts.fail_count,
                "attainment": round(counts.met_count / ended, 6) if ended else None,
                "attainment_target": chain.attainment,
                "modules": modules,
            }
        )
    return found
