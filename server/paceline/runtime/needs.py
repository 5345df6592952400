"""What a request will need of models, and when: the leases that residency is told of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.dispatch import ModuleRoute
from paceline.residency.events import Need

LATER_S = 1e-6
"""No module is wanted before the dispatcher says so, even the first, or where nothing is known."""


def needs(
    modules: Sequence[ModuleRoute],
    processes: Callable[[str], Sequence[str]] = lambda model: (model,),
    together: Callable[[Sequence[str]], str] = lambda models: "",
) -> tuple[Need, ...]:
    """One need for each module, in the chain's order: after all that it waits for, at the
    durations of single rows; of an ensemble one for each of its `processes`,
    on the machine where they shall be `together`.
    """
    ends_s: dict[str, float] = {}
    found = []
    for module in modules:
        parents = [p for p in module.bound.module.parents if p in ends_s]
        start_s = max((ends_s[parent] for parent in parents), default=0.0)
        ends_s[module.name] = start_s + module.best_s(1)
        in_s, after_s = max(start_s, LATER_S), module.floor_s
        models = processes(module.model)
        machine = together(models)
        found += [Need(model, in_s, after_s, machine) for model in models]
    return tuple(found)
