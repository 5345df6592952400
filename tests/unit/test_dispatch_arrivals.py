"""When rows could start: on their way to a module, or behind others on machines of two kinds."""

from __future__ import annotations

from heapq import heapify, heapreplace
from random import Random

import pytest

from paceline.core.bind import bind
from paceline.core.chain import Chain, Module, Source
from paceline.core.errors import Rejected
from paceline.core.model import ModelSpec
from paceline.core.plan import Allocation, ChainPlan, ModulePlan
from paceline.core.profile import Durations
from paceline.core.tensor import TensorSpec
from paceline.dispatch import route_chain
from paceline.dispatch.admission import Admission
from paceline.dispatch.arrivals import Arrivals
from paceline.dispatch.machines import MachinePool
from paceline.dispatch.pooled import Pooled
from paceline.dispatch.route import ModuleRoute
from paceline.dispatch.stage import Served, served

X, Y = TensorSpec("x", "UINT8", (1,)), TensorSpec("y", "UINT8", (1,))
ONE = Durations(((1, 0.02),))
FOUR = Durations(((1, 0.02), (4, 0.05)))


def test_who_comes_soon_after_another_waits_until_that_one_is_done() -> None:
    arrivals = Arrivals(1, ONE)
    assert arrivals.wait_s(0.0, 1.0) == 0.0
    arrivals.add(1.0, 0.0, 1.0)
    assert arrivals.wait_s(0.0, 1.012) == pytest.approx(0.008)
    arrivals.placed(1, 2, 0.0, 0.02)
    assert arrivals.wait_s(0.0, 1.012) == 0.0, "there is another slot"
    arrivals.placed(2, 1, 0.004, 0.02)
    assert arrivals.wait_s(0.0, 1.012) == pytest.approx(0.012), "others take their part of it"
    arrivals.placed(3, 1, 0.0, 0.02)
    arrivals.add(1.0, 0.0, 1.012)
    assert arrivals.wait_s(0.0, 1.015) == pytest.approx(0.025)
    assert arrivals.wait_s(0.0, 1.5) == 0.0
    arrivals.placed(4, 1.25, 0.0, 0.02)
    arrivals.add(1.0, 0.0, 2.0)
    assert arrivals.wait_s(0.0, 2.0) == pytest.approx(0.016), "it has a quarter of another slot"


def test_rows_that_wait_share_batches_and_so_do_those_that_come_together() -> None:
    arrivals = Arrivals(4, FOUR)
    arrivals.add(1.0, 0.0, 1.0)
    for _ in range(4):
        assert arrivals.wait_s(0.0, 1.01) == pytest.approx(0.01), "the second batch"
        arrivals.add(1.0, 0.0, 1.01)
    assert arrivals.wait_s(0.0, 1.01) == pytest.approx(0.06), "the third"
    together = Arrivals(4, FOUR)
    for company in range(4):
        at_s = 1.0 + company / 100
        assert together.wait_s(company, at_s) == 0.0, "as they are in one batch"
        together.add(1.0, company, at_s)
    assert together.wait_s(4, 1.03) == pytest.approx(0.05)


def test_an_expected_part_of_a_row_takes_that_part_of_its_time() -> None:
    arrivals = Arrivals(1, ONE)
    for request in range(100):
        # Half of what the slot could do.
        assert arrivals.wait_s(0.0, request / 40) < 0.02
        arrivals.add(0.4, 0.0, request / 40)
    assert arrivals.wait_s(0.0, 99 / 40 + 0.003) == pytest.approx(0.005)


def test_those_that_were_expected_long_after_who_comes_now_are_gone() -> None:
    arrivals = Arrivals(1, ONE)
    arrivals.placed(1, 1, 0.0, 0.02)
    for _ in range(50):
        arrivals.add(1.0, 0.0, 9.0)
    assert arrivals.wait_s(0.0, 8.99) == pytest.approx(1.0), "a little before: behind"
    assert arrivals.wait_s(0.0, 2.0) == 0.0
    arrivals.add(1.0, 0.0, 2.0)
    assert arrivals.wait_s(0.0, 2.0) == pytest.approx(0.02)


