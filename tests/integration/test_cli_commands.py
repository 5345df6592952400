"""The commands beside `serve`, and serving with a Triton that somebody else runs."""

from __future__ import annotations

import csv
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.integration.conftest import PAIR_CHAIN, Start
from tests.integration.models import write_add
from tests.integration.paceline_process import Paceline, run_cli
from tests.integration.test_serve_inference import TIMEOUT_S, pair

from paceline.triton.launcher import LocalTriton, LocalTritonSettings

pytestmark = pytest.mark.integration

HARDWARE = "hardware,price_per_hour,memory_mib\nbox,2.5,1024\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def outside(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalTriton]:
    """A Triton that Paceline did not start: `add`, not loaded."""
    models = tmp_path_factory.mktemp("outside-models")
    write_add(models)
    settings = LocalTritonSettings(
        state_directory=tmp_path_factory.mktemp("outside"),
        model_repositories=(models,),
        stop_timeout_s=0.5,
    )
    async with LocalTriton(settings) as local:
        yield local


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """`--input` options for the chain `pair`: a is 40, b is 1."""
    options = []
    for name, value in (("a", 40), ("b", 1)):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps([value] * 16), encoding="utf-8")
        options += ["--input", f"{name}={file}"]
    return options


def test_infer_prints_the_outputs_and_explain_says_where_the_time_went(
    front: Paceline, inputs: list[str]
) -> None:
    ended = run_cli("infer", "pair", "--server", front.address, *inputs, "--format", "json")
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert answer["outputs"] == {"total": [42] * 16, "part": [41] * 16}
    told = run_cli("explain", answer["request_id"], "--server", front.address, "--format", "json")
    assert told.returncode == 0, told.stderr
    assert [span["module"] for span in json.loads(told.stdout)["spans"]] == ["first", "second"]
    text = run_cli("explain", answer["request_id"], "--server", front.address)
    assert text.returncode == 0
    assert "queue ms" in text.stdout and "second" in text.stdout
    shown = run_cli("infer", "pair", "--server", front.address, *inputs)
    assert shown.returncode == 0
    assert shown.stdout.splitlines()[0].startswith("total: [42, 42")


def test_what_the_server_refuses_is_1_and_one_line(front: Paceline, inputs: list[str]) -> None:
    server = ("--server", front.address)
    for arguments, code, message in (
        (("infer", "nope", *inputs), 1, "NOT_FOUND: Request for unknown model: 'nope' is not fo"),
        (("infer", "add", *inputs), 1, "INVALID_ARGUMENT: [request id: "),
        (("infer", "pair", "--input", f"z={inputs[1].partition('=')[2]}"), 2, "--input: pair has "),
        (("explain", "never"), 1, "NOT_FOUND: request 'never' is unknown"),
    ):
        ended = run_cli(*arguments, *server)
        assert ended.returncode == code
        assert ended.stderr.startswith(f"paceline: {message}"), ended.stderr
        assert len(ended.stderr.splitlines()) == 1


def test_status_as_text_and_as_json(front: Paceline) -> None:
    text = run_cli("status", "--server", front.address)
    assert text.returncode == 0, text.stderr
    for word in ("ready", "pair", "pair.first", "items.each", "local", "add x"):
        assert word in text.stdout
    ended = run_cli("status", "--server", front.address, "--format", "json")
    status = json.loads(ended.stdout)
    assert status["ready"] is True
    assert [chain["chain"] for chain in status["chains"]] == ["items", "pair"]


def test_a_profile_measured_on_a_triton_is_what_plan_reads(
    outside: LocalTriton, tmp_path: Path
) -> None:
    profile, prices, chain = tmp_path / "p.csv", tmp_path / "h.csv", tmp_path / "pair.yaml"
    prices.write_text(HARDWARE, encoding="utf-8")
    chain.write_text(PAIR_CHAIN, encoding="utf-8")
    ended = run_cli("profile", "add", "--triton", f"box@{outside.url}", "--out", str(profile))
    assert ended.returncode == 0, ended.stderr
    with profile.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"add"} and {row["hardware"] for row in rows} == {
        "box"
    }
    assert [row["batch_size"] for row in rows][:2] == ["1", "2"]
    assert all(float(row["duration_ms"]) > 0 for row in rows)
    files = (str(chain), "--profiles", str(profile), "--hardware", str(prices))
    planned = run_cli("plan", *files, "--format", "json")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    (of_chain,) = plan["chains"]
    assert (of_chain["chain"], of_chain["rate_rps"], of_chain["slo_ms"]) == ("pair", 10, 60_000)
    assert [module["module"] for module in of_chain["modules"]] == ["first", "second"]
    assert 0 < plan["lower_bound_per_hour"] <= plan["cost_per_hour"] * 1.000001
    text = run_cli("plan", *files, "--no-verify")
    assert text.returncode == 0
    assert (
        "first" in text.stdout and "box" in text.stdout and "no plan can cost less" in text.stdout
    )
    hopeless = run_cli("plan", *files, "--slo-ms", "0.01")
    assert hopeless.returncode == 3
    assert not hopeless.stdout
    (line,) = hopeless.stderr.splitlines()
    assert line.startswith("paceline: ") and "ms" in line
    unknown = run_cli("profile", "nope", "--triton", outside.url, "--out", str(profile))
    assert unknown.returncode == 1
    assert "'nope' did not load" in unknown.stderr.splitlines()[-1]


def test_a_triton_that_somebody_else_runs_is_used_and_left_running(
    outside: LocalTriton, start_paceline: Start, tmp_path: Path
) -> None:
    prices, chain = tmp_path / "h.csv", tmp_path / "pair.yaml"
    prices.write_text(HARDWARE, encoding="utf-8")
    chain.write_text(PAIR_CHAIN, encoding="utf-8")
    server = start_paceline(
        *("--triton", f"box@{outside.url}", "--slots", "2"),
        *("--hardware", str(prices), "--chains", str(chain)),
    ).wait_ready()
    assert server.descendants() == []
    with server.client() as client:
        answer = client.infer("pair", pair(40), client_timeout=TIMEOUT_S)
        assert (answer.as_numpy("total") == 42).all()
    ended = run_cli("status", "--server", server.address, "--format", "json")
    (machine,) = json.loads(ended.stdout)["machines"]
    assert (machine["machine"], machine["hardware"], machine["slots"]) == ("triton-0", "box", 2)
    assert server.stop() == 0
    assert outside.pid is not None
    rest = run_cli("profile", "add", "--triton", outside.url, "--out", str(tmp_path / "after.csv"))
    assert rest.returncode == 0, rest.stderr
