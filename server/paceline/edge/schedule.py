"""Who is served in a round, in which order of models, with how much bandwidth (PartialLoading).

A schedule is built from its end: with the batches after it fixed, a batch starts as late as they
and its users' deadlines allow, because user k needs D_k / (a_k s_k) of the bandwidth when its batch
starts at a_k (the closed form of algorithms.md section 5): later is cheaper. What comes before
depends on the rest only through (users served, start of the first batch, bandwidth used), so of two
endings with the same models the one that is worse in all three is dropped: that is the dynamic
program.

* `exact` tries every order: for any sharing, exponential in the models, polynomial in the users.
* `by_clusters` is for models that share one backbone within clusters: a cluster stays together, so
  one order of clusters is enough as long as all deadlines are the same and bandwidth does not
  decide. Polynomial; says whether its result is proven.
* `greedy` is for everything else: users served per extra second, loads counted by the blocks that
  are really missing; where another simple order does better, that.

Above `THOROUGH_USERS` users `in_order`, on which the last two rest, keeps two endings per number of
users (the latest, the cheapest) and looks `NEAR` models ahead: large rounds take seconds.

>>> models = {n: EdgeModel(n, {"trunk": 100, n: 10}, 0.1) for n in ("a", "b")}
>>> users = tuple(User(f"{m}{i}", m, 8.0, 1.0, 1.5) for m in "ab" for i in range(2))
>>> shared = Round(users, models, bandwidth_hz=1000.0, load_bytes_per_s=100.0)
>>> schedule(shared).served, schedule(shared.without_sharing()).served
(4, 2)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf

from paceline.core.bandwidth import needed, shared_out
from paceline.edge.round import Batch, EdgeModel, Grant, Round, Schedule, User

__all__ = [
    "EXACT_MODELS",
    "EdgeModel",
    "Round",
    "User",
    "backbones",
    "by_clusters",
    "exact",
    "greedy",
    "in_order",
    "schedule",
]

EXACT_MODELS = 8
"""Up to so many models, wanted by up to `THOROUGH_USERS`, every order is tried."""

THOROUGH_USERS = 48
NEAR = 6

_ROUNDING = 1e-9


def schedule(round_: Round) -> Schedule:
    """The best schedule that is affordable: exact for few models, else the better of the two."""
    wanted = {user.model for user in round_.users}
    if len(wanted) <= EXACT_MODELS and len(round_.users) <= THOROUGH_USERS:
        return exact(round_)
    found = [greedy(round_)]
    if backbones(round_) is not None:
        found.append(by_clusters(round_))
    return max(found, key=lambda s: (s.served, s.exact, -s.needed_hz))


def exact(round_: Round) -> Schedule:
    """The most users that can be served, with the least bandwidth for that many."""
    models = sorted({user.model for user in round_.users})
    endings: dict[frozenset[str], dict[str, list[_Ending]]] = {}
    best: _Ending | None = None
    choices = _Choices(round_)
    for model in models:
        found = choices.before(model, None)
        endings[frozenset((model,))] = {model: found}
    for size in range(1, len(models) + 1):
        for after in [key for key in endings if len(key) == size]:
            by_first = endings.pop(after)
            for first, found in by_first.items():
                best = choices.better(best, first, found)
            for model in models:
                if model in after:
                    continue
                longer = [e for found in by_first.values() for e in choices.extend(model, found)]
                if longer:
                    slot = endings.setdefault(after | {model}, {})
                    slot[model] = _undominated([*slot.get(model, ()), *longer])
    return choices.finished(best, "exact", proven=True)


def by_clusters(round_: Round) -> Schedule:
    """Clusters in the order of their tightest deadline, models of a cluster together.

    Proven when all deadlines are the same and bandwidth turned nobody away.
    """
    clusters = backbones(round_)
    assert clusters is not None, "models share more than one backbone per cluster"
    order = [model for cluster in clusters for model in cluster]
    found = in_order(round_, order)
    free = Round(round_.users, round_.models, inf_hz(round_), round_.load_bytes_per_s, round_.there)
    same = len({user.deadline_s for user in round_.users}) <= 1
    proven = same and found.served == in_order(free, order).served and not round_.there
    return Schedule(found.batches, found.grants, "clusters", proven)


def inf_hz(round_: Round) -> float:
    """More bandwidth than the users of a round can use before any load ends."""
    return 1e30 * max(1.0, round_.bandwidth_hz)


def in_order(round_: Round, order: Sequence[str]) -> Schedule:
    """The best schedule whose models come in this order (each may be left out)."""
    choices = _Choices(round_)
    endings: list[list[_Ending]] = []
    best: _Ending | None = None
    wanted = {user.model for user in round_.users}
    large = len(round_.users) > THOROUGH_USERS
    for model in reversed([model for model in order if model in wanted]):
        longer = choices.before(model, None)
        for found in endings[-NEAR:] if large else endings:
            longer += choices.extend(model, found)
        endings.append(_thinned(longer) if large else _undominated(longer))
        best = choices.better(best, model, endings[-1])
    return choices.finished(best, "in order", proven=False)


def greedy(round_: Round) -> Schedule:
    """The best of three orders: by users per second of load and batch with and without what is
    shared, and by deadline. Models that an order left out stand at its end.
    """
    wanted = {user.model for user in round_.users}
    tightest = {m: min(u.deadline_s for u in round_.users if u.model == m) for m in wanted}
    by_deadline = sorted(wanted, key=lambda model: (tightest[model], model))
    orders = [by_deadline]
    for chosen in (_gaining(round_, shared=True), _gaining(round_, shared=False)):
        orders.append([*chosen, *(model for model in by_deadline if model not in chosen)])
    found = max(
        (in_order(round_, order) for order in orders), key=lambda s: (s.served, -s.needed_hz)
    )
    return Schedule(found.batches, found.grants, "greedy", exact=False)


def _gaining(round_: Round, *, shared: bool) -> list[str]:
    """The model that serves the most users per second of its load and batch, again and again."""
    left = sorted({user.model for user in round_.users})
    order: list[str] = []
    at_s, last = 0.0, None
    choices = _Choices(round_)
    while left:
        gains = []
        for model in left:
            starts_s = at_s + round_.load_s(model, last if shared else None)
            count, ends_s = choices.most(model, starts_s)
            if count:
                gains.append((count / (ends_s - at_s), -left.index(model), model, ends_s))
        if not gains:
            break
        _, _, model, at_s = max(gains)
        left.remove(model)
        order.append(model)
        last = model
    return order


def backbones(round_: Round) -> list[list[str]] | None:
    """Models by cluster, where each cluster shares one backbone and nothing else is shared.

    None when sharing is not of that kind. Clusters by tightest deadline, then by name.
    """
    models = sorted({user.model for user in round_.users})
    owners: dict[str, list[str]] = {}
    for model in models:
        for block in round_.models[model].blocks:
            owners.setdefault(block, []).append(model)
    clusters = {tuple(o) for o in owners.values() if len(o) > 1}
    grouped = [model for cluster in clusters for model in cluster]
    if len(grouped) != len(set(grouped)):
        return None
    alone = [(model,) for model in models if model not in grouped]
    tightest = {m: min(u.deadline_s for u in round_.users if u.model == m) for m in models}
    ordered = sorted([*clusters, *alone], key=lambda c: (min(tightest[m] for m in c), c))
    return [list(cluster) for cluster in ordered]


@dataclass(frozen=True, slots=True)
class _Ending:
    """The last batches of a schedule: `served` users, `hertz` of bandwidth in use."""

    served: int
    starts_s: float
    hertz: float
    model: str
    users: tuple[User, ...]
    rest: _Ending | None


class _Choices:
    """What can be put in front of an ending. Users of a model by bandwidth, cheapest first."""

    def __init__(self, round_: Round) -> None:
        self._round = round_
        self._users: dict[str, list[User]] = {}
        for user in sorted(round_.users, key=lambda u: (u.hertz_seconds, u.name)):
            self._users.setdefault(user.model, []).append(user)

    def before(self, model: str, rest: _Ending | None) -> list[_Ending]:
        """Every sensible batch of `model` in front of `rest`.

        For each instant at which it may end (the limit, and each deadline before it) the users
        with that deadline or a later one, the cheapest in bandwidth first.
        """
        users = self._users[model]
        after = None if rest is None else rest.starts_s - self._round.load_s(rest.model, model)
        limit_s = inf if after is None else after
        ends = {u.deadline_s for u in users if u.deadline_s < limit_s}
        if limit_s < inf:
            ends.add(limit_s)
        found: list[_Ending] = []
        for ends_s in sorted(ends):
            able = [user for user in users if user.deadline_s >= ends_s]
            needs = accumulate(user.hertz_seconds for user in able)
            for count, need in enumerate(needs, 1):
                starts_s = ends_s - self._round.models[model].duration_s(count)
                if starts_s <= 0:
                    break
                hertz = need / starts_s + (rest.hertz if rest else 0.0)
                if hertz <= self._round.bandwidth_hz * (1 + _ROUNDING):
                    served = count + (rest.served if rest else 0)
                    chosen = tuple(able[:count])
                    found.append(_Ending(served, starts_s, hertz, model, chosen, rest))
        return found

    def extend(self, model: str, endings: Iterable[_Ending]) -> list[_Ending]:
        """Everything that `model` in front of `endings` makes of them."""
        return [ending for rest in endings for ending in self.before(model, rest)]

    def better(self, best: _Ending | None, first: str, found: Iterable[_Ending]) -> _Ending | None:
        """The best that starts after its first load."""
        load_s = self._round.load_s(first, None)
        for ending in found:
            if ending.starts_s >= load_s - _ROUNDING and (
                best is None or (ending.served, -ending.hertz) > (best.served, -best.hertz)
            ):
                best = ending
        return best

    def most(self, model: str, starts_s: float) -> tuple[int, float]:
        """Most users of `model` that a batch from `starts_s` on serves in time, and its end."""
        deadlines = sorted((u.deadline_s for u in self._users[model]), reverse=True)
        count, ends_s = 0, 0.0
        for served, deadline_s in enumerate(deadlines, 1):
            ends = starts_s + self._round.models[model].duration_s(served)
            if ends <= deadline_s:
                count, ends_s = served, ends
        return count, ends_s

    def finished(self, best: _Ending | None, method: str, *, proven: bool) -> Schedule:
        """The schedule of an ending, with the bandwidth that is left shared out."""
        batches: list[Batch] = []
        starts: list[tuple[User, float]] = []
        last: str | None = None
        ending = best
        while ending is not None:
            model = self._round.models[ending.model]
            load_s = self._round.load_s(ending.model, last)
            ends_s = ending.starts_s + model.duration_s(len(ending.users))
            names = tuple(user.name for user in ending.users)
            batches.append(Batch(ending.model, names, load_s, ending.starts_s, ends_s))
            starts += [(user, ending.starts_s) for user in ending.users]
            last, ending = ending.model, ending.rest
        return Schedule(tuple(batches), self._shares(starts), method, proven)

    def _shares(self, starts: Sequence[tuple[User, float]]) -> tuple[Grant, ...]:
        """What each needs, and the rest in proportion, so that all uploads end early alike."""
        needs = [needed(user.hertz_seconds, starts_s) for user, starts_s in starts]
        shares = shared_out(needs, self._round.bandwidth_hz)
        return tuple(
            Grant(user.name, need, hertz, hertz * user.efficiency_bps_per_hz)
            for (user, _), need, hertz in zip(starts, needs, shares, strict=True)
        )


def _undominated(endings: list[_Ending]) -> list[_Ending]:
    """Without those than which another serves no fewer, starts no earlier and uses no more."""
    order: Callable[[_Ending], tuple[float, float, float]] = lambda e: (  # noqa: E731
        -e.served,
        -e.starts_s,
        e.hertz,
    )
    kept: list[_Ending] = []
    for ending in sorted(endings, key=order):
        if not any(k.starts_s >= ending.starts_s and k.hertz <= ending.hertz for k in kept):
            kept.append(ending)
    return kept


def _thinned(endings: list[_Ending]) -> list[_Ending]:
    """For each number of users the ending that starts last, and the one that uses least."""
    latest: dict[int, _Ending] = {}
    cheapest: dict[int, _Ending] = {}
    for ending in endings:
        known = latest.get(ending.served)
        if known is None or (-ending.starts_s, ending.hertz) < (-known.starts_s, known.hertz):
            latest[ending.served] = ending
        known = cheapest.get(ending.served)
        if known is None or (ending.hertz, -ending.starts_s) < (known.hertz, -known.starts_s):
            cheapest[ending.served] = ending
    return _undominated([*latest.values(), *cheapest.values()])
