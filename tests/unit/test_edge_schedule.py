"""Rounds of edge inference: against brute force, and by hand."""

from __future__ import annotations

from itertools import combinations, permutations, product
from random import Random

import pytest

from paceline.core.errors import ConfigError
from paceline.edge.round import EdgeModel, Round, Schedule, User
from paceline.edge.schedule import backbones, by_clusters, exact, greedy, schedule
from paceline.round_file import parse_round


def brute_force(round_: Round) -> tuple[int, float]:
    """(most users served, least bandwidth for that many), over every order and choice of users."""
    models = sorted({user.model for user in round_.users})
    best = (0, 0.0)
    for size in range(1, len(models) + 1):
        for order in permutations(models, size):
            subsets = [
                [
                    chosen
                    for users in [[u for u in round_.users if u.model == model]]
                    for n in range(1, len(users) + 1)
                    for chosen in combinations(users, n)
                ]
                for model in order
            ]
            for chosen in product(*subsets):
                hertz = least_bandwidth(round_, order, chosen)
                count = sum(map(len, chosen))
                if hertz is not None and (count, -hertz) > (best[0], -best[1]):
                    best = (count, hertz)
    return best


def least_bandwidth(
    round_: Round, order: tuple[str, ...], chosen: tuple[tuple[User, ...], ...]
) -> float | None:
    """Each batch as late as it can be; None when the first would start before its load is done."""
    limit_s, hertz, following = float("inf"), 0.0, None
    for model, users in reversed(list(zip(order, chosen, strict=True))):
        if following is not None:
            limit_s -= round_.load_s(following, model)
        ends_s = min(limit_s, *(user.deadline_s for user in users))
        limit_s = ends_s - round_.models[model].duration_s(len(users))
        if limit_s <= 0:
            return None
        hertz += sum(user.payload_bits / user.efficiency_bps_per_hz for user in users) / limit_s
        following = model
    if limit_s < round_.load_s(order[0], None) or hertz > round_.bandwidth_hz:
        return None
    return hertz


def random_round(
    random: Random, *, models: int, users: int, clusters: bool = False, same_deadline: bool = False
) -> Round:
    """Blocks shared anywhere, or one backbone per cluster; bandwidth that sometimes decides."""
    made = {}
    for index in range(models):
        name = f"m{index}"
        if clusters:
            blocks = {f"trunk{index % 2}": 60 + 30 * (index % 2), name: random.randint(5, 40)}
        else:
            shared = {f"s{i}": 20 + 10 * i for i in range(4) if random.random() < 0.5}
            blocks = {**shared, name: random.randint(1, 60)}
        made[name] = EdgeModel(name, blocks, random.uniform(0.05, 0.3), random.uniform(0, 0.1))
    end_s = random.uniform(1.0, 5.0)
    return Round(
        tuple(
            User(
                f"u{i}",
                f"m{random.randrange(models)}",
                random.uniform(1e3, 1e4),
                random.choice([0.5, 1.0, 4.0]),
                end_s if same_deadline else end_s * random.uniform(0.4, 1.4),
            )
            for i in range(users)
        ),
        made,
        bandwidth_hz=random.choice([3e3, 1e4, 1e6]),
        load_bytes_per_s=100.0,
        there={"s0": 20} if random.random() < 0.3 and not clusters else {},
    )


def check(round_: Round, found: Schedule) -> None:
    """A schedule is what it says: in time, within the bandwidth, every load in its place."""
    users = {user.name: user for user in round_.users}
    at_s, last = 0.0, None
    for batch in found.batches:
        assert batch.loads_s == pytest.approx(round_.load_s(batch.model, last))
        assert batch.starts_s >= at_s + batch.loads_s - 1e-6
        duration_s = round_.models[batch.model].duration_s(len(batch.users))
        assert batch.ends_s == pytest.approx(batch.starts_s + duration_s)
        for name in batch.users:
            assert users[name].model == batch.model
            assert batch.ends_s <= users[name].deadline_s + 1e-6
        at_s, last = batch.ends_s, batch.model
    starts = {name: batch.starts_s for batch in found.batches for name in batch.users}
    assert [grant.user for grant in found.grants] == list(starts)
    for grant in found.grants:
        user = users[grant.user]
        assert grant.needed_hz == pytest.approx(user.hertz_seconds / starts[user.name])
        assert grant.bandwidth_hz >= grant.needed_hz - 1e-9
        sent_bits = grant.bits_per_s * starts[user.name]
        assert sent_bits >= user.payload_bits * (1 - 1e-9)
    total = sum(grant.bandwidth_hz for grant in found.grants)
    assert total <= round_.bandwidth_hz * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(60))
