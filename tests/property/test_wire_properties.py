"""Reading and writing inference messages by hand is the same as letting protobuf do it."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_rpc_convert import requests
from tritonclient.grpc import service_pb2

from paceline.core.errors import ErrorKind, RequestError
from paceline.core.request import InferAnswer, Timeline
from paceline.core.tensor import DATATYPES, Tensor
from paceline.core.wire import Unusual
from paceline.rpc.wire import parse_request, read_request, response_parts, stream_parts

TIMELINE = Timeline(1, "", "c", 0.0, 1.0, 2.0, ())
TEXT = st.text(max_size=6)
DATATYPE = TEXT | st.sampled_from(sorted(DATATYPES))


def picture(message: Any) -> tuple[Any, ...]:
    """What Paceline reads of a request that has raw contents only. Parameters by their bytes: some
    are NaN."""
    return (
        message.model_name,
        message.model_version,
        message.id,
        [(t.name, t.datatype, tuple(t.shape), t.HasField("contents")) for t in message.inputs],
        [o.name for o in message.outputs],
        [bytes(raw) for raw in message.raw_input_contents],
        {name: stated.SerializeToString() for name, stated in message.parameters.items()},
    )


def same(data: bytes) -> None:
    """Both readers agree, or the hand-written one leaves it to protobuf."""
    try:
        read = parse_request(data)
    except Unusual:
        return
    assert picture(read) == picture(service_pb2.ModelInferRequest.FromString(data))


def state(draw: st.DrawFn, message: Any) -> None:
    """Some parameters of the request itself."""
    for name in draw(st.lists(TEXT | st.sampled_from(["slo_ms", "priority"]), max_size=3)):
        parameter = message.parameters[name]
        match draw(st.integers(0, 5)):
            case 0:
                parameter.bool_param = draw(st.booleans())
            case 1:
                parameter.int64_param = draw(st.integers(-(2**63), 2**63 - 1))
            case 2:
                parameter.double_param = draw(st.floats())
            case 3:
                parameter.uint64_param = draw(st.integers(0, 2**64 - 1))
            case 4:
                parameter.string_param = draw(TEXT)


@st.composite
def plain_requests(draw: st.DrawFn) -> Any:
    message = service_pb2.ModelInferRequest(
        model_name=draw(TEXT), model_version=draw(TEXT), id=draw(TEXT)
    )
    state(draw, message)
    for _ in range(draw(st.integers(0, 3))):
        shape = draw(st.lists(st.integers(0, 2**63 - 1), max_size=4))
        message.inputs.add(name=draw(TEXT), datatype=draw(DATATYPE), shape=shape)
    for name in draw(st.lists(TEXT, max_size=3)):
        message.outputs.add(name=name)
    sizes = st.sampled_from([0, 1, 127, 128, 4096, 4097, 20000])
    for size in draw(st.lists(sizes, min_size=1, max_size=3)):
        message.raw_input_contents.append(bytes(size))
    return message


@given(message=plain_requests())
def test_a_request_with_raw_contents_only_is_read_without_protobuf_and_equal(message: Any) -> None:
    assert picture(parse_request(message.SerializeToString())) == picture(message)


@given(message=requests())
def test_every_valid_request_is_read_as_protobuf_reads_it(message: Any) -> None:
    data = message.SerializeToString()
    same(data)
    assert picture(read_request(data))[:3] == picture(message)[:3]


@given(message=requests(), more=st.binary(max_size=12))
def test_unknown_fields_and_trailing_bytes_mean_what_protobuf_says(
    message: Any, more: bytes
) -> None:
    same(message.SerializeToString() + more)


@given(data=st.binary(max_size=60))
def test_arbitrary_bytes_are_refused_by_both_or_read_alike(data: bytes) -> None:
    same(data)
    try:
        service_pb2.ModelInferRequest.FromString(data)
    except DecodeError:
        try:
            read_request(data)
        except RequestError as error:
            assert error.kind is ErrorKind.INTERNAL
        else:
            raise AssertionError("read what protobuf refuses") from None


@given(
    message=plain_requests(), cut=st.integers(0, 200), flip=st.integers(0, 255), at=st.floats(0, 1)
)
def test_a_damaged_request_is_refused_by_both_or_read_alike(
    message: Any, cut: int, flip: int, at: float
) -> None:
    data = bytearray(message.SerializeToString())
    # What it was like is remembered.
    parse_request(bytes(data))
    if data:
        data[int(at * (len(data) - 1))] ^= flip
    same(bytes(data[: len(data) - cut % (len(data) + 1)]))


@given(
    message=plain_requests(),
    byte=st.integers(0, 255),
    identity=st.text("abc", max_size=6),
    number=st.integers(0, 2**64 - 1),
)
def test_a_request_like_an_earlier_one_has_its_own_id_parameters_and_contents(
    message: Any, byte: int, identity: str, number: int
) -> None:
    message.parameters["timeout"].uint64_param = 2**64 - 1 - number
    parse_request(message.SerializeToString())
    message.id = identity
    message.parameters["timeout"].uint64_param = number
    contents = [bytes((byte,)) * len(raw) for raw in message.raw_input_contents]
    message.ClearField("raw_input_contents")
    message.raw_input_contents.extend(contents)
    for _ in range(2):
        assert picture(parse_request(message.SerializeToString())) == picture(message)


@given(
    message=plain_requests(),
    outputs=st.lists(
        st.tuples(TEXT, TEXT, st.lists(st.integers(0, 2**40), max_size=3), st.binary(max_size=200)),
        max_size=3,
    ),
    viewed=st.booleans(),
)
def test_a_response_is_byte_for_byte_what_protobuf_serializes(
    message: Any, outputs: list[tuple[str, str, list[int], bytes]], viewed: bool
) -> None:
    expected = service_pb2.ModelInferResponse(
        model_name=message.model_name,
        model_version=message.model_version or "1",
        id=message.id,
    )
    tensors = []
    for name, datatype, shape, data in outputs:
        expected.outputs.add(name=name, datatype=datatype, shape=shape)
        expected.raw_output_contents.append(data)
        tensors.append(Tensor(name, datatype, tuple(shape), memoryview(data) if viewed else data))
    parts = response_parts(message, "1", InferAnswer("c", tuple(tensors), TIMELINE))
    assert b"".join(parts) == expected.SerializeToString()
    stream = service_pb2.ModelStreamInferResponse(infer_response=expected)
    assert b"".join(stream_parts(parts)) == stream.SerializeToString()
