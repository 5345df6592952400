"""The replanner over a controller that does as it is told: what is counted, when it asks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from itertools import pairwise

import pytest
from tests.fakes import OCR, plan_of

from paceline.core.chain import Chain
from paceline.core.errors import PlanError
from paceline.core.plan import Plan
from paceline.core.request import Span, Timeline
from paceline.planner.replan import Proposal, Replanning, Traffic
from paceline.runtime.replanning import Decide, Replanner

RULES = Replanning(window_s=10)


class Controller:
    """Serves OCR at 20 requests/s and follows every plan that is worth it."""

    def __init__(self) -> None:
        self.traffic = Traffic({"ocr": 20.0}, {("ocr", "detect"): 1.0, ("ocr", "recognize"): 4.0})
        self.asked: list[Proposal] = []
        self.failure: PlanError | None = None
        self.slow: dict[tuple[str, str], float] = {}
        self.chain: tuple[Chain, ...] = (OCR,)
        self.up = {"a", "b"}
        self.rebalanced: list[list[str]] = []
        self.behind: dict[str, float] = {}
        self.told_slow: list[dict[str, float]] = []

    def chains(self) -> tuple[Chain, ...]:
        return self.chain

    def current_plan(self) -> Plan:
        return plan_of(self.chain)

    def slowdowns(self) -> Mapping[tuple[str, str], float]:
        return self.slow

    def stragglers(self) -> Mapping[str, float]:
        return self.behind

    def machines_up(self) -> frozenset[str]:
        return frozenset(self.up)

    async def rebalance(self, slow: Mapping[str, float]) -> None:
        self.rebalanced.append(sorted(self.up))
        self.told_slow.append(dict(slow))

    async def replan(self, proposal: Proposal, decide: Decide) -> bool:
        self.asked.append(proposal)
        if self.failure is not None:
            raise self.failure
        if not decide(self.current_plan(), plan_of(self.chain), 0.0):
            return False
        self.traffic = proposal.traffic
        return True


def timeline(chain: str = "ocr", error: str = "", crops: int = 4) -> Timeline:
    spans = (
        Span("detect", "det", "local", 1, 1, 0, 0, 1),
        Span("recognize", "rec", "local", crops, 4, 1, 1, 2),
    )
    return Timeline(1, "", chain, 0, 2, 3, () if error else spans, error)


async def run(
    replanner: Replanner, requests: int, seconds: range, error: str = "", crops: int = 4
) -> None:
    for second in seconds:
        for _ in range(requests):
            replanner.observe(timeline(error=error, crops=crops))
        await replanner.tick(float(second))


def test_traffic_as_planned_asks_for_nothing() -> None:
    controller = Controller()
    asyncio.run(run(Replanner(controller, RULES), 20, range(60)))
    assert controller.asked == []


def test_refused_requests_are_traffic_too() -> None:
    controller = Controller()
    replanner = Replanner(controller, RULES)
    asyncio.run(run(replanner, 0, range(1)))
    asyncio.run(run(replanner, 80, range(1, 30), error="refused"))
    assert {p.cause for p in controller.asked} == {"infeasible"}
    assert controller.traffic.rates_rps["ocr"] == pytest.approx(88, rel=0.1)
    assert controller.traffic.fan_outs["ocr", "recognize"] == 4.0
    assert [change.reason for change in replanner.changes] == [p.reason for p in controller.asked]


def test_changes_are_the_settling_time_apart() -> None:
    controller = Controller()
    replanner = Replanner(controller, RULES)
    asyncio.run(run(replanner, 0, range(1)))
    at: list[int] = []
    for second in range(1, 20):
        before = len(controller.asked)
        asyncio.run(run(replanner, 60 * second, range(second, second + 1)))
        if len(controller.asked) > before:
            at.append(second)
    assert len(at) >= 2
    assert all(b - a >= RULES.settle_s for a, b in pairwise(at))


def test_a_measured_fan_out_is_planned_for() -> None:
    controller = Controller()
    asyncio.run(run(Replanner(controller, RULES), 20, range(30), crops=8))
    assert controller.traffic.fan_outs["ocr", "recognize"] == pytest.approx(8)
    assert controller.traffic.rates_rps == {"ocr": 20.0}


def test_rows_of_a_run_count_for_each_of_its_modules() -> None:
    controller = Controller()
    replanner = Replanner(controller, RULES)
    asyncio.run(run(replanner, 0, range(1)))
    spans = (
        Span("detect+recognize", "a-run", "local", 1, 1, 0, 0, 1),
        Span("recognize", "rec", "local", 2, 4, 1, 1, 2),
    )
    for _ in range(40):
        replanner.observe(Timeline(1, "", "ocr", 0, 2, 3, spans))
    asyncio.run(replanner.tick(1.0))
    found = replanner.measured().fan_outs
    assert found == {("ocr", "detect"): 1.0, ("ocr", "recognize"): 3.0}


def test_slowdowns_count_when_they_last() -> None:
    controller = Controller()
    controller.traffic = Traffic({"ocr": 20.0}, controller.traffic.fan_outs, {("rec", "cpu"): 1.0})
    replanner = Replanner(controller, RULES)
    controller.slow = {("rec", "cpu"): 3.0}
    asyncio.run(run(replanner, 20, range(1)))
    controller.slow = {}
    assert controller.asked == [], "one second of it is a stall"
    controller.slow = {("rec", "cpu"): 2.0, ("unplanned", "cpu"): 9.0}
    asyncio.run(run(replanner, 20, range(1, 60)))
    assert [p.cause for p in controller.asked][:1] == ["infeasible"]
    assert controller.traffic.slowdowns["rec", "cpu"] > 1.25
    assert set(controller.traffic.slowdowns) == {("rec", "cpu")}


def test_a_plan_that_cannot_be_made_is_said_and_tried_again_a_window_later() -> None:
    controller = Controller()
    controller.failure = PlanError("ocr lacks 5 ms")
    replanner = Replanner(controller, RULES)
    asyncio.run(run(replanner, 80, range(25)))
    assert 2 <= len(controller.asked) <= 4
    assert "ocr lacks 5 ms" in replanner.failure
    assert replanner.changes == type(replanner.changes)(maxlen=replanner.changes.maxlen)
    controller.failure = None
    asyncio.run(run(replanner, 80, range(25, 50)))
    assert replanner.failure == ""
    assert len(replanner.changes) >= 1


def test_a_deleted_chain_is_forgotten_and_models_by_their_own_name_are_not_counted() -> None:
    controller = Controller()
    replanner = Replanner(controller, RULES)
    asyncio.run(run(replanner, 20, range(3)))
    controller.chain = ()
    asyncio.run(run(replanner, 500, range(3, 20)))
    replanner.observe(timeline(chain="det"))
    assert replanner.measured().rates_rps == {}
    assert controller.asked == []


def test_machines_that_come_and_go_are_planned_for_at_the_next_look() -> None:
    controller = Controller()
    replanner = Replanner(controller, RULES)
    asyncio.run(run(replanner, 20, range(2)))
    assert controller.rebalanced == []
    for second, up in enumerate(({"a"}, {"a"}, set(), {"b", "c"}), 2):
        controller.up = up
        asyncio.run(run(replanner, 20, range(second, second + 1)))
    assert controller.rebalanced == [["a"], ["b", "c"]], "without machines there is no plan"
    assert [c.reason for c in replanner.changes] == ["b is gone", "b has come, c has come"]


def test_a_machine_that_stays_slower_than_its_kind_is_told_the_plan_and_so_is_its_recovery() -> (
    None
):
    controller = Controller()
    replanner = Replanner(controller, RULES)
    controller.behind = {"a": 1.0, "b": 3.0}
    asyncio.run(run(replanner, 20, range(2)))
    assert controller.told_slow == [], "a stall does not count"
    asyncio.run(run(replanner, 20, range(2, 30)))
    assert controller.told_slow == [{"b": 3.0}]
    controller.behind["b"] = 1.6
    asyncio.run(run(replanner, 20, range(30, 90)))
    assert controller.told_slow[1:] == [{"b": 1.6}], "once it is that fast for good"
    controller.behind["b"] = 1.4
    asyncio.run(run(replanner, 20, range(90, 150)))
    assert len(controller.told_slow) == 2, "it wanders about the limit"
    controller.behind["b"] = 1.0
    asyncio.run(run(replanner, 20, range(150, 180)))
    assert controller.told_slow[2:] == [{}]
    assert [change.reason for change in replanner.changes] == [
        "b takes 3 times as long as others",
        "b takes 1.6 times as long as others by now",
        "b is as fast as others again",
    ]
