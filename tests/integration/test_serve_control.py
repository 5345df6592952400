"""paceline.v1.Control on a running server: chains come, change and go while requests are served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
from google.protobuf import json_format
from tests.integration.paceline_process import Paceline
from tests.integration.test_serve_inference import TIMEOUT_S, failure, pair
from tritonclient.grpc import service_pb2, service_pb2_grpc

from paceline.v1 import control_pb2

pytestmark = pytest.mark.integration

CHAIN = """\
chain: sums
slo_ms: {slo_ms}
rate_rps: 5
inputs:
  a: {{dtype: INT32, shape: [16]}}
  b: {{dtype: INT32, shape: [16]}}
modules:
  only:
    model: {model}
    inputs: {{a: inputs.a, b: {b}}}
outputs:
  out: only.sum
"""

SLOW_CHAIN = """\
chain: sums
slo_ms: 60000
rate_rps: {rate}
inputs:
  x: {{dtype: FP32, shape: [4]}}
modules:
  only:
    model: slow
    inputs: {{x: inputs.x}}
outputs:
  y: only.y
"""


@pytest.fixture
def control(front: Paceline) -> Iterator[Any]:
    """The Control stub; whatever a test applied is deleted again."""
    with front.channel() as channel:
        stub = front.control(channel)
        yield stub
        stub.Delete(control_pb2.DeleteRequest(chain="sums"), timeout=TIMEOUT_S)


def document(*, slo_ms: float = 60_000, model: str = "add", b: str = "inputs.b") -> Any:
    text = CHAIN.format(slo_ms=slo_ms, model=model, b=b)
    return control_pb2.ChainDocument(name="sums.yaml", yaml=text)


def apply(control: Any, *documents: Any) -> Any:
    return control.Apply(control_pb2.ApplyRequest(chains=documents), timeout=TIMEOUT_S).plan


def names(control: Any) -> list[str]:
    listed = control.List(control_pb2.ListRequest(), timeout=TIMEOUT_S)
    return [chain.name for chain in listed.chains]


def picture(control: Any) -> tuple[list[str], str]:
    """Chains and plan, the time it took to make aside."""
    plan = control.CurrentPlan(control_pb2.CurrentPlanRequest(), timeout=TIMEOUT_S).plan
    return names(control), str([chain.SerializeToString() for chain in plan.chains])


def refused(call: Any, request: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Code, message and metadata of a call that is to fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=TIMEOUT_S)
    error: Any = caught.value
    return error.code(), error.details(), dict(error.trailing_metadata())


def test_a_chain_is_applied_listed_served_replaced_and_deleted(
    control: Any, client: triton.InferenceServerClient
) -> None:
    plan = apply(control, document())
    assert sorted(chain.chain for chain in plan.chains) == ["items", "pair", "sums"]
    assert names(control) == ["items", "pair", "sums"]
    answer = client.infer("sums", pair(4), client_timeout=TIMEOUT_S)
    assert (answer.as_numpy("out") == 5).all()
    apply(control, document(b="inputs.a"))
    answer = client.infer("sums", pair(4), client_timeout=TIMEOUT_S)
    assert (answer.as_numpy("out") == 8).all()
    current = control.CurrentPlan(control_pb2.CurrentPlanRequest(), timeout=TIMEOUT_S).plan
    assert json.loads(current.json)["cost_per_hour"] == pytest.approx(current.cost_per_hour)
    deleted = control.Delete(control_pb2.DeleteRequest(chain="sums"), timeout=TIMEOUT_S)
    assert deleted.deleted
    assert names(control) == ["items", "pair"]
    assert failure(client, "sums", pair(4))[0] == "NOT_FOUND"
    again = control.Delete(control_pb2.DeleteRequest(chain="sums"), timeout=TIMEOUT_S)
    assert not again.deleted
    assert client.infer("add", pair(4, 1), client_timeout=TIMEOUT_S).as_numpy("sum")[0][0] == 5


def test_a_dry_run_plans_and_changes_nothing(
    control: Any, client: triton.InferenceServerClient
) -> None:
    before = picture(control)
    would = control.Plan(control_pb2.PlanRequest(chains=[document()]), timeout=TIMEOUT_S).plan
    assert "sums" in [chain.chain for chain in would.chains]
    assert picture(control) == before
    assert failure(client, "sums", pair(1))[0] == "NOT_FOUND"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (document(model="nope"), "unknown model 'nope'"),
        (document(b="inputs.z"), "sums.yaml:10: modules.only.inputs.b: unknown input 'z'"),
        (document(slo_ms=-5), "slo_ms"),
        (control_pb2.ChainDocument(name="x.yaml", yaml="chain: [unclosed"), "x.yaml"),
        (
            control_pb2.ChainDocument(name="x.yaml", yaml="chain: x\nslo_ms: 1\n"),
            "inputs: is missing",
        ),
        (
            control_pb2.ChainDocument(
                yaml=CHAIN.format(slo_ms=9, model="add", b="inputs.b").replace(
                    "chain: sums", "chain: add"
                )
            ),
            "is a model of the repository",
        ),
    ],
)
def test_a_chain_that_is_wrong_changes_nothing(control: Any, wrong: Any, words: str) -> None:
    before = picture(control)
    fine = control_pb2.ChainDocument(
        yaml=document().yaml.replace("chain: sums", "chain: fine"),
    )
    for request in ([wrong], [fine, wrong]):
        call = control_pb2.ApplyRequest(chains=request)
        code, message, _ = refused(control.Apply, call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "\n" not in message
    assert words in message
    assert picture(control) == before


def test_deleting_or_replacing_a_chain_loses_no_request_under_way(
    control: Any, front: Paceline
) -> None:
    """The chain's one model takes 80 ms and is deleted and replaced meanwhile."""
    slow = SLOW_CHAIN.format(rate=1)
    request = service_pb2.ModelInferRequest(model_name="sums", raw_input_contents=[bytes(16)])
    request.inputs.add(name="x", datatype="FP32", shape=[4])
    with front.channel() as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answers = []
        for change in ("replace", "delete"):
            apply(control, control_pb2.ChainDocument(name="sums.yaml", yaml=slow))
            answers += [stub.ModelInfer.future(request, timeout=TIMEOUT_S) for _ in range(20)]
            watch = control.WatchStatus(control_pb2.StatusRequest(), timeout=TIMEOUT_S)
            assert any(busy(status, "sums") for status in watch)
            watch.cancel()
            if change == "replace":
                again = SLOW_CHAIN.format(rate=2)
                apply(control, control_pb2.ChainDocument(name="sums.yaml", yaml=again))
            else:
                control.Delete(control_pb2.DeleteRequest(chain="sums"), timeout=TIMEOUT_S)
        assert [len(a.result().raw_output_contents[0]) for a in answers] == [16] * 40


