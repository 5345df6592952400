"""Residency's decisions, one at a time: what is loaded, what goes for it, who is answered how."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations
from math import inf
from random import Random

import pytest

from paceline.residency import events as ev
from paceline.residency.evict import Candidate, Eviction, Rate, choose
from paceline.residency.ledger import Footprint, Ledger
from paceline.residency.loading import Pending, order, served
from paceline.residency.residency import Residency
from paceline.residency.state import (
    LOAD_WEIGHT,
    RECYCLE_EVERY_S,
    SERVER_FREE_BYTES,
    SERVER_LOOKS,
    Limits,
)

NOW_S = 100.0


def residency(
    sizes: dict[str, int],
    *,
    budget: float = inf,
    machines: Iterable[str] = ("m",),
    limits: Limits | None = None,
    blocks: dict[str, dict[str, int]] | None = None,
) -> Residency:
    """Models of these sizes, known and loaded nowhere."""
    made = Residency(limits)
    for model, size in sizes.items():
        made.handle(ev.Declare(model, Footprint(size, (blocks or {}).get(model, {}))), now_s=0.0)
    for name in machines:
        made.handle(ev.MachineUp(name, budget, recyclable=True, fill=False), now_s=0.0)
    return made


def enter(
    made: Residency, request: int, *models: str, deadline_s: float = inf, now_s: float = NOW_S
) -> list[ev.Action]:
    """A request that needs these models one after the other."""
    needs = tuple(ev.Need(m, in_s=float(i), after_s=-float(i)) for i, m in enumerate(models))
    return made.handle(ev.Enter(request, needs, deadline_s), now_s=now_s)


def loads(actions: Iterable[ev.Action]) -> list[str]:
    return [a.model for a in actions if isinstance(a, ev.Load)]


def unloads(actions: Iterable[ev.Action]) -> list[str]:
    return [a.model for a in actions if isinstance(a, ev.Unload)]


def granted(actions: Iterable[ev.Action]) -> list[tuple[int, str]]:
    return [(a.request, a.model) for a in actions if isinstance(a, ev.Grant)]


def done(made: Residency, action: ev.Action, *, now_s: float = NOW_S) -> list[ev.Action]:
    """A load or unload ends well."""
    assert isinstance(action, ev.Load | ev.Unload)
    kind = ev.LoadDone if isinstance(action, ev.Load) else ev.UnloadDone
    return made.handle(kind(action.operation, action.machine, action.model), now_s=now_s)


def resident(made: Residency, *models: str, now_s: float = NOW_S) -> None:
    """Have these loaded, by requests that have ended."""
    for number, model in enumerate(models, start=9000):
        actions = enter(made, number, model, now_s=now_s)
        for action in actions:
            if isinstance(action, ev.Load):
                done(made, action, now_s=now_s + 0.1)
        made.handle(ev.Leave(number), now_s=now_s + 0.1)


def only(actions: list[ev.Action], kind: type) -> ev.Action:
    (found,) = (a for a in actions if isinstance(a, kind))
    return found


def test_a_request_for_a_cold_model_is_granted_when_it_is_loaded_and_the_next_at_once() -> None:
    made = residency({"a": 10})
    actions = enter(made, 1, "a")
    assert loads(actions) == ["a"] and not granted(actions)
    assert granted(done(made, only(actions, ev.Load))) == [(1, "a")]
    assert granted(enter(made, 2, "a")) == [(2, "a")]
    assert (made.counts.misses, made.counts.hits) == (1, 1)


def test_a_shared_block_counts_once_and_is_free_when_its_last_user_goes() -> None:
    ledger = Ledger(100)
    one, two = Footprint(10, {"backbone": 60}), Footprint(20, {"backbone": 60})
    ledger.begin_load("one", one, 1, 1, NOW_S)
    assert ledger.missing_bytes(two) == 20
    ledger.begin_load("two", two, 1, 2, NOW_S)
    assert ledger.used_bytes == 90
    assert (ledger.freed_bytes(["one"]), ledger.freed_bytes(["one", "two"])) == (10, 90)
    ledger.freed("one")
    assert ledger.used_bytes == 80
    with pytest.raises(AssertionError):
        ledger.begin_load("three", Footprint(21), 1, 3, NOW_S)


def test_memory_that_is_being_unloaded_still_counts() -> None:
    made = residency({"a": 60, "b": 60}, budget=100)
    resident(made, "a")
    actions = enter(made, 1, "b")
    assert unloads(actions) == ["a"] and not loads(actions)
    assert loads(done(made, only(actions, ev.Unload))) == ["b"]


def test_a_model_in_use_is_not_unloaded_but_closed_for_who_comes_after_a_more_urgent_wait() -> None:
    made = residency({"a": 60, "b": 60}, budget=100)
    resident(made, "a")
    enter(made, 1, "a", deadline_s=NOW_S + 9)
    assert not unloads(enter(made, 2, "b", deadline_s=NOW_S + 1)), "request 1 uses it"
    assert not granted(enter(made, 3, "a", deadline_s=NOW_S + 9)), "it would keep b out"
    actions = made.handle(ev.Passed(1, "a"), now_s=NOW_S)
    assert unloads(actions) == ["a"]
    actions = done(made, only(actions, ev.Unload))
    assert loads(actions) == ["b"]
    assert granted(done(made, only(actions, ev.Load))) == [(2, "b")]
    actions = made.handle(ev.Leave(2), now_s=NOW_S)
    assert unloads(actions) == ["b"], "request 3 still waits"


def test_what_a_sooner_deadline_needs_is_not_evicted_for_a_later_one() -> None:
    made = residency({"a": 60, "b": 60, "c": 40}, budget=100)
    resident(made, "a", "c")
    enter(made, 1, "c", "a", deadline_s=NOW_S + 2)  # a is needed after c
    actions = enter(made, 2, "b", deadline_s=NOW_S + 9)
    assert not unloads(actions) and not loads(actions)
    made.handle(ev.Leave(1), now_s=NOW_S)
    assert made.recent[-1].model == "a"


def test_a_closed_model_opens_again_when_the_more_urgent_request_has_gone() -> None:
    made = residency({"a": 60, "b": 60}, budget=100)
    resident(made, "a")
    enter(made, 1, "a", deadline_s=NOW_S + 9)
    enter(made, 2, "b", deadline_s=NOW_S + 1)
    enter(made, 3, "a", deadline_s=NOW_S + 9)
    assert granted(made.handle(ev.Leave(2), now_s=NOW_S)) == [(3, "a")]


def test_a_chain_whose_models_do_not_fit_together_is_served_one_after_the_other() -> None:
    made = residency({"a": 60, "b": 60}, budget=100)
    actions = enter(made, 1, "a", "b")
    assert loads(actions) == ["a"]
    assert granted(done(made, only(actions, ev.Load))) == [(1, "a")]
    actions = made.handle(ev.Passed(1, "a"), now_s=NOW_S)
    assert unloads(actions) == ["a"]
    made.handle(ev.Reach(1, "b"), now_s=NOW_S)
    actions = done(made, only(actions, ev.Unload))
    assert loads(actions) == ["b"]
    assert granted(done(made, only(actions, ev.Load))) == [(1, "b")]


def test_between_two_uses_of_a_model_its_room_may_go_to_what_comes_between() -> None:
    made = residency({"a": 60, "b": 60}, budget=100)
    uses = ((0.0, "a"), (1.0, "b"), (2.0, "a"))
    needs = tuple(ev.Need(model, at_s, after_s=2.0 - at_s) for at_s, model in uses)
    actions = made.handle(ev.Enter(1, needs, NOW_S + 60), now_s=NOW_S)
    done(made, only(actions, ev.Load))
    actions = made.handle(ev.Passed(1, "a"), now_s=NOW_S)
    actions += made.handle(ev.Reach(1, "b"), now_s=NOW_S)
    assert unloads(actions) == ["a"]
    actions = done(made, only(actions, ev.Unload))
    assert granted(done(made, only(actions, ev.Load))) == [(1, "b")]


def test_loads_of_later_modules_start_at_once_in_the_order_they_are_needed() -> None:
    made = residency(dict.fromkeys("dcba", 10), limits=Limits(most_loads=3))
    actions = enter(made, 1, "a", "b", "c", "d", deadline_s=NOW_S + 60)
    assert loads(actions) == ["a", "b", "c"]
    assert loads(done(made, actions[0])) == ["d"]


def test_an_urgent_load_overtakes_those_that_are_queued() -> None:
    made = residency(dict.fromkeys("abc", 10), limits=Limits(most_loads=1))
    first = only(enter(made, 1, "a", deadline_s=NOW_S + 60), ev.Load)
    assert not loads(enter(made, 2, "b", deadline_s=NOW_S + 60))
    assert not loads(enter(made, 3, "c", deadline_s=NOW_S + 5))
    assert loads(done(made, first)) == ["c"]
    made.handle(ev.Leave(2), now_s=NOW_S)  # a queued load is cancelled with its request
    load = made.machines["m"].ledger.get("c")
    assert load is not None
    assert not loads(made.handle(ev.LoadDone(load.operation, "m", "c"), now_s=NOW_S))


def test_the_model_that_is_missed_least_per_byte_goes_and_lru_takes_the_oldest() -> None:
    for eviction, victim in (("cost", "rare"), ("lru", "often")):
        limits = Limits(eviction=eviction)  # type: ignore[arg-type]
        made = residency({"often": 50, "rare": 50, "new": 50}, budget=100, limits=limits)
        for turn in range(20):
            resident(made, "often", now_s=NOW_S + turn)
        resident(made, "rare", now_s=NOW_S + 30)
        assert unloads(enter(made, 1, "new", now_s=NOW_S + 31)) == [victim], eviction


def test_who_would_take_the_place_of_what_is_wanted_more_waits_until_that_is_worth_it() -> None:
    made = residency({"often": 90, "rare": 50}, budget=100)
    for turn in range(40):
        resident(made, "often", now_s=NOW_S + turn)
    now_s = NOW_S + 41
    actions = enter(made, 1, "rare", now_s=now_s)
    waits = 0
    while not unloads(actions):
        wake = [a.at_s for a in actions if isinstance(a, ev.Wake)]
        now_s = wake[-1] if wake else now_s + 0.1
        waits += 1
        actions = made.handle(ev.Tick(), now_s=now_s)
    assert unloads(actions) == ["often"]
    assert waits > 0 and now_s < NOW_S + 41 + 5.5, "and not for ever"
    urgent = residency({"often": 90, "rare": 50}, budget=100)
    for turn in range(40):
        resident(urgent, "often", now_s=NOW_S + turn)
    deadline_s = NOW_S + 42.0
    found = enter(urgent, 1, "rare", deadline_s=deadline_s, now_s=NOW_S + 41)
    assert unloads(found) == ["often"], "it would be late"


def test_a_cold_chain_waits_once_for_the_place_of_what_is_wanted_more_and_not_once_a_model() -> (
    None
):
    made = residency({"often": 90, "one": 30, "two": 30, "three": 30}, budget=100)
    for turn in range(40):
        resident(made, "often", now_s=NOW_S + turn)
    now_s = NOW_S + 41
    actions = enter(made, 1, "one", "two", "three", deadline_s=NOW_S + 1000, now_s=now_s)
    while not unloads(actions):
        now_s += 0.1
        actions = made.handle(ev.Tick(), now_s=now_s)
    assert unloads(actions) == ["often"]
    actions = done(made, only(actions, ev.Unload), now_s=now_s)
    assert loads(actions) == ["one", "two", "three"], "none waits for another's turn to be wanted"


def test_what_a_waiting_request_will_need_later_may_take_a_place_as_well() -> None:
    made = residency({"often": 60, "one": 30, "two": 50}, budget=100)
    for turn in range(40):
        resident(made, "often", now_s=NOW_S + turn)
    now_s = NOW_S + 41
    actions = enter(made, 1, "one", "two", deadline_s=NOW_S + 1000, now_s=now_s)
    assert loads(actions) == ["one"]
    begun = only(actions, ev.Load)
    while not unloads(actions):
        now_s += 0.1
        assert now_s < NOW_S + 47, "it waited for its turn"
        actions = made.handle(ev.Tick(), now_s=now_s)
    assert unloads(actions) == ["often"], "while the first is being loaded"
    done(made, begun, now_s=now_s)


def test_eviction_frees_enough_and_no_more_than_it_must() -> None:
    rng = Random(3)
    for _ in range(300):
        sizes = {f"m{i}": rng.randint(1, 50) for i in range(rng.randint(1, 7))}
        candidates = [
            Candidate(name, rng.random(), 1.0, 1.0, size, rng.random())
            for name, size in sizes.items()
        ]
        ledger = Ledger()
        for name, size in sizes.items():
            ledger.adopt(name, Footprint(size), 1, NOW_S)
        missing = rng.randint(1, 150)
        eviction: Eviction = rng.choice(("cost", "lru"))
        chosen = choose(candidates, missing, ledger.freed_bytes, eviction)
        if chosen is None:
            assert sum(sizes.values()) < missing
            continue
        freed = sum(sizes[name] for name in chosen)
        assert freed >= missing
        assert all(freed - sizes[name] < missing for name in chosen), "one too many"


def test_a_size_that_was_twice_as_large_is_made_good_before_anything_is_loaded() -> None:
    made = residency({"a": 40, "b": 40, "c": 10}, budget=100)
    resident(made, "b")
    load = only(enter(made, 1, "a"), ev.Load)
    assert isinstance(load, ev.Load)
    actions = made.handle(ev.LoadDone(load.operation, "m", "a", 80), now_s=NOW_S)
    assert unloads(actions) == ["b"] and granted(actions) == [(1, "a")]
    assert not loads(enter(made, 2, "c")), "20 bytes too many are held"
    assert loads(done(made, only(actions, ev.Unload))) == ["c"]


def test_a_load_that_found_its_backbone_there_says_little_about_one_that_does_not() -> None:
    """First nothing better is known; a whole load then says it, and only a longer one more."""
    blocks = {model: {"backbone": 90, model: 1} for model in "ab"}
    made = residency({"a": 5, "b": 5}, blocks=blocks, machines=())
    a, b = (made.models[name] for name in "ab")

    def loaded(*took_s: tuple[str, float]) -> None:
        """One after the other, on a machine that has nothing."""
        made.handle(ev.MachineUp("m", inf, recyclable=True, fill=False), now_s=NOW_S)
        for model, took in took_s:
            load = only(enter(made, 1, model), ev.Load)
            done(made, load, now_s=NOW_S + took)
            made.handle(ev.Leave(1), now_s=NOW_S + took)
        made.handle(ev.MachineDown("m"), now_s=NOW_S)

    loaded(("a", 8.0), ("b", 1.0))
    assert (a.load_s, b.load_s) == (8.0, 1.0)
    loaded(("b", 7.0), ("a", 2.0))
    assert (a.load_s, b.load_s) == (8.0, 7.0)
    loaded(("b", 7.0), ("a", 18.0))
    assert a.load_s == pytest.approx(8.0 + LOAD_WEIGHT * 10.0)


def test_blocks_that_became_known_are_counted_once_from_then_on() -> None:
    """As of models that were loaded from a store that did not answer before."""
    made = residency({"a": 10, "b": 10, "c": 60}, budget=100)
    load = only(enter(made, 1, "a"), ev.Load)
    assert isinstance(load, ev.Load)
    blocks = {"backbone": 60, "head": 1}
    made.handle(ev.LoadDone(load.operation, "m", "a", 12, blocks), now_s=NOW_S)
    made.handle(ev.Leave(1), now_s=NOW_S)
    ledger = made.machines["m"].ledger
    assert ledger.used_bytes == 73
    load = only(enter(made, 2, "b"), ev.Load)
    assert isinstance(load, ev.Load)
    made.handle(ev.SizeMeasured("b", 10, {"backbone": 60}), now_s=NOW_S)
    assert ledger.used_bytes == 83, "while it loads"
    made.handle(ev.LoadDone(load.operation, "m", "b", 11), now_s=NOW_S)
    assert ledger.used_bytes == 84, "what was not said is as it was believed"


def test_a_model_larger_than_every_machine_is_refused_with_both_sizes() -> None:
    made = residency({"a": 300 << 20}, budget=200 << 20)
    refused = only(enter(made, 1, "a"), ev.Refuse)
    assert isinstance(refused, ev.Refuse)
    assert refused.reason == "model 'a' needs 300 MiB, m has 200 MiB"


def test_a_load_that_failed_is_tried_elsewhere_then_refused_and_tried_again_later() -> None:
    made = residency({"a": 10}, machines=("m1", "m2"))
    load = only(enter(made, 1, "a"), ev.Load)
    assert isinstance(load, ev.Load) and load.machine == "m1"
    failed = ev.LoadFailed(load.operation, "m1", "a", "bad file")
    load = only(made.handle(failed, now_s=NOW_S), ev.Load)
    assert isinstance(load, ev.Load) and load.machine == "m2"
    failed = ev.LoadFailed(load.operation, "m2", "a", "worse file")
    refused = only(made.handle(failed, now_s=NOW_S), ev.Refuse)
    assert isinstance(refused, ev.Refuse) and refused.reason == "worse file"
    assert isinstance(only(enter(made, 2, "a"), ev.Refuse), ev.Refuse), "it was tried just now"
    assert loads(enter(made, 3, "a", now_s=NOW_S + 2)) == ["a"]


def test_a_load_that_hangs_keeps_its_bytes_until_it_is_unloaded() -> None:
    made = residency({"a": 60, "b": 60}, budget=100)
    load = only(enter(made, 1, "a"), ev.Load)
    assert isinstance(load, ev.Load)
    hung = made.handle(ev.LoadHung(load.operation, "m", "a", "no answer"), now_s=NOW_S)
    assert unloads(hung) == ["a"]
    assert not loads(enter(made, 2, "b")), "it may still be there"
    assert loads(done(made, only(hung, ev.Unload))) == ["b"]


def test_a_leaking_machine_is_restarted_after_its_models_were_moved() -> None:
    made = residency({"a": 40, "b": 40}, budget=100, machines=("m1", "m2"))
    resident(made, "a", "b", now_s=NOW_S - 1)
    assert made.copies("a") == made.copies("b") == ["m1"]
    unload = only(made.handle(ev.Forget("b"), now_s=NOW_S), ev.Unload)
    assert isinstance(unload, ev.Unload)
    actions = made.handle(ev.UnloadStuck(unload.operation, "m1", "b"), now_s=NOW_S)
    assert [(a.machine, a.model) for a in actions if isinstance(a, ev.Load)] == [("m2", "a")]
    assert not [a for a in actions if isinstance(a, ev.Recycle)], "not before it is there"
    recycle = only(done(made, only(actions, ev.Load)), ev.Recycle)
    assert isinstance(recycle, ev.Recycle) and recycle.machine == "m1"
    assert made.counts.leaks == made.counts.recycles == 1


def test_a_server_that_grows_for_good_is_restarted_after_its_models_were_moved() -> None:
    mib = 1 << 20
    made = residency({"a": 40 * mib}, budget=1000 * mib, machines=("m1", "m2"))
    resident(made, "a", now_s=NOW_S - 1)

    def measure(mibs: list[int], now_s: float = NOW_S) -> list[ev.Action]:
        found: list[ev.Action] = []
        for number in mibs:
            event = ev.ServerMeasured("m1", number * mib)
            found += made.handle(event, now_s=now_s)
        return found

    ledger = made.machines["m1"].ledger
    free = ledger.free_bytes
    peaks = [500 if number % 3 == 1 else 100 for number in range(2 * SERVER_LOOKS)]
    assert not loads(measure([30, *peaks])), "peaks, and what a server keeps for itself"
    assert ledger.free_bytes == free - (70 * mib - SERVER_FREE_BYTES)
    actions = measure([200] * SERVER_LOOKS)
    assert [(a.machine, a.model) for a in actions if isinstance(a, ev.Load)] == [("m2", "a")]
    assert not [a for a in actions if isinstance(a, ev.Recycle)], "not before it is there"
    recycle = only(done(made, only(actions, ev.Load)), ev.Recycle)
    assert recycle == ev.Recycle("m1", "the server itself has grown")

    def restarted(now_s: float) -> list[ev.Action]:
        made.handle(ev.MachineDown("m1"), now_s=now_s)
        made.handle(ev.MachineUp("m1", 1000 * mib, recyclable=True, fill=False), now_s=now_s)
        return measure([30] + [400] * SERVER_LOOKS, now_s)

    assert not restarted(NOW_S + 60), "what comes back at once is no leak"
    assert made.machines["m1"].ledger.grown_bytes == 370 * mib - SERVER_FREE_BYTES, "but it counts"
    assert only(restarted(NOW_S + RECYCLE_EVERY_S), ev.Recycle)


def test_what_leaves_a_leaking_machine_is_loaded_elsewhere_no_more_at_a_time_than_anything() -> (
    None
):
    limits = Limits(most_loads=2)
    made = residency(dict.fromkeys("abcd", 20), budget=100, machines=["m1"], limits=limits)
    resident(made, "a", "b")
    resident(made, "c", "d")
    made.handle(ev.MachineUp("m2", 100, recyclable=True, fill=False), now_s=NOW_S)
    withdrawn = made.handle(ev.Forget("d"), now_s=NOW_S)
    gone = only(withdrawn, ev.Unload)
    assert isinstance(gone, ev.Unload)
    stuck = ev.UnloadStuck(gone.operation, gone.machine, gone.model)
    moved = [a for a in made.handle(stuck, now_s=NOW_S) if isinstance(a, ev.Load)]
    assert [(a.machine, a.model) for a in moved] == [("m2", "a"), ("m2", "b")]
    assert len(loads(done(made, moved[0]))) == 1, "the third waited for its turn"


def test_an_idle_model_goes_after_its_chains_keep_alive_and_comes_back_on_demand() -> None:
    made = residency({"a": 10})
    actions = made.handle(ev.ChainUp("c", {"a": 1.0}, keep_alive_s=30.0), now_s=NOW_S)
    enter(made, 1, "a")
    done(made, only(actions, ev.Load))
    made.handle(ev.Leave(1), now_s=NOW_S)
    assert not unloads(made.handle(ev.Tick(), now_s=NOW_S + 29))
    actions = made.handle(ev.Tick(), now_s=NOW_S + 30)
    assert unloads(actions) == ["a"]
    done(made, only(actions, ev.Unload), now_s=NOW_S + 31)
    assert made.machines["m"].ledger.used_bytes == 0
    assert loads(enter(made, 2, "a", now_s=NOW_S + 40)) == ["a"]


def test_a_replan_neither_wakes_what_went_idle_nor_keeps_it_from_going() -> None:
    made = residency({"a": 10, "b": 10})
    first, second = ({"a": rps, "b": 1.0} for rps in (1.0, 2.0))
    begun = made.handle(ev.ChainUp("c", first, keep_alive_s=30.0), now_s=NOW_S)
    for load in [a for a in begun if isinstance(a, ev.Load)]:
        done(made, load)
    made.handle(ev.ChainUp("c", second, keep_alive_s=30.0), now_s=NOW_S + 29)
    gone = made.handle(ev.Tick(), now_s=NOW_S + 30)
    assert unloads(gone) == ["a", "b"]
    for unload in [a for a in gone if isinstance(a, ev.Unload)]:
        done(made, unload, now_s=NOW_S + 31)
    assert not made.handle(ev.ChainUp("c", first, keep_alive_s=30.0), now_s=NOW_S + 40)
    assert loads(made.handle(ev.ChainUp("d", {"b": 1.0}), now_s=NOW_S + 41)) == ["b"], "new use"


def test_whoever_runs_residency_is_asked_to_come_back_when_a_model_has_been_idle() -> None:
    made = residency({"a": 10})
    begun = made.handle(ev.ChainUp("c", {"a": 1.0}, keep_alive_s=30.0), now_s=NOW_S)
    now_s = NOW_S + 1
    actions = begun + done(made, only(begun, ev.Load), now_s=now_s)
    wakes: list[float] = []
    while not unloads(actions):
        wakes += [a.at_s for a in actions if isinstance(a, ev.Wake)]
        assert wakes and wakes[-1] > now_s, "nothing would ever happen again"
        now_s = wakes[-1]
        actions = made.handle(ev.Tick(), now_s=now_s)
    assert now_s == pytest.approx(NOW_S + 31)


def test_loads_are_held_back_while_what_runs_cannot_bear_them_but_not_for_ever() -> None:
    made = residency(dict.fromkeys("abc", 10), limits=Limits(most_loads=2, held_s=1.0))
    made.handle(ev.Pace("m", interference=(1.5, 1.7), bearable=1.6), now_s=NOW_S)
    actions = enter(made, 1, "a") + enter(made, 2, "b")
    assert loads(actions) == ["a"], "one load at a time can be borne"
    made.handle(ev.Pace("m", interference=(1.5, 1.7), bearable=1.1), now_s=NOW_S)
    assert not loads(done(made, only(actions, ev.Load)))
    assert loads(made.handle(ev.Tick(), now_s=NOW_S + 1.1)) == ["b"]


def test_what_is_there_when_a_machine_comes_up_is_filled_with_what_is_worth_most() -> None:
    made = residency({"a": 60, "b": 30, "c": 30}, machines=())
    made.handle(ev.ChainUp("x", {"b": 5.0, "c": 1.0}), now_s=NOW_S)
    actions = made.handle(ev.MachineUp("m", 70), now_s=NOW_S)
    assert loads(actions) == ["b", "c"]


def test_a_machine_that_went_takes_its_grants_along_and_another_is_asked() -> None:
    made = residency({"a": 10}, machines=("m1", "m2"))
    load = only(enter(made, 1, "a"), ev.Load)
    done(made, load)
    actions = made.handle(ev.MachineDown("m1"), now_s=NOW_S)
    again = only(actions, ev.Load)
    assert isinstance(again, ev.Load) and again.machine == "m2"
    assert granted(done(made, again)) == [(1, "a")]
    late = ev.LoadFailed(1, "m1", "a", "late news of its former life")
    assert made.handle(late, now_s=NOW_S) == []


def test_load_order_serves_as_many_as_the_best_order_where_deadlines_allow_it() -> None:
    rng = Random(11)
    best_total = greedy_total = 0
    for _ in range(200):
        shared = {"x": rng.randint(1, 20)}
        pending = [
            Pending(
                f"m{i}",
                rng.uniform(0.2, 2.0),
                tuple(rng.uniform(0.3, 6.0) for _ in range(rng.randint(1, 4))),
                own_bytes=rng.randint(1, 20),
                blocks=shared if rng.random() < 0.5 else {},
            )
            for i in range(rng.randint(1, 5))
        ]
        best = max(served(some, 0.0) for some in permutations(pending))
        ours = served(order(pending, 0.0), 0.0)
        assert ours <= best
        by_deadline = sorted(pending, key=lambda p: min(p.latest_s))
        assert ours >= served(by_deadline, 0.0) or ours >= 0.5 * best
        best_total, greedy_total = best_total + best, greedy_total + ours
    assert greedy_total >= 0.93 * best_total


def test_a_rate_follows_the_traffic_and_forgets() -> None:
    rate = Rate()
    for index in range(6000):
        rate.count(index / 20)
    assert rate.at(300.0) == pytest.approx(20.0, rel=0.05)
    assert rate.at(600.0) < 0.2
