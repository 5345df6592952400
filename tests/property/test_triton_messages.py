"""Towards Triton, too, hand-made messages are those that protobuf makes and reads."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from paceline.core.errors import BackendError
from paceline.core.ports import ModelCall
from paceline.core.tensor import DATATYPES, BatchTensor
from paceline.triton.messages import Place, decode_infer_response, infer_request, read_response

TEXT = st.text(max_size=6)
DATATYPE = TEXT | st.sampled_from(sorted(DATATYPES))
SHAPE = st.lists(st.integers(0, 2**63 - 1), max_size=3).map(tuple)
PARTS = st.lists(st.binary(max_size=40), max_size=3).map(tuple)
PARAMETERS = st.dictionaries(
    TEXT,
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT,
    max_size=3,
)
PLACE = st.builds(Place, TEXT, st.integers(0, 2**40), st.integers(0, 2**40))

calls = st.builds(
    ModelCall,
    TEXT,
    st.lists(st.builds(BatchTensor, TEXT, TEXT, SHAPE, PARTS), max_size=3).map(tuple),
    st.lists(TEXT, max_size=3).map(tuple),
    TEXT,
    TEXT,
    PARAMETERS,
)


def value_of(parameter: Any) -> Any:
    return getattr(parameter, parameter.WhichOneof("parameter_choice"))


@given(call=calls)
def test_protobuf_reads_what_was_asked_for(call: ModelCall) -> None:
    message = service_pb2.ModelInferRequest.FromString(b"".join(infer_request(call)))
    assert (message.model_name, message.model_version) == (call.model, call.version)
    assert message.id == call.request_id
    assert {k: value_of(v) for k, v in message.parameters.items()} == dict(call.parameters)
    headers = [(t.name, t.datatype, tuple(t.shape)) for t in message.inputs]
    assert headers == [(t.name, t.datatype, t.shape) for t in call.inputs]
    assert list(message.raw_input_contents) == [b"".join(t.parts) for t in call.inputs]
    assert tuple(output.name for output in message.outputs) == call.outputs


@given(call=calls, data=st.data())
def test_places_in_shared_memory_stand_where_triton_looks_for_them(
    call: ModelCall, data: st.DataObject
) -> None:
    inputs = [data.draw(PLACE) for _ in call.inputs]
    outputs = [data.draw(PLACE) for _ in call.outputs]
    message = service_pb2.ModelInferRequest.FromString(
        b"".join(infer_request(call, inputs, outputs))
    )
    for tensors, places in ((message.inputs, inputs), (message.outputs, outputs)):
        for tensor, place in zip(tensors, places, strict=True):
            assert {k: value_of(v) for k, v in tensor.parameters.items()} == {
                "shared_memory_region": place.region,
                "shared_memory_byte_size": place.size_bytes,
                "shared_memory_offset": place.offset,
            }
    assert not inputs or not message.raw_input_contents


def response_of(outputs: list[tuple[str, str, tuple[int, ...], bytes | Place]]) -> Any:
    """What a Triton answers: contents, or where they are in shared memory."""
    message = service_pb2.ModelInferResponse(model_name="m", model_version="1", id="7")
    for name, datatype, shape, contents in outputs:
        output = message.outputs.add(name=name, datatype=datatype, shape=shape)
        if isinstance(contents, bytes):
            message.raw_output_contents.append(contents)
        else:
            output.parameters["shared_memory_region"].string_param = contents.region
            output.parameters["shared_memory_byte_size"].int64_param = contents.size_bytes
    return message


@given(
    outputs=st.lists(st.tuples(TEXT, DATATYPE, SHAPE, st.binary(max_size=200) | PLACE), max_size=3),
    parameters=PARAMETERS,
    entry=st.none() | st.binary(max_size=8),
    more=st.binary(max_size=5),
)
def test_an_answer_is_read_as_protobuf_reads_it(
    outputs: list[tuple[str, str, tuple[int, ...], bytes | Place]],
    parameters: dict[str, Any],
    entry: bytes | None,
    more: bytes,
) -> None:
    message = response_of(outputs)
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}
        setattr(message.parameters[name], kind.get(type(value), "double_param"), value)
    data = message.SerializeToString() + more
    if entry is not None:
        # A parameter as no encoder would write it, most of the time.
        data = bytes((4 << 3 | 2, len(entry))) + entry + data
    for _ in range(2):
        # The second time what was read is remembered.
        alike(data)


def alike(data: bytes) -> None:
    """An answer is read as protobuf reads it, or refused as protobuf refuses it."""
    try:
        expected: Any = decode_infer_response(service_pb2.ModelInferResponse.FromString(data))
    except Exception:
        expected = None
    try:
        read = read_response(memoryview(data))
    except BackendError:
        assert expected is None
        return
    assert expected is not None
    assert {k: (t.datatype, t.shape, bytes(t.data)) for k, t in read.items()} == {
        k: (t.datatype, t.shape, bytes(t.data)) for k, t in expected.items()
    }


@given(
    outputs=st.lists(
        st.tuples(TEXT, DATATYPE, SHAPE, st.binary(max_size=200) | PLACE), min_size=1, max_size=3
    ),
    flip=st.integers(1, 255),
    at=st.floats(0, 1),
)
def test_an_answer_that_was_damaged_is_not_taken_for_the_one_before(
    outputs: list[tuple[str, str, tuple[int, ...], bytes | Place]], flip: int, at: float
) -> None:
    data = bytearray(response_of(outputs).SerializeToString())
    alike(bytes(data))
    data[int(at * (len(data) - 1))] ^= flip
    alike(bytes(data))


def test_an_ensembles_answer_is_read_without_copying() -> None:
    message = response_of([("y", "UINT8", (2, 3), b"abcdef")])
    message.parameters["sequence_id"].int64_param = 0
    for name in ("sequence_start", "sequence_end"):
        message.parameters[name].bool_param = False
    data = message.SerializeToString()
    for _ in range(2):
        found = read_response(data)["y"].data
        assert isinstance(found, memoryview) and found.obj is data and bytes(found) == b"abcdef"