def test_exact_equals_brute_force_whatever_is_shared(seed: int) -> None:
    round_ = random_round(Random(seed), models=3, users=5)
    found = exact(round_)
    check(round_, found)
    served, hertz = brute_force(round_)
    assert found.served == served
    assert found.needed_hz == pytest.approx(hertz)


@pytest.mark.parametrize("seed", range(40))
def test_clusters_are_optimal_where_they_say_so(seed: int) -> None:
    round_ = random_round(
        Random(seed), models=5, users=9, clusters=True, same_deadline=seed % 2 == 0
    )
    found, best = by_clusters(round_), exact(round_)
    check(round_, found)
    assert found.served <= best.served
    if found.exact:
        assert found.served == best.served
    assert found.exact or round_.bandwidth_hz < 1e6 or seed % 2


def test_clusters_are_proven_when_deadlines_are_common_and_bandwidth_is_plenty() -> None:
    proven = 0
    for seed in range(0, 40, 2):
        found = by_clusters(
            random_round(Random(seed), models=5, users=9, clusters=True, same_deadline=True)
        )
        proven += found.exact
    assert proven >= 8


def test_greedy_is_never_better_than_exact_and_seldom_much_worse() -> None:
    served = best = 0
    for seed in range(60):
        round_ = random_round(Random(seed), models=4, users=10)
        found, optimum = greedy(round_), exact(round_)
        check(round_, found)
        assert found.served <= optimum.served
        served, best = served + found.served, best + optimum.served
    assert served >= 0.9 * best


def test_many_users_and_models_are_scheduled() -> None:
    round_ = random_round(Random(7), models=40, users=200, clusters=True, same_deadline=True)
    found = schedule(round_)
    check(round_, found)
    assert found.served >= greedy(round_).served
    assert backbones(round_) is not None


def test_nobody_can_be_served_before_a_load_is_done() -> None:
    model = EdgeModel("m", {"b": 100}, 0.1)
    late = Round((User("u", "m", 1.0, 1.0, 1.05),), {"m": model}, 1e6, 100.0)
    assert schedule(late) == Schedule((), (), "exact", exact=True)
    there = Round(late.users, late.models, 1e6, 100.0, there={"b": 100})
    assert schedule(there).served == 1


ROUND = """\
bandwidth_hz: 1000.0
load_mib_per_s: 100.0
models:
  m: {blocks: {trunk: 10.0, head: 1.0}, batch_ms: 5.0}
users:
  - {user: a, model: m, payload_bits: 100.0, efficiency_bps_per_hz: 2.0, deadline_ms: 500.0}
"""


def test_a_round_file_reads_in_its_units() -> None:
    round_ = parse_round(ROUND)
    assert round_.models["m"].blocks == {"trunk": 10 << 20, "head": 1 << 20}
    assert round_.users == (User("a", "m", 100.0, 2.0, 0.5),)
    assert round_.load_s("m", None) == pytest.approx(0.11)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("model: m,", "model: n,", r"r.yaml:6: users.0.model: unknown model 'n'; models: m"),
        ("batch_ms: 5.0", "batch_ms: 0.0", r"r.yaml:4: models.m.batch_ms: must be above 0"),
        ("trunk: 10.0", "trunk: -1.0", r"r.yaml:4: models.m.blocks.trunk: must be above 0"),
        ("payload_bits: 100.0", "payload: 1", r"r.yaml:6: users.0.payload_bits: is missing"),
        ("bandwidth_hz: 1000.0", "bandwidth: 1", r"r.yaml:1: bandwidth"),
        ("deadline_ms: 500.0", "deadline_ms: .inf", r"r.yaml:6: users.0.deadline_ms: must be"),
        (ROUND, "- 1\n", r"r.yaml: a round file is a mapping with"),
        ("users:", "users: []\nold:", r"r.yaml:5: users: "),
    ],
)
def test_a_bad_round_file_says_where_and_what(old: str, new: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_round(ROUND.replace(old, new), name="r.yaml")
