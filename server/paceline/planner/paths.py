"""Longest paths through a chain's modules: how much latency each module may still gain.

Invariant: with every latency added within its slack, one at a time, no path exceeds the objective.
Modules are indices in topological order; `parents[i]` holds smaller indices only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Graph:
    """A chain's DAG: the parents and the children of every module, by index.

    >>> diamond = Graph.of([(), (0,), (0,), (1, 2)])
    >>> diamond.longest([1.0, 2.0, 5.0, 1.0]), diamond.slowest([1.0, 2.0, 5.0, 1.0])
    (7.0, (0, 2, 3))
    >>> diamond.slacks([1.0, 2.0, 5.0, 1.0], 8.0)
    [1.0, 4.0, 1.0, 1.0]
    >>> diamond.siblings
    ((1, 2),)
    """

    parents: tuple[tuple[int, ...], ...]
    children: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, parents: Sequence[Sequence[int]]) -> Graph:
        """The graph in which module `i` waits for `parents[i]`."""
        children: list[list[int]] = [[] for _ in parents]
        for module, above in enumerate(parents):
            for parent in above:
                children[parent].append(module)
        return cls(
            tuple(tuple(sorted(set(above))) for above in parents),
            tuple(tuple(below) for below in children),
        )

    @property
    def siblings(self) -> tuple[tuple[int, ...], ...]:
        """Groups of two or more modules between the same parents and the same children."""
        groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for module, key in enumerate(zip(self.parents, self.children, strict=True)):
            groups.setdefault(key, []).append(module)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    def through(self, latencies_s: Sequence[float]) -> list[float]:
        """For every module, the length of the longest path that it is on."""
        head = [0.0] * len(latencies_s)
        tail = [0.0] * len(latencies_s)
        for i, latency_s in enumerate(latencies_s):
            head[i] = latency_s + max((head[p] for p in self.parents[i]), default=0.0)
        for i in reversed(range(len(latencies_s))):
            tail[i] = max((latencies_s[c] + tail[c] for c in self.children[i]), default=0.0)
        return [h + t for h, t in zip(head, tail, strict=True)]

    def longest(self, latencies_s: Sequence[float]) -> float:
        """The length of the slowest path."""
        return max(self.through(latencies_s))

    def slacks(self, latencies_s: Sequence[float], slo_s: float) -> list[float]:
        """For every module, the latency it alone could gain with every path within `slo_s`."""
        return [slo_s - length for length in self.through(latencies_s)]

    def slowest(self, latencies_s: Sequence[float]) -> tuple[int, ...]:
        """The slowest path; among equals the one with the smallest indices."""
        tail = [0.0] * len(latencies_s)
        for i in reversed(range(len(latencies_s))):
            tail[i] = latencies_s[i] + max((tail[c] for c in self.children[i]), default=0.0)
        roots = [i for i, above in enumerate(self.parents) if not above]
        path = [max(roots, key=lambda i: tail[i])]
        while self.children[path[-1]]:
            path.append(max(self.children[path[-1]], key=lambda i: tail[i]))
        return tuple(path)
