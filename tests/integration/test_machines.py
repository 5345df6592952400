"""Machines come and go while requests are served: real Tritons, named by the lines of a file."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from scripts.residency_models import chain_file
from scripts.timed_model import write_timed
from tests.integration.conftest import Start
from tests.integration.models import write_add
from tests.integration.paceline_process import Paceline
from tests.integration.test_serve_inference import TIMEOUT_S, pair
from tests.integration.test_serve_lifecycle import wait_status

from paceline.v1 import control_pb2

pytestmark = pytest.mark.integration

CHAIN = """\
chain: sums
slo_ms: 20000
rate_rps: 5
inputs:
  a: {dtype: INT32, shape: [16]}
  b: {dtype: INT32, shape: [16]}
modules:
  only:
    model: add
    inputs: {a: inputs.a, b: inputs.b}
outputs:
  out: only.sum
"""


@contextlib.contextmanager
def somebody_elses_triton(state: Path, models: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that owns a tritonserver, which ends with it, and host:port of that."""
    owner = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.triton_owner", str(state), str(models)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    try:
        pid, url = owner.stdout.readline().split()
        yield owner, url
    finally:
        owner.send_signal(signal.SIGTERM)
        owner.wait(20)
        owner.stdout.close()
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(int(pid)).wait(20)


class Traffic:
    """Requests one after the other on a thread of its own, until told to stop."""

    def __init__(self, server: Paceline) -> None:
        self._stop = threading.Event()
        self.answers: list[int | str] = []
        self._thread = threading.Thread(target=self._run, args=(server,))
        self._thread.start()

    def _run(self, server: Paceline) -> None:
        with server.client() as client:
            while not self._stop.is_set():
                try:
                    answer = client.infer("sums", pair(40), client_timeout=TIMEOUT_S)
                    self.answers.append(int(answer.as_numpy("out")[0]))
                except triton.InferenceServerException as error:
                    self.answers.append(str(error))

    def end(self) -> list[int | str]:
        self._stop.set()
        self._thread.join(TIMEOUT_S)
        return self.answers


def up(status: Any) -> list[str]:
    return [m["machine"] for m in json.loads(status.json)["machines"] if m["state"] == "up"]


def reasons(status: Any) -> list[str]:
    return [change["reason"] for change in json.loads(status.json)["replanning"]["changes"]]


def test_machines_join_die_and_leave_and_no_request_fails(
    start_paceline: Start, tmp_path: Path
) -> None:
    models, chain, file = tmp_path / "models", tmp_path / "sums.yaml", tmp_path / "machines"
    models.mkdir()
    write_add(models)
    chain.write_text(CHAIN, encoding="utf-8")
    with (
        somebody_elses_triton(tmp_path / "a", models) as (_, first),
        somebody_elses_triton(tmp_path / "b", models) as (owner, second),
    ):
        file.write_text(f"{first}  # the only one for now\n", encoding="utf-8")
        server = start_paceline(
            *("--triton", f"file:{file}", "--chains", str(chain)),
            *("--model-repository", str(models)),
        ).wait_ready()
        traffic = Traffic(server)

        file.write_text(f"{first}\n{second}\n", encoding="utf-8")
        wait_status(server, lambda s: up(s) == ["triton-0", "triton-1"])
        status = wait_status(server, lambda s: "triton-1 has come" in reasons(s))

        # The second one dies; what it had under way is done by the first.
        owner.kill()
        status = wait_status(server, lambda s: "triton-1 is gone" in reasons(s))
        assert up(status) == ["triton-0"]

        # A bad line takes nobody with it; a line that is gone takes its machine.
        file.write_text("no machine\n", encoding="utf-8")
        server.wait_line("going on with the machines known")
        file.write_text(f"{first}\n", encoding="utf-8")
        server.wait_line(r"\(triton-1\) left")
        answers = traffic.end()
        status = wait_status(server, lambda s: up(s) == ["triton-0"])
        assert len(json.loads(status.json)["machines"]) == 1
        assert set(answers) == {41}
        assert server.stop() == 0


def test_a_name_is_looked_up(start_paceline: Start, tmp_path: Path) -> None:
    models, chain = tmp_path / "models", tmp_path / "sums.yaml"
    models.mkdir()
    write_add(models)
    chain.write_text(CHAIN, encoding="utf-8")
    with somebody_elses_triton(tmp_path / "a", models) as (_, url):
        port = url.rpartition(":")[2]
        server = start_paceline(
            *("--triton", f"box@dns:localhost:{port}", "--chains", str(chain)),
            *("--model-repository", str(models)),
        ).wait_ready()
        status = wait_status(server, lambda s: up(s) == ["triton-0"])
        (machine,) = json.loads(status.json)["machines"]
        assert machine["hardware"] == "box"
        assert server.stop() == 0


