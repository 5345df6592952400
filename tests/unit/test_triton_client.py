"""Messages to and from Triton, without one."""

from __future__ import annotations

import struct

import grpc
import pytest
from tritonclient.grpc import service_pb2

from paceline.core.errors import BackendError, ErrorKind, ResidencyError
from paceline.core.ports import ModelCall
from paceline.core.tensor import BatchTensor, encode_bytes
from paceline.triton.client import (
    checked_url,
    decode_infer_response,
    encode_infer_request,
    error_kind,
)


def test_a_hand_joined_request_is_the_message_that_protobuf_reads() -> None:
    large = bytes(range(256)) * 100
    call = ModelCall(
        "m",
        (
            BatchTensor("x", "UINT8", (2, 12800), (large[:12800], memoryview(large)[12800:])),
            BatchTensor("empty", "FP32", (0, 4), ()),
            BatchTensor("s", "BYTES", (1,), (encode_bytes([b"abc"]),)),
        ),
        ("y", "z"),
        version="3",
        request_id="r1",
        parameters={"flag": True, "count": 7, "share": 0.5, "name": "n"},
    )
    request = service_pb2.ModelInferRequest.FromString(encode_infer_request(call))
    assert (request.model_name, request.model_version, request.id) == ("m", "3", "r1")
    assert [(t.name, t.datatype, list(t.shape)) for t in request.inputs] == [
        ("x", "UINT8", [2, 12800]),
        ("empty", "FP32", [0, 4]),
        ("s", "BYTES", [1]),
    ]
    assert list(request.raw_input_contents) == [large, b"", b"\x03\0\0\0abc"]
    assert [output.name for output in request.outputs] == ["y", "z"]
    assert request.parameters["flag"].bool_param is True
    assert request.parameters["count"].int64_param == 7
    assert request.parameters["share"].double_param == 0.5
    assert request.parameters["name"].string_param == "n"


@pytest.mark.parametrize(
    ("datatype", "field", "values", "code"),
    [
        ("BOOL", "bool_contents", [True, False], "<2?"),
        ("INT8", "int_contents", [-128, 127], "<2b"),
        ("INT16", "int_contents", [-32768, 5], "<2h"),
        ("INT32", "int_contents", [-5, 5], "<2i"),
        ("INT64", "int64_contents", [-(2**63), 5], "<2q"),
        ("UINT8", "uint_contents", [0, 255], "<2B"),
        ("UINT16", "uint_contents", [0, 65535], "<2H"),
        ("UINT32", "uint_contents", [0, 2**32 - 1], "<2I"),
        ("UINT64", "uint64_contents", [0, 2**64 - 1], "<2Q"),
        ("FP32", "fp32_contents", [0.5, -2.0], "<2f"),
        ("FP64", "fp64_contents", [0.1, -2.0], "<2d"),
    ],
)
def test_typed_contents_of_an_answer_become_the_same_bytes(
    datatype: str, field: str, values: list[float], code: str
) -> None:
    response = service_pb2.ModelInferResponse(model_name="m")
    output = response.outputs.add(name="y", datatype=datatype, shape=[2])
    getattr(output.contents, field).extend(values)
    assert decode_infer_response(response)["y"].data == struct.pack(code, *values)


def test_typed_bytes_get_their_lengths_and_impossible_contents_are_errors() -> None:
    response = service_pb2.ModelInferResponse(model_name="m")
    output = response.outputs.add(name="y", datatype="BYTES", shape=[2])
    output.contents.bytes_contents.extend([b"", b"ab"])
    assert decode_infer_response(response)["y"].data == encode_bytes([b"", b"ab"])
    output.datatype = "FP16"
    with pytest.raises(BackendError, match="'FP16' do not exist"):
        decode_infer_response(response)
    output.datatype = "INT8"
    output.contents.int_contents.extend([300])
    with pytest.raises(BackendError, match="do not fit datatype INT8"):
        decode_infer_response(response)


def test_raw_contents_that_do_not_match_the_outputs_are_an_error() -> None:
    response = service_pb2.ModelInferResponse(model_name="m", raw_output_contents=[b"a", b"b"])
    response.outputs.add(name="y", datatype="UINT8", shape=[1])
    with pytest.raises(BackendError, match="1 outputs with 2 raw contents"):
        decode_infer_response(response)


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        ("INVALID_ARGUMENT", "expected 2 inputs", ErrorKind.INVALID),
        ("NOT_FOUND", "Request for unknown model: 'x' is not found", ErrorKind.UNKNOWN_MODEL),
        ("NOT_FOUND", "unknown model: 'x' has no available versions", ErrorKind.NOT_READY),
        ("UNIMPLEMENTED", "no", ErrorKind.UNSUPPORTED),
        ("UNAVAILABLE", "Exceeds maximum queue size", ErrorKind.QUEUE_FULL),
        ("UNAVAILABLE", "Request timeout expired", ErrorKind.DEADLINE),
        ("UNAVAILABLE", "something else", ErrorKind.BACKEND),
        ("INTERNAL", "Stub process 'x' is not healthy.", ErrorKind.UNAVAILABLE),
        ("INTERNAL", "something else", ErrorKind.BACKEND),
    ],
)
def test_what_triton_says_has_a_kind(code: str, details: str, kind: ErrorKind) -> None:
    assert error_kind(grpc.StatusCode[code], details) is kind


def test_urls_are_host_and_port() -> None:
    assert checked_url("grpc://h:1") == checked_url("h:1/") == "h:1"
    assert checked_url("[::1]:8001") == "[::1]:8001"
    for url in ("h", "h:", ":1", "h:0", "h:65536", "http://h:1", "h:1/v2", ""):
        with pytest.raises(ResidencyError, match="is not host:port"):
            checked_url(url)
