"""How many instances a model comes with, and when it gets the others that are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf

from tests.unit.test_residency import NOW_S, done, enter, granted, only, resident

from paceline.residency import events as ev
from paceline.residency.ledger import Footprint
from paceline.residency.residency import Residency
from paceline.residency.state import Limits


def two_wanted(
    *models: str,
    budget: float = inf,
    machines: Iterable[str] = ("m",),
    limits: Limits | None = None,
    adopted: Mapping[str, int] | None = None,
) -> Residency:
    """Models of 10 bytes, two instances of each wanted everywhere; `adopted` are there."""
    made = Residency(limits)
    for model in models:
        made.handle(ev.Declare(model, Footprint(10), dict.fromkeys(machines, 2)), now_s=0.0)
    for name in machines:
        up = ev.MachineUp(name, budget, adopted or {}, recyclable=True, fill=False)
        made.handle(up, now_s=0.0)
    return made


def loads(actions: Iterable[ev.Action]) -> list[tuple[str, int]]:
    return [(a.model, a.instances) for a in actions if isinstance(a, ev.Load)]


def leave(made: Residency, request: int) -> list[ev.Action]:
    return made.handle(ev.Leave(request), now_s=NOW_S)


def test_what_a_request_waits_for_comes_with_one_instance_and_the_other_after_the_answer() -> None:
    made = two_wanted("a")
    begun = enter(made, 1, "a")
    assert loads(begun) == [("a", 1)]
    came = done(made, only(begun, ev.Load))
    assert granted(came) == [(1, "a")] and not loads(came)
    assert not loads(made.handle(ev.Passed(1, "a"), now_s=NOW_S)), "it is not over yet"
    grown = leave(made, 1)
    assert loads(grown) == [("a", 2)] and made.machines["m"].starting == 1
    assert granted(enter(made, 2, "a")) == [(2, "a")], "meanwhile the one is used"
    assert not loads(done(made, only(grown, ev.Load)) + leave(made, 2))
    held = made.machines["m"].ledger.get("a")
    assert held is not None and held.instances == 2


def test_the_first_of_those_who_waited_is_enough() -> None:
    made = two_wanted("a")
    begun = enter(made, 1, "a") + enter(made, 2, "a")
    assert granted(done(made, only(begun, ev.Load))) == [(1, "a"), (2, "a")]
    assert granted(enter(made, 3, "a")) == [(3, "a")]
    assert not loads(leave(made, 3)), "it did not wait: who did may still be without an answer"
    assert loads(leave(made, 2)) == [("a", 2)]
    assert not loads(leave(made, 1))


def test_a_chain_that_waited_is_answered_before_any_of_its_models_grows() -> None:
    made = two_wanted("a", "b")
    begun = enter(made, 1, "a", "b")
    assert loads(begun) == [("a", 1), ("b", 1)]
    said = [action for load in begun if isinstance(load, ev.Load) for action in done(made, load)]
    for model in "ab":
        said += made.handle(ev.Passed(1, model), now_s=NOW_S)
        said += made.handle(ev.Reach(1, "b"), now_s=NOW_S) if model == "a" else []
    assert granted(said) == [(1, "a"), (1, "b")] and not loads(said)
    assert loads(leave(made, 1)) == [("a", 2), ("b", 2)]


def test_what_nobody_waits_for_any_more_grows_when_it_is_there() -> None:
    made = two_wanted("a")
    begun = enter(made, 1, "a")
    leave(made, 1)
    assert loads(done(made, only(begun, ev.Load))) == [("a", 2)]


def test_others_who_wait_go_first_and_who_gives_up_holds_nothing_back() -> None:
    made = two_wanted("a", "b")
    first = only(enter(made, 1, "a"), ev.Load)
    done(made, first)
    other = only(enter(made, 2, "b"), ev.Load)
    assert not loads(leave(made, 1)), "request 2 waits"
    leave(made, 2)
    assert loads(done(made, other)) == [("a", 2), ("b", 2)]


def test_a_request_that_is_refused_is_over() -> None:
    made = two_wanted("a", "b")
    done(made, enter(made, 1, "a", "b")[0])
    load = made.machines["m"].ledger.get("b")
    assert load is not None
    made.handle(ev.Reach(1, "b"), now_s=NOW_S)
    failed = made.handle(ev.LoadFailed(load.operation, "m", "b", "bad file"), now_s=NOW_S)
    assert only(failed, ev.Refuse) == ev.Refuse(1, "b", "bad file")
    assert loads(failed) == [("a", 2)]


def test_an_awaited_model_that_went_with_its_machine_is_awaited_where_it_comes_again() -> None:
    made = two_wanted("a", machines=("m1", "m2"))
    done(made, only(enter(made, 1, "a"), ev.Load))
    again = made.handle(ev.MachineDown("m1"), now_s=NOW_S)
    assert loads(again) == [("a", 1)]
    assert not loads(done(made, only(again, ev.Load)))
    assert loads(leave(made, 1)) == [("a", 2)]


def test_who_used_what_came_first_says_nothing_of_where_it_comes_again() -> None:
    made = two_wanted("a", "b", machines=("m1", "m2"))
    begun = only(enter(made, 1, "a"), ev.Load)
    enter(made, 2, "a")
    done(made, begun)
    made.handle(ev.Passed(1, "a"), now_s=NOW_S)
    again = made.handle(ev.MachineDown("m1"), now_s=NOW_S)
    assert not loads(done(made, only(again, ev.Load)))
    assert not loads(leave(made, 1)), "it is for request 2 that the model came again"
    assert loads(leave(made, 2)) == [("a", 2)]


def test_what_was_there_or_has_been_used_follows_a_plan_at_once() -> None:
    made = two_wanted("a", adopted={"a": 2})
    assert granted(enter(made, 1, "a")) == [(1, "a")], "it waits for nothing"

    def plan(instances: int) -> list[ev.Action]:
        event = ev.Declare("a", Footprint(10), {"m": instances})
        return made.handle(event, now_s=NOW_S)

    for instances in (3, 1):
        changed = plan(instances)
        assert loads(changed) == [("a", instances)]
        done(made, only(changed, ev.Load))


def test_a_plan_that_changes_before_the_first_answer_is_the_one_that_counts() -> None:
    for instances in (1, 3):
        made = two_wanted("a")
        done(made, only(enter(made, 1, "a"), ev.Load))
        event = ev.Declare("a", Footprint(10), {"m": instances})
        assert not loads(made.handle(event, now_s=NOW_S))
        assert loads(leave(made, 1)) == ([("a", 3)] if instances == 3 else [])


def test_what_is_loaded_ahead_of_any_request_comes_with_all_instances() -> None:
    made = two_wanted("a", "b")
    begun = made.handle(ev.ChainUp("c", {"a": 5.0, "b": 1.0}), now_s=NOW_S)
    assert loads(begun) == [("a", 2), ("b", 2)]
    small = two_wanted("a", "b", budget=35)
    assert loads(small.handle(ev.ChainUp("c", {"a": 5.0, "b": 1.0}), now_s=NOW_S)) == [
        ("a", 2),
        ("b", 1),
    ], "as far as there is room"


def test_what_is_moved_comes_with_all_instances_unless_somebody_waits() -> None:
    for waits, instances in ((False, 2), (True, 1)):
        made = two_wanted("a", "b", machines=("m1", "m2"))
        resident(made, "a", "b", now_s=NOW_S - 1)
        for held in made.machines["m1"].ledger.held():
            grown = ev.Load(held.operation, "m1", held.model, 2)
            done(made, grown)
        unload = only(made.handle(ev.Forget("b"), now_s=NOW_S), ev.Unload)
        assert isinstance(unload, ev.Unload)
        made.machines["m1"].ledger.budget_bytes = 50  # ten of which leak
        if waits:
            need = ev.Need("a", in_s=5.0)
            made.handle(ev.Enter(1, (need,)), now_s=NOW_S)
        moved = made.handle(ev.UnloadStuck(unload.operation, "m1", "b"), now_s=NOW_S)
        assert loads(moved) == [("a", instances)], waits


def test_no_more_grow_at_a_time_than_are_loaded_at_a_time() -> None:
    made = two_wanted(*"abcd", limits=Limits(most_loads=2), adopted=dict.fromkeys("abcd", 1))
    grown = {h.model: h.operation for h in made.machines["m"].ledger.held() if h.operation}
    assert sorted(grown) == ["a", "b"], "they began when they were adopted"
    assert loads(done(made, ev.Load(grown["a"], "m", "a", 2))) == [("c", 2)]
    assert loads(done(made, ev.Load(grown["b"], "m", "b", 2))) == [("d", 2)]
