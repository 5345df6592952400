"""Policies, admission, faults and fan-out failures of the dispatcher, in hand-driven time."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from random import Random

import pytest

from paceline.core.bind import bind
from paceline.core.chain import Chain, Dispatch, Module, Source
from paceline.core.errors import BackendError, ErrorKind, Rejected
from paceline.core.model import ModelSpec
from paceline.core.plan import Allocation, ChainPlan, ModulePlan
from paceline.core.profile import Durations
from paceline.core.tensor import Tensor, TensorSpec, bytes_elements, encode_bytes
from paceline.dispatch import (
    Action,
    Answer,
    BatchDone,
    BatchFailed,
    Broken,
    Dispatcher,
    Event,
    Execute,
    Fail,
    HangLimits,
    InstallChain,
    MachineUp,
    Partial,
    Submit,
    Tick,
    Wake,
    route_chain,
)
from paceline.dispatch.holders import REMEMBERED_BATCHES
from paceline.dispatch.machines import MachinePool

M3 = ModelSpec("m3", 32, (TensorSpec("x", "BOOL", (1,)),), (TensorSpec("y", "BOOL", (1,)),))
M3_DURATIONS = Durations(((1, 0.08), (2, 0.1), (8, 0.25), (32, 0.8)))


def m3_chain(
    policy: Dispatch, allocations: list[tuple[int, float]], rate_rps: float, slo_s: float
) -> InstallChain:
    """Module M3 of algorithms.md 1.2 under a schedule of (batch size, machines)."""
    chain = Chain(
        "m3_chain",
        slo_s,
        (TensorSpec("x", "BOOL", (1,)),),
        (Module("m3", "m3", {"x": Source(None, "x")}),),
        {"y": Source("m3", "y")},
        dispatch=policy,
    )
    made = tuple(
        Allocation("gpu", size, M3_DURATIONS.at(size), machines, 1.0)
        for size, machines in allocations
    )
    module = ModulePlan("m3", "m3", rate_rps, 0.0, slo_s, slo_s, made)
    plan = ChainPlan("m3_chain", slo_s, rate_rps, slo_s, (module,))
    return InstallChain(route_chain(bind(chain, {"m3": M3}), plan, {"m3": {"gpu": M3_DURATIONS}}))


@dataclass
class Played:
    """What happened to every request."""

    latencies_s: dict[int, float] = field(default_factory=dict)
    batches: dict[int, int] = field(default_factory=dict)
    """Rows of the batch that each was in."""
    rows: dict[str, int] = field(default_factory=dict)
    """Executed by each machine."""
    failures: dict[int, Exception] = field(default_factory=dict)


def play(
    install: InstallChain,
    machines: int,
    arrivals_s: list[float],
    slo_s: float,
    *,
    slow: float = 1.0,
) -> Played:
    """Requests through the dispatcher and machines that take exactly the profiled time, the first
    of them `slow` times as long.
    """
    dispatcher, played = Dispatcher(), Played()
    due: list[tuple[float, int, Event]] = []
    order = iter(range(10**9))
    dispatcher.handle(install, now_s=0.0)
    for index in range(machines):
        dispatcher.handle(MachineUp(f"g{index}", "gpu", 1, {"m3": 1}), now_s=0.0)
    for request, at_s in enumerate(arrivals_s):
        x = Tensor("x", "BOOL", (1,), b"1")
        heapq.heappush(
            due, (at_s, next(order), Submit(request, "m3_chain", {"x": x}, at_s + slo_s))
        )
    while due:
        now_s, _, event = heapq.heappop(due)
        for action in dispatcher.handle(event, now_s=now_s):
            match action:
                case Execute():
                    y = Tensor("y", "BOOL", (action.rows, 1), bytes(action.rows))
                    took_s = M3_DURATIONS.at(action.rows)
                    ends_s = now_s + took_s * (slow if action.machine == "g0" else 1.0)
                    done = played.rows.get(action.machine, 0)
                    played.rows[action.machine] = done + action.rows
                    heapq.heappush(due, (ends_s, next(order), BatchDone(action.batch, (y,))))
                case Answer():
                    played.latencies_s[action.request] = action.timeline.latency_s
                    played.batches[action.request] = action.timeline.spans[0].batch_size
                case Fail():
                    played.failures[action.request] = action.error
                case Wake():
                    heapq.heappush(due, (max(action.at_s, now_s), next(order), Tick()))
    assert dispatcher.in_flight == 0
    return played


@pytest.mark.parametrize(
    ("policy", "allocations", "machines", "bound_s"),
    [
        ("round-robin", [(8, 6.0), (2, 0.3)], 7, 2 * 0.25),
        ("throughput-cost", [(32, 4.0), (2, 1.9)], 6, 0.8 + 32 / 198),
        ("throughput-cost", [(32, 4.0), (8, 1.0), (2, 0.3)], 6, 0.8 + 32 / 198),
        ("throughput-cost", [(32, 5.0)], 5, 0.8 + 32 / 198),
        ("pooled", [(32, 4.95)], 5, 0.8 + 32 / 198),
        ("pooled", [(32, 5.0)], 5, 0.8 + 32 / 198),
    ],
)
def test_evenly_spaced_requests_stay_within_the_policys_published_bound(
    policy: Dispatch, allocations: list[tuple[int, float]], machines: int, bound_s: float
) -> None:
    arrivals_s = [request / 198 for request in range(4000)]
    played = play(m3_chain(policy, allocations, 198, 10.0), machines, arrivals_s, 10.0)
    # The last batches of a stream that ends are never filled: they go when their slack runs out.
    steady = [played.latencies_s[request] for request in range(3800)]
    assert not played.failures
    assert max(steady) <= bound_s + 1e-6


def test_below_the_first_rank_the_schedules_bound_holds_and_not_the_ranks_own() -> None:
    # d + b/w of a rank takes what better ranks leave as evenly spaced. But the first rank is within
    # its own bound only if it collects 32 rows in a row; then 7.6 rows come in 0.04 s every 0.2 s,
    # of which two machines can take 4 at once and the next 4 after 0.1 s: later than
    # 0.1 + 2/38 s, however they are dealt.
    arrivals_s = [request / 198 for request in range(4000)]
    install = m3_chain("throughput-cost", [(32, 4.0), (2, 1.9)], 198, 10.0)
    played = play(install, 6, arrivals_s, 10.0)
    worst_s: dict[int, float] = {}
    for request, latency_s in played.latencies_s.items():
        if request < 3800:
            size = played.batches[request]
            worst_s[size] = max(worst_s.get(size, 0.0), latency_s)
    assert worst_s[32] <= 0.8 + 32 / 198 + 1e-6
    assert 0.1 + 2 / 38 < worst_s[2] <= 0.8 + 32 / 198 + 1e-6


def test_a_slow_machine_gets_as_much_less_of_the_work_and_nothing_is_late_for_it() -> None:
    arrivals_s = [request / 198 for request in range(4000)]
    install = m3_chain("pooled", [(32, 6.0)], 198, 3.0)
    played = play(install, 7, arrivals_s, 3.0, slow=3.0)
    assert not played.failures
    slow, *others = (played.rows[f"g{at}"] for at in range(7))
    assert slow < 0.5 * min(others)


def test_pooled_requests_at_low_load_do_not_wait_for_a_batch_to_fill() -> None:
    arrivals_s = [request / 4 for request in range(200)]
    played = play(m3_chain("pooled", [(32, 5.0)], 198, 10.0), 5, arrivals_s, 10.0)
    assert max(played.latencies_s.values()) == pytest.approx(0.08)


def poisson(rate_rps: float, count: int) -> list[float]:
    rng, now_s, arrivals_s = Random(7), 0.0, []
    for _ in range(count):
        now_s += rng.expovariate(rate_rps)
        arrivals_s.append(now_s)
    return arrivals_s


def goodput_rps(rate_rps: float, seconds: float) -> float:
    arrivals_s = poisson(rate_rps, int(rate_rps * seconds))
    played = play(m3_chain("pooled", [(32, 6.0)], 198, 1.0), 6, arrivals_s, 1.0)
    assert all(isinstance(error, Rejected) for error in played.failures.values())
    return sum(latency_s <= 1.0 for latency_s in played.latencies_s.values()) / seconds


def test_goodput_at_twice_and_five_times_the_rate_stays_within_5_percent_of_its_peak() -> None:
    measured = {factor: goodput_rps(198 * factor, 20.0) for factor in (1.0, 1.2, 2.0, 5.0)}
    peak = max(measured.values())
    assert measured[2.0] >= 0.95 * peak and measured[5.0] >= 0.95 * peak, measured


def test_an_overload_rejection_says_when_to_try_again() -> None:
    played = play(m3_chain("pooled", [(32, 1.0)], 40, 1.0), 1, [0.001 * i for i in range(200)], 1.0)
    rejected = [error for error in played.failures.values() if isinstance(error, Rejected)]
    assert rejected and {error.kind for error in rejected} == {ErrorKind.OVERLOADED}
    assert all(error.retry_after_s > 0 for error in rejected)


# -- faults -------------------------------------------------------------------------------------

READ = ModelSpec(
    "read", 4, (TensorSpec("crop", "BYTES", (1,)),), (TensorSpec("text", "BYTES", (1,)),)
)


def reader(*, on_error: str = "fail", machines: int = 1) -> Dispatcher:
    """A chain that reads every crop of its input; machines g0, g1, ... hold the model."""
    chain = Chain(
        "reader",
        100.0,
        (TensorSpec("crops", "BYTES", (-1, 1)),),
        (
            Module(
                "read",
                "read",
                {"crop": Source(None, "crops")},
                for_each=Source(None, "crops"),
                on_error=on_error,
            ),
        ),
        {"text": Source("read", "text")},
    )
    dispatcher = Dispatcher()
    for index in range(machines):
        dispatcher.handle(MachineUp(f"g{index}", "gpu", 1, {"read": 1}), now_s=0.0)
    dispatcher.handle(InstallChain(route_chain(bind(chain, {"read": READ}))), now_s=0.0)
    return dispatcher


def submit(
    dispatcher: Dispatcher,
    request: int,
    *crops: bytes,
    now_s: float = 0.0,
    priority: int = 0,
    stream: bool = False,
) -> list[Action]:
    tensor = Tensor("crops", "BYTES", (len(crops), 1), encode_bytes(crops))
    event = Submit(request, "reader", {"crops": tensor}, 90.0, priority=priority, stream=stream)
    return dispatcher.handle(event, now_s=now_s)


def executes(actions: list[Action]) -> list[Execute]:
    return [action for action in actions if isinstance(action, Execute)]


def crops_of(action: Execute) -> list[bytes]:
    given = action.call.inputs[0]
    return bytes_elements(Tensor("crop", "BYTES", given.shape, b"".join(given.parts)))


def read(action: Execute) -> BatchDone:
    data = encode_bytes(crop.upper() for crop in crops_of(action))
    return BatchDone(action.batch, (Tensor("text", "BYTES", (action.rows, 1), data),))


def texts(actions: list[Action]) -> dict[int, list[bytes]]:
    return {a.request: bytes_elements(a.outputs[0]) for a in actions if isinstance(a, Answer)}


def test_one_bad_request_does_not_fail_the_others_in_its_batch() -> None:
    dispatcher = reader()
    (blocker,) = executes(submit(dispatcher, 0, b"x"))
    for request, crop in ((1, b"good"), (2, b"bad"), (3, b"fine")):
        submit(dispatcher, request, crop)
    (shared,) = executes(dispatcher.handle(read(blocker), now_s=1.0))
    assert shared.rows == 3
    refused = BackendError("cannot read bad", kind=ErrorKind.INVALID)
    actions = dispatcher.handle(BatchFailed(shared.batch, refused), now_s=2.0)
    outcome: dict[int, object] = {}
    while launches := executes(actions):
        (launch,) = launches
        assert launch.rows == 1
        failed = crops_of(launch) == [b"bad"]
        event = BatchFailed(launch.batch, refused) if failed else read(launch)
        actions = dispatcher.handle(event, now_s=3.0)
        outcome |= texts(actions) | {a.request: a.error for a in actions if isinstance(a, Fail)}
    assert outcome == {1: [b"GOOD"], 2: outcome[2], 3: [b"FINE"]}
    assert isinstance(outcome[2], BackendError)


def test_with_on_error_skip_a_failed_item_is_a_typed_null_in_its_place() -> None:
    dispatcher = reader(on_error="skip")
    actions = submit(dispatcher, 1, b"a", b"bad", b"c")
    answers: dict[int, list[bytes]] = {}
    while launches := executes(actions):
        (launch,) = launches
        failed = b"bad" in crops_of(launch)
        event = BatchFailed(launch.batch, BackendError("no")) if failed else read(launch)
        actions = dispatcher.handle(event, now_s=1.0)
        answers |= texts(actions)
    assert answers == {1: [b"A", b"", b"C"]}


def test_a_streaming_request_gets_its_items_as_they_come_and_then_everything() -> None:
    dispatcher = reader(machines=2)
    first, second = executes(submit(dispatcher, 1, *b"a b c d e f".split(), stream=True))
    (part,) = dispatcher.handle(read(second), now_s=1.0)
    assert isinstance(part, Partial) and part.start == 4
    assert (part.outputs[0].name, bytes_elements(part.outputs[0])) == ("text", [b"E", b"F"])
    part, answer = dispatcher.handle(read(first), now_s=2.0)
    assert isinstance(part, Partial) and part.start == 0
    assert texts([answer]) == {1: [b"A", b"B", b"C", b"D", b"E", b"F"]}


def lost(action: Execute, kind: ErrorKind = ErrorKind.UNAVAILABLE) -> BatchFailed:
    return BatchFailed(action.batch, BackendError("connection lost", kind=kind))


def test_a_machine_that_loses_a_batch_is_quarantined_and_the_batch_runs_elsewhere() -> None:
    dispatcher = reader(machines=2)
    (first,) = executes(submit(dispatcher, 1, b"a"))
    broken, again, *_ = dispatcher.handle(lost(first), now_s=0.1)
    assert isinstance(broken, Broken) and broken.machine == first.machine
    assert isinstance(again, Execute) and again.machine != first.machine
    assert not executes(submit(dispatcher, 2, b"b", now_s=0.2)), "the quarantined machine rests"
    assert texts(dispatcher.handle(read(again), now_s=0.3)) == {1: [b"A"]}


def test_a_batch_is_tried_at_most_once_per_machine() -> None:
    dispatcher = reader(machines=2)
    (first,) = executes(submit(dispatcher, 1, b"a"))
    (second,) = executes(dispatcher.handle(lost(first), now_s=0.1))
    fails = [a for a in dispatcher.handle(lost(second), now_s=0.2) if isinstance(a, Fail)]
    assert [fail.request for fail in fails] == [1]
    assert {first.machine, second.machine} == {"g0", "g1"}


def test_a_quarantined_machine_is_probed_with_growing_back_off_until_it_answers() -> None:
    dispatcher = reader()
    (launch,) = executes(submit(dispatcher, 0, b"a"))
    dispatcher.handle(lost(launch), now_s=0.0)
    waits_s = []
    now_s = 0.0
    for request in (1, 2, 3):
        wakes = [a for a in submit(dispatcher, request, b"b", now_s=now_s) if isinstance(a, Wake)]
        waits_s.append(wakes[-1].at_s - now_s)
        now_s = wakes[-1].at_s
        (probe,) = executes(dispatcher.handle(Tick(), now_s=now_s))
        dispatcher.handle(lost(probe), now_s=now_s)
    assert waits_s == pytest.approx([0.5, 1.0, 2.0])
    submit(dispatcher, 4, b"c", now_s=now_s)
    (probe,) = executes(dispatcher.handle(Tick(), now_s=now_s + 4.0))
    dispatcher.handle(read(probe), now_s=now_s + 4.1)
    assert executes(submit(dispatcher, 5, b"d", now_s=now_s + 4.2)), "it is trusted again"


def test_rows_behind_one_that_waits_for_another_machine_do_not_wait_with_it() -> None:
    dispatcher = reader(machines=2)
    (first,) = executes(submit(dispatcher, 1, b"a"))
    (second,) = executes(submit(dispatcher, 2, b"b"))
    dispatcher.handle(lost(first), now_s=0.1)
    (waiting,) = executes(submit(dispatcher, 3, b"c", now_s=0.7)) or (None,)
    # The lane of `first` may be probed from 0.6 on, but not with the row that it lost.
    assert waiting is not None and waiting.machine == first.machine
    assert crops_of(waiting) == [b"c"]
    (again, *_) = executes(dispatcher.handle(read(second), now_s=0.8))
    assert (again.machine, crops_of(again)) == (second.machine, [b"a"])


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_what_waits_for_another_machine_is_given_up_when_none_has_the_model(on_error: str) -> None:
    dispatcher = reader(machines=2, on_error=on_error)
    (first,) = executes(submit(dispatcher, 1, b"a"))
    (second,) = executes(submit(dispatcher, 2, b"b"))
    dispatcher.handle(lost(first), now_s=0.1)
    (end,) = dispatcher.handle(MachineUp(second.machine, "gpu", 1, {}), now_s=0.2)
    if on_error == "skip":
        assert texts([end]) == {1: [b""]}
    else:
        assert isinstance(end, Fail) and end.error.kind is ErrorKind.UNAVAILABLE
        assert str(end.error) == (
            f"module 'read' failed on {first.machine}; no other machine has model 'read'"
        )
    assert texts(dispatcher.handle(read(second), now_s=0.3)) == {2: [b"B"]}
    assert dispatcher.in_flight == 0


def test_garbled_outputs_are_the_machines_fault_and_run_elsewhere() -> None:
    dispatcher = reader(machines=2)
    (first,) = executes(submit(dispatcher, 1, b"a"))
    garbled = BatchDone(first.batch, (Tensor("text", "INT8", (1, 1), b"\0"),))
    broken, again, *_ = dispatcher.handle(garbled, now_s=0.1)
    assert isinstance(broken, Broken) and "malformed" in broken.reason
    assert isinstance(again, Execute) and again.machine != first.machine


def test_a_batch_may_hang_for_twenty_times_its_profiled_duration_and_ten_seconds_at_least() -> None:
    dispatcher = Dispatcher()
    dispatcher.handle(m3_chain("pooled", [(32, 1.0)], 40, 100.0), now_s=0.0)
    dispatcher.handle(MachineUp("g0", "gpu", 1, {"m3": 1}), now_s=0.0)
    x = Tensor("x", "BOOL", (1,), b"1")
    (launch, *_) = executes(dispatcher.handle(Submit(1, "m3_chain", {"x": x}, 90.0), now_s=0.0))
    assert launch.timeout_s == pytest.approx(10.0)


def test_with_a_p99_in_the_profile_a_batch_hangs_by_that_and_by_no_less_than_the_limits_say() -> (
    None
):
    slow = Durations(M3_DURATIONS.points, ((1, 1.0), (32, 4.1)))
    limits = HangLimits(factor=5.0, least_s=3.0, unprofiled_s=60.0)
    module = Module("m3", "m3", {"x": Source(None, "x")})
    inputs = (TensorSpec("x", "BOOL", (1,)),)
    chain = Chain("c", 100.0, inputs, (module,), {"y": Source("m3", "y")})
    x = Tensor("x", "BOOL", (1,), b"1")
    for known, expected_s in ((slow, 5.0), (M3_DURATIONS, 3.0), (None, 60.0)):
        dispatcher = Dispatcher(limits)
        durations = {"m3": {"gpu": known}} if known is not None else {}
        route = route_chain(bind(chain, {"m3": M3}), None, durations)
        dispatcher.handle(InstallChain(route), now_s=0.0)
        dispatcher.handle(MachineUp("g0", "gpu", 1, {"m3": 1}), now_s=0.0)
        (launch,) = executes(dispatcher.handle(Submit(1, "c", {"x": x}, 90.0), now_s=0.0))
        assert launch.timeout_s == pytest.approx(expected_s)


def test_low_priority_is_served_now_and_then_under_constant_high_priority_load() -> None:
    dispatcher = reader()
    (launch,) = executes(submit(dispatcher, 0, *[b"x"] * 4))
    submit(dispatcher, 1, *[b"low"] * 4, priority=5)
    served = None
    for turn in range(1, 60):
        submit(dispatcher, 100 + turn, *[b"high"] * 4, now_s=float(turn))
        (launch,) = executes(dispatcher.handle(read(launch), now_s=float(turn)))
        if crops_of(launch)[0] == b"low":
            served = turn
            break
    assert served is not None and served > 5, "not before it has aged"


def test_a_slow_machine_is_learned_and_called_a_straggler() -> None:
    dispatcher = Dispatcher()
    dispatcher.handle(m3_chain("pooled", [(32, 1.0)], 40, 100.0), now_s=0.0)
    dispatcher.handle(MachineUp("g0", "gpu", 1, {"m3": 1}), now_s=0.0)
    now_s = 0.0
    for request in range(40):
        x = Tensor("x", "BOOL", (1,), b"1")
        actions = dispatcher.handle(
            Submit(request, "m3_chain", {"x": x}, now_s + 90.0), now_s=now_s
        )
        (launch,) = executes(actions)
        now_s += 3 * 0.08
        y = Tensor("y", "BOOL", (1, 1), b"1")
        dispatcher.handle(BatchDone(launch.batch, (y,)), now_s=now_s)
    lane = dispatcher.machines()[0].lanes["m3"]
    assert lane.straggling and lane.ratio == pytest.approx(3.0, rel=0.05)
    (learned,) = dispatcher.durations_learned()
    assert (learned.model, learned.machine, learned.batch_size) == ("m3", "g0", 1)
    assert learned.count == 40 and learned.median_s == pytest.approx(3 * 0.08)
    assert lane.slower(1) == lane.ratio, "of other batches the same is expected"
    assert lane.slower(32) == lane.ratio


def test_durations_are_learned_by_machine_and_batch_size() -> None:
    # Batches of one take 3 times as long as profiled here, those of eight as long.
    pool, route = MachinePool(), m3_chain("pooled", [(8, 1.0)], 20, 100.0).route.modules[0]
    for name in ("slow", "sound"):
        pool.up(name, "gpu", 1, {"m3": 1})
    slow, sound = pool.get("slow"), pool.get("sound")
    assert slow is not None and sound is not None
    for _ in range(60):
        pool.succeeded(slow, route, 1, 3 * 0.08)
        pool.succeeded(slow, route, 8, 0.25)
        pool.succeeded(sound, route, 1, 0.08)
    assert pool.expected_s(slow, route, 1) == pytest.approx(3 * 0.08, rel=0.01)
    assert pool.expected_s(slow, route, 8) == pytest.approx(0.25, rel=0.01)
    assert pool.expected_s(sound, route, 1) == pytest.approx(0.08, rel=0.01)
    told = {(d.machine, d.batch_size): d.median_s for d in pool.learned.all()}
    assert told == {("slow", 1): 3 * 0.08, ("slow", 8): 0.25, ("sound", 1): 0.08}


def test_a_stall_says_nothing_of_the_batches_to_come() -> None:
    # The first executions of processes took ten times as long: batches of eight were expected to
    # take twice as long for as long as only smaller ones ran, and requests were refused for that.
    pool, route = MachinePool(), m3_chain("pooled", [(8, 1.0)], 20, 100.0).route.modules[0]
    pool.up("g0", "gpu", 8, {"m3": 8})
    machine = pool.get("g0")
    assert machine is not None
    pool.succeeded(machine, route, 8, 10 * 0.25)
    assert pool.expected_s(machine, route, 8) == pytest.approx(0.25, rel=0.06)
    for _ in range(9):
        pool.succeeded(machine, route, 8, 10 * 0.25)
    stalled_s = pool.expected_s(machine, route, 8)
    assert stalled_s is not None and stalled_s > 1.5 * 0.25, "one that lasts is believed"
    for _ in range(REMEMBERED_BATCHES):
        pool.succeeded(machine, route, 1, 0.08)
    assert pool.expected_s(machine, route, 8) == stalled_s
    pool.succeeded(machine, route, 1, 0.08)
    assert pool.expected_s(machine, route, 8) == pytest.approx(0.25, rel=0.03)
