"""Runs on a real Triton: modules executed at once compute, fail and come back as they do apart."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from tests.integration.models import write_add, write_model
from tests.integration.paceline_process import Paceline
from tritonclient.grpc import service_pb2, service_pb2_grpc

from paceline.v1 import control_pb2

pytestmark = pytest.mark.integration

TIMEOUT_S = 30.0

MODULES = """\
modules:
  first: {model: plus, inputs: {a: inputs.a, b: inputs.b}}
  second: {model: minus, inputs: {a: first.sum, b: inputs.c}}
  third: {model: plus, inputs: {a: second.difference, b: inputs.a}}
"""
"""(a + b - c) + a; models of one row a batch, so that the plan does not depend on measurements."""

THRICE = """\
modules:
  first: {model: add, inputs: {a: inputs.a, b: inputs.b}}
  second: {model: add, inputs: {a: first.sum, b: inputs.c}}
  third: {model: add, inputs: {a: second.sum, b: inputs.a}}
"""
"""a + b + c + a, by one model that takes batches."""

_MINUS = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            a, b = (pb_utils.get_input_tensor_by_name(request, n).as_numpy() for n in "ab")
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("difference", a - b)]))
        return responses
"""

RUN = "first+second+third"


def chain(name: str, modules: str, runs: str) -> str:
    tensors = ", ".join(f"{name}: {{dtype: INT32, shape: [16]}}" for name in "abc")
    return (
        f"chain: {name}\nslo_ms: 60000\nrate_rps: 10\nruns: {runs}\n"
        f"inputs: {{{tensors}}}\n{modules}outputs: {{out: third.sum}}\n"
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("run-models")
    write_add(repository)
    write_add(repository, "plus", max_batch_size=1)
    config = """
    max_batch_size: 1
    input [{name: "a" data_type: TYPE_INT32 dims: [16]}]
    input [{name: "b" data_type: TYPE_INT32 dims: [16]}]
    output [{name: "difference" data_type: TYPE_INT32 dims: [16]}]
    """
    write_model(repository, "minus", config, _MINUS)
    return repository


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paceline]:
    """Serves `mixed` and `thrice` with runs, `apart` without; tests leave it as it was."""
    chains = tmp_path_factory.mktemp("run-chains")
    for name, modules, runs in (
        ("mixed", MODULES, "auto"),
        ("thrice", THRICE, "auto"),
        ("apart", MODULES, "off"),
    ):
        (chains / f"{name}.yaml").write_text(chain(name, modules, runs), encoding="utf-8")
    started = Paceline(
        tmp_path_factory.mktemp("run-state"),
        ["--model-repository", str(models), "--chains", str(chains), "--slots", "2"],
    )
    try:
        yield started.wait_ready()
    finally:
        code = started.stop()
    assert code == 0


@pytest.fixture
def stub(server: Paceline) -> Iterator[Any]:
    with server.channel() as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture
def control(server: Paceline) -> Iterator[Any]:
    with server.channel() as channel:
        yield server.control(channel)


def request(name: str, seed: int) -> tuple[Any, bytes]:
    """A request to `name`, and what `mixed` and `apart`, or `thrice`, have to answer."""
    a, b, c = np.random.default_rng(seed).integers(-1000, 1000, (3, 16)).astype(np.int32)
    message = service_pb2.ModelInferRequest(model_name=name, id=f"{name}-{seed}")
    for tensor, value in zip("abc", (a, b, c), strict=True):
        message.inputs.add(name=tensor, datatype="INT32", shape=[16])
        message.raw_input_contents.append(value.tobytes())
    return message, (a + b + (c if name == "thrice" else -c) + a).astype(np.int32).tobytes()


def answers(stub: Any, name: str, seeds: range) -> list[bytes]:
    """What requests that are sent together are answered, after a look at every byte."""
    pairs = [request(name, seed) for seed in seeds]
    calls = [stub.ModelInfer.future(message, timeout=TIMEOUT_S) for message, _ in pairs]
    found = [call.result().raw_output_contents[0] for call in calls]
    assert found == [expected for _, expected in pairs]
    return found


def spans(control: Any, request_id: str) -> list[str]:
    asked = control_pb2.ExplainRequest(request_id=request_id)
    return [span.module for span in control.Explain(asked, timeout=TIMEOUT_S).spans]


def status(control: Any) -> Any:
    return json.loads(control.Status(control_pb2.StatusRequest(), timeout=TIMEOUT_S).json)


def wait_for(condition: Callable[[], bool]) -> None:
    """Each look is a call to the server."""
    give_up_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up_s