def chain(
    modules: dict[str, tuple[tuple[str, ...], Durations]],
    slo_s: float,
    items: float = 1.0,
    many: int = 1,
) -> Served:
    """Modules by name with their parents, planned for one machine of a kind of its own each; the
    last `many` for so many items a request."""
    *_, last = modules
    made = tuple(
        Module(
            name,
            name,
            {f"x{p}": Source(p, "y") for p in parents} or {"x": Source(None, "x")},
            fan_out=items if name in list(modules)[-many:] else 1.0,
        )
        for name, (parents, _) in modules.items()
    )
    specs = {
        m.name: ModelSpec(
            m.name,
            modules[m.name][1].points[-1][0],
            tuple(TensorSpec(i, "UINT8", (1,)) for i in m.inputs),
            (Y,),
        )
        for m in made
    }
    plans, durations = [], {}
    for name, (_, known) in modules.items():
        size, took_s = known.points[-1]
        allocation = Allocation("gpu", size, took_s, 1.0, 1.0)
        plans.append(ModulePlan(name, name, 30.0, 0.0, slo_s, slo_s, (allocation,)))
        durations[name] = {"gpu": known}
    bound = bind(Chain("c", slo_s, (X,), made, {"y": Source(last, "y")}), specs)
    plan = ChainPlan("c", slo_s, 30.0, slo_s, tuple(plans))
    return served(route_chain(bound, plan, durations), {})


def test_a_request_is_refused_that_would_come_to_a_module_too_soon_after_another() -> None:
    # The first module has two machines, the second one: whoever comes 12 ms after another has a
    # machine at once, comes 12 ms after it to the second, and waits there.
    slow, next_up = Durations(((1, 0.026),)), Durations(((1, 0.023),))
    both = chain({"a": ((), slow), "b": (("a",), next_up)}, 0.055)
    admission, pool = Admission(), MachinePool()
    for name, models in (("1", "a"), ("2", "a"), ("3", "b")):
        pool.up(name, "gpu", 1, {models: 1})
    admission.admit(both, 0, 0.055, pool, 0.0)
    assert admission.predicted_s(both, 0, pool, 0.012) == pytest.approx(0.026 + 0.011 + 0.023)
    with pytest.raises(Rejected):
        admission.admit(both, 0, 0.055, pool, 0.012)
    admission.admit(both, 0, 0.055, pool, 0.024)


def test_modules_side_by_side_on_one_machine_follow_each_other() -> None:
    one = Durations(((1, 0.03),))
    fork = chain({"a": ((), one), "b": (("a",), one), "c": (("a",), one)}, 1.0)
    admission, pool = Admission(), MachinePool()
    pool.up("1", "gpu", 1, {"a": 1})
    pool.up("2", "gpu", 1, {"b": 1, "c": 1})
    assert admission.predicted_s(fork, 0, pool, 0.0) == pytest.approx(0.09)
    pool.up("2", "gpu", 1, {"b": 1})
    pool.up("3", "gpu", 1, {"c": 1})
    assert admission.predicted_s(fork, 0, pool, 0.0) == pytest.approx(0.06)


def test_modules_side_by_side_do_not_wait_for_each_other_where_each_has_a_machine() -> None:
    # Every request was refused of a fork whose objective left no time for both on one machine.
    one = Durations(((1, 0.03),))
    fork = chain({"a": ((), one), "b": (("a",), one), "c": (("a",), one)}, 1.0)
    admission, pool = Admission(), MachinePool()
    pool.up("1", "gpu", 1, {"a": 1})
    for name in ("2", "3"):
        pool.up(name, "gpu", 1, {"b": 1, "c": 1})
    assert admission.predicted_s(fork, 0, pool, 0.0) == pytest.approx(0.06)


def test_a_request_ends_with_the_last_of_its_items_unless_so_many_never_could() -> None:
    each = chain({"a": ((), ONE), "b": (("a",), ONE)}, 1.0, 3.0)
    admission, pool = Admission(), MachinePool()
    pool.up("1", "gpu", 1, {"a": 1})
    pool.up("2", "gpu", 1, {"b": 1})
    assert admission.predicted_s(each, 0, pool, 0.0, 0.09) == pytest.approx(0.08)
    assert admission.predicted_s(each, 0, pool, 0.0, 0.07) == pytest.approx(0.04), "with one item"
    for miss in range(40):
        admission.missed(each, miss / 5)
    # It is not refused for what others missed where it waits for nobody.
    admission.admit(each, 0, 0.081, pool, 8.0)


