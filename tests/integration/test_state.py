"""What survives SIGKILL, and what SIGHUP changes, on a running server with a real Triton."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from tests.integration.conftest import Start
from tests.integration.models import write_add
from tests.integration.paceline_process import Paceline
from tests.integration.test_machines import somebody_elses_triton
from tests.integration.test_serve_inference import TIMEOUT_S, pair
from tests.integration.test_serve_lifecycle import wait_status

from paceline.v1 import control_pb2

pytestmark = pytest.mark.integration

CHAIN = """\
chain: {name}
slo_ms: {slo_ms}
rate_rps: 5
inputs:
  a: {{dtype: INT32, shape: [16]}}
  b: {{dtype: INT32, shape: [16]}}
modules:
  only:
    model: {model}
    inputs: {{a: inputs.a, b: inputs.b}}
outputs:
  out: only.sum
"""


def document(name: str, *, slo_ms: int = 60_000, model: str = "add") -> str:
    return CHAIN.format(name=name, slo_ms=slo_ms, model=model)


def served(server: Paceline) -> dict[str, float]:
    """Objectives in ms by chain."""
    with server.channel() as channel:
        answer = server.control(channel).List(control_pb2.ListRequest(), timeout=TIMEOUT_S)
    return {chain.name: chain.slo_ms for chain in answer.chains}


def apply(server: Paceline, text: str) -> None:
    with server.channel() as channel:
        request = control_pb2.ApplyRequest(chains=[control_pb2.ChainDocument(yaml=text)])
        server.control(channel).Apply(request, timeout=TIMEOUT_S)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """(models, chains): the model `add`, the chain `declared`."""
    models, chains = tmp_path / "models", tmp_path / "chains"
    models.mkdir()
    chains.mkdir()
    write_add(models)
    (chains / "declared.yaml").write_text(document("declared"), encoding="utf-8")
    return models, chains


def arguments(places: tuple[Path, Path]) -> list[str]:
    models, chains = places
    return ["--model-repository", str(models), "--chains", str(chains)]


def test_chains_applied_and_deleted_are_so_after_a_kill(
    start_paceline: Start, places: tuple[Path, Path], tmp_path: Path
) -> None:
    models, chains = places
    state = tmp_path / "state"
    (chains / "unwanted.yaml").write_text(document("unwanted"), encoding="utf-8")
    first = start_paceline(*arguments(places), state=state).wait_ready()
    apply(first, document("applied"))
    apply(first, document("declared", slo_ms=40_000))
    with first.channel() as channel:
        first.control(channel).Delete(
            control_pb2.DeleteRequest(chain="unwanted"), timeout=TIMEOUT_S
        )
    first.process.kill()
    first.end()
    first.assert_nothing_left()

    second = start_paceline(*arguments(places), state=state).wait_ready()
    assert served(second) == {"applied": 60_000, "declared": 40_000}
    assert "(1/4)" not in second.said, "what was measured is not measured again"
    assert second.stop() == 0

    # A model that only an applied chain uses is gone: the chain files are served all the same.
    write_add(models, "other")
    third = start_paceline(*arguments(places), state=state).wait_ready()
    apply(third, document("applied", model="other"))
    assert third.stop() == 0
    shutil.rmtree(models / "other")
    fourth = start_paceline(*arguments(places), state=state).wait_ready()
    assert served(fourth) == {"declared": 60_000}
    assert re.search("only those in files are served.*other", fourth.said)
    assert fourth.stop() == 0


def test_what_an_external_triton_holds_is_taken_over_after_a_kill(
    start_paceline: Start, places: tuple[Path, Path], tmp_path: Path
) -> None:
    models, _ = places
    state = tmp_path / "state"
    with somebody_elses_triton(tmp_path / "owner", models) as (owner, url):
        bounded = [*arguments(places), "--triton", url, "--memory-mib", "500"]
        first = start_paceline(*bounded, state=state).wait_ready()
        (held,) = stubs(owner.pid)
        first.process.kill()
        first.end()
        second = start_paceline(*bounded, state=state).wait_ready()
        assert stubs(owner.pid) == [held], "the same process: it was not loaded again"
        status = wait_status(second, lambda s: ledger(s) == {"add": "resident"})
        assert json.loads(status.json)["residency"]["loads"] == 0
        with second.client() as client:
            answer = client.infer("declared", pair(40), client_timeout=TIMEOUT_S)
            assert int(answer.as_numpy("out")[0]) == 41
        assert second.stop() == 0


def stubs(owner_pid: int) -> list[int]:
    """Processes of models below the owner of a Triton."""
    found = psutil.Process(owner_pid).children(recursive=True)
    return sorted(p.pid for p in found if p.name().startswith("triton_python"))


def ledger(status: control_pb2.StatusResponse) -> dict[str, str]:
    (machine,) = json.loads(status.json)["machines"]
    return {held["model"]: held["state"] for held in machine.get("held", ())}


def test_hangup_applies_what_the_files_say_or_nothing(
    start_paceline: Start, places: tuple[Path, Path]
) -> None:
    _, chains = places
    server = start_paceline(*arguments(places)).wait_ready()
    apply(server, document("applied"))

    (chains / "declared.yaml").write_text(document("declared", slo_ms=30_000), encoding="utf-8")
    (chains / "bad.yaml").write_text(document("bad", model="missing"), encoding="utf-8")
    server.process.send_signal(signal.SIGHUP)
    server.wait_line("nothing was reloaded: .*missing")
    assert served(server) == {"applied": 60_000, "declared": 60_000}

    (chains / "bad.yaml").rename(chains / "good.yaml")
    (chains / "good.yaml").write_text(document("good"), encoding="utf-8")
    server.process.send_signal(signal.SIGHUP)
    server.wait_line("reloaded the chain files; changed: declared, good")
    assert served(server) == {"applied": 60_000, "declared": 30_000, "good": 60_000}

    (chains / "declared.yaml").unlink()
    server.process.send_signal(signal.SIGHUP)
    server.wait_line("changed: declared$")
    assert served(server) == {"applied": 60_000, "good": 60_000}
    assert server.stop() == 0
