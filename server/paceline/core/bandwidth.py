"""How a link is divided among transfers that have deadlines: PartialLoading's closed form.

What is `amount` long and has to be there in `within_s` needs amount / within_s of the link
(algorithms.md section 5: B_k = D_k / (a_k s_k)); all are in time if that is no more than the link
gives in all, and the rest is shared out in proportion, so that everybody ends early alike.
"""

from __future__ import annotations

from collections.abc import Sequence


def needed(amount: float, within_s: float) -> float:
    """The least that brings it in time; `within_s` is above 0."""
    return amount / within_s


def shared_out(needs: Sequence[float], total: float) -> list[float]:
    """`needs` and the rest in proportion; what is needed where that is more than `total`.

    >>> shared_out([1.0, 3.0], 8.0)
    [2.0, 6.0]
    """
    wanted = sum(needs)
    factor = max(1.0, total / wanted) if wanted > 0 else 1.0
    return [need * factor for need in needs]
