"""Inference through a served Triton, with unmodified clients: sync, callbacks, aio, streams."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tests.integration.models import DATATYPES
from tests.integration.paceline_process import Paceline
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

pytestmark = pytest.mark.integration

TIMEOUT_S = 30.0


def tensor(name: str, array: np.ndarray[Any, Any], datatype: str = "") -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype or np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


def pair(value: int, rows: int | None = None) -> list[triton.InferInput]:
    """Inputs of `add`: a = value, b = 1; with a batch axis where `rows` is given."""
    shape = (16,) if rows is None else (rows, 16)
    a, b = np.full(shape, value, np.int32), np.ones(shape, np.int32)
    return [tensor("a", a), tensor("b", b)]


def values(datatype: str) -> np.ndarray[Any, Any]:
    """Two rows of three extreme values."""
    if datatype == "BYTES":
        return np.array([[b"", b"abc", bytes(range(256))], [b"x" * 5000, b"\0", b"y"]], np.object_)
    if datatype == "BOOL":
        return np.array([[True, False, True], [False, False, True]])
    wanted = np.dtype(triton_to_np_dtype(datatype))
    if datatype == "BF16" or wanted.kind == "f":
        return np.array([[0.5, -2.0, 1.0], [1024.0, 0.0, -0.25]], wanted)
    low, high = np.iinfo(wanted).min, np.iinfo(wanted).max
    return np.array([[low, high, 1], [0, 2, 3]], wanted)


def failure(client: triton.InferenceServerClient, *arguments: Any, **named: Any) -> tuple[str, str]:
    """Code and message of a refused request."""
    named.setdefault("client_timeout", TIMEOUT_S)
    with pytest.raises(InferenceServerException) as caught:
        client.infer(*arguments, **named)
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


@pytest.mark.parametrize("datatype", DATATYPES)
def test_a_tensor_of_every_datatype_comes_back_as_it_was_sent(
    client: triton.InferenceServerClient, datatype: str
) -> None:
    name, sent = f"x_{datatype.lower()}", values(datatype)
    answer = client.infer(
        "identity",
        [tensor(name, sent, datatype)],
        outputs=[triton.InferRequestedOutput(name)],
        client_timeout=TIMEOUT_S,
    )
    (output,) = answer.get_response().outputs
    assert (output.datatype, list(output.shape)) == (datatype, [2, 3])
    got = answer.as_numpy(name)
    assert got.dtype == sent.dtype
    assert (got == sent).all()


def test_typed_contents_are_as_good_as_raw_ones(front: Paceline) -> None:
    request = service_pb2.ModelInferRequest(model_name="add", id="typed")
    for name, value in (("a", 40), ("b", 2)):
        added = request.inputs.add(name=name, datatype="INT32", shape=[2, 16])
        added.contents.int_contents.extend([value] * 32)
    with front.channel() as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer = triton.InferResult(stub.ModelInfer(request, timeout=TIMEOUT_S))
    assert (answer.as_numpy("sum") == np.full((2, 16), 42)).all()


def test_a_request_id_is_echoed_and_one_without_gets_a_number_to_ask_with(
    front: Paceline, client: triton.InferenceServerClient
) -> None:
    answer = client.infer("add", pair(1, 1), request_id="mine", client_timeout=TIMEOUT_S)
    assert answer.get_response().id == "mine"
    request = service_pb2.ModelInferRequest(model_name="add")
    for part in pair(1, 1):
        request.inputs.append(part._get_tensor())
        request.raw_input_contents.append(part._get_content())
    with front.channel() as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        response, call = stub.ModelInfer.with_call(request, timeout=TIMEOUT_S)
    assert response.id == ""
    metadata = dict(call.trailing_metadata())
    assert metadata["paceline-request-id"].isdigit()


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_model_called_by_its_own_name_takes_batched_requests(
    client: triton.InferenceServerClient, rows: int
) -> None:
    a = np.arange(rows * 16, dtype=np.int32).reshape(rows, 16)
    inputs = [tensor("a", a), tensor("b", np.full_like(a, 100))]
    answer = client.infer("add", inputs, client_timeout=TIMEOUT_S)
    assert (answer.as_numpy("sum") == a + 100).all()


@pytest.mark.parametrize("rows", [9, 19, 32])
def test_a_request_larger_than_a_batch_is_split_and_comes_back_in_order(
    front: Paceline, client: triton.InferenceServerClient, rows: int
) -> None:
    a = np.arange(rows * 16, dtype=np.int32).reshape(rows, 16)
    b = np.full_like(a, 1000)
    name = f"rows-{rows}"
    given = [tensor("a", a), tensor("b", b)]
    answer = client.infer("add", given, request_id=name, client_timeout=TIMEOUT_S)
    assert (answer.as_numpy("sum") == a + b).all()
    with front.channel() as channel:
        spans = explained(front, channel, name)
    assert sum(span.rows for span in spans) == rows
    assert max(span.batch_size for span in spans) <= 8
    texts = np.array([[f"text {row}".encode()] for row in range(rows)], np.object_)
    answer = client.infer(
        "identity",
        [tensor("x_bytes", texts)],
        outputs=[triton.InferRequestedOutput("x_bytes")],
        client_timeout=TIMEOUT_S,
    )
    assert answer.as_numpy("x_bytes").tolist() == texts.tolist()


def test_a_model_without_batch_axis_takes_tensors_as_they_are(
    client: triton.InferenceServerClient,
) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    answer = client.infer("transpose", [tensor("x", x)], client_timeout=TIMEOUT_S)
    assert (answer.as_numpy("y") == x.T).all()


def test_a_chain_gives_its_outputs_or_those_asked_for(
    client: triton.InferenceServerClient,
) -> None:
    answer = client.infer("pair", pair(40), client_timeout=TIMEOUT_S)
    assert [output.name for output in answer.get_response().outputs] == ["total", "part"]
    assert (answer.as_numpy("total") == 42).all() and (answer.as_numpy("part") == 41).all()
    only = client.infer(
        "pair",
        pair(40),
        outputs=[triton.InferRequestedOutput("part")],
        client_timeout=TIMEOUT_S,
    )
    assert [output.name for output in only.get_response().outputs] == ["part"]


def test_callbacks_each_get_the_answer_to_their_request(
    client: triton.InferenceServerClient,
) -> None:
    done: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    for number in range(20):

        def finished(result: Any, error: Any, number: int = number) -> None:
            done.put((number, result, error))

        client.async_infer("pair", pair(number), finished, client_timeout=TIMEOUT_S)
    for _ in range(20):
        number, result, error = done.get(timeout=TIMEOUT_S)
        assert error is None
        assert (result.as_numpy("total") == number + 2).all()


async def test_the_aio_client_has_many_requests_under_way(front: Paceline) -> None:
    async with triton_aio.InferenceServerClient(front.address) as client:
        answers = await asyncio.gather(
            *(
                client.infer("pair", pair(n), request_id=f"aio-{n}", client_timeout=TIMEOUT_S)
                for n in range(40)
            )
        )
    for number, answer in enumerate(answers):
        assert answer.get_response().id == f"aio-{number}"
        assert (answer.as_numpy("total") == number + 2).all()


async def test_a_stream_has_several_requests_of_a_chain_in_flight(front: Paceline) -> None:
    """All are sent before the first answer is read; a refused one does not end the stream."""

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for number in range(12):
            name = "no-such-chain" if number == 5 else "pair"
            yield {"model_name": name, "inputs": pair(number), "request_id": f"s-{number}"}

    totals: dict[str, int] = {}
    errors: list[str] = []
    async with triton_aio.InferenceServerClient(front.address) as client:
        stream = client.stream_infer(requests(), stream_timeout=TIMEOUT_S)
        async for result, error in stream:
            if error is not None:
                errors.append(error.message())
                continue
            totals[result.get_response().id] = int(result.as_numpy("total")[0])
    assert totals == {f"s-{n}": n + 2 for n in range(12) if n != 5}
    assert errors == ["Request for unknown model: 'no-such-chain' is not found"]


def test_a_stream_of_the_sync_client_answers_through_its_callback(
    client: triton.InferenceServerClient,
) -> None:
    done: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: done.put((result, error)))
    for number in range(8):
        client.async_stream_infer("pair", pair(number), request_id=str(number))
    answers = [done.get(timeout=TIMEOUT_S) for _ in range(8)]
    client.stop_stream()
    assert all(error is None for _, error in answers)
    totals = {r.get_response().id: int(r.as_numpy("total")[0]) for r, _ in answers}
    assert totals == {str(number): number + 2 for number in range(8)}


async def test_items_of_different_requests_share_a_batch(front: Paceline) -> None:
    """While the first request's batch runs, the others' items come together in the queue."""
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    async with triton_aio.InferenceServerClient(front.address) as client:
        answers = await asyncio.gather(
            *(
                client.infer(
                    "items", [tensor("x", x + n)], request_id=f"it-{n}", client_timeout=TIMEOUT_S
                )
                for n in range(5)
            )
        )
    for number, answer in enumerate(answers):
        assert (answer.as_numpy("y") == x + number).all()
    with front.channel() as channel:
        spans = [explained(front, channel, f"it-{number}") for number in range(5)]
    assert all(sum(span.rows for span in of) == 2 for of in spans)
    assert any(span.batch_size > span.rows for of in spans for span in of)


def explained(front: Paceline, channel: grpc.Channel, request_id: str) -> Any:
    from paceline.v1 import control_pb2

    request = control_pb2.ExplainRequest(request_id=request_id)
    return front.control(channel).Explain(request, timeout=TIMEOUT_S).spans


def test_no_items_is_an_answer_with_no_rows(client: triton.InferenceServerClient) -> None:
    nothing = np.zeros((0, 4), np.float32)
    answer = client.infer("items", [tensor("x", nothing)], client_timeout=TIMEOUT_S)
    (output,) = answer.get_response().outputs
    assert (output.name, list(output.shape)) == ("y", [0, 4])


def test_bad_requests_get_tritons_code_and_words(client: triton.InferenceServerClient) -> None:
    unnamed = "[request id: <id_unknown>] "
    wrong_type = [tensor("a", np.zeros((1, 16), np.float32)), pair(1, 1)[1]]
    wrong_shape = [tensor("a", np.zeros((1, 15), np.int32)), pair(1, 1)[1]]
    uneven = [pair(1, 2)[0], pair(1, 1)[1]]
    cases: list[tuple[str, list[Any], str, str]] = [
        ("nope", pair(1), "NOT_FOUND", "Request for unknown model: 'nope' is not found"),
        (
            "add",
            wrong_type,
            "INVALID_ARGUMENT",
            f"{unnamed}inference input 'a' data-type is 'FP32', but model 'add' expects 'INT32'",
        ),
        (
            "add",
            wrong_shape,
            "INVALID_ARGUMENT",
            f"{unnamed}unexpected shape for input 'a' for model 'add'. Expected [-1,16], got "
            "[1,15]. ",
        ),
        (
            "add",
            pair(1, 4097),
            "INVALID_ARGUMENT",
            f"{unnamed}inference request batch-size must be <= 4096 for 'add'",
        ),
        (
            "add",
            uneven,
            "INVALID_ARGUMENT",
            f"{unnamed}input 'b' batch size does not match other inputs for 'add'",
        ),
        (
            "add",
            pair(1, 1)[:1],
            "INVALID_ARGUMENT",
            f"{unnamed}expected 2 inputs but got 1 inputs for model 'add'. Got input(s) ['a'], but "
            "missing required input(s) ['b']. Please provide all required input(s).",
        ),
        (
            "pair",
            pair(1, 1),
            "INVALID_ARGUMENT",
            f"{unnamed}unexpected shape for input 'a' for model 'pair'. Expected [16], got [1,16].",
        ),
        (
            "broken",
            [tensor("x", np.zeros((1, 4), np.float32))],
            "NOT_FOUND",
            "Request for unknown model: 'broken' has no available versions",
        ),
        (
            "failing",
            [tensor("x", np.zeros((1, 4), np.float32))],
            "INVALID_ARGUMENT",
            "deliberate failure",
        ),
    ]
    for model, inputs, code, message in cases:
        got = failure(client, model, inputs)
        assert got[0] == code, (model, got)
        assert got[1].startswith(message), (model, got)
    assert failure(client, "add", pair(1, 1), model_version="7") == (
        "NOT_FOUND",
        "Request for unknown model: 'add' version 7 is not found",
    )


def test_bytes_that_do_not_fill_the_shape_are_refused(front: Paceline) -> None:
    request = service_pb2.ModelInferRequest(model_name="add", raw_input_contents=[bytes(64)] * 2)
    for name in ("a", "b"):
        request.inputs.add(name=name, datatype="INT32", shape=[1, 16])
    request.raw_input_contents[0] = bytes(60)
    with front.channel() as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request, timeout=TIMEOUT_S)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "input byte size mismatch for input 'a'" in error.details()
    assert "Expected 64, got 60" in error.details()


def items_request(rows: int, slo_ms: int) -> Any:
    request = service_pb2.ModelInferRequest(model_name="items")
    request.inputs.add(name="x", datatype="FP32", shape=[rows, 4])
    request.raw_input_contents.append(bytes(16 * rows))
    request.parameters["slo_ms"].int64_param = slo_ms
    return request


def test_an_objective_that_cannot_be_met_says_by_how_much(front: Paceline) -> None:
    """`slow` takes 80 ms: with 20 ms left the request is refused before it costs anything."""
    request = items_request(1, slo_ms=20)
    with front.channel() as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request, timeout=TIMEOUT_S)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    metadata = dict(error.trailing_metadata())
    assert metadata["paceline-reason"] == "deadline"
    assert 50 < float(metadata["paceline-shortfall-ms"]) < 10_000
    assert "module 'each'" in error.details()


def test_what_an_overload_refuses_is_told_when_to_try_again(front: Paceline) -> None:
    """256 rows at once, for a model that takes 4 in 80 ms, and half a second for each request."""
    request = items_request(4, slo_ms=500)
    with front.channel() as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        calls = [stub.ModelInfer.future(request, timeout=TIMEOUT_S) for _ in range(64)]
        ended = [(call.code(), dict(call.trailing_metadata())) for call in calls]
    refused = [told for code, told in ended if code is grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert refused and any(code is grpc.StatusCode.OK for code, _ in ended)
    for told in refused:
        assert told["paceline-reason"] == "overloaded"
        assert int(told["retry-after-ms"]) > 0 and float(told["paceline-shortfall-ms"]) > 0


@pytest.mark.parametrize(
    ("parameter", "value"), [("slo_ms", "soon"), ("slo_ms", -1), ("slo_ms", 0), ("sequence_id", 7)]
)
def test_parameters_that_make_no_sense_are_refused(
    client: triton.InferenceServerClient, parameter: str, value: Any
) -> None:
    if parameter == "sequence_id":
        code, message = failure(client, "add", pair(1, 1), sequence_id=value)
        assert code == "UNIMPLEMENTED"
    else:
        code, message = failure(client, "add", pair(1, 1), parameters={parameter: value})
        assert code == "INVALID_ARGUMENT"
    assert parameter in message
