"""HTTP over a real socket, in front of fakes: metrics, health, and the page for people."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families
from tests.fakes import FakeControl

from paceline.core.errors import ConfigError
from paceline.core.ports import ModelStatistics
from paceline.core.request import Timeline
from paceline.metrics import Metrics
from paceline.web.app import WebServer, start_web
from paceline.web.page import render


class Stand:
    def __init__(self, server: WebServer, control: FakeControl, metrics: Metrics) -> None:
        self.control = control
        self.metrics = metrics
        self.port = server.port
        self.client = aiohttp.ClientSession(f"http://127.0.0.1:{server.port}")

    async def get(self, path: str, **headers: str) -> tuple[int, str, str]:
        """Status, content type and body."""
        async with self.client.get(path, headers=headers) as answer:
            return answer.status, answer.headers["Content-Type"], await answer.text()

    async def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Everything at /metrics by name and labels."""
        _, _, text = await self.get("/metrics")
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@pytest_asyncio.fixture
async def stand() -> AsyncIterator[Stand]:
    control = FakeControl()
    metrics = Metrics()
    metrics.watch(control)
    server = await start_web(control, metrics.registry, port=0)
    made = Stand(server, control, metrics)
    yield made
    await made.client.close()
    await server.stop()


def timeline(latency_s: float, *, error: str = "", rejected: bool = False) -> Timeline:
    return Timeline(1, "", "ocr", 10.0, 10.0 + latency_s, 10.8, (), error, rejected)


async def test_requests_are_counted_by_chain_and_outcome_with_their_latency(stand: Stand) -> None:
    for ended in (
        timeline(0.3),
        timeline(0.4),
        timeline(0.9),
        timeline(0.1, error="Stub process is not healthy."),
        timeline(0.0, error="too late", rejected=True),
    ):
        stand.metrics.observe(ended)
    samples = await stand.samples()
    outcomes = {
        dict(labels)["outcome"]: value
        for (name, labels), value in samples.items()
        if name == "paceline_requests_total"
    }
    assert outcomes == {"met": 2, "missed": 1, "failed": 1, "rejected": 1}
    chain = (("chain", "ocr"),)
    assert samples["paceline_request_duration_seconds_count", chain] == 3
    assert samples["paceline_request_duration_seconds_sum", chain] == pytest.approx(1.6)
    within = (("chain", "ocr"), ("le", "0.5"))
    assert samples["paceline_request_duration_seconds_bucket", within] == 2


async def test_models_and_chains_have_tritons_metrics_in_microseconds(stand: Stand) -> None:
    stand.control.counts["x"] = ModelStatistics(
        "x", "1", 0, 10, 4, 9, 0.5, 1, 0.25, 9, 0.125, 4, 0.2, ((1, 1, 0.05), (3, 3, 0.15))
    )
    samples = await stand.samples()
    x = (("model", "x"), ("version", "1"))
    got = {
        name.removeprefix("nv_inference_"): value
        for (name, labels), value in samples.items()
        if labels == x
    }
    assert got == {
        "request_success": 9,
        "request_failure": 1,
        "count": 10,
        "exec_count": 4,
        "request_duration_us": 500_000,
        "queue_duration_us": 125_000,
        "compute_infer_duration_us": 200_000,
    }
    assert samples["nv_inference_request_success", (("model", "ocr"), ("version", "1"))] == 0
    assert samples["nv_inference_pending_request_count", (("model", "ocr"), ("version", "1"))] == 2
    assert samples["nv_inference_pending_request_count", (("model", "det"), ("version", "1"))] == 3


async def test_batch_sizes_are_a_histogram_of_executions(stand: Stand) -> None:
    stand.control.counts["x"] = ModelStatistics("x", "1", batches=((1, 2, 0.1), (3, 5, 0.2)))
    samples = await stand.samples()
    cumulative = {
        dict(labels)["le"]: value
        for (name, labels), value in samples.items()
        if name == "paceline_batch_size_bucket"
    }
    assert {edge: cumulative[edge] for edge in ("1.0", "2.0", "4.0", "+Inf")} == {
        "1.0": 2,
        "2.0": 2,
        "4.0": 7,
        "+Inf": 7,
    }
    assert samples["paceline_batch_size_sum", (("model", "x"),)] == 17


