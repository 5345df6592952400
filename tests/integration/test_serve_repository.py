"""What Triton clients ask beside inference: metadata, configuration, statistics, index, loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from scripts.timed_model import write_timed
from tests.integration.conftest import Start
from tests.integration.models import write_add
from tests.integration.paceline_process import Paceline
from tests.integration.test_serve_inference import TIMEOUT_S, failure, pair, tensor
from tritonclient.utils import InferenceServerException

from paceline.v1 import control_pb2

pytestmark = pytest.mark.integration

CHAIN = """\
chain: twice
slo_ms: 60000
rate_rps: 1
inputs:
  a: {dtype: INT32, shape: [16]}
modules:
  only:
    model: add
    inputs: {a: inputs.a, b: inputs.a}
outputs:
  double: only.sum
"""


def states(client: triton.InferenceServerClient) -> dict[str, str]:
    """The repository index: state by name."""
    index = client.get_model_repository_index(client_timeout=TIMEOUT_S)
    names = [model.name for model in index.models]
    assert len(names) == len(set(names)), f"a name is there twice: {names}"
    return {model.name: model.state for model in index.models}


def counts(client: triton.InferenceServerClient, model: str) -> tuple[int, int, int, int]:
    """Inferences, executions, successes and failures of one model or chain."""
    statistics = client.get_inference_statistics(model, client_timeout=TIMEOUT_S)
    (entry,) = statistics.model_stats
    ended = entry.inference_stats
    return (
        entry.inference_count,
        entry.execution_count,
        ended.success.count,
        ended.fail.count,
    )


def refused(call: Any, *arguments: Any) -> tuple[str, str]:
    """Code and message of a call that is to fail."""
    with pytest.raises(InferenceServerException) as caught:
        call(*arguments, client_timeout=TIMEOUT_S)
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


def test_the_server_says_that_it_is_live_ready_and_what_it_can(
    client: triton.InferenceServerClient,
) -> None:
    assert client.is_server_live(client_timeout=TIMEOUT_S)
    assert client.is_server_ready(client_timeout=TIMEOUT_S)
    about = client.get_server_metadata(client_timeout=TIMEOUT_S)
    assert about.name == "paceline"
    assert {"model_repository", "model_configuration", "statistics"} <= set(about.extensions)
    assert not [name for name in about.extensions if "shared_memory" in name]


def test_chains_and_models_are_ready_and_others_are_not(
    client: triton.InferenceServerClient,
) -> None:
    ready = {
        name: client.is_model_ready(name, client_timeout=TIMEOUT_S)
        for name in ("pair", "items", "add", "broken", "nope")
    }
    assert ready == {"pair": True, "items": True, "add": True, "broken": False, "nope": False}
    found = states(client)
    assert found.pop("broken") == "UNAVAILABLE"
    expected = ("add", "failing", "identity", "items", "pair", "picky", "slow", "transpose")
    assert found == dict.fromkeys(expected, "READY")


def test_metadata_and_configuration_describe_a_chain_and_a_model(
    client: triton.InferenceServerClient,
) -> None:
    chain = client.get_model_metadata("pair", client_timeout=TIMEOUT_S)
    assert [(t.name, t.datatype, list(t.shape)) for t in chain.inputs] == [
        ("a", "INT32", [16]),
        ("b", "INT32", [16]),
    ]
    assert [(t.name, list(t.shape)) for t in chain.outputs] == [("total", [16]), ("part", [16])]
    model = client.get_model_metadata("add", client_timeout=TIMEOUT_S)
    assert [(t.name, list(t.shape)) for t in model.inputs] == [("a", [-1, 16]), ("b", [-1, 16])]
    assert (list(model.versions), model.platform) == (["1"], "python")
    chained = client.get_model_config("pair", client_timeout=TIMEOUT_S).config
    assert (chained.name, chained.max_batch_size) == ("pair", 0)
    config = client.get_model_config("add", client_timeout=TIMEOUT_S).config
    assert (config.name, config.max_batch_size) == ("add", 8)
    assert [(t.name, list(t.dims)) for t in config.input] == [("a", [16]), ("b", [16])]
    for ask in (client.get_model_metadata, client.get_model_config):
        message = "Request for unknown model: 'nope' is not found"
        assert refused(ask, "nope") == ("NOT_FOUND", message)


def test_statistics_count_what_was_served(client: triton.InferenceServerClient) -> None:
    chain, model = counts(client, "pair"), counts(client, "add")
    for number in range(3):
        client.infer("pair", pair(number), client_timeout=TIMEOUT_S)
    client.infer("add", pair(1, 4), client_timeout=TIMEOUT_S)
    chained = np.subtract(counts(client, "pair"), chain).tolist()
    assert chained == [3, 3, 3, 0]
    # Two modules of the chain run `add`, and four rows came in one request of its own.
    inferences, executions, successes, failures = np.subtract(counts(client, "add"), model)
    assert (inferences, executions, successes, failures) == (3 * 2 + 4, 3 * 2 + 1, 3 * 2 + 1, 0)
    before = counts(client, "failing")
    failure(client, "failing", [tensor("x", np.zeros((1, 4), np.float32))])
    assert counts(client, "failing")[3] == before[3] + 1
    assert refused(client.get_inference_statistics, "nope") == (
        "INVALID_ARGUMENT",
        "requested model 'nope' is not available",
    )
    everything = client.get_inference_statistics(client_timeout=TIMEOUT_S)
    assert {"pair", "items", "add", "slow"} <= {entry.name for entry in everything.model_stats}


def test_a_model_is_unloaded_and_loaded_again(client: triton.InferenceServerClient) -> None:
    x = [tensor("x", np.zeros((2, 3), np.float32))]
    client.unload_model("transpose", client_timeout=TIMEOUT_S)
    assert states(client)["transpose"] == "UNAVAILABLE"
    assert not client.is_model_ready("transpose", client_timeout=TIMEOUT_S)
    code, message = failure(client, "transpose", x)
    assert code == "NOT_FOUND"
    assert message == "Request for unknown model: 'transpose' has no available versions"
    client.unload_model("transpose", client_timeout=TIMEOUT_S)
    client.load_model("transpose", client_timeout=TIMEOUT_S)
    assert states(client)["transpose"] == "READY"
    client.load_model("transpose", client_timeout=TIMEOUT_S)
    assert client.infer("transpose", x, client_timeout=TIMEOUT_S).as_numpy("y").shape == (3, 2)


def test_a_model_that_a_chain_uses_is_not_unloaded(client: triton.InferenceServerClient) -> None:
    code, message = refused(client.unload_model, "add")
    assert code == "INVALID_ARGUMENT"
    assert message == ("failed to unload 'add', it is used by chain 'pair'; delete the chain first")
    assert client.infer("pair", pair(1), client_timeout=TIMEOUT_S).as_numpy("total")[0] == 3


def test_a_chain_is_withdrawn_and_served_again(client: triton.InferenceServerClient) -> None:
    client.unload_model("pair", client_timeout=TIMEOUT_S)
    assert states(client)["pair"] == "UNAVAILABLE"
    assert failure(client, "pair", pair(1))[0] == "NOT_FOUND"
    client.load_model("pair", client_timeout=TIMEOUT_S)
    assert client.infer("pair", pair(1), client_timeout=TIMEOUT_S).as_numpy("total")[0] == 3


def test_a_withdrawn_chain_stays_so_when_another_is_applied(
    front: Paceline, client: triton.InferenceServerClient
) -> None:
    document = control_pb2.ChainDocument(name="twice.yaml", yaml=CHAIN)
    with front.channel() as channel:
        control = front.control(channel)
        client.unload_model("pair", client_timeout=TIMEOUT_S)
        try:
            control.Apply(control_pb2.ApplyRequest(chains=[document]), timeout=TIMEOUT_S)
            assert states(client)["pair"] == "UNAVAILABLE"
            listed = control.List(control_pb2.ListRequest(), timeout=TIMEOUT_S)
            assert [chain.name for chain in listed.chains] == ["items", "twice"]
        finally:
            client.load_model("pair", client_timeout=TIMEOUT_S)
            control.Delete(control_pb2.DeleteRequest(chain="twice"), timeout=TIMEOUT_S)
    assert client.infer("pair", pair(1), client_timeout=TIMEOUT_S).as_numpy("total")[0] == 3


def test_loading_what_cannot_be_loaded_says_so_and_changes_nothing(
    client: triton.InferenceServerClient,
) -> None:
    before = states(client)
    code, message = refused(client.load_model, "nope")
    assert code == "INTERNAL"
    assert message == "failed to load 'nope', failed to poll from model repository"
    client.unload_model("nope", client_timeout=TIMEOUT_S)
    code, message = refused(client.load_model, "broken")
    assert code == "INTERNAL"
    assert "this model does not load on purpose" in message
    assert states(client) == before
    expected = ("NOT_FOUND", "Request for unknown model: 'nope' is not found")
    assert failure(client, "nope", pair(1)) == expected


def test_a_load_cannot_bring_its_own_configuration_or_files(
    client: triton.InferenceServerClient,
) -> None:
    with pytest.raises(InferenceServerException, match="load parameter 'config'"):
        client.load_model("add", config="{}", client_timeout=TIMEOUT_S)
    with pytest.raises(InferenceServerException, match="load parameter"):
        files = {"file:1/" + "x" * 300: b"x"}
        client.load_model("add", config="{}", files=files, client_timeout=TIMEOUT_S)
    assert client.infer("add", pair(1, 1), client_timeout=TIMEOUT_S).as_numpy("sum").shape == (
        1,
        16,
    )


def test_models_that_appear_in_the_repository_can_be_loaded_and_used_by_a_new_chain(
    start_paceline: Start, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    write_timed(models, {1: 5}, "quick", max_batch_size=2)
    server: Paceline = start_paceline("--model-repository", str(models)).wait_ready()
    with server.client() as client, server.channel() as channel:
        assert states(client) == {"quick": "READY"}
        write_add(models)
        client.load_model("add", client_timeout=TIMEOUT_S)
        assert states(client) == {"quick": "READY", "add": "READY"}
        document = control_pb2.ChainDocument(name="twice.yaml", yaml=CHAIN)
        request = control_pb2.ApplyRequest(chains=[document])
        server.control(channel).Apply(request, timeout=TIMEOUT_S)
        answer = client.infer("twice", pair(21)[:1], client_timeout=TIMEOUT_S)
        assert (answer.as_numpy("double") == 42).all()
    assert server.stop() == 0


def test_a_model_whose_reload_fails_goes_on_serving_and_an_unloaded_one_is_in_no_new_chain(
    start_paceline: Start, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    write_add(models)
    server = start_paceline("--model-repository", str(models)).wait_ready()
    with server.client() as client, server.channel() as channel:
        config = models / "add" / "config.pbtxt"
        good = config.read_text(encoding="utf-8")
        config.write_text("max_batch_size: many", encoding="utf-8")
        assert refused(client.load_model, "add")[0] == "INTERNAL"
        assert states(client) == {"add": "READY"}
        assert client.infer("add", pair(1, 1), client_timeout=TIMEOUT_S).as_numpy("sum")[0][0] == 2
        config.write_text(good, encoding="utf-8")
        client.unload_model("add", client_timeout=TIMEOUT_S)
        document = control_pb2.ChainDocument(name="twice.yaml", yaml=CHAIN)
        request = control_pb2.ApplyRequest(chains=[document])
        with pytest.raises(grpc.RpcError) as caught:
            server.control(channel).Apply(request, timeout=TIMEOUT_S)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "'add', which was unloaded: load it first" in error.details()
        client.load_model("add", client_timeout=TIMEOUT_S)
        server.control(channel).Apply(request, timeout=TIMEOUT_S)
        answer = client.infer("twice", pair(21)[:1], client_timeout=TIMEOUT_S)
        assert (answer.as_numpy("double") == 42).all()
    assert server.stop() == 0
