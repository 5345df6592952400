"""What starts and stops: draining, killed processes, cancelled requests, a warm second start."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scripts.timed_model import write_timed
from tests.integration.conftest import Start
from tests.integration.models import write_transpose
from tests.integration.paceline_process import Paceline
from tritonclient.grpc import service_pb2, service_pb2_grpc

from paceline.v1 import control_pb2

pytestmark = pytest.mark.integration

TIMEOUT_S = 30.0
SLOW_MS = 500

CHAIN = """\
chain: calm
slo_ms: 60000
rate_rps: 1
inputs:
  x: {dtype: FP32, shape: [4]}
modules:
  only:
    model: slow
    inputs: {x: inputs.x}
outputs:
  y: only.y
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`slow`: 500 ms a row, one row at a time."""
    repository = tmp_path_factory.mktemp("lifecycle-models")
    write_timed(repository, {1: SLOW_MS}, "slow", max_batch_size=1)
    return repository


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paceline]:
    """One server for the tests that only bother it; it takes messages of up to 1 MiB."""
    repository = tmp_path_factory.mktemp("bothered-models")
    write_timed(repository, {1: SLOW_MS}, "slow", max_batch_size=1)
    write_transpose(repository)
    state = tmp_path_factory.mktemp("bothered")
    started = Paceline(state, ["--model-repository", str(repository), "--max-message-mib", "1"])
    try:
        yield started.wait_ready()
    finally:
        code = started.stop()
    assert code == 0


def slow_request(model: str = "slow", request_id: str = "") -> Any:
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    request.inputs.add(name="x", datatype="FP32", shape=[4] if model == "calm" else [1, 4])
    request.raw_input_contents.append(bytes(16))
    return request


@contextlib.contextmanager
def inference(server: Paceline) -> Iterator[Any]:
    """The generated stub, which gives futures that can be cancelled."""
    with server.channel() as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def wait_status(
    server: Paceline, condition: Callable[[Any], bool], timeout_s: float = TIMEOUT_S
) -> Any:
    """The first status of which `condition` is true; each look is a call to the server."""
    give_up_s = time.monotonic() + timeout_s
    with server.channel() as channel:
        stub = server.control(channel)
        while True:
            status = stub.Status(control_pb2.StatusRequest(), timeout=timeout_s)
            if condition(status):
                return status
            assert time.monotonic() < give_up_s, status


def in_flight(count: int) -> Callable[[Any], bool]:
    """Requests that the server has accepted and not answered."""
    return lambda status: json.loads(status.json)["in_flight"] == count


def executions(server: Paceline, model: str) -> int:
    """Batches of a model that have been executed since the start."""
    with inference(server) as stub:
        request = service_pb2.ModelStatisticsRequest(name=model)
        (entry,) = stub.ModelStatistics(request, timeout=TIMEOUT_S).model_stats
        return int(entry.execution_count)


def test_sigterm_answers_what_was_accepted_and_refuses_the_rest(
    models: Path, start_paceline: Start
) -> None:
    server = start_paceline("--model-repository", str(models)).wait_ready()
    with inference(server) as stub, server.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        serving = health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert serving.status == health_pb2.HealthCheckResponse.SERVING
        accepted = [stub.ModelInfer.future(slow_request(), timeout=TIMEOUT_S) for _ in range(3)]
        wait_status(server, in_flight(3))
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_line(r"draining (\d+) requests")[1] == "3"
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(slow_request(), timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        load = service_pb2.RepositoryModelLoadRequest(model_name="slow")
        with pytest.raises(grpc.RpcError) as caught:
            stub.RepositoryModelLoad(load, timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        gone = health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert gone.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert [len(answer.result().raw_output_contents[0]) for answer in accepted] == [16] * 3
    assert server.end() == 0
    server.assert_nothing_left()
    assert "Traceback" not in server.said


def test_nothing_is_unloaded_any_more_once_triton_stops(
    models: Path, start_paceline: Start, tmp_path: Path
) -> None:
    """The model is due to go, by its chain's keep-alive, while Triton is stopped."""
    chain = tmp_path / "calm.yaml"
    chain.write_text(CHAIN.replace("rate_rps: 1", "rate_rps: 1\nkeep_alive_s: 0.1"), "utf-8")
    given = ("--model-repository", str(models), "--chains", str(chain))
    server = start_paceline(*given).wait_ready()
    with inference(server) as stub:
        accepted = stub.ModelInfer.future(slow_request("calm"), timeout=TIMEOUT_S)
        wait_status(server, in_flight(1))
        server.process.send_signal(signal.SIGTERM)
        assert len(accepted.result().raw_output_contents) == 1
    assert server.end() == 0
    assert "ERROR" not in server.said, server.said


