"""KServe v2 over a real gRPC connection, with unmodified Triton clients, in front of fakes."""

from __future__ import annotations

import asyncio
import queue
import struct
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tests.fakes import OCR, FakeControl, FakeInference
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from paceline.core.chain import Chain
from paceline.core.errors import BackendError, ErrorKind, Rejected, RequestError
from paceline.core.ports import ModelStatistics
from paceline.core.tensor import DATATYPES, ITEM_BYTES, encode_bytes
from paceline.rpc.server import RpcServer, start_grpc
from paceline.rpc.status import CODES

A_BYTES = bytes(64)
B_BYTES = encode_bytes([b"a", b"bc"])


class Stand:
    """A server over fakes and a stub that talks to it."""

    def __init__(self, server: RpcServer, control: FakeControl, inference: FakeInference) -> None:
        self.server = server
        self.control = control
        self.inference = inference
        self.address = f"127.0.0.1:{server.port}"
        self.channel = grpc.aio.insecure_channel(self.address)
        self.stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    async def failure(self, request: Any) -> tuple[grpc.StatusCode, str]:
        """Code and message with which ModelInfer refuses `request`."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.stub.ModelInfer(request)
        return caught.value.code(), caught.value.details() or ""


def no_chains(text: str, *, name: str) -> Chain:
    raise AssertionError("inference reads no chain files")


@pytest_asyncio.fixture
async def stand() -> AsyncIterator[Stand]:
    control = FakeControl()
    inference = FakeInference(control)
    server = await start_grpc(inference, control, parse_chain=no_chains, port=0)
    made = Stand(server, control, inference)
    yield made
    await made.channel.close(None)
    await server.stop(None)


def request(
    model: str = "x",
    a: tuple[str, str, list[int]] | None = ("A", "INT32", [1, 16]),
    b: tuple[str, str, list[int]] | None = ("B", "BYTES", [1, 2]),
    raw: tuple[bytes, ...] = (A_BYTES, B_BYTES),
    **fields: Any,
) -> Any:
    message = service_pb2.ModelInferRequest(model_name=model, **fields)
    for tensor in (a, b):
        if tensor is not None:
            message.inputs.add(name=tensor[0], datatype=tensor[1], shape=tensor[2])
    message.raw_input_contents.extend(raw)
    return message


def echo(datatype: str, shape: list[int], raw: bytes) -> Any:
    message = service_pb2.ModelInferRequest(model_name=f"echo_{datatype.lower()}")
    message.inputs.add(name="in", datatype=datatype, shape=shape)
    message.raw_input_contents.append(raw)
    return message


def with_parameter(kind: str, name: str, value: Any) -> Any:
    message = request()
    setattr(message.parameters[name], kind, value)
    return message


NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be "
    "prepended to each input shape. If you want to specify the full shape including the batch dim "
    "in your input dims config, try setting max_batch_size to zero. See the model configuration "
    "docs for more info on max_batch_size."
)
ANON = "[request id: <id_unknown>] "

# What tritonserver 2.51.0 answered to the same requests for the same models.
TRITON_ERRORS: dict[str, tuple[Any, str, str]] = {
    "unknown model": (
        request("nope"),
        "NOT_FOUND",
        "Request for unknown model: 'nope' is not found",
    ),
    "unknown version": (
        request(model_version="7"),
        "NOT_FOUND",
        "Request for unknown model: 'x' version 7 is not found",
    ),
    "version that is no number": (
        request(model_version="abc"),
        "INVALID_ARGUMENT",
        "failed to get model version from specified version string 'abc' (details: stol), "
        "version should be an integral value > 0",
    ),
    "negative version": (
        request(model_version="-1"),
        "INVALID_ARGUMENT",
        "invalid model version specified '-1' , version should be an integral value > 0",
    ),
    "missing input": (
        request(b=None, raw=(A_BYTES,)),
        "INVALID_ARGUMENT",
        f"{ANON}expected 2 inputs but got 1 inputs for model 'x'. Got input(s) ['A'], but "
        "missing required input(s) ['B']. Please provide all required input(s).",
    ),
    "missing input, with an id": (
        request(b=None, raw=(A_BYTES,), id="r1"),
        "INVALID_ARGUMENT",
        "[request id: r1] expected 2 inputs but got 1 inputs for model 'x'. Got input(s) ['A'], "
        "but missing required input(s) ['B']. Please provide all required input(s).",
    ),
    "no inputs": (
        request(a=None, b=None, raw=()),
        "INVALID_ARGUMENT",
        f"{ANON}expected 2 inputs but got 0 inputs for model 'x'. Got input(s) [], but "
        "missing required input(s) ['A','B']. Please provide all required input(s).",
    ),
    "unexpected input": (
        request(a=("Z", "INT32", [1, 16])),
        "INVALID_ARGUMENT",
        "unexpected inference input 'Z' for model 'x'",
    ),
    "datatype": (
        request(a=("A", "FP32", [1, 16])),
        "INVALID_ARGUMENT",
        f"{ANON}inference input 'A' data-type is 'FP32', but model 'x' expects 'INT32'",
    ),
    "datatype that does not exist": (
        request(a=("A", "FOO", [1, 16])),
        "INVALID_ARGUMENT",
        f"{ANON}inference input 'A' data-type is '<invalid>', but model 'x' expects 'INT32'",
    ),
    "shape": (
        request(a=("A", "INT32", [1, 15]), raw=(bytes(60), B_BYTES)),
        "INVALID_ARGUMENT",
        f"{ANON}unexpected shape for input 'A' for model 'x'. Expected [-1,16], got [1,15]. {NOTE}",
    ),
    "shape without a batch axis": (
        request("n", ("A", "INT32", [15]), ("B", "BYTES", [2]), (bytes(60), B_BYTES)),
        "INVALID_ARGUMENT",
        f"{ANON}unexpected shape for input 'A' for model 'n'. Expected [16], got [15]. ",
    ),
    "no batch axis": (
        request(a=("A", "INT32", [])),
        "INVALID_ARGUMENT",
        f"{ANON}input 'A' has no shape but model requires batch dimension for 'x'",
    ),
    "byte size": (
        request(raw=(bytes(60), B_BYTES)),
        "INVALID_ARGUMENT",
        f"{ANON}input byte size mismatch for input 'A' for model 'x'. Expected 64, got 60",
    ),
    "string cut off": (
        request(raw=(A_BYTES, B_BYTES[:-2])),
        "INVALID_ARGUMENT",
        "incomplete string data for inference input 'B', expecting string of length 2 but only "
        "0 bytes available",
    ),
    "string length cut off": (
        request(raw=(A_BYTES, B_BYTES[:-4])),
        "INVALID_ARGUMENT",
        f"{ANON}incomplete string length indicator for inference input 'B' for model 'x', "
        "expecting 4 bytes but only 2 bytes available. Please make sure the string length "
        "indicator is in one buffer.",
    ),
    "too many strings": (
        request(raw=(A_BYTES, B_BYTES + encode_bytes([b"!"]))),
        "INVALID_ARGUMENT",
        f"{ANON}unexpected number of string elements 3 for inference input 'B' for model 'x', "
        "expecting 2",
    ),
    "too little raw data": (
        request(raw=(A_BYTES,)),
        "INVALID_ARGUMENT",
        "unable to find data for input tensor 'B' for model 'x' in request.",
    ),
    "no data": (
        request(raw=()),
        "INVALID_ARGUMENT",
        "unable to find data for input tensor 'A' for model 'x' in request.",
    ),
    "priority of a wrong type": (
        with_parameter("string_param", "priority", "1"),
        "INVALID_ARGUMENT",
        "invalid value type for 'priority' parameter, expected int64_param or uint64_param.",
    ),
    "negative priority": (
        with_parameter("int64_param", "priority", -1),
        "INVALID_ARGUMENT",
        "invalid value for 'priority', expected value >= 0.",
    ),
    "timeout of a wrong type": (
        with_parameter("string_param", "timeout", "a"),
        "INVALID_ARGUMENT",
        "invalid value type for 'timeout' parameter, expected int64_param.",
    ),
}


@pytest.mark.parametrize("case", TRITON_ERRORS)
async def test_a_bad_request_is_refused_with_the_code_and_message_of_triton(
    stand: Stand, case: str
) -> None:
    message, code, details = TRITON_ERRORS[case]
    assert await stand.failure(message) == (grpc.StatusCode[code], details)
    assert stand.inference.requests == []


async def test_an_input_given_twice_or_beyond_the_declared_ones_is_refused(stand: Stand) -> None:
    twice = request()
    twice.inputs.add(name="A", datatype="INT32", shape=[1, 16])
    twice.raw_input_contents.append(A_BYTES)
    assert await stand.failure(twice) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{ANON}input 'A' already exists in request",
    )
    more = request()
    more.inputs.add(name="Z", datatype="INT32", shape=[1, 16])
    more.raw_input_contents.append(A_BYTES)
    assert await stand.failure(more) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "unexpected inference input 'Z' for model 'x'",
    )
    code, details = await stand.failure(request(raw=(A_BYTES, B_BYTES, b"")))
    assert (code.name, details) == (
        "INVALID_ARGUMENT",
        "3 raw_input_contents for 2 inputs of model 'x'",
    )


async def test_negative_axes_and_unequal_or_empty_batches_are_refused(stand: Stand) -> None:
    shape = request("n", ("A", "INT32", [-1]), ("B", "BYTES", [2]))
    assert (await stand.failure(shape))[1].endswith("Expected [16], got [-1]. ")
    unequal = request(a=("A", "INT32", [2, 16]), raw=(A_BYTES * 2, B_BYTES))
    assert "batch size does not match other inputs for 'x'" in (await stand.failure(unequal))[1]
    empty = request(a=("A", "INT32", [0, 16]), b=("B", "BYTES", [0, 2]), raw=(b"", b""))
    assert "batch-size must be >= 1" in (await stand.failure(empty))[1]


async def test_more_rows_than_a_batch_takes_are_accepted_up_to_a_limit_with_tritons_words(
    stand: Stand,
) -> None:
    def rows(count: int) -> Any:
        a, b = ("A", "INT32", [count, 16]), ("B", "BYTES", [count, 2])
        return request(a=a, b=b, raw=(A_BYTES * count, B_BYTES * count))

    await stand.stub.ModelInfer(rows(9))
    await stand.stub.ModelInfer(rows(4096))
    assert [given.inputs[0].shape[0] for given in stand.inference.requests] == [9, 4096]
    assert await stand.failure(rows(4097)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{ANON}inference request batch-size must be <= 4096 for 'x'",
    )


async def test_raw_and_typed_contents_together_are_refused_as_triton_does(stand: Stand) -> None:
    message = request()
    message.inputs[0].contents.int_contents.extend([0] * 16)
    assert await stand.failure(message) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "contents field must not be specified when using raw_input_contents for 'A' for model 'x'",
    )


async def test_a_model_that_is_not_loaded_has_no_available_versions(stand: Stand) -> None:
    stand.control.not_ready.add("x")
    assert await stand.failure(request()) == (
        grpc.StatusCode.NOT_FOUND,
        "Request for unknown model: 'x' has no available versions",
    )


async def test_outputs_that_do_not_exist_or_ask_for_what_is_not_offered_are_refused(
    stand: Stand,
) -> None:
    unknown = request()
    unknown.outputs.add(name="Q")
    assert await stand.failure(unknown) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "unexpected inference output 'Q' for model 'x'",
    )
    ranked = request()
    ranked.outputs.add(name="C").parameters["classification"].int64_param = 3
    code, details = await stand.failure(ranked)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "'classification'" in details
    shared = request()
    shared.outputs.add(name="C").parameters["shared_memory_region"].string_param = "r"
    code, details = await stand.failure(shared)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "shared memory" in details
    shared = request(raw=())
    shared.inputs[0].parameters["shared_memory_region"].string_param = "r"
    code, details = await stand.failure(shared)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "tensor 'A': shared memory" in details


TYPED: dict[str, tuple[str, list[Any], str]] = {
    "BOOL": ("bool_contents", [True, False], "<2?"),
    "INT8": ("int_contents", [-128, 127], "<2b"),
    "INT16": ("int_contents", [-32768, 32767], "<2h"),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1], "<2i"),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1], "<2q"),
    "UINT8": ("uint_contents", [0, 255], "<2B"),
    "UINT16": ("uint_contents", [0, 65535], "<2H"),
    "UINT32": ("uint_contents", [0, 2**32 - 1], "<2I"),
    "UINT64": ("uint64_contents", [0, 2**64 - 1], "<2Q"),
    "FP32": ("fp32_contents", [0.5, -1.25], "<2f"),
    "FP64": ("fp64_contents", [0.1, -1e300], "<2d"),
}


@pytest.mark.parametrize("datatype", TYPED)
async def test_typed_contents_become_the_bytes_of_their_datatype(
    stand: Stand, datatype: str
) -> None:
    field, values, layout = TYPED[datatype]
    message = service_pb2.ModelInferRequest(model_name=f"echo_{datatype.lower()}")
    tensor = message.inputs.add(name="in", datatype=datatype, shape=[2])
    getattr(tensor.contents, field).extend(values)
    answer = await stand.stub.ModelInfer(message)
    assert list(answer.raw_output_contents) == [struct.pack(layout, *values)]


async def test_typed_strings_become_length_prefixed_bytes(stand: Stand) -> None:
    message = service_pb2.ModelInferRequest(model_name="echo_bytes")
    tensor = message.inputs.add(name="in", datatype="BYTES", shape=[3])
    tensor.contents.bytes_contents.extend([b"", b"\x00\xff", "ö".encode()])
    answer = await stand.stub.ModelInfer(message)
    assert list(answer.raw_output_contents) == [encode_bytes([b"", b"\x00\xff", "ö".encode()])]


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
async def test_half_precision_has_no_typed_contents(stand: Stand, datatype: str) -> None:
    model = f"echo_{datatype.lower()}"
    message = service_pb2.ModelInferRequest(model_name=model)
    message.inputs.add(name="in", datatype=datatype, shape=[1]).contents.fp32_contents.append(1.0)
    assert await stand.failure(message) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"unexpected explicit tensor data for input tensor 'in' for model '{model}' of type "
        f"'FP32', expected datatype '{datatype}'",
    )


async def test_typed_contents_of_another_datatype_or_out_of_range_are_refused(
    stand: Stand,
) -> None:
    message = service_pb2.ModelInferRequest(model_name="echo_int8")
    tensor = message.inputs.add(name="in", datatype="INT8", shape=[1])
    tensor.contents.fp32_contents.append(1.0)
    assert (await stand.failure(message))[1] == (
        "unexpected explicit tensor data for input tensor 'in' for model 'echo_int8' of type "
        "'FP32', expected datatype 'INT8'"
    )
    tensor.contents.Clear()
    tensor.contents.int_contents.append(128)
    assert (await stand.failure(message))[1] == (
        "explicit tensor data for input tensor 'in' for model 'echo_int8' has a value outside "
        "the range of INT8"
    )


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
async def test_raw_contents_of_every_datatype_come_back_unchanged(
    stand: Stand, datatype: str
) -> None:
    raw = (
        bytes(range(3 * ITEM_BYTES[datatype])) if datatype != "BYTES" else encode_bytes([b"x"] * 3)
    )
    answer = await stand.stub.ModelInfer(echo(datatype, [3], raw))
    assert [(o.name, o.datatype, list(o.shape)) for o in answer.outputs] == [("out", datatype, [3])]
    assert list(answer.raw_output_contents) == [raw]


async def test_tensors_without_elements_are_served(stand: Stand) -> None:
    answer = await stand.stub.ModelInfer(echo("FP32", [0], b""))
    assert (list(answer.outputs[0].shape), list(answer.raw_output_contents)) == ([0], [b""])
    typed = service_pb2.ModelInferRequest(model_name="echo_fp32")
    typed.inputs.add(name="in", datatype="FP32", shape=[0])
    assert list((await stand.stub.ModelInfer(typed)).raw_output_contents) == [b""]


async def test_the_requested_outputs_come_in_the_requested_order_and_the_id_is_echoed(
    stand: Stand,
) -> None:
    message = request(id="mine", model_version="1")
    for name in ("D", "C", "D"):
        message.outputs.add(name=name)
    answer = await stand.stub.ModelInfer(message)
    assert (answer.id, answer.model_name, answer.model_version) == ("mine", "x", "1")
    assert [output.name for output in answer.outputs] == ["D", "C"]
    assert stand.inference.requests[0].outputs == ("D", "C")


async def test_optional_inputs_may_be_left_out(stand: Stand) -> None:
    message = service_pb2.ModelInferRequest(model_name="sometimes")
    message.inputs.add(name="A", datatype="INT32", shape=[2])
    message.raw_input_contents.append(bytes(8))
    assert (await stand.stub.ModelInfer(message)).outputs[0].name == "C"


async def test_the_budget_is_the_tightest_of_deadline_slo_and_timeout(stand: Stand) -> None:
    message = request()
    message.parameters["slo_ms"].double_param = 250.5
    message.parameters["timeout"].int64_param = 300_000
    await stand.stub.ModelInfer(message)
    await stand.stub.ModelInfer(with_parameter("int64_param", "timeout", 1_500))
    await stand.stub.ModelInfer(with_parameter("int64_param", "slo_ms", 90_000), timeout=20)
    await stand.stub.ModelInfer(with_parameter("int64_param", "timeout", 0))
    budgets = [asked.budget_s for asked in stand.inference.requests]
    assert budgets[:2] == [0.2505, 0.0015]
    assert budgets[2] is not None and 0 < budgets[2] < 90
    assert budgets[3] is None


async def test_only_the_models_own_parameters_are_forwarded(stand: Stand) -> None:
    message = request()
    message.parameters["temperature"].double_param = 0.5
    message.parameters["mode"].string_param = "fast"
    message.parameters["flag"].bool_param = False
    message.parameters["n"].int64_param = -3
    message.parameters["headers"].string_param = "x"
    message.parameters["binary_data_output"].bool_param = True
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    message.parameters["sequence_start"].bool_param = False
    message.parameters["priority"].uint64_param = 3
    await stand.stub.ModelInfer(message)
    (asked,) = stand.inference.requests
    assert asked.parameters == {"temperature": 0.5, "mode": "fast", "flag": False, "n": -3}
    assert asked.priority == 3


@pytest.mark.parametrize(
    ("kind", "name", "value", "code", "says"),
    [
        ("int64_param", "slo_ms", 0, "INVALID_ARGUMENT", "'slo_ms', expected value > 0"),
        ("double_param", "slo_ms", float("nan"), "INVALID_ARGUMENT", "'slo_ms'"),
        ("bool_param", "slo_ms", True, "INVALID_ARGUMENT", "'slo_ms' parameter"),
        ("int64_param", "timeout", -1, "INVALID_ARGUMENT", "'timeout', expected value >= 0"),
        ("int64_param", "sequence_id", 3, "UNIMPLEMENTED", "'sequence_id'"),
        ("string_param", "sequence_id", "s", "UNIMPLEMENTED", "'sequence_id'"),
        ("bool_param", "sequence_start", True, "UNIMPLEMENTED", "'sequence_start'"),
    ],
)
async def test_a_parameter_with_a_bad_value_is_named(
    stand: Stand, kind: str, name: str, value: Any, code: str, says: str
) -> None:
    got, details = await stand.failure(with_parameter(kind, name, value))
    assert got.name == code
    assert says in details


async def test_a_parameter_without_a_value_is_named(stand: Stand) -> None:
    message = request()
    message.parameters["odd"].SetInParent()
    assert await stand.failure(message) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "parameter 'odd' has no value",
    )


def test_every_kind_of_failure_has_a_code() -> None:
    assert set(CODES) == set(ErrorKind)


def raised_by_the_service(error: Exception) -> bool:
    """Then its frames hold it, and it them: a cycle for the garbage collector, of each refusal."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).name == "service.py" for frame in frames)