@pytest.mark.parametrize(("needed_by", "admitted"), [(0.4, 12), (0.6, 4)])
def test_a_module_that_fewer_than_every_second_request_needs_keeps_nobody_out(
    needed_by: float, admitted: int
) -> None:
    # One comes every 12 ms, of which the last module could take an eighth.
    quick, slow = Durations(((1, 0.01),)), Durations(((1, 0.1),))
    modules = {"a": ((), quick), "b": (("a",), quick), "c": (("a",), slow)}
    fork = chain(modules, 0.2, needed_by)
    admission, pool = Admission(), MachinePool()
    for name in modules:
        pool.up(name, "gpu", 1, {name: 1})
    tickets = []
    for request in range(12):
        try:
            ticket = admission.admit(fork, 0, 0.2, pool, 0.012 * request)
        except Rejected:
            continue
        tickets.append(ticket)
        admission.launched(ticket, 0, 1)
    assert len(tickets) == admitted
    last = tickets[-1]
    if needed_by < 0.5:
        # It comes too late there: it is not ahead of others, until it turns out to need it.
        assert last.rows[2] == 0.0
        assert not last.in_doubt
        admission.counted(last, 2, 1)
        assert last.in_doubt
        # If nobody else waits there, it has to be in time.
        with pytest.raises(Rejected):
            Admission().admit(chain(modules, 0.2, needed_by), 0, 0.109, pool, 0.0)
        Admission().admit(chain(modules, 0.2, needed_by), 0, 0.111, pool, 0.0)


@pytest.mark.parametrize(("needed_by", "end_s"), [(0.4, 0.4 * 0.28 + 0.6 * 0.03), (0.6, 0.28)])
def test_modules_below_a_condition_run_together_or_not_at_all(
    needed_by: float, end_s: float
) -> None:
    quick, slow = Durations(((1, 0.01),)), Durations(((1, 0.09),))
    modules = {"a": ((), quick), "b": (("a",), quick), "c": (("a",), slow), "d": (("c",), quick)}
    fork = chain(modules, 1.0, needed_by, many=2)
    admission, pool = Admission(), MachinePool()
    for name in modules:
        pool.up(name, "gpu", 1, {name: 1})
    admission.counted(admission.admit(fork, 0, 1.0, pool, 0.0), 2, 2)
    assert admission.predicted_s(fork, 0, pool, 0.0) == pytest.approx(end_s)


KINDS = {"big": Durations(((1, 0.08), (25, 0.64))), "small": Durations(((1, 0.2), (11, 0.925)))}


def mixed(sizes: dict[str, int]) -> ModuleRoute:
    module = Module("m", "m", {"x": Source(None, "x")})
    bound = bind(
        Chain("c", 9.0, (X,), (module,), {"y": Source("m", "y")}),
        {"m": ModelSpec("m", 25, (X,), (Y,))},
    )
    made = tuple(
        Allocation(kind, size, KINDS[kind].at(size), 1.0, 1.0) for kind, size in sizes.items()
    )
    plan = ChainPlan("c", 9.0, 40.0, 9.0, (ModulePlan("m", "m", 40.0, 0.0, 9.0, 9.0, made),))
    return route_chain(bound, plan, {"m": KINDS}).modules[0]


@pytest.mark.parametrize("seed", range(20))
def test_rows_ahead_fill_the_batches_that_each_kind_of_machine_takes(seed: int) -> None:
    # Where all machines counted as the best kind, 36 % of what was admitted in overload was late.
    rng = Random(seed)
    route = mixed({"big": 25, "small": 11})
    pool, free = MachinePool(), []
    for at in range(rng.randint(2, 6)):
        kind = "big" if at == 0 else "small" if at == 1 else rng.choice(("big", "small"))
        pool.up(str(at), kind, 1, {"m": 1})
        machine = pool.get(str(at))
        assert machine is not None
        rows = rng.randint(0, route.batch_size(kind))
        at_s = 10.0
        if rows:
            pool.started(machine, route, rows, at, 10.0)
            # Some have begun something else, which takes longer than any batch of these.
            machine.ends_s[at] += rng.choice((0.0, 0.0, 3.0))
            at_s = machine.ends_s[at]
        free.append((at_s, kind))
    now_s = 10.0 + rng.random() * 0.05
    free = [(max(now_s, at_s), kind) for at_s, kind in free]
    for rows in (1, 30, 120, 500, 3000):
        # What the machines would take, one batch after the other.
        slots, left = list(free), rows
        heapify(slots)
        while left >= (size := route.batch_size(slots[0][1])):
            at_s, kind = slots[0]
            left -= size
            heapreplace(slots, (at_s + KINDS[kind].at(size), kind))
        found = Pooled(route).foreseen(rows, 0, 1.0, pool, now_s)
        assert found is not None
        assert found[0] == pytest.approx(slots[0][0] - now_s, abs=0.02)