def test_when_what_is_left_does_not_suffice_the_lowest_priority_is_shed(
    start_paceline: Start, tmp_path: Path
) -> None:
    models, chains, file = tmp_path / "models", tmp_path / "chains", tmp_path / "machines"
    for directory in (models, chains):
        directory.mkdir()
    write_timed(models, {1: 60, 8: 100})
    for priority, name in enumerate(("high", "low")):
        text = chain_file(name, ["timed"], slo_ms=3000, rate_rps=50)
        (chains / f"{name}.yaml").write_text(f"priority: {priority}\n{text}", encoding="utf-8")
    with (
        somebody_elses_triton(tmp_path / "a", models) as (_, first),
        somebody_elses_triton(tmp_path / "b", models) as (owner, second),
    ):
        file.write_text(f"{first}\n", encoding="utf-8")
        server = start_paceline(
            *("--triton", f"file:{file}", "--chains", str(chains)),
            *("--model-repository", str(models)),
        ).wait_ready()

        def planned(status: Any) -> dict[str, tuple[float, float | None]]:
            found = json.loads(status.json)["chains"]
            return {c["chain"]: (c["rate_rps"], c.get("wanted_rps")) for c in found}

        file.write_text(f"{first}\n{second}\n", encoding="utf-8")
        status = wait_status(server, lambda s: any("has come" in r for r in reasons(s)))
        assert planned(status) == {"high": (50, None), "low": (50, None)}
        owner.kill()
        status = wait_status(server, lambda s: any("is gone" in r for r in reasons(s)))
        (reason,) = [r for r in reasons(status) if "is gone" in r]
        assert "triton-1 is gone; low is planned for " in reason and "of 50 requests/s" in reason
        plan = planned(status)
        assert plan["high"] == (50, None)
        assert 0 < plan["low"][0] < 45 and plan["low"][1] == 50
        given = np.arange(4, dtype=np.float32)
        sent = triton.InferInput("x", [4], "FP32")
        sent.set_data_from_numpy(given)
        with server.client() as client:
            for name in ("high", "low"):
                answer = client.infer(name, [sent], client_timeout=TIMEOUT_S)
                assert (answer.as_numpy("y") == given).all(), "there is room for both now"
        assert server.stop() == 0


def test_a_model_is_planned_for_machines_that_it_fits_into(
    start_paceline: Start, tmp_path: Path
) -> None:
    models, chain, prices = tmp_path / "models", tmp_path / "sums.yaml", tmp_path / "hardware.csv"
    models.mkdir()
    write_add(models)
    # What a Triton elsewhere needs for a model is guessed by its files: 48 MiB and these.
    (models / "add" / "weights").write_bytes(bytes(60 << 20))
    chain.write_text(CHAIN, encoding="utf-8")
    prices.write_text(
        "hardware,price_per_hour,memory_mib\nsmall,1,100\nlarge,50,400\n", encoding="utf-8"
    )
    with (
        somebody_elses_triton(tmp_path / "a", models) as (_, small),
        somebody_elses_triton(tmp_path / "b", models) as (_, large),
    ):
        server = start_paceline(
            *("--triton", f"small@{small}", "--triton", f"large@{large}"),
            *("--chains", str(chain), "--hardware", str(prices)),
            *("--model-repository", str(models)),
        ).wait_ready()
        with server.client() as client:
            answer = client.infer("sums", pair(40), client_timeout=TIMEOUT_S)
            assert int(answer.as_numpy("out")[0]) == 41
        with server.channel() as channel:
            request = control_pb2.CurrentPlanRequest()
            plan = server.control(channel).CurrentPlan(request, timeout=TIMEOUT_S).plan
        planned = {a.hardware for m in plan.chains[0].modules for a in m.allocations}
        assert planned == {"large"}, "the cheaper one has no room for it"
        assert server.stop() == 0


def test_a_module_runs_on_two_kinds_of_machines_where_the_cheap_ones_are_too_few(
    start_paceline: Start, tmp_path: Path
) -> None:
    cheap_models, fast_models = tmp_path / "cheap", tmp_path / "fast"
    for directory, took_ms in ((cheap_models, {1: 60, 8: 100}), (fast_models, {1: 30, 8: 50})):
        directory.mkdir()
        write_timed(directory, took_ms)
    chain, prices = tmp_path / "timed.yaml", tmp_path / "hardware.csv"
    chain.write_text(chain_file("sleep", ["timed"], slo_ms=3000, rate_rps=100), encoding="utf-8")
    prices.write_text(
        "hardware,price_per_hour,memory_mib\ncheap,1,4096\nfast,6,4096\n", encoding="utf-8"
    )
    with (
        somebody_elses_triton(tmp_path / "a", cheap_models) as (_, cheap),
        somebody_elses_triton(tmp_path / "b", fast_models) as (_, fast),
    ):
        server = start_paceline(
            *("--triton", f"cheap@{cheap}", "--triton", f"fast@{fast}"),
            *("--chains", str(chain), "--hardware", str(prices)),
        ).wait_ready()
        with server.channel() as channel:
            request = control_pb2.CurrentPlanRequest()
            plan = server.control(channel).CurrentPlan(request, timeout=TIMEOUT_S).plan
            told = server.control(channel).Status(control_pb2.StatusRequest(), timeout=TIMEOUT_S)
        (module,) = plan.chains[0].modules
        machines = {a.hardware: a.machines for a in module.allocations}
        assert 0.9 < machines["cheap"] <= 1.0 + 1e-6 and 0.05 < machines["fast"] < 1.0
        assert json.loads(told.json)["shortage"] == [], "all of the rate is planned for"
        given = np.arange(4, dtype=np.float32)
        sent = triton.InferInput("x", [4], "FP32")
        sent.set_data_from_numpy(given)
        with server.client() as client:
            answer = client.infer("sleep", [sent], client_timeout=TIMEOUT_S)
            assert (answer.as_numpy("y") == given).all()
        assert server.stop() == 0
