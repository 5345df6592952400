"""Whatever a client sends is either a well-formed request or refused with a reason."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.fakes import MODELS
from tritonclient.grpc import service_pb2

from paceline.core.bind import single_model_chain
from paceline.core.errors import ErrorKind, RequestError
from paceline.core.tensor import DATATYPES, byte_size_error, encode_bytes
from paceline.rpc.convert import infer_request
from paceline.rpc.validate import Signature

FIELDS = (
    *(("bool_contents", st.booleans()), ("int_contents", st.integers(-(2**31), 2**31 - 1))),
    *(("uint_contents", st.integers(0, 2**32 - 1)), ("fp32_contents", st.floats(width=32))),
    *(("fp64_contents", st.floats()), ("bytes_contents", st.binary(max_size=9))),
)
PARAMETERS = st.sampled_from(
    ["slo_ms", "timeout", "priority", "sequence_id", "triton_x", "headers", "mine", ""]
)


@st.composite
def tensors(draw: st.DrawFn, message: Any) -> None:
    names = st.sampled_from(["A", "B", "in", "Z", ""])
    axes = st.lists(st.sampled_from([1, 2, 16, 0, -1, 9, 2**62]), max_size=3)
    tensor = message.inputs.add(
        name=draw(names), datatype=draw(st.sampled_from([*sorted(DATATYPES), "FOO", ""]))
    )
    tensor.shape.extend(draw(st.sampled_from([[1, 16], [1, 2], [16], [2]]) | axes))
    if draw(st.integers(0, 3)) == 0:
        field, values = draw(st.sampled_from(FIELDS))
        getattr(tensor.contents, field).extend(draw(st.lists(values, max_size=17)))
    if draw(st.integers(0, 9)) == 0:
        tensor.parameters["shared_memory_region"].string_param = "r"


@st.composite
def requests(draw: st.DrawFn) -> Any:
    message = service_pb2.ModelInferRequest(id=draw(st.text(max_size=3)))
    if draw(st.booleans()):
        message.inputs.add(name="A", datatype="INT32", shape=[1, 16])
        message.inputs.add(name="B", datatype="BYTES", shape=[1, 2])
        message.raw_input_contents.extend([bytes(64), encode_bytes([b"a", b""])])
    for _ in range(draw(st.integers(0, 3))):
        draw(tensors(message))
    for raw in draw(st.lists(st.binary(max_size=70), max_size=3)):
        message.raw_input_contents.append(raw)
    for name in draw(st.lists(PARAMETERS, max_size=3)):
        parameter = message.parameters[name]
        kind, values = draw(
            st.sampled_from(
                [
                    ("bool_param", st.booleans()),
                    ("int64_param", st.integers(-(2**63), 2**63 - 1)),
                    ("uint64_param", st.integers(0, 2**64 - 1)),
                    ("double_param", st.floats()),
                    ("string_param", st.text(max_size=4)),
                ]
            )
        )
        setattr(parameter, kind, draw(values))
    for name in draw(st.lists(st.sampled_from(["C", "D", "Q"]), max_size=2)):
        message.outputs.add(name=name)
    return message


@given(
    message=requests(),
    model=st.sampled_from(sorted(MODELS)),
    remaining_s=st.none() | st.floats(0, 1e6),
)
def test_a_request_that_passes_is_consistent_and_any_other_is_refused_on_purpose(
    message: Any, model: str, remaining_s: float | None
) -> None:
    bound = single_model_chain(MODELS[model])
    try:
        request = infer_request(message, Signature.of(bound), remaining_s)
    except RequestError as error:
        assert error.kind in (ErrorKind.INVALID, ErrorKind.UNSUPPORTED)
        assert error.message
        return
    declared = {spec.name: spec for spec in bound.inputs}
    for tensor in request.inputs:
        spec = declared[tensor.name]
        assert tensor.datatype == spec.datatype
        assert spec.accepts(tensor.shape)
        assert all(axis >= 0 for axis in tensor.shape)
        assert byte_size_error(tensor) is None
    assert len({t.name for t in request.inputs}) == len(request.inputs)
    assert {s.name for s in bound.inputs if not s.optional} <= {t.name for t in request.inputs}
    assert request.budget_s is None or request.budget_s >= 0
    if remaining_s is not None:
        assert request.budget_s is not None and request.budget_s <= remaining_s
    assert request.priority is None or request.priority > 0
    assert set(request.parameters) <= {"mine", ""}
