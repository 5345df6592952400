"""paceline.v1.Control, health, reflection and the life of the server, over real connections."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_tools import protoc
from tests.fakes import OCR, FakeControl, FakeInference, plan_of
from tritonclient.grpc import service_pb2, service_pb2_grpc

from paceline.core.chain import Chain
from paceline.core.errors import ConfigError, PlanError, ResidencyError
from paceline.core.plan import Plan
from paceline.core.request import Span, Timeline
from paceline.rpc.control import plan_message
from paceline.rpc.server import RpcServer, start_grpc
from paceline.v1 import control_pb2, control_pb2_grpc

ROOT = Path(__file__).parents[2]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def parse_chain(text: str, *, name: str) -> Chain:
    """A chain document is a chain's name here."""
    if not text.isalnum():
        raise ConfigError(f"{text!r} is no chain", key="chain", where=f"{name}:1")
    return replace(OCR, name=text)


class Stand:
    def __init__(self, server: RpcServer, control: FakeControl, inference: FakeInference) -> None:
        self.server = server
        self.control = control
        self.inference = inference
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
        self.stub: Any = control_pb2_grpc.ControlStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)
        self.triton: Any = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)


@pytest_asyncio.fixture
async def stand() -> AsyncIterator[Stand]:
    control = FakeControl()
    inference = FakeInference(control)
    server = await start_grpc(inference, control, parse_chain=parse_chain, port=0)
    made = Stand(server, control, inference)
    yield made
    await made.channel.close(None)
    await server.stop(None)


def documents(*texts: str) -> list[control_pb2.ChainDocument]:
    return [control_pb2.ChainDocument(name=f"{t}.yaml", yaml=t) for t in texts]


