"""How much waits and runs, by module: for whoever shows it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from paceline.dispatch.running import Running
from paceline.dispatch.waiting import Waiting


@dataclass(slots=True)
class ModuleLoad:
    """Rows of a module that wait and that run; `oldest_s` is when the first of them was queued."""

    queued: int = 0
    oldest_s: float = inf
    executing: int = 0


def loads(waiting: Waiting, running: Running) -> dict[tuple[str, str], ModuleLoad]:
    """By (chain, module), modules with nothing left out."""
    found: dict[tuple[str, str], ModuleLoad] = {}
    for stage in waiting.stages():
        load = found.setdefault((stage.route.chain, stage.route.name), ModuleLoad())
        for queue in stage.collector.queues():
            load.queued += queue.rows
            if (oldest := queue.oldest()) is not None:
                load.oldest_s = min(load.oldest_s, oldest.queued_s)
    for batch in running.all():
        route = batch.stage.route
        load = found.setdefault((route.chain, route.name), ModuleLoad())
        load.executing += batch.rows
    return found
