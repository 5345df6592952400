"""More models than memory, on a real Triton: what is in memory comes and goes with the requests."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from scripts.residency_models import chain_file, write_ballast
from tests.integration.paceline_process import Paceline
from tests.integration.test_serve_inference import TIMEOUT_S, failure

from paceline.triton.processes import model_processes
from paceline.v1 import control_pb2

pytestmark = pytest.mark.integration

MIB = 1 << 20
BUDGET_MIB = 190
SIZES_MIB = {"b0": 16, "b1": 32, "b2": 48, "b3": 80, "b4": 96}
"""With a process of some 25 MiB each: 400 MiB in all, and b3 and b4 do not fit together."""
LINE = ["line0", "line1", "line2"]


@contextmanager
def serving(
    tmp_path_factory: pytest.TempPathFactory, models: Path, chains: dict[str, tuple[list[str], Any]]
) -> Iterator[Paceline]:
    """Paceline with `BUDGET_MIB`; each chain: its models in a line, and how long they are kept."""
    files = tmp_path_factory.mktemp("chains")
    for name, (members, keep_alive_s) in chains.items():
        text = chain_file(name, members, keep_alive_s=keep_alive_s)
        (files / f"{name}.yaml").write_text(text, encoding="utf-8")
    server = Paceline(
        tmp_path_factory.mktemp("state"),
        [
            *("--model-repository", str(models), "--chains", str(files)),
            *("--memory-mib", str(BUDGET_MIB), "--log-level", "info"),
        ],
    )
    try:
        yield server.wait_ready(100)
    finally:
        code = server.stop()
    assert code == 0


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paceline]:
    """Six models, chains of them, and memory for less than half."""
    models = tmp_path_factory.mktemp("models")
    for name, size_mib in SIZES_MIB.items():
        write_ballast(models, name, size_mib, batch=1)
    write_ballast(models, "slow", 1, execute_s=1.0, batch=1)
    chains = {"both": (["b3", "b4"], None), "brief": (["b0"], 1.0)}
    with serving(tmp_path_factory, models, chains) as server:
        yield server


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paceline]:
    """A chain whose three models fit together, and are soon unloaded when nobody asks."""
    models = tmp_path_factory.mktemp("models")
    for name in LINE:
        write_ballast(models, name, 4, load_s=0.3, batch=1)
    with serving(tmp_path_factory, models, {"line": (LINE, 1.0)}) as server:
        yield server


@pytest.fixture
def client(tight: Paceline) -> Iterator[triton.InferenceServerClient]:
    with tight.client() as made:
        yield made


def ask(client: triton.InferenceServerClient, name: str, **parameters: Any) -> None:
    """One request, answered with what it sent."""
    shape = [4] if name in ("both", "brief", "line") else [1, 4]
    given = np.arange(4, dtype=np.float32).reshape(shape)
    sent = triton.InferInput("x", shape, "FP32")
    sent.set_data_from_numpy(given)
    answer = client.infer(name, [sent], client_timeout=TIMEOUT_S, parameters=parameters or None)
    assert (answer.as_numpy("y") == given).all()


def tritons_index(process: psutil.Process) -> set[str]:
    """What Triton itself calls READY, asked past Paceline."""
    (port,) = [
        word.partition("=")[2] for word in process.cmdline() if word.startswith("--grpc-port=")
    ]
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as direct:
        index = direct.get_model_repository_index(client_timeout=TIMEOUT_S)
    return {model.name for model in index.models if model.state == "READY"}


def status_until(server: Paceline, holds: Any) -> dict[str, Any]:
    """The first status for which `holds` is true; the watch ends it when time is up."""
    with server.channel() as channel:
        for told in server.control(channel).WatchStatus(
            control_pb2.StatusRequest(), timeout=TIMEOUT_S
        ):
            status: dict[str, Any] = json.loads(told.json)
            if holds(status):
                return status
    raise AssertionError("the watch ended")


def held(status: dict[str, Any]) -> dict[str, str]:
    """The ledger: state by model."""
    (machine,) = status["machines"]
    return {entry["model"]: entry["state"] for entry in machine["held"]}


def used_bytes(triton_pid: int, model: str) -> int:
    """What a model takes now, pages that several processes map counted once in all (PSS)."""
    used = 0
    for process in model_processes(triton_pid, model):
        with suppress(psutil.Error):  # it has just ended
            used += process.memory_full_info().pss
    return used


def test_everything_is_served_within_the_budget(
    tight: Paceline, client: triton.InferenceServerClient
) -> None:
    names = [*SIZES_MIB, "both", "slow"]
    process = tight.triton_process()
    over: list[str] = []
    most: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            sizes = {name: used_bytes(process.pid, name) for name in [*SIZES_MIB, "slow"]}
            most.append(sum(sizes.values()))
            if most[-1] > 1.03 * BUDGET_MIB * MIB:
                over.append(str(sizes))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: ask(client, name), names * 3))
    finally:
        ended.set()
        watcher.join()
    assert not over, f"more than {BUDGET_MIB} MiB: {over[0]}"
    assert max(most) > 0.5 * BUDGET_MIB * MIB, "the budget is used"
    status = status_until(tight, lambda status: set(held(status).values()) == {"resident"})
    assert set(held(status)) == tritons_index(process), "the ledger says what Triton says"
    (machine,) = status["machines"]
    assert 0 < machine["memory_used_mib"] <= machine["memory_mib"] == BUDGET_MIB
    residency = status["residency"]
    assert residency["evictions"] > 0 and residency["misses"] > 0 and residency["leaks"] == 0
    assert all(gone["why"] and gone["mib"] > 0 for gone in residency["evicted"])


def test_a_model_is_not_unloaded_under_a_request_that_uses_it(
    tight: Paceline, client: triton.InferenceServerClient
) -> None:
    ask(client, "slow")
    with ThreadPoolExecutor(1) as pool:
        using = pool.submit(ask, client, "slow")
        status_until(tight, lambda status: status["in_flight"] == 1)
        client.unload_model("slow", client_timeout=TIMEOUT_S)
        using.result(TIMEOUT_S)
    sent = triton.InferInput("x", [1, 4], "FP32")
    sent.set_data_from_numpy(np.zeros((1, 4), np.float32))
    assert failure(client, "slow", [sent])[0] == "NOT_FOUND"
    assert "slow" not in tritons_index(tight.triton_process())
    client.load_model("slow", client_timeout=TIMEOUT_S)
    ask(client, "slow")


def test_a_chain_scales_to_zero_and_back(
    tight: Paceline, client: triton.InferenceServerClient
) -> None:
    ask(client, "brief")
    status_until(tight, lambda status: "b0" not in held(status))
    assert "b0" not in tritons_index(tight.triton_process())
    ask(client, "brief")
    assert "b0" in tritons_index(tight.triton_process())


def test_a_cold_chain_loads_its_models_together_in_the_order_they_are_needed(
    roomy: Paceline,
) -> None:
    with roomy.client() as client:
        ask(client, "line")
        status_until(roomy, lambda status: not held(status))
        before = len(roomy.lines)
        ask(client, "line")
    told = re.findall(r"(loading|loaded) (line\d)", "\n".join(roomy.lines[before:]))
    begun = [model for what, model in told if what == "loading"]
    assert begun == LINE
    assert [what for what, _ in told[:3]] == ["loading"] * 3, "no load waits for another to end"


def test_who_cannot_wait_for_a_load_is_told_so_and_finds_it_loaded_later(roomy: Paceline) -> None:
    status_until(roomy, lambda status: not held(status))
    sent = triton.InferInput("x", [4], "FP32")
    sent.set_data_from_numpy(np.zeros(4, np.float32))
    with roomy.client() as client, pytest.raises(triton.InferenceServerException) as caught:
        client.infer("line", [sent], parameters={"slo_ms": 200}, client_timeout=TIMEOUT_S)
    assert caught.value.status() == f"StatusCode.{grpc.StatusCode.RESOURCE_EXHAUSTED.name}"
    assert "'line' is not in memory: loading model 'line" in caught.value.message()
    status_until(roomy, lambda status: set(LINE) <= set(held(status)))


def test_metrics_show_memory_and_loads(tight: Paceline) -> None:
    from urllib.request import urlopen

    with urlopen(f"{tight.http}/metrics", timeout=TIMEOUT_S) as page:
        text = page.read().decode()
    budget = re.search(r'^paceline_memory_budget_bytes\{machine="local"\} (\S+)', text, re.M)
    loads = re.search(r"^paceline_model_loads_total (\S+)", text, re.M)
    assert budget is not None and float(budget[1]) == BUDGET_MIB * MIB
    assert loads is not None and float(loads[1]) >= len(SIZES_MIB)


def test_a_budget_with_several_workers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    arguments = ["--model-repository", str(tmp_path / "models"), "--memory-mib", "100"]
    server = Paceline(tmp_path / "state", [*arguments, "--workers", "2"])
    assert server.end() == 2
    assert "--memory-mib: is for one worker" in server.said
