"""What Triton calls: requests in, responses out; see `blockmodel` for what happens in between.

Invariant: every request is answered once, and one that fails takes no other with it. With
`parallel` 1 a batch is computed where Triton hands it over, so that Triton keeps collecting the
next one meanwhile. With more (by default the number of members of a fused model) batches go to
that many threads, and at most that many are under way: `execute` blocks while all are busy.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


def _package() -> str:
    """Makes this directory importable as a package: Triton imports model.py as a mere module."""
    name, here = "paceline_blocks", Path(__file__).resolve().parent
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, here / "__init__.py", submodule_search_locations=[str(here)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return name


_package()
try:
    from paceline_blocks import batching
    from paceline_blocks.blockmodel import BlockModel
    from paceline_blocks.manifest import Tensor
    from paceline_blocks.settings import Settings, read_settings
    from paceline_blocks.wired import WiredModel, tensors_of
except ModuleNotFoundError as error:
    raise ImportError(
        f"backend paceline_blocks: Triton's Python has no {error.name}: "
        'pip install "numpy<2" onnxruntime blake3'
    ) from None

# What is imported stays, and a collection that looks through it holds all threads of a load for
# 25 ms.
gc.freeze()


class TritonPythonModel:
    def initialize(self, args: Mapping[str, str]) -> None:
        """Opens the model. Raises ValueError, naming model and fix, if it cannot be served."""
        self._name = args["model_name"]
        config = json.loads(args["model_config"])
        parameters = dict(config.get("parameters", {}))
        if args.get("model_instance_kind") == "GPU":
            number = args.get("model_instance_device_id", "0")
            parameters.setdefault("device", {"string_value": f"cuda:{number}"})
        self._wired: WiredModel | None = None
        try:
            settings = read_settings(parameters, Path(args["model_repository"]))
            self._blocks = self._open(settings, config)
            if self._blocks.manifest.wiring is not None:
                self._wired = self._wire(args, settings.parallel or 1)
        except ValueError as error:  # PoolError, SettingsError
            raise ValueError(f"model '{self._name}': {error}") from None
        self._model = self._wired or self._blocks
        batches = int(config.get("max_batch_size", 0)) > 0
        members = self._blocks.members if self._wired is None else ()
        self._batching = {member.name: member.batching and batches for member in members}
        self._batching.setdefault("", batches)
        self._scalars = _without_axes(batches, _tensors(self._blocks))
        parallel = settings.parallel or max(1, len(members))
        self._workers = ThreadPoolExecutor(parallel) if parallel > 1 else None
        self._free = threading.Semaphore(parallel)

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        answers = _Answers(len(requests))
        calls: list[batching.Call] = []
        for position, request in enumerate(requests):
            try:
                made = self._calls(position, request)
            except Exception as error:
                answers.fail(position, self._failure(error))
                continue
            answers.expect(position, len(made))
            calls.extend(made)
        batches = batching.batches(calls, self._batching)
        if self._workers is None:
            for batch in batches:
                self._compute(batch, answers)
            return answers.take()
        answers.send_with([request.get_response_sender() for request in requests])
        for batch in batches:
            self._free.acquire()
            self._workers.submit(self._compute_and_free, batch, answers)
        return None

    def finalize(self) -> None:
        if self._workers is not None:
            self._workers.shutdown()
        self._model.close()

    def _compute_and_free(self, batch: list[batching.Call], answers: _Answers) -> None:
        try:
            self._compute(batch, answers)
        finally:
            self._free.release()

    def _compute(self, batch: Sequence[batching.Call], answers: _Answers) -> None:
        """Together if they can run together, else each for itself."""
        try:
            rows = batching.rows_together(batch, self._batching)
            results = self._model.infer(
                batch[0].member, batching.join(batch), batch[0].outputs, rows
            )
            parts = batching.split(batch, results)
        except Exception as error:  # ONNX Runtime's own exceptions share no useful base class
            if len(batch) == 1:
                answers.fail(batch[0].request, self._failure(error))
            else:
                for call in batch:
                    self._compute([call], answers)
            return
        for call, part in zip(batch, parts, strict=True):
            for name in self._scalars.intersection(part):
                part[name] = part[name].reshape(*part[name].shape, 1)
            answers.give(call.request, part)

    def _calls(self, position: int, request: Any) -> list[batching.Call]:
        given = {}
        for tensor in request.inputs():
            array = tensor.as_numpy()
            if tensor.name() in self._scalars:
                array = array.reshape(array.shape[:-1])
            text = array.dtype == np.object_ and self._wired is None
            given[tensor.name()] = _as_text(array) if text else array
        outputs = request.requested_output_names()
        if self._wired is not None:
            return [self._wired.call(position, given, outputs)]
        return batching.calls_of(position, self._blocks.members, given, outputs)

    @staticmethod
    def _open(settings: Settings, config: Mapping[str, Any]) -> BlockModel:
        model = BlockModel.open(settings, str(config.get("name", "")))
        try:
            _check(config, model)
            return model.start()
        except BaseException:
            model.close()  # what is left behind would be in the way of others
            raise

    def _wire(self, args: Mapping[str, str], parallel: int) -> WiredModel:
        from paceline_blocks import hosted  # other models need none of it

        wiring = self._blocks.manifest.wiring
        directory = Path(args["model_repository"], args["model_version"])
        try:
            members = hosted.host_all(wiring, directory, args)
            return WiredModel(wiring, self._blocks, members, parallel)
        except BaseException:
            self._blocks.close()
            raise

    def _failure(self, error: Exception) -> Any:
        code = (
            pb_utils.TritonError.INVALID_ARG
            if isinstance(error, batching.RequestError)
            else pb_utils.TritonError.INTERNAL
        )
        return pb_utils.TritonError(f"model '{self._name}': {' '.join(str(error).split())}", code)


def _tensors(model: BlockModel) -> dict[str, Sequence[Tensor]]:
    """The model's inputs and outputs as the manifest has them, by the configuration's key."""
    wiring = model.manifest.wiring
    if wiring is None:
        return {
            "input": [tensor for member in model.members for tensor in member.inputs],
            "output": [tensor for member in model.members for tensor in member.outputs],
        }
    return {
        "input": tensors_of(wiring, (*wiring.inputs, *wiring.own_inputs)),
        "output": tensors_of(wiring, wiring.outputs),
    }


def _check(config: Mapping[str, Any], model: BlockModel) -> None:
    """The configuration's tensors are the manifest's. Raises ValueError."""
    for kind, tensors in _tensors(model).items():
        known = {tensor.name: tensor.dtype for tensor in tensors}
        for tensor in config.get(kind, []):
            name, data_type = str(tensor["name"]), str(tensor["data_type"])
            dtype = data_type.removeprefix("TYPE_").replace("STRING", "BYTES")
            if known.get(name) != dtype:
                raise ValueError(
                    f"config.pbtxt: {kind} {name!r} is {data_type}; the manifest has {known}"
                )


def _without_axes(batches: bool, tensors: Mapping[str, Sequence[Tensor]]) -> frozenset[str]:
    """Tensors that have no axis but the batch's: Triton's shape of them has one of length 1."""
    return frozenset(
        tensor.name
        for kind in tensors.values()
        for tensor in kind
        if len(tensor.shape) == int(batches)
    )


class _Answers:
    """Responses under way to some requests; complete when all of a request's calls are done."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._missing = [0] * count
        self._parts: list[dict[str, Any]] = [{} for _ in range(count)]
        self._done: list[Any] = [None] * count
        self._senders: Sequence[Any] | None = None

    def expect(self, position: int, calls: int) -> None:
        self._missing[position] = calls
        if not calls:
            self._finish(position, pb_utils.InferenceResponse([]))

    def give(self, position: int, part: Mapping[str, Any]) -> None:
        with self._lock:
            self._parts[position].update(part)
            self._missing[position] -= 1
            if self._missing[position]:
                return
        tensors = [
            pb_utils.Tensor(name, _as_bytes(array) if array.dtype.kind in "OU" else array)
            for name, array in self._parts[position].items()
        ]
        self._finish(position, pb_utils.InferenceResponse(tensors))

    def fail(self, position: int, error: Any) -> None:
        self._finish(position, pb_utils.InferenceResponse(error=error))

    def take(self) -> list[Any]:
        """All of them, for `execute` to return."""
        return self._done

    def send_with(self, senders: Sequence[Any]) -> None:
        """From now on each response goes out when it is complete."""
        with self._lock:
            self._senders = senders
            ready = [position for position, done in enumerate(self._done) if done is not None]
        for position in ready:
            self._send(position)

    def _finish(self, position: int, response: Any) -> None:
        with self._lock:
            if self._done[position] is not None:
                return  # another call of the request failed before
            self._done[position] = response
            if self._senders is None:
                return
        self._send(position)

    def _send(self, position: int) -> None:
        assert self._senders is not None
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self._senders[position].send(self._done[position], flags=final)


def _as_text(array: Any) -> Any:
    """BYTES elements (UTF-8) as the `str` that ONNX Runtime takes."""
    texts = [element.decode() for element in array.ravel()]
    return np.array(texts, dtype=np.object_).reshape(array.shape)


def _as_bytes(array: Any) -> Any:
    encoded = np.empty(array.size, dtype=np.object_)
    encoded[:] = [e if isinstance(e, bytes) else str(e).encode() for e in array.ravel()]
    return encoded.reshape(array.shape)