def is_dead(process: psutil.Process) -> bool:
    """Gone, or waiting for its parent to notice."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def apply(control: Any, text: str) -> Any:
    document = control_pb2.ChainDocument(name="chain.yaml", yaml=text)
    return control.Apply(control_pb2.ApplyRequest(chains=[document]), timeout=TIMEOUT_S).plan


def test_a_run_answers_what_its_modules_answer_one_by_one(stub: Any, control: Any) -> None:
    assert answers(stub, "mixed", range(40)) == answers(stub, "apart", range(40))
    answers(stub, "thrice", range(40))
    assert spans(control, "mixed-7") == spans(control, "thrice-7") == [RUN]
    assert spans(control, "apart-7") == ["first", "second", "third"]


def test_requests_of_a_run_share_batches_as_large_as_its_smallest_member_takes(
    stub: Any, control: Any
) -> None:
    plan = control.CurrentPlan(control_pb2.CurrentPlanRequest(), timeout=TIMEOUT_S).plan
    planned = {c.chain: [(m.module, len(m.allocations)) for m in c.modules] for c in plan.chains}
    assert planned["mixed"] == planned["thrice"] == [(RUN, 1)]
    assert [module for module, _ in planned["apart"]] == ["first", "second", "third"]
    answers(stub, "mixed", range(100, 108))
    answers(stub, "thrice", range(100, 164))
    for name, most in (("mixed", 1), ("thrice", 8)):
        asked = [
            control_pb2.ExplainRequest(request_id=f"{name}-{seed}") for seed in range(100, 108)
        ]
        sizes = [control.Explain(each, timeout=TIMEOUT_S).spans[0].batch_size for each in asked]
        assert max(sizes) <= most


def test_status_shows_a_run_by_its_modules_and_with_as_many_batches_as_they_had_apart(
    control: Any,
) -> None:
    seen = status(control)
    (run,) = [m for m in seen["modules"] if m["chain"] == "mixed"]
    assert run["module"] == RUN and run["machines"] == ["local"]
    (machine,) = seen["machines"]
    assert machine["instances"][run["model"]] == machine["slots"] == 2
    listed = control.List(control_pb2.ListRequest(), timeout=TIMEOUT_S).chains
    assert [m.name for m in listed[1].modules] == ["first", "second", "third"], "as declared"


def test_a_chain_goes_from_run_to_modules_and_back_while_it_is_served(
    stub: Any, control: Any
) -> None:
    assert [m.module for m in apply(control, chain("mixed", MODULES, "off")).chains[1].modules] == [
        *("first", "second", "third")
    ]
    answers(stub, "mixed", range(200, 210))
    assert spans(control, "mixed-200") == ["first", "second", "third"]
    wait_for(lambda: not any("run-mixed" in m for m in status(control)["machines"][0]["models"]))
    apply(control, chain("mixed", MODULES, "auto"))
    answers(stub, "mixed", range(210, 220))
    assert spans(control, "mixed-210") == [RUN]
    control.Delete(control_pb2.DeleteRequest(chain="mixed"), timeout=TIMEOUT_S)
    wait_for(lambda: not any("run-mixed" in m for m in status(control)["machines"][0]["models"]))
    answers(stub, "apart", range(220, 230))
    apply(control, chain("mixed", MODULES, "auto"))
    answers(stub, "mixed", range(230, 240))


def test_a_member_whose_process_dies_is_loaded_afresh_with_the_run(
    server: Paceline, stub: Any, control: Any
) -> None:
    victims = [p for p in server.descendants() if "/minus/" in " ".join(p.cmdline())]
    for victim in victims:
        victim.kill()
    wait_for(lambda: all(is_dead(victim) for victim in victims))
    # The batch that finds it dead is lost with it, where no other machine can take it.
    message, expected = request("mixed", 300)
    try:
        assert stub.ModelInfer(message, timeout=TIMEOUT_S).raw_output_contents[0] == expected
    except grpc.RpcError as error:
        assert "not healthy" in str(error.details())
    answers(stub, "mixed", range(301, 320))
    answers(stub, "apart", range(301, 320))
    answers(stub, "thrice", range(301, 320))
    assert spans(control, "mixed-310") == [RUN]


def test_runs_come_back_with_a_triton_that_died(server: Paceline, stub: Any, control: Any) -> None:
    server.triton_process().kill()
    server.wait_line("the local Triton is back")
    answers(stub, "mixed", range(400, 420))
    answers(stub, "thrice", range(400, 420))
    assert spans(control, "mixed-410") == spans(control, "thrice-410") == [RUN]
    assert "Traceback" not in server.said