async def refusal(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details() or ""


async def test_applied_chains_are_listed_planned_and_deleted(stand: Stand) -> None:
    answer = await stand.stub.Apply(control_pb2.ApplyRequest(chains=documents("aa", "bb")))
    assert [chain.chain for chain in answer.plan.chains] == ["aa", "bb"]
    listed = (await stand.stub.List(control_pb2.ListRequest())).chains
    assert [chain.name for chain in listed] == ["aa", "bb", "ocr"]
    current = (await stand.stub.CurrentPlan(control_pb2.CurrentPlanRequest())).plan
    assert [chain.chain for chain in current.chains] == ["aa", "bb", "ocr"]
    assert (await stand.stub.Delete(control_pb2.DeleteRequest(chain="aa"))).deleted
    assert not (await stand.stub.Delete(control_pb2.DeleteRequest(chain="aa"))).deleted
    assert [chain.name for chain in stand.control.chains()] == ["bb", "ocr"]


async def test_a_dry_run_plans_without_serving(stand: Stand) -> None:
    answer = await stand.stub.Plan(control_pb2.PlanRequest(chains=documents("aa")))
    assert [chain.chain for chain in answer.plan.chains] == ["aa"]
    assert [chain.name for chain in stand.control.chains()] == ["ocr"]


async def test_a_listed_chain_shows_what_its_file_declares(stand: Stand) -> None:
    (chain,) = (await stand.stub.List(control_pb2.ListRequest())).chains
    assert (chain.name, chain.slo_ms, chain.rate_rps, chain.priority) == ("ocr", 800.0, 20.0, 1)
    assert [(m.name, m.model, m.for_each, m.fan_out) for m in chain.modules] == [
        ("detect", "det", "", 1.0),
        ("recognize", "rec", "detect.crops", 4.0),
    ]
    assert [(t.name, t.datatype, list(t.shape)) for t in chain.inputs] == [
        ("image", "UINT8", [-1, -1, 3])
    ]
    assert dict(chain.outputs) == {"text": "recognize.text"}
    stand.control.served["ocr"] = replace(OCR, rate_rps=None)
    (chain,) = (await stand.stub.List(control_pb2.ListRequest())).chains
    assert not chain.HasField("rate_rps")


def test_a_plan_message_has_every_field_of_the_published_json() -> None:
    class Packed:
        """A plan with the optional parts of the published format."""

        def as_json(self) -> dict[str, Any]:
            share = {"chain": "ocr", "module": "m", "batch_size": 4, "utilisation": 0.5}
            return {
                **plan_of([OCR]).as_json(),
                "attainment": {
                    "arrivals": "poisson",
                    "target": 0.99,
                    "simulated": 0.9931,
                    "requests": 50000,
                },
                "machines": [{"hardware": "cpu", "shares": [share], "memory_mib": 12.5}],
            }

    from google.protobuf import json_format

    plan = Packed()
    message = plan_message(cast(Plan, plan))
    assert json.loads(message.json) == plan.as_json()
    message.json = ""
    back = json_format.MessageToDict(message, preserving_proto_field_name=True)
    # Zeros are left out of proto3 JSON, 64-bit integers are strings there.
    assert _normal(back) == _normal(plan.as_json())


def _normal(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _normal(v) for k, v in value.items() if v not in (0, 0.0)}
    if isinstance(value, list):
        return [_normal(item) for item in value]
    return float(value) if str(value).replace(".", "").isdigit() else value


@pytest.mark.parametrize("method", ["Apply", "Plan"])
async def test_bad_chain_documents_are_invalid_arguments_that_name_the_place(
    stand: Stand, method: str
) -> None:
    call = getattr(stand.stub, method)
    ask = getattr(control_pb2, f"{method}Request")
    code, details = await refusal(call(ask(chains=documents("fine", "not fine"))))
    assert code == "INVALID_ARGUMENT"
    assert details == "not fine.yaml:1: chain: 'not fine' is no chain"
    code, details = await refusal(call(ask(chains=documents("aa", "aa"))))
    assert (code, details) == (
        "INVALID_ARGUMENT",
        "aa.yaml: chain: chain 'aa' is in this call twice",
    )
    assert await refusal(call(ask())) == ("INVALID_ARGUMENT", "no chain document in the call")
    assert [chain.name for chain in stand.control.chains()] == ["ocr"]


async def test_a_chain_without_a_feasible_plan_says_which_module_lacks_how_much(
    stand: Stand,
) -> None:
    stand.control.failure = PlanError(
        "chain 'aa': module 'detect' lacks 12.5 ms", chain="aa", module="detect", lacking_s=0.0125
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stand.stub.Apply(control_pb2.ApplyRequest(chains=documents("aa")))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.details() == "chain 'aa': module 'detect' lacks 12.5 ms"
    metadata: dict[Any, Any] = dict(caught.value.trailing_metadata())  # type: ignore[arg-type]
    assert metadata["paceline-lacking-ms"] == "12.500"
    stand.control.failure = ResidencyError("model 'det' did not load: out of memory")
    ask = control_pb2.ApplyRequest(chains=documents("aa"))
    assert await refusal(stand.stub.Apply(ask)) == (
        "FAILED_PRECONDITION",
        "model 'det' did not load: out of memory",
    )


async def test_the_status_has_fields_for_chains_modules_machines_and_models(stand: Stand) -> None:
    status = await stand.stub.Status(control_pb2.StatusRequest())
    assert (status.ready, status.draining, status.uptime_s) == (True, False, 12.5)
    assert [(c.chain, c.met, c.attainment) for c in status.chains] == [("ocr", 99, 0.99)]
    assert [(m.module, m.queued, m.batch_size) for m in status.modules] == [
        ("detect", 3, 4),
        ("recognize", 3, 4),
    ]
    assert [(m.machine, m.state, list(m.models)) for m in status.machines] == [
        ("local", "up", ["det", "rec"])
    ]
    assert {m.model: m.state for m in status.models}["det"] == "READY"
    assert json.loads(status.json) == stand.control.status()


async def test_whoever_watches_the_status_sees_every_change(stand: Stand) -> None:
    call = stand.stub.WatchStatus(control_pb2.StatusRequest())
    assert (await call.read()).ready
    stand.control.ready = False
    stand.control.changed()
    assert not (await call.read()).ready
    call.cancel()


async def test_a_request_is_explained_span_by_span(stand: Stand) -> None:
    stand.control.timelines["mine"] = Timeline(
        7,
        "mine",
        "ocr",
        10.0,
        10.5,
        10.8,
        (Span("detect", "det", "local", 1, 4, 10.001, 10.011, 10.111),),
    )
    told = await stand.stub.Explain(control_pb2.ExplainRequest(request_id="mine"))
    assert (told.request, told.chain, told.latency_ms, told.slack_ms) == (7, "ocr", 500.0, 300.0)
    assert told.met and not told.error
    (span,) = told.spans
    assert (span.module, span.model, span.machine) == ("detect", "det", "local")
    assert (span.rows, span.batch_size) == (1, 4)
    assert (span.start_ms, span.queue_ms, span.execute_ms) == (1.0, 10.0, 100.0)
    unknown = stand.stub.Explain(control_pb2.ExplainRequest(request_id="other"))
    assert await refusal(unknown) == (
        "NOT_FOUND",
        "request 'other' is unknown or no longer remembered",
    )


# Health and reflection


async def health(stand: Stand, service: str) -> int:
    answer = await stand.health.Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


async def test_health_is_that_of_the_server_its_services_and_every_chain(stand: Stand) -> None:
    names = ("", "inference.GRPCInferenceService", "paceline.v1.Control", "ocr", "x")
    assert [await health(stand, name) for name in names] == [SERVING] * 5
    stand.control.not_ready.add("x")
    assert (await health(stand, "x"), await health(stand, "ocr")) == (NOT_SERVING, SERVING)
    stand.control.ready = False
    assert (await health(stand, ""), await health(stand, "ocr")) == (NOT_SERVING, SERVING)
    ask = health_pb2.HealthCheckRequest(service="nope")
    assert (await refusal(stand.health.Check(ask)))[0] == "NOT_FOUND"


async def test_everything_is_unhealthy_while_the_server_drains(stand: Stand) -> None:
    stand.control.draining = True
    assert [await health(stand, name) for name in ("", "ocr")] == [NOT_SERVING] * 2


async def test_health_watchers_are_told_every_change_and_only_changes(stand: Stand) -> None:
    first = stand.health.Watch(health_pb2.HealthCheckRequest(service="late"))
    second = stand.health.Watch(health_pb2.HealthCheckRequest(service="late"))
    assert (await first.read()).status == (await second.read()).status == SERVICE_UNKNOWN
    first.cancel()
    stand.control.changed()
    await stand.control.apply([replace(OCR, name="late")])
    stand.control.changed()
    assert (await second.read()).status == SERVING
    stand.control.not_ready.add("late")
    stand.control.changed()
    assert (await second.read()).status == NOT_SERVING
    second.cancel()


async def test_reflection_lists_and_describes_every_service(stand: Stand) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(stand.channel)
    asks = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="paceline.v1.Control"),
        reflection_pb2.ServerReflectionRequest(
            file_containing_symbol="inference.GRPCInferenceService"
        ),
    ]
    listed, *described = [answer async for answer in stub.ServerReflectionInfo(iter(asks))]
    assert {service.name for service in listed.list_services_response.service} == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
        "paceline.v1.Control",
        "paceline.v1.Edge",
    }
    assert all(answer.file_descriptor_response.file_descriptor_proto for answer in described)


