"""What the command line says, and with which exit code, when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.conftest import PAIR_CHAIN
from tests.integration.models import write_add
from tests.integration.paceline_process import Paceline, processes_of, run_cli

pytestmark = pytest.mark.integration


@pytest.fixture
def models(tmp_path: Path) -> Path:
    repository = tmp_path / "models"
    repository.mkdir()
    write_add(repository)
    return repository


@pytest.fixture(scope="module", autouse=True)
def nowhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A server that looks for a Triton for ten seconds; other tests run meanwhile."""
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "paceline", "serve", "--triton", "127.0.0.1:1"),
            *("--state-dir", str(tmp_path_factory.mktemp("nowhere"))),
            *("--grpc-port", "0", "--http-port", "0"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def failing(*arguments: str) -> tuple[int, str]:
    """Exit code and last line; nothing else is said but progress, nothing on stdout."""
    ended = run_cli(*arguments)
    lines = ended.stderr.splitlines()
    assert not ended.stdout
    assert all(line.startswith("paceline: ") for line in lines), ended.stderr
    return ended.returncode, lines[-1].removeprefix("paceline: ")


def failing_serve(tmp_path: Path, models: Path, *arguments: str) -> tuple[int, str]:
    """The same of a server that does not come up; nothing of it is left."""
    state = tmp_path / "state"
    told = failing(
        "serve",
        *("--model-repository", str(models), "--state-dir", str(state)),
        *("--grpc-port", "0", "--http-port", "0"),
        *arguments,
    )
    assert processes_of(state) == []
    return told


def chain_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "pair.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chain: [x\n", "pair.yaml:2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (PAIR_CHAIN + "surprise: 1\n", "pair.yaml:17: surprise: unknown key; expected one of"),
        (PAIR_CHAIN.replace("first.sum", "third.sum"), "pair.yaml:13: modules.second.inputs.a: "),
        (PAIR_CHAIN.replace("inputs.a", "second.sum"), "pair.yaml:8: modules.first: "),
        (PAIR_CHAIN.replace("60000", "never"), "pair.yaml:2: slo_ms: "),
    ],
)
def test_a_malformed_chain_file_is_2_and_names_file_line_and_key(
    tmp_path: Path, models: Path, text: str, message: str
) -> None:
    code, line = failing_serve(tmp_path, models, "--chains", chain_file(tmp_path, text))
    assert (code, line[: len(message)]) == (2, message)


def test_an_unknown_model_in_a_chain_is_2_and_names_it(tmp_path: Path, models: Path) -> None:
    text = PAIR_CHAIN.replace("model: add", "model: nope", 1)
    code, line = failing_serve(tmp_path, models, "--chains", chain_file(tmp_path, text))
    assert code == 2
    assert line.endswith("modules.first.model: unknown model 'nope'; the repository has add")


def test_an_objective_that_no_plan_meets_is_3_and_names_module_and_milliseconds(
    tmp_path: Path, models: Path
) -> None:
    text = PAIR_CHAIN.replace("slo_ms: 60000", "slo_ms: 0.05")
    code, line = failing_serve(tmp_path, models, "--chains", chain_file(tmp_path, text))
    assert code == 3
    assert "'pair'" in line or "pair" in line
    assert "first" in line or "second" in line
    assert " ms" in line


def test_a_busy_port_is_2_and_says_which_option_changes_it(
    tmp_path: Path, models: Path, front: Paceline
) -> None:
    for option, port in (("--grpc-port", front.grpc_port), ("--http-port", front.http_port)):
        code, line = failing_serve(tmp_path, models, option, str(port))
        assert (code, line) == (2, f"port {port} is in use; choose another with {option}")


def test_missing_and_malformed_files_and_directories_are_2(tmp_path: Path, models: Path) -> None:
    nothing = tmp_path / "nothing"
    prices = tmp_path / "prices.csv"
    prices.write_text("hardware,price\ncpu,1\n", encoding="utf-8")
    cases = [
        (("--hardware", str(nothing)), f"{nothing}: cannot be read: No such file or directory"),
        (("--hardware", str(prices)), "prices.csv:1: column 'price_per_hour' is missing"),
        (
            ("--model-repository", str(nothing)),
            f"--model-repository: {nothing} is not a directory",
        ),
        (("--triton", "nowhere"), "--triton: 'nowhere' is not [HARDWARE@]HOST:PORT"),
        (
            ("--hang-factor", "2"),
            "a batch cannot be overdue after 3 and hang after 2 times its p99: ",
        ),
    ]
    for arguments, message in cases:
        code, line = failing_serve(tmp_path, models, *arguments)
        assert (code, line[: len(message)]) == (2, message)
    code, line = failing("serve", "--state-dir", str(prices), "--model-repository", str(models))
    assert (code, line) == (2, f"--state-dir: {prices}: File exists")


def test_a_triton_that_is_not_there_is_1_and_says_what_to_check(
    nowhere: subprocess.Popen[str],
) -> None:
    _, said = nowhere.communicate(timeout=60)
    line = said.splitlines()[-1]
    assert nowhere.returncode == 1
    assert line.startswith("paceline: no Triton answered at 127.0.0.1:1 within ")
    assert "is tritonserver running" in line


def test_wrong_arguments_are_2_and_one_line(tmp_path: Path) -> None:
    for arguments, message in (
        (("serve", "--bogus"), "No such option: --bogus"),
        (("serve", "--grpc-port", "99999"), "Invalid value for '--grpc-port'"),
        (("infer", "ocr"), "Missing option '--input'"),
        (("infer", "ocr", "--input", "image=none.png"), "--input: none.png: no such file"),
        (("status", "--format", "xml"), "--format: must be one of text, json, got 'xml'"),
        (("frobnicate",), "No such command 'frobnicate'"),
    ):
        code, line = failing(*arguments)
        assert (code, line[: len(message)]) == (2, message), line


@pytest.mark.parametrize("command", [("status",), ("explain", "1")])
def test_asking_a_server_that_is_not_there_is_1(command: tuple[str, ...]) -> None:
    code, line = failing(*command, "--server", "127.0.0.1:1")
    expected = "no paceline answers at 127.0.0.1:1; is `paceline serve` running?"
    assert (code, line) == (1, expected)