def busy(status: Any, name: str) -> bool:
    return any(chain.chain == name and chain.in_flight > 0 for chain in status.chains)


def test_an_objective_that_no_plan_meets_names_module_and_milliseconds(control: Any) -> None:
    before = picture(control)
    call = control_pb2.ApplyRequest(chains=[document(slo_ms=0.01)])
    code, message, metadata = refused(control.Apply, call)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert metadata["paceline-chain"] == "sums"
    assert metadata["paceline-module"] == "only"
    assert float(metadata["paceline-lacking-ms"]) > 0
    assert "only" in message and "ms" in message
    assert picture(control) == before


def test_status_shows_what_runs_where_and_watching_it_shows_changes(
    front: Paceline, control: Any
) -> None:
    status = control.Status(control_pb2.StatusRequest(), timeout=TIMEOUT_S)
    assert status.ready and not status.draining
    assert [machine.state for machine in status.machines] == ["up"]
    assert {"add", "slow"} <= set(status.machines[0].models)
    assert [chain.chain for chain in status.chains] == ["items", "pair"]
    watch = control.WatchStatus(control_pb2.StatusRequest(), timeout=TIMEOUT_S)
    assert len(next(watch).chains) == 2
    apply(control, document())
    assert any(len(status.chains) == 3 for status in watch)
    watch.cancel()


def test_explain_says_where_a_requests_time_went(
    control: Any, client: triton.InferenceServerClient
) -> None:
    client.infer("pair", pair(1), request_id="why", client_timeout=TIMEOUT_S)
    told = control.Explain(control_pb2.ExplainRequest(request_id="why"), timeout=TIMEOUT_S)
    assert (told.chain, told.request_id, told.met, told.error) == ("pair", "why", True, "")
    assert [(span.module, span.model, span.rows) for span in told.spans] == [
        ("first", "add", 1),
        ("second", "add", 1),
    ]
    first, second = told.spans
    assert second.start_ms >= first.start_ms + first.queue_ms + first.execute_ms - 0.01
    assert sum(s.queue_ms + s.execute_ms for s in told.spans) <= told.latency_ms + 0.01
    assert json_format.MessageToDict(told)["slackMs"] > 0
    code, message, _ = refused(control.Explain, control_pb2.ExplainRequest(request_id="never"))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "'never'" in message