async def test_a_rejection_says_why_and_by_how_much_in_its_metadata(stand: Stand) -> None:
    stand.inference.failure = Rejected(ErrorKind.DEADLINE, "too late", shortfall_s=0.0125)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stand.stub.ModelInfer(request())
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    metadata: dict[Any, Any] = dict(caught.value.trailing_metadata())  # type: ignore[arg-type]
    assert metadata["paceline-reason"] == "deadline"
    assert metadata["paceline-shortfall-ms"] == "12.500"
    assert not raised_by_the_service(stand.inference.failure)


async def test_a_rejection_on_a_stream_says_it_in_the_parameters_of_its_response(
    stand: Stand,
) -> None:
    stand.inference.failure = Rejected(
        ErrorKind.OVERLOADED, "too much", shortfall_s=0.0125, retry_after_s=0.0301
    )
    call = stand.stub.ModelStreamInfer(iter([request(id="7")]))
    (answer,) = [response async for response in call]
    assert (answer.error_message, answer.infer_response.id) == ("too much", "7")
    told = {key: one.string_param for key, one in answer.infer_response.parameters.items()}
    assert told == {
        "paceline-reason": "overloaded",
        "paceline-shortfall-ms": "12.500",
        "retry-after-ms": "31",
    }
    assert not raised_by_the_service(stand.inference.failure)