async def test_queues_machines_and_the_objective_are_gauges_in_base_units(stand: Stand) -> None:
    samples = await stand.samples()
    module = (("chain", "ocr"), ("module", "detect"))
    assert samples["paceline_queue_depth", module] == 3
    assert samples["paceline_queue_oldest_seconds", module] == pytest.approx(0.0045)
    assert samples["paceline_executing_rows", module] == 1
    chain = (("chain", "ocr"),)
    assert samples["paceline_slo_seconds", chain] == pytest.approx(0.8)
    assert samples["paceline_slo_attainment_ratio", chain] == 0.99
    assert samples["paceline_slo_target_ratio", chain] == 0.99
    assert samples["paceline_in_flight_requests", chain] == 2
    assert samples["paceline_machine_up", (("machine", "local"),)] == 1
    assert samples["paceline_cost_per_hour", ()] == stand.control.current_plan().cost_per_hour
    assert samples["paceline_ready", ()] == 1


async def test_a_scraper_that_accepts_openmetrics_gets_it(stand: Stand) -> None:
    _, plain, _ = await stand.get("/metrics")
    assert plain.startswith("text/plain")
    _, kind, text = await stand.get("/metrics", Accept="application/openmetrics-text")
    assert kind.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")


async def test_liveness_is_not_readiness(stand: Stand) -> None:
    stand.control.ready = False
    stand.control.not_ready.add("det")
    assert (await stand.get("/healthz"))[0] == 200
    code, kind, body = await stand.get("/readyz")
    assert (code, kind.split(";")[0]) == (503, "application/json")
    assert json.loads(body) == {"ready": False, "reason": "det is UNAVAILABLE (unloaded)"}


async def test_readiness_says_why_not(stand: Stand) -> None:
    assert (await stand.get("/readyz"))[::2] == (200, '{"ready": true}')
    stand.control.ready = False
    assert json.loads((await stand.get("/readyz"))[2])["reason"] == "starting"
    stand.control.ready = True
    stand.control.draining = True
    code, _, body = await stand.get("/readyz")
    assert (code, json.loads(body)["reason"]) == (503, "draining: new requests are refused")


class Cells(HTMLParser):
    """The text of every table cell, and every address that the page refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_cell = tag == "td" or (self._in_cell and tag == "span")
        if tag == "td":
            self.cells.append("")
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


async def test_the_page_shows_chains_modules_machines_and_models_and_loads_nothing(
    stand: Stand,
) -> None:
    code, kind, text = await stand.get("/")
    assert (code, kind) == (200, "text/html; charset=utf-8")
    page = Cells(text)
    for shown in ("ocr", "800", "99.00 %", "recognize", "4.5", "local", "cpu", "READY", "rec"):
        assert shown in page.cells, shown
    assert page.addresses == []
    assert "<meta http-equiv=refresh" in text


def test_what_a_model_or_machine_is_called_cannot_become_markup() -> None:
    evil = "<script>alert(1)</script>"
    text = render(
        {
            "version": evil,
            "shortage": [{"hardware": evil, "needed": 2, "present": 1}],
            "chains": [{"chain": evil}],
            "modules": [{"chain": evil, "module": evil, "model": evil, "machines": [evil]}],
            "machines": [{"machine": evil, "hardware": evil, "state": evil, "models": [evil]}],
            "models": [{"model": evil, "version": evil, "state": evil, "reason": evil}],
        }
    )
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 15


@pytest.mark.parametrize("status", [{}, {"chains": [{}], "modules": [{}], "machines": [{}]}])
def test_a_status_with_keys_missing_still_makes_a_page(status: dict[str, Any]) -> None:
    assert "not ready" in render(status)


async def test_a_busy_port_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            await start_web(FakeControl(), Metrics().registry, port=port)
    assert str(caught.value) == f"port {port} is in use; choose another with --http-port"


async def test_only_reading_is_possible(stand: Stand) -> None:
    async with stand.client.post("/") as answer:
        assert answer.status == 405
    assert (await stand.get("/nothing"))[0] == 404