def test_a_repeated_sigterm_still_drains(models: Path, start_paceline: Start) -> None:
    """Supervisors send it to the process and again to its group."""
    server = start_paceline("--model-repository", str(models)).wait_ready()
    with inference(server) as stub:
        accepted = stub.ModelInfer.future(slow_request(), timeout=TIMEOUT_S)
        wait_status(server, in_flight(1))
        server.process.send_signal(signal.SIGTERM)
        server.wait_line("draining 1 requests")
        server.process.send_signal(signal.SIGTERM)
        assert len(accepted.result().raw_output_contents) == 1
    assert server.end() == 0


def test_ctrl_c_drains_and_a_second_one_ends_it_at_once(
    models: Path, start_paceline: Start
) -> None:
    server = start_paceline("--model-repository", str(models)).wait_ready()
    with inference(server) as stub:
        accepted = [stub.ModelInfer.future(slow_request(), timeout=TIMEOUT_S) for _ in range(20)]
        wait_status(server, in_flight(20))
        server.process.send_signal(signal.SIGINT)
        server.wait_line("draining 20 requests")
        server.process.send_signal(signal.SIGINT)
        server.wait_line("stopped at once; requests under way are lost")
        assert server.end() == 128 + signal.SIGINT
        assert accepted[-1].code() is grpc.StatusCode.UNAVAILABLE
    server.assert_nothing_left()


def test_sigterm_while_models_load_ends_it_cleanly(models: Path, start_paceline: Start) -> None:
    server = start_paceline("--model-repository", str(models))
    server.wait_line("starting a local Triton")
    assert server.stop() == 0
    assert "Traceback" not in server.said


def test_a_killed_paceline_leaves_no_triton_behind(models: Path, start_paceline: Start) -> None:
    server = start_paceline("--model-repository", str(models)).wait_ready()
    with inference(server) as stub:
        lost = stub.ModelInfer.future(slow_request(), timeout=TIMEOUT_S)
        wait_status(server, in_flight(1))
        assert len(server.descendants()) >= 2, "tritonserver and a model process"
        server.process.kill()
        assert server.end() == -signal.SIGKILL
        assert lost.code() is grpc.StatusCode.UNAVAILABLE
    server.assert_nothing_left()


def test_a_second_start_measures_nothing_again(start_paceline: Start, tmp_path: Path) -> None:
    models, chain = tmp_path / "models", tmp_path / "calm.yaml"
    models.mkdir()
    write_timed(models, {1: 20}, "slow", max_batch_size=1)
    chain.write_text(CHAIN, encoding="utf-8")
    arguments = ("--model-repository", str(models), "--chains", str(chain))
    counts, plans = [], []
    for _ in range(2):
        server = start_paceline(*arguments, state=tmp_path / "state").wait_ready()
        counts.append(triton_executions(server, "slow"))
        with server.channel() as channel:
            plan = server.control(channel).CurrentPlan(
                control_pb2.CurrentPlanRequest(), timeout=TIMEOUT_S
            )
        plans.append([m.allocations[0].duration_ms for m in plan.plan.chains[0].modules])
        assert server.stop() == 0
    assert counts[0] > 0 and counts[1] == 0
    assert plans[0] == plans[1]


def triton_executions(server: Paceline, model: str) -> int:
    """What the Triton behind it has executed."""
    (port,) = [
        argument.partition("=")[2]
        for argument in server.triton_process().cmdline()
        if argument.startswith("--grpc-port=")
    ]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelStatisticsRequest(name=model)
        return int(stub.ModelStatistics(request, timeout=TIMEOUT_S).model_stats[0].execution_count)


def test_a_killed_triton_comes_back_and_serves_without_a_restart_of_paceline(
    models: Path, start_paceline: Start, tmp_path: Path
) -> None:
    chain = tmp_path / "calm.yaml"
    chain.write_text(CHAIN, encoding="utf-8")
    server = start_paceline("--model-repository", str(models), "--chains", str(chain)).wait_ready()
    with inference(server) as stub:
        running = stub.ModelInfer.future(slow_request("calm"), timeout=TIMEOUT_S)
        waiting = stub.ModelInfer.future(slow_request("calm"), timeout=TIMEOUT_S)
        wait_status(server, in_flight(2))
        victim = server.triton_process()
        victim.kill()
        victim.wait(TIMEOUT_S)
        meanwhile = stub.ModelInfer.future(slow_request("calm"), timeout=TIMEOUT_S)
        short = stub.ModelInfer.future(slow_request("calm"), timeout=0.2)
        for answer in (running, waiting, meanwhile):
            if answer.exception() is not None:
                assert answer.code() is grpc.StatusCode.UNAVAILABLE, answer.details()
        assert short.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        server.wait_line("the local Triton is back")
        for model in ("calm", "slow"):
            after = stub.ModelInfer(slow_request(model), timeout=TIMEOUT_S)
            assert len(after.raw_output_contents) == 1
    assert server.triton_process().pid != victim.pid
    assert server.stop() == 0


