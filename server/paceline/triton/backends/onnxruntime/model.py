"""Triton backend `onnxruntime`, in Python: runs `<model>/<version>/model.onnx` on the CPU.

The Triton that ships in the nvidia-pytriton wheel has the Python backend only. With this one beside
it, model directories that say `backend: "onnxruntime"` work there as they do on NVIDIA's
tritonserver image, which has the real backend. Tensor names and types in config.pbtxt are those of
the ONNX file, as there; `default_model_filename` and these parameters are honoured:

* `intra_op_thread_count` (default 1: Paceline scales by instances, not by threads),
* `inter_op_thread_count` (default 1).

Invariant: `execute` answers every request, in order, and a request that fails takes no other with
it. Self-contained: it runs in Triton's stub process and imports nothing of Paceline.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

Array = npt.NDArray[Any]
Feed = dict[str, Array]

# Triton's data types (as config.pbtxt spells them) and ONNX Runtime's.
_ORT_TYPES = {
    "TYPE_BOOL": "tensor(bool)",
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_UINT16": "tensor(uint16)",
    "TYPE_UINT32": "tensor(uint32)",
    "TYPE_UINT64": "tensor(uint64)",
    "TYPE_INT8": "tensor(int8)",
    "TYPE_INT16": "tensor(int16)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP64": "tensor(double)",
    "TYPE_STRING": "tensor(string)",
}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        """Builds the session. Raises ValueError, naming model and file, if they don't fit."""
        config = json.loads(args["model_config"])
        self._model = args["model_name"]
        self._file = Path(
            args["model_repository"],
            args["model_version"],
            config.get("default_model_filename") or "model.onnx",
        )
        if args.get("model_instance_kind") == "GPU":
            raise self._wrong("this backend runs on the CPU: set KIND_CPU in instance_group")
        self._batching = int(config.get("max_batch_size", 0)) > 0
        self._inputs = [str(tensor["name"]) for tensor in config.get("input", [])]
        self._session = self._open(config.get("parameters", {}))
        self._check("input", config.get("input", []), self._session.get_inputs())
        self._check("output", config.get("output", []), self._session.get_outputs())
        missing = {node.name for node in self._session.get_inputs()} - set(self._inputs)
        if missing:
            raise self._wrong(f"config.pbtxt lacks input {', '.join(sorted(missing))}")

    def execute(self, requests: list[Any]) -> list[Any]:
        answers: list[Any] = [None] * len(requests)
        feeds: list[Feed | None] = [None] * len(requests)
        for position, request in enumerate(requests):
            try:
                feeds[position] = self._feed(request)
            except Exception as error:
                answers[position] = self._failure(error)
        for positions in _runs(requests, feeds, self._batching):
            outputs = list(requests[positions[0]].requested_output_names())
            parts = [feed for position in positions if (feed := feeds[position]) is not None]
            for position, answer in zip(positions, self._answers(parts, outputs), strict=True):
                answers[position] = answer
        return answers

    def _answers(self, feeds: Sequence[Feed], outputs: Sequence[str]) -> list[Any]:
        """One response a feed; together if they can run together, else each for itself."""
        try:
            results = self._run_together(feeds, outputs)
        except Exception as error:  # ONNX Runtime's own exceptions share no useful base class
            if len(feeds) == 1:
                return [self._failure(error)]
            return [answer for feed in feeds for answer in self._answers([feed], outputs)]
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, array) for name, array in result.items()]
            )
            for result in results
        ]

    def _run_together(self, feeds: Sequence[Feed], outputs: Sequence[str]) -> list[Feed]:
        if len(feeds) == 1:
            return [self._run(feeds[0], outputs)]
        rows = [len(feed[self._inputs[0]]) for feed in feeds]
        joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in self._inputs}
        results = self._run(joined, outputs)
        for name, array in results.items():
            if array.ndim == 0 or len(array) != sum(rows):
                raise self._wrong(f"output {name} {array.shape} has no row for each of {sum(rows)}")
        ends = np.cumsum(rows)[:-1]
        split = {name: np.split(array, ends) for name, array in results.items()}
        return [{name: split[name][index] for name in results} for index in range(len(feeds))]

    def _run(self, feed: Feed, outputs: Sequence[str]) -> Feed:
        arrays = self._session.run(outputs, feed) if outputs else []  # there, [] means all
        return {
            name: _as_bytes(array) if array.dtype.kind in "OU" else array
            for name, array in zip(outputs, map(np.asarray, arrays), strict=True)
        }

    def _feed(self, request: Any) -> Feed:
        feed = {}
        for name in self._inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is None:
                raise self._wrong(f"request lacks input {name}")
            array = tensor.as_numpy()
            feed[name] = _as_text(array) if array.dtype == np.object_ else array
        return feed

    def _open(self, parameters: Mapping[str, Mapping[str, str]]) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads(parameters, "intra_op_thread_count")
        options.inter_op_num_threads = self._threads(parameters, "inter_op_thread_count")
        options.log_severity_level = 3  # errors
        # A model is served many shapes; the arena would keep the largest of each.
        options.enable_cpu_mem_arena = False
        if not self._file.is_file():
            raise self._wrong("no such file")
        try:
            return ort.InferenceSession(self._file, options, ["CPUExecutionProvider"])
        except Exception as error:  # as above
            raise self._wrong(str(error)) from error

    def _threads(self, parameters: Mapping[str, Mapping[str, str]], key: str) -> int:
        """As the real backend reads it; 0 is one thread a core."""
        text = parameters.get(key, {}).get("string_value", "1")
        if not text.isdecimal():
            raise self._wrong(f"parameter {key} is {text!r}: give a whole number of threads")
        return int(text)

    def _check(self, kind: str, tensors: Iterable[Mapping[str, Any]], nodes: Iterable[Any]) -> None:
        types = {node.name: node.type for node in nodes}
        for tensor in tensors:
            name, data_type = str(tensor["name"]), str(tensor["data_type"])
            if name not in types:
                raise self._wrong(f"the file has no {kind} {name!r}, it has {sorted(types)}")
            if _ORT_TYPES.get(data_type) != types[name]:
                raise self._wrong(f"{kind} {name!r} is {types[name]}, not {data_type}")

    def _failure(self, error: Exception) -> Any:
        wrong = error if isinstance(error, _ModelError) else self._wrong(str(error))
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(wrong)))

    def _wrong(self, what: str) -> _ModelError:
        return _ModelError(f"model '{self._model}' ({self._file}): {what}")


class _ModelError(ValueError):
    """Names the model and its file."""


def _runs(requests: Sequence[Any], feeds: Sequence[Feed | None], batching: bool) -> list[list[int]]:
    """Positions of the requests that can run as one: same item shapes, same outputs."""
    runs: dict[Any, list[int]] = {}
    for position, (request, feed) in enumerate(zip(requests, feeds, strict=True)):
        if feed is None:
            continue
        shapes = tuple((name, array.shape[1:]) for name, array in feed.items())
        outputs = tuple(request.requested_output_names())
        runs.setdefault((shapes, outputs) if batching else position, []).append(position)
    return list(runs.values())


def _as_text(array: Array) -> Array:
    """BYTES elements (UTF-8) as the `str` that ONNX Runtime takes."""
    texts = [element.decode() for element in array.ravel()]
    return np.array(texts, dtype=np.object_).reshape(array.shape)


def _as_bytes(array: Array) -> Array:
    encoded = np.empty(array.size, dtype=np.object_)
    encoded[:] = [str(element).encode() for element in array.ravel()]
    return encoded.reshape(array.shape)