# The server


def infer_request() -> Any:
    message = service_pb2.ModelInferRequest(model_name="echo_uint8")
    message.inputs.add(name="in", datatype="UINT8", shape=[1])
    message.raw_input_contents.append(b"x")
    return message


async def test_stopping_answers_what_was_accepted_and_ends_idle_streams_at_once(
    stand: Stand,
) -> None:
    stand.inference.gate.clear()
    accepted = asyncio.ensure_future(stand.triton.ModelInfer(infer_request()))
    streaming = stand.triton.ModelStreamInfer()
    await streaming.write(infer_request())
    await stand.inference.until_waiting(2)
    idle = stand.triton.ModelStreamInfer()
    await idle.wait_for_connection()
    watch = stand.health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    status = stand.stub.WatchStatus(control_pb2.StatusRequest())
    await status.read()
    stand.control.draining = True
    # A grace period longer than this test may take: nothing may use it up.
    stop = asyncio.ensure_future(stand.server.stop(600))
    assert (await watch.read()).status == NOT_SERVING
    assert await idle.code() is grpc.StatusCode.UNAVAILABLE
    assert await status.code() is grpc.StatusCode.OK
    assert not stop.done() and not accepted.done()
    stand.inference.gate.set()
    assert (await accepted).raw_output_contents[0] == b"x"
    assert (await streaming.read()).infer_response.raw_output_contents[0] == b"x"
    assert await streaming.code() is grpc.StatusCode.UNAVAILABLE
    await stop
    assert (await refusal(stand.triton.ModelInfer(infer_request())))[0] == "UNAVAILABLE"
    assert stand.control.watchers == 0


async def test_a_busy_port_is_one_clear_line(stand: Stand) -> None:
    with pytest.raises(ConfigError) as caught:
        await start_grpc(
            stand.inference, stand.control, parse_chain=parse_chain, port=stand.server.port
        )
    assert str(caught.value) == (
        f"port {stand.server.port} is in use; choose another with --grpc-port"
    )


async def test_a_port_that_another_program_listens_on_is_busy_too() -> None:
    control = FakeControl()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use"):
            await start_grpc(FakeInference(control), control, parse_chain=parse_chain, port=port)


async def test_an_address_that_is_not_this_machines_is_one_clear_line() -> None:
    control = FakeControl()
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0: .*--host"):
        await start_grpc(
            FakeInference(control), control, parse_chain=parse_chain, host="192.0.2.1", port=0
        )


async def test_an_oversize_request_is_refused_and_the_connection_lives_on() -> None:
    control = FakeControl()
    inference = FakeInference(control)
    server = await start_grpc(
        inference, control, parse_chain=parse_chain, port=0, max_message_bytes=100_000
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        large = service_pb2.ModelInferRequest(model_name="echo_uint8")
        large.inputs.add(name="in", datatype="UINT8", shape=[200_000])
        large.raw_input_contents.append(bytes(200_000))
        code, details = await refusal(stub.ModelInfer(large))
        assert code == "RESOURCE_EXHAUSTED"
        assert "100000" in details
        assert (await stub.ModelInfer(infer_request())).raw_output_contents[0] == b"x"
    await server.stop(None)


def test_the_committed_stubs_are_what_protoc_makes_of_the_proto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert (
        protoc.main(
            [
                "protoc",
                f"-I{ROOT / 'proto'}",
                *(
                    f"--{plugin}_out={tmp_path}"
                    for plugin in ("python", "mypy", "grpc_python", "mypy_grpc")
                ),
                str(ROOT / "proto/paceline/v1/control.proto"),
            ]
        )
        == 0
    )
    made = {path.name: path.read_text() for path in (tmp_path / "paceline/v1").iterdir()}
    committed = ROOT / "server/paceline/v1"
    assert made == {name: (committed / name).read_text() for name in made}
    assert len(made) == 4