async def test_failures_of_triton_and_our_own_bugs_are_internal_errors(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    stand.inference.failure = BackendError("Stub process 'x_0' is not healthy.")
    assert await stand.failure(request()) == (
        grpc.StatusCode.INTERNAL,
        "Stub process 'x_0' is not healthy.",
    )
    assert caplog.records == []
    stand.inference.failure = ZeroDivisionError("secret")
    code, details = await stand.failure(request())
    assert code is grpc.StatusCode.INTERNAL
    assert "ZeroDivisionError" in details and "secret" not in details
    assert [record.exc_info is not None for record in caplog.records] == [True]


async def test_a_very_long_message_is_cut_so_that_it_still_arrives(stand: Stand) -> None:
    stand.inference.failure = RequestError(ErrorKind.INVALID, "x" * 100_000)
    code, details = await stand.failure(request())
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert len(details) < 5_000


async def test_a_request_without_an_id_learns_its_number_for_explain(stand: Stand) -> None:
    call = stand.stub.ModelInfer(request())
    await call
    metadata = dict(await call.trailing_metadata())
    assert stand.control.explain(metadata["paceline-request-id"]) is not None
    named = stand.stub.ModelInfer(request(id="mine"))
    await named
    assert "paceline-request-id" not in dict(await named.trailing_metadata())


async def test_a_client_that_cancels_or_runs_out_of_time_cancels_its_request(
    stand: Stand,
) -> None:
    stand.inference.gate.clear()
    call = stand.stub.ModelInfer(request())
    await stand.inference.until_waiting(1)
    call.cancel()
    await stand.inference.until_waiting(0)
    assert stand.inference.cancelled == 1
    code, _ = await _timed_out(stand)
    await stand.inference.until_waiting(0)
    assert (code, stand.inference.cancelled) == (grpc.StatusCode.DEADLINE_EXCEEDED, 2)


async def _timed_out(stand: Stand) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stand.stub.ModelInfer(request(), timeout=0.05)
    return caught.value.code(), caught.value.details() or ""


# Unmodified clients


def triton_inputs(module: Any) -> list[Any]:
    a = module.InferInput("A", [1, 16], "INT32")
    a.set_data_from_numpy(np.arange(16, dtype=np.int32).reshape(1, 16))
    b = module.InferInput("B", [1, 2], "BYTES")
    b.set_data_from_numpy(np.array([[b"hello", "wörld".encode()]], dtype=np.object_))
    return [a, b]


async def test_the_synchronous_triton_client_and_its_callbacks_are_served(stand: Stand) -> None:
    got: queue.Queue[Any] = queue.Queue()

    def keep(result: Any, error: Any) -> None:
        got.put(error or result.as_numpy("C").sum())

    def use() -> None:
        with triton.InferenceServerClient(stand.address) as client:
            assert client.is_server_live() and client.is_server_ready()
            assert client.is_model_ready("x") and not client.is_model_ready("nope")
            result = client.infer("x", triton_inputs(triton), request_id="one", timeout=10**6)
            assert result.as_numpy("C").tolist() == [list(range(16))]
            assert result.as_numpy("D").tolist() == [[b"hello", "wörld".encode()]]
            assert result.get_response().id == "one"
            for _ in range(8):
                client.async_infer("x", triton_inputs(triton), keep)
            assert [got.get(timeout=10) for _ in range(8)] == [120] * 8
            with pytest.raises(InferenceServerException, match="unexpected inference output 'Q'"):
                client.infer("x", triton_inputs(triton), outputs=[triton.InferRequestedOutput("Q")])

    await asyncio.to_thread(use)
    assert stand.inference.requests[0].budget_s == 1.0


async def test_the_asyncio_triton_client_is_served(stand: Stand) -> None:
    async with triton_aio.InferenceServerClient(stand.address) as client:
        inputs = triton_inputs(triton_aio)
        outputs = [triton_aio.InferRequestedOutput("D")]
        result = await client.infer("x", inputs, outputs=outputs, parameters={"slo_ms": 40})
        assert result.as_numpy("D").tolist() == [[b"hello", "wörld".encode()]]
        assert result.as_numpy("C") is None
        metadata = await client.get_server_metadata()
        assert metadata.name == "paceline"
    assert stand.inference.requests[0].budget_s == 0.04


async def test_a_stream_of_the_triton_client_gets_every_answer_and_error_with_its_id(
    stand: Stand,
) -> None:
    got: list[tuple[Any, Any]] = []

    def use() -> None:
        with triton.InferenceServerClient(stand.address) as client:
            client.start_stream(lambda result, error: got.append((result, error)))
            for index in range(100):
                client.async_stream_infer("x", triton_inputs(triton), request_id=str(index))
            client.async_stream_infer("nope", triton_inputs(triton), request_id="bad")
            client.stop_stream()

    await asyncio.to_thread(use)
    answered = sorted(int(result.get_response().id) for result, error in got if error is None)
    assert answered == list(range(100))
    (error,) = (error for _, error in got if error is not None)
    assert error.message() == "Request for unknown model: 'nope' is not found"


async def test_a_stream_serves_at_most_64_requests_at_once_and_answers_them_as_they_finish(
    stand: Stand,
) -> None:
    stand.inference.gate.clear()
    call = stand.stub.ModelStreamInfer(iter([request(id=str(i)) for i in range(80)]))
    await stand.inference.until_waiting(64)
    stand.inference.gate.set()
    ids = {response.infer_response.id async for response in call}
    assert ids == {str(i) for i in range(80)}
    assert stand.inference.waiting_most == 64


async def test_errors_on_a_stream_leave_it_open_and_carry_the_request_id(stand: Stand) -> None:
    call = stand.stub.ModelStreamInfer()
    await call.write(request("nope", id="7"))
    first = await call.read()
    assert first.error_message == "Request for unknown model: 'nope' is not found"
    assert first.infer_response.id == "7"
    await call.write(request(id="8"))
    second = await call.read()
    assert (second.error_message, second.infer_response.id) == ("", "8")
    await call.done_writing()
    assert await call.read() == grpc.aio.EOF  # type: ignore[attr-defined]
    assert await call.code() is grpc.StatusCode.OK


async def test_errors_end_a_stream_whose_client_asks_for_grpc_errors(stand: Stand) -> None:
    call = stand.stub.ModelStreamInfer(metadata=(("triton_grpc_error", "true"),))
    await call.write(request("nope"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "Request for unknown model: 'nope' is not found"


async def test_a_cancelled_stream_cancels_its_requests(stand: Stand) -> None:
    stand.inference.gate.clear()
    call = stand.stub.ModelStreamInfer()
    for _ in range(3):
        await call.write(request())
    await stand.inference.until_waiting(3)
    call.cancel()
    await stand.inference.until_waiting(0)
    assert stand.inference.cancelled == 3


# What clients ask first


async def test_metadata_and_configuration_of_a_chain(stand: Stand) -> None:
    metadata = await stand.stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="ocr"))
    assert (metadata.platform, list(metadata.versions)) == ("paceline_chain", ["1"])
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
        ("image", "UINT8", [-1, -1, 3])
    ]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [
        ("text", "BYTES", [-1, 1])
    ]
    config = (await stand.stub.ModelConfig(service_pb2.ModelConfigRequest(name="ocr"))).config
    assert (config.name, config.platform, config.max_batch_size) == ("ocr", "paceline_chain", 0)
    assert config.output[0].data_type == model_config_pb2.TYPE_STRING