def test_a_triton_killed_while_its_models_are_measured_is_no_reason_not_to_start(
    models: Path, start_paceline: Start, tmp_path: Path
) -> None:
    chain = tmp_path / "calm.yaml"
    chain.write_text(CHAIN, encoding="utf-8")
    server = start_paceline("--model-repository", str(models), "--chains", str(chain))
    server.wait_line(r"loading slow \(1/1\)")
    victim = server.triton_process()
    victim.kill()
    server.wait_ready()
    assert "starting over" in server.said
    with inference(server) as stub:
        after = stub.ModelInfer(slow_request("calm"), timeout=TIMEOUT_S)
        assert len(after.raw_output_contents) == 1
    assert server.triton_process().pid != victim.pid
    assert server.stop() == 0


def test_a_killed_model_process_is_replaced_and_nobody_hears_of_an_unknown_model(
    models: Path, start_paceline: Start
) -> None:
    server = start_paceline("--model-repository", str(models)).wait_ready()
    (victim,) = [p for p in server.descendants() if "stub" in p.name()]
    with inference(server) as stub:
        calls = [stub.ModelInfer.future(slow_request(), timeout=TIMEOUT_S) for _ in range(2)]
        wait_status(server, in_flight(2))
        victim.kill()
        give_up_s = time.monotonic() + TIMEOUT_S
        while calls[-1].exception() is not None or len(calls) < 3:
            assert time.monotonic() < give_up_s, calls[-1].details()
            calls.append(stub.ModelInfer.future(slow_request(), timeout=TIMEOUT_S))
    for call in calls[:-1]:
        assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE), call.details()
    assert server.stop() == 0


def test_cancelled_requests_free_their_places(server: Paceline) -> None:
    with inference(server) as stub:
        before = executions(server, "slow")
        queued = [stub.ModelInfer.future(slow_request(), timeout=TIMEOUT_S) for _ in range(12)]
        wait_status(server, in_flight(12))
        for call in queued[1:]:
            call.cancel()
        wait_status(
            server, lambda status: status.machines[0].executing > 0 and in_flight(1)(status)
        )
        later = stub.ModelInfer(slow_request(request_id="later"), timeout=TIMEOUT_S)
        assert len(later.raw_output_contents) == 1
        assert len(queued[0].result().raw_output_contents) == 1
        # The first, one that had been started when it was cancelled (or none), and the last.
        assert executions(server, "slow") - before <= 3


CLIENT = """\
import sys
import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(sys.argv[1]))
request = service_pb2.ModelInferRequest(model_name="slow", raw_input_contents=[bytes(16)])
request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
calls = [stub.ModelInfer.future(request) for _ in range(6)]
sys.stdin.read()
"""


def test_a_client_that_dies_frees_its_places(server: Paceline) -> None:
    before = executions(server, "slow")
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, server.address],
        stdin=subprocess.PIPE,
        env={**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"},
    ) as client:
        try:
            wait_status(server, in_flight(6))
        finally:
            client.kill()
    wait_status(server, in_flight(0))
    with inference(server) as stub:
        assert len(stub.ModelInfer(slow_request(), timeout=TIMEOUT_S).raw_output_contents) == 1
        assert executions(server, "slow") - before <= 3


def test_a_message_above_the_limit_is_refused_and_one_below_is_served(server: Paceline) -> None:
    with inference(server) as stub:
        for rows, code in ((1200, grpc.StatusCode.RESOURCE_EXHAUSTED), (200, None)):
            request = service_pb2.ModelInferRequest(model_name="transpose")
            request.inputs.add(name="x", datatype="FP32", shape=[rows, 256])
            request.raw_input_contents.append(bytes(rows * 1024))
            call = stub.ModelInfer.future(request, timeout=TIMEOUT_S)
            if code is None:
                assert len(call.result().raw_output_contents[0]) == rows * 1024
            else:
                assert call.exception() is not None and call.code() is code
