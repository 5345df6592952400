"""In which order waiting models are loaded (PartialLoading, arXiv 2503.22982, general case).

More urgent priorities first. Within one, by deadline, as long as that serves everybody who waits
in time (no other order can serve more); else greedily by users served in time per extra second,
where a load takes only as long as the blocks take that are not there yet.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Pending:
    """A model to load: `load_s` for `own_bytes` and all its blocks; until when each of those who
    wait for it needs it (`latest_s`).
    """

    model: str
    load_s: float
    latest_s: tuple[float, ...]
    priority: float = 0.0
    own_bytes: int = 0
    blocks: Mapping[str, int] = field(default_factory=dict)
    machine: str = ""
    """The one that it is to be loaded on, "" for any."""

    def extra_s(self, there: Collection[str]) -> float:
        """How long it takes to load what is missing.

        >>> Pending("a", 4.0, (), own_bytes=1, blocks={"x": 3}).extra_s({"x"})
        1.0
        """
        total = self.own_bytes + sum(self.blocks.values())
        missing = total - sum(size for key, size in self.blocks.items() if key in there)
        return self.load_s * missing / total if total else self.load_s


def order(
    pending: Sequence[Pending], now_s: float, there: Collection[str] = frozenset()
) -> list[Pending]:
    """`pending` in the order in which to load it; `there` are blocks that need no loading.

    >>> one, two = Pending("one", 5.0, (6.0,)), Pending("two", 1.0, (2.0, 2.0))
    >>> [p.model for p in order([one, two], 0.0)]
    ['two', 'one']
    """
    found: list[Pending] = []
    at_s, have = now_s, set(there)
    for priority in sorted({p.priority for p in pending}):
        alike = sorted(
            (p for p in pending if p.priority == priority),
            key=lambda p: (min(p.latest_s, default=float("inf")), p.model),
        )
        ordered = alike
        if len(alike) > 1 and served(alike, at_s, have) < sum(len(p.latest_s) for p in alike):
            ordered = _greedy(alike, at_s, have)
        for one in ordered:
            at_s += one.extra_s(have)
            have.update(one.blocks)
        found += ordered
    return found


def served(ordered: Sequence[Pending], now_s: float, there: Collection[str] = frozenset()) -> int:
    """Users served in time when loaded one after the other in this order."""
    at_s, have, count = now_s, set(there), 0
    for one in ordered:
        at_s += one.extra_s(have)
        have.update(one.blocks)
        count += sum(latest_s >= at_s for latest_s in one.latest_s)
    return count


def _greedy(alike: Sequence[Pending], now_s: float, there: Collection[str]) -> list[Pending]:
    """`alike` comes by deadline, which breaks ties and orders those that serve nobody in time."""
    left, found = list(alike), list[Pending]()
    at_s, have = now_s, set(there)
    while left:
        best = max(left, key=_gain(at_s, have))
        if _gain(at_s, have)(best) <= 0.0:
            return found + left
        left.remove(best)
        found.append(best)
        at_s += best.extra_s(have)
        have.update(best.blocks)
    return found


def _gain(at_s: float, have: Collection[str]) -> Callable[[Pending], float]:
    """Users served in time per second that the load takes."""

    def gain(one: Pending) -> float:
        extra_s = one.extra_s(have)
        count = sum(latest_s >= at_s + extra_s for latest_s in one.latest_s)
        return count / max(extra_s, 1e-9)

    return gain