async def test_a_models_configuration_leaves_out_the_batch_axis_that_its_metadata_shows(
    stand: Stand,
) -> None:
    metadata = await stand.stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="x"))
    assert [list(t.shape) for t in metadata.inputs] == [[-1, 16], [-1, 2]]
    config = (await stand.stub.ModelConfig(service_pb2.ModelConfigRequest(name="x"))).config
    assert (config.platform, config.max_batch_size) == ("python", 8)
    assert [list(t.dims) for t in config.input] == [[16], [2]]
    assert config.version_policy.latest.num_versions == 1


async def test_a_model_of_several_versions_lists_them_and_its_latest_answers(
    stand: Stand,
) -> None:
    metadata = await stand.stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="n"))
    assert list(metadata.versions) == ["2", "10"]
    shapes = (("A", "INT32", [16]), ("B", "BYTES", [2]))
    assert (await stand.stub.ModelInfer(request("n", *shapes))).model_version == "10"
    assert (
        await stand.stub.ModelInfer(request("n", *shapes, model_version="2"))
    ).model_version == "2"


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig"])
async def test_metadata_of_an_unknown_model_is_not_found(stand: Stand, method: str) -> None:
    ask = getattr(service_pb2, f"{method}Request")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(stand.stub, method)(ask(name="nope"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_statistics_are_in_nanoseconds_and_cover_one_model_or_all(stand: Stand) -> None:
    stand.control.counts["x"] = ModelStatistics(
        "x", "1", 123, 10, 4, 9, 0.5, 1, 0.25, 9, 0.125, 4, 0.2, ((1, 1, 0.05), (3, 3, 0.15))
    )
    ask = service_pb2.ModelStatisticsRequest
    (one,) = (await stand.stub.ModelStatistics(ask(name="x"))).model_stats
    assert (one.name, one.version, one.last_inference) == ("x", "1", 123)
    assert (one.inference_count, one.execution_count) == (10, 4)
    stats = one.inference_stats
    assert (stats.success.count, stats.success.ns) == (9, 500_000_000)
    assert (stats.fail.count, stats.fail.ns) == (1, 250_000_000)
    assert (stats.queue.count, stats.queue.ns) == (9, 125_000_000)
    assert (stats.compute_infer.count, stats.compute_infer.ns) == (4, 200_000_000)
    assert [(b.batch_size, b.compute_infer.count, b.compute_infer.ns) for b in one.batch_stats] == [
        (1, 1, 50_000_000),
        (3, 3, 150_000_000),
    ]
    everything = (await stand.stub.ModelStatistics(ask())).model_stats
    assert {entry.name for entry in everything} == set(stand.control.bound)


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [
        ("nope", "", "requested model 'nope' is not available"),
        ("x", "7", "requested model version is not available for model 'x'"),
    ],
)
async def test_statistics_of_what_is_unknown_are_an_invalid_argument(
    stand: Stand, name: str, version: str, says: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stand.stub.ModelStatistics(
            service_pb2.ModelStatisticsRequest(name=name, version=version)
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == says


async def test_models_are_ready_or_not_but_never_an_error(stand: Stand) -> None:
    ask = service_pb2.ModelReadyRequest
    stand.control.not_ready.add("n")
    answers = [
        (await stand.stub.ModelReady(ask(name=name, version=version))).ready
        for name, version in (("x", ""), ("x", "1"), ("x", "7"), ("n", ""), ("nope", ""))
    ]
    assert answers == [True, True, False, False, False]


async def test_the_server_is_not_ready_while_it_drains(stand: Stand) -> None:
    ask = service_pb2.ServerReadyRequest()
    assert (await stand.stub.ServerReady(ask)).ready
    stand.control.draining = True
    assert not (await stand.stub.ServerReady(ask)).ready
    assert (await stand.stub.ServerLive(service_pb2.ServerLiveRequest())).live
    assert await stand.failure(request()) == (
        grpc.StatusCode.UNAVAILABLE,
        "the server is stopping",
    )


# Repository


async def test_models_are_listed_unloaded_and_loaded_through_the_repository_api(
    stand: Stand,
) -> None:
    async with triton_aio.InferenceServerClient(stand.address) as client:
        await client.unload_model("x")
        index = await client.get_model_repository_index()
        assert {m.name: (m.state, m.reason) for m in index.models}["x"] == (
            "UNAVAILABLE",
            "unloaded",
        )
        await client.load_model("x")
    ready = await stand.stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(ready=True))
    assert OCR.name in {m.name for m in ready.models}
    assert stand.control.loaded == ["x"]


async def test_unloading_an_unknown_model_is_fine_and_loading_it_fails_as_in_triton(
    stand: Stand,
) -> None:
    await stand.stub.RepositoryModelUnload(
        service_pb2.RepositoryModelUnloadRequest(model_name="nope")
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stand.stub.RepositoryModelLoad(
            service_pb2.RepositoryModelLoadRequest(model_name="nope")
        )
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == ("failed to load 'nope', failed to poll from model repository")


@pytest.mark.parametrize("name", ["config", "file:1/model.py", "file:" + "a" * 300, "b" * 300])
async def test_a_load_with_a_configuration_or_files_is_refused(stand: Stand, name: str) -> None:
    ask = service_pb2.RepositoryModelLoadRequest(model_name="x")
    ask.parameters[name].bytes_param = b"{}"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stand.stub.RepositoryModelLoad(ask)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(caught.value.details() or "") < 120
    assert stand.control.loaded == []


@pytest.mark.parametrize(
    "method",
    [
        "SystemSharedMemoryStatus",
        "SystemSharedMemoryRegister",
        "SystemSharedMemoryUnregister",
        "CudaSharedMemoryStatus",
        "CudaSharedMemoryRegister",
        "CudaSharedMemoryUnregister",
        "TraceSetting",
        "LogSettings",
    ],
)
async def test_what_is_not_offered_says_so(stand: Stand, method: str) -> None:
    name = "LogSettings" if method == "LogSettings" else method
    ask = getattr(service_pb2, f"{name}Request")()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(stand.stub, method)(ask)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "is not offered in this version of Paceline" in (caught.value.details() or "")
