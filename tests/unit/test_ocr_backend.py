"""The local `onnxruntime` backend on real networks, with a stand-in for Triton's Python module."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

BACKEND = Path("server/paceline/triton/backends/onnxruntime/model.py")
OUTPUT = "save_infer_model/scale_0.tmp_1"  # of the direction classifier, [rows, 2]
CONFIG: dict[str, Any] = {
    "max_batch_size": 8,
    "input": [{"name": "x", "data_type": "TYPE_FP32"}],
    "output": [{"name": OUTPUT, "data_type": "TYPE_FP32"}],
    "parameters": {"intra_op_thread_count": {"string_value": "1"}},
}


@dataclass
class Tensor:
    name: str
    array: npt.NDArray[Any]

    def as_numpy(self) -> npt.NDArray[Any]:
        return self.array


@dataclass
class Request:
    inputs: Sequence[Tensor]
    outputs: Sequence[str] = (OUTPUT,)

    def requested_output_names(self) -> Sequence[str]:
        return self.outputs


@dataclass
class Response:
    output_tensors: Sequence[Tensor] = ()
    error: Exception | None = None

    def only(self) -> npt.NDArray[Any]:
        assert self.error is None, self.error
        (tensor,) = self.output_tensors
        return tensor.array


def find_input(request: Request, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs if tensor.name == name), None)


@pytest.fixture
def backend() -> Iterator[ModuleType]:
    stand_in: Any = ModuleType("triton_python_backend_utils")
    stand_in.Tensor, stand_in.InferenceResponse = Tensor, Response
    stand_in.TritonError, stand_in.get_input_tensor_by_name = RuntimeError, find_input
    sys.modules[stand_in.__name__] = stand_in
    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location("paceline_onnxruntime_backend", root / BACKEND)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[stand_in.__name__]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    assert package is not None and package.origin is not None
    network = Path(package.origin).parent / "models" / "ch_ppocr_mobile_v2.0_cls_infer.onnx"
    (tmp_path / "1").mkdir()
    shutil.copy(network, tmp_path / "1" / "model.onnx")
    return tmp_path


def load(backend: ModuleType, directory: Path, **changes: Any) -> Any:
    model = backend.TritonPythonModel()
    model.initialize(
        {
            "model_name": "direction",
            "model_repository": str(directory),
            "model_version": "1",
            "model_instance_kind": "CPU",
            "model_config": json.dumps(CONFIG | changes),
        }
    )
    return model


def batch(rows: int, seed: int, width: int = 192) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).random((rows, 3, 48, width), dtype=np.float32)


def test_requests_of_one_shape_are_answered_row_by_row(
    backend: ModuleType, directory: Path
) -> None:
    model = load(backend, directory)
    inputs = [batch(2, 0), batch(1, 1), batch(3, 2, width=96)]
    answers = model.execute([Request([Tensor("x", array)]) for array in inputs])
    for array, answer in zip(inputs, answers, strict=True):
        (alone,) = model.execute([Request([Tensor("x", array)])])
        np.testing.assert_allclose(answer.only(), alone.only(), rtol=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param([Tensor("x", np.zeros((1, 5, 48, 192), dtype=np.float32))], id="shape"),
        pytest.param([Tensor("x", np.zeros((1, 3, 48, 192), dtype=np.float64))], id="dtype"),
        pytest.param([], id="missing"),
    ],
)
def test_a_bad_request_fails_alone_and_names_model_and_file(
    backend: ModuleType, directory: Path, bad: list[Tensor]
) -> None:
    model = load(backend, directory)
    good = Request([Tensor("x", batch(1, 0))])
    first, failed, last = model.execute([good, Request(bad), good])
    assert first.only().shape == last.only().shape == (1, 2)
    assert "model 'direction'" in str(failed.error)
    assert "model.onnx" in str(failed.error)


def test_a_request_for_no_output_gets_none(backend: ModuleType, directory: Path) -> None:
    model = load(backend, directory)
    asked = Request([Tensor("x", batch(1, 0))])
    (one, none) = model.execute([asked, Request([Tensor("x", batch(1, 0))], outputs=())])
    assert one.only().shape == (1, 2)
    assert none.error is None
    assert list(none.output_tensors) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": [{"name": "y", "data_type": "TYPE_FP32"}]}, "no input 'y', it has"),
        ({"input": []}, "config.pbtxt lacks input x"),
        ({"input": [{"name": "x", "data_type": "TYPE_INT8"}]}, "'x' is tensor.float., not"),
        ({"output": [{"name": "z", "data_type": "TYPE_FP32"}]}, "no output 'z', it has"),
        ({"default_model_filename": "none.onnx"}, "none.onnx.: no such file"),
        (
            {"parameters": {"intra_op_thread_count": {"string_value": "two"}}},
            "intra_op_thread_count is 'two'",
        ),
    ],
)
def test_a_config_that_does_not_fit_the_file_fails_to_load(
    backend: ModuleType, directory: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(backend, directory, **changes)


def test_a_broken_file_fails_to_load_and_is_named(backend: ModuleType, directory: Path) -> None:
    (directory / "1" / "model.onnx").write_bytes(b"not a network")
    with pytest.raises(ValueError, match=r"model 'direction' \(.*model\.onnx\)"):
        load(backend, directory)
