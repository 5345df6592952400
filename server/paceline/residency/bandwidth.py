"""How concurrent loads split a machine's link (PartialLoading, arXiv 2503.22982): for each the
least that brings its bytes by the instant at which its first waiting request must start, shared
blocks counted once; the rest to those that are late, or to end early.

Where the link does not suffice for all, loads are taken by priority, then in order of the
bandwidth that each user served costs: given the same number of users, the cheapest first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from paceline.core.bandwidth import needed, shared_out

AHEAD = 0.8
"""Bytes are to be there when this much of the time is over: turns and estimates are coarse."""

LEAST_SHARE = 0.02
"""No load stands still: what nobody waits for, and who is late, gets that at least."""

LEAST_S = 0.01


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes of a model that are under way. `latest_s`: until when each of those who wait for it
    must have them; `blocks`: its shared blocks, of `total_bytes` in all.
    """

    model: str
    left_bytes: int
    latest_s: tuple[float, ...] = ()
    priority: float = 0.0
    blocks: Mapping[str, int] = field(default_factory=dict)
    total_bytes: int = 0

    @property
    def first_s(self) -> float:
        return min(self.latest_s, default=inf)


def split(
    transfers: Sequence[Transfer], now_s: float, link_bytes_s: float | None = None
) -> dict[str, float]:
    """Shares of the link by model, which sum to 1. Without `link_bytes_s` (not measured yet) it
    is taken to suffice.

    A model of 60 MB that is needed in 1 s beside one of 200 MB that is needed in 10 s, at 100 MB/s:

    >>> urgent, later = Transfer("a", 60, (1.0,)), Transfer("b", 200, (10.0,))
    >>> {model: round(share, 2) for model, share in split([urgent, later], 0.0, 100.0).items()}
    {'a': 0.75, 'b': 0.25}

    Both are in time: a after 0.8 s, b after 2.6 s.
    """
    if not transfers:
        return {}
    ordered = sorted(transfers, key=lambda t: (t.priority, t.first_s, t.model))
    needs = _needs(ordered, now_s)
    total = link_bytes_s or max(sum(needs.values()), 1.0)
    chosen: dict[str, float] = {}
    users = {t.model: sum(at_s > now_s for at_s in t.latest_s) for t in ordered}
    left = total
    for each in sorted(
        (t for t in ordered if t.model in needs),
        key=lambda t: (t.priority, needs[t.model] / max(1, users[t.model]), t.model),
    ):
        if needs[each.model] <= left * (1 + 1e-9):
            chosen[each.model] = needs[each.model]
            left -= needs[each.model]
    late = [t.model for t in ordered if t.latest_s and t.first_s < inf and t.model not in chosen]
    if late:
        shares = chosen | {model: max(0.0, left) / len(late) for model in late}
    else:
        shares = dict(zip(chosen, shared_out(list(chosen.values()), total), strict=True))
    least = {t.model: max(shares.get(t.model, 0.0) / total, LEAST_SHARE) for t in ordered}
    whole = sum(least.values())
    return {t.model: least[t.model] / whole for t in ordered}


def _needs(ordered: Sequence[Transfer], now_s: float) -> dict[str, float]:
    """Bytes a second of those that can still be in time; a block is the most urgent one's."""
    have: set[str] = set()
    found: dict[str, float] = {}
    for each in ordered:
        shared = sum(size for key, size in each.blocks.items() if key in have)
        have.update(each.blocks)
        own = 1.0 - shared / each.total_bytes if each.total_bytes else 1.0
        in_time = [at_s for at_s in each.latest_s if now_s < at_s < inf]
        if in_time:
            within_s = max(LEAST_S, AHEAD * (min(in_time) - now_s))
            found[each.model] = needed(each.left_bytes * own, within_s)
    return found
