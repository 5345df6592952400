"""Health, reflection and the HTTP side of a running server."""

from __future__ import annotations

import re
import urllib.error
import urllib.request

import pytest
import tritonclient.grpc as triton
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from tests.integration.paceline_process import Paceline
from tests.integration.test_serve_inference import TIMEOUT_S, pair

pytestmark = pytest.mark.integration

SERVING = health_pb2.HealthCheckResponse.SERVING


def fetch(front: Paceline, path: str) -> tuple[int, str]:
    """Status and body of a GET."""
    try:
        with urllib.request.urlopen(front.http + path, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def sample(text: str, name: str, /, *absent: float, **labels: str) -> float:
    """One value of a metrics page; `absent` where it is not there."""
    wanted = ",".join(f'{key}="{value}"' for key, value in labels.items())
    found = re.search(rf"^{re.escape(f'{name}{{{wanted}}}')} (\S+)$", text, re.MULTILINE)
    if found is None and absent:
        return absent[0]
    assert found is not None, f"no {name}{{{wanted}}}"
    return float(found[1])


def test_health_knows_the_server_its_services_chains_and_models(front: Paceline) -> None:
    with front.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService", "paceline.v1.Control", "pair", "add"):
            request = health_pb2.HealthCheckRequest(service=service)
            assert stub.Check(request, timeout=TIMEOUT_S).status == SERVING, service
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="pair"), timeout=TIMEOUT_S)
        assert next(watch).status == SERVING
        watch.cancel()


def test_watched_health_follows_a_chain_that_is_withdrawn(
    front: Paceline, client: triton.InferenceServerClient
) -> None:
    with front.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="items"), timeout=TIMEOUT_S)
        assert next(watch).status == SERVING
        client.unload_model("items", client_timeout=TIMEOUT_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        client.load_model("items", client_timeout=TIMEOUT_S)
        assert next(watch).status == SERVING
        watch.cancel()


def test_reflection_describes_every_service(front: Paceline) -> None:
    with front.channel() as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        assert {
            "inference.GRPCInferenceService",
            "paceline.v1.Control",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        } <= services
        pool = DescriptorPool(database)
        control = pool.FindServiceByName("paceline.v1.Control")
        assert "Apply" in [method.name for method in control.methods]


def test_metrics_count_requests_under_tritons_names_and_ours(
    front: Paceline, client: triton.InferenceServerClient
) -> None:
    code, before = fetch(front, "/metrics")
    assert code == 200
    for number in range(3):
        client.infer("pair", pair(number), client_timeout=TIMEOUT_S)
    _, after = fetch(front, "/metrics")
    for name, labels, growth in (
        ("nv_inference_request_success", {"model": "pair", "version": "1"}, 3),
        ("nv_inference_count", {"model": "add", "version": "1"}, 6),
        ("nv_inference_exec_count", {"model": "add", "version": "1"}, 6),
        ("paceline_requests_total", {"chain": "pair", "outcome": "met"}, 3),
        ("paceline_request_duration_seconds_count", {"chain": "pair"}, 3),
    ):
        # Nothing is counted of a chain before its first request.
        then = sample(before, name, 0.0, **labels)
        assert sample(after, name, **labels) - then == growth, name
    for name in (
        "nv_inference_request_failure",
        "nv_inference_request_duration_us",
        "nv_inference_queue_duration_us",
        "nv_inference_compute_infer_duration_us",
        "nv_inference_pending_request_count",
    ):
        assert sample(after, name, model="pair", version="1") >= 0
    assert sample(after, "paceline_machine_up", machine="local") == 1


def test_probes_and_the_page_answer(front: Paceline) -> None:
    assert fetch(front, "/healthz") == (200, '{"live": true}')
    assert fetch(front, "/readyz") == (200, '{"ready": true}')
    code, page = fetch(front, "/")
    assert code == 200
    assert "<html" in page and "pair" in page and "items" in page
    assert fetch(front, "/nothing")[0] == 404
