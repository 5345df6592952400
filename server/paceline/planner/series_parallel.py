"""Series-parallel structure of a DAG, for composing frontiers exactly.

Invariant: a module waits for another in the tree exactly if it does, directly or not, in the DAG.

An order is series-parallel if it falls apart, again and again, either into parts that don't wait
for each other at all (parallel) or into parts of which each waits for all of the one before
(series). The smallest that does not is the letter N: c waits for a, d for a and b.

>>> from paceline.planner.paths import Graph
>>> tree(Graph.of([(), (0,), (0,), (1, 2)]))
Series(parts=(0, Parallel(parts=(1, 2)), 3))
>>> tree(Graph.of([(), (), (0,), (0, 1)])) is None
True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from paceline.planner.paths import Graph


@dataclass(frozen=True, slots=True)
class Series:
    """One after the other: latencies add up."""

    parts: tuple[Tree, ...]


@dataclass(frozen=True, slots=True)
class Parallel:
    """Side by side: the slowest counts."""

    parts: tuple[Tree, ...]


Tree: TypeAlias = int | Series | Parallel


def tree(graph: Graph) -> Tree | None:
    """The DAG as a tree of series and parallel parts; None if it is not series-parallel."""
    before: list[set[int]] = []
    for above in graph.parents:
        before.append(set(above).union(*(before[parent] for parent in above)))
    return _tree(tuple(range(len(before))), before)


def _tree(modules: tuple[int, ...], before: Sequence[set[int]]) -> Tree | None:
    if len(modules) == 1:
        return modules[0]

    def ordered(a: int, b: int) -> bool:
        return a in before[b] or b in before[a]

    apart = _components(modules, ordered)
    if len(apart) > 1:
        parts = [_tree(part, before) for part in apart]
        return None if None in parts else Parallel(tuple(p for p in parts if p is not None))
    stages = _components(modules, lambda a, b: not ordered(a, b))
    if len(stages) == 1:
        return None
    # All of one stage are before all of the next, so the number before any of them tells.
    inside = set(modules)
    stages.sort(key=lambda stage: len(before[stage[0]] & inside - set(stage)))
    parts = [_tree(part, before) for part in stages]
    return None if None in parts else Series(tuple(p for p in parts if p is not None))


def _components(
    modules: tuple[int, ...], joined: Callable[[int, int], bool]
) -> list[tuple[int, ...]]:
    left = list(modules)
    found: list[tuple[int, ...]] = []
    while left:
        part = [left.pop(0)]
        for member in part:
            part += [other for other in left if joined(member, other)]
            left = [other for other in left if other not in part]
        found.append(tuple(sorted(part)))
    return found
