"""Models of Triton's Python backend in the process of a fused chain.

A member's `model.py` is what it is on its own: `TritonPythonModel` with `initialize`, `execute` and
`finalize`, its directory on the path, the arguments those of Triton (`model_repository` is where
its copy lies). It is called by one thread at a time, as Triton does; one that runs beside others,
where the chain forks, always by the same, its own. What it cannot be: decoupled, or a coroutine.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import triton_python_backend_utils as pb_utils

from .batching import RequestError
from .wired import StepError
from .wiring import Step, Wiring

T = TypeVar("T")


def host_all(
    wiring: Wiring, directory: Path, instance: Mapping[str, str]
) -> dict[str, HostedModel]:
    """The Python models of a fused chain by module; `directory` is that of its version.

    Raises ValueError that names the one which does not load; the others are finalized then.
    """
    hosted: dict[str, HostedModel] = {}
    try:
        for step in wiring.steps:
            if step.kind == "python":
                hosted[step.module] = HostedModel(
                    step, directory / wiring.code, instance, own_thread=wiring.forks(step.module)
                )
    except BaseException:
        for one in hosted.values():
            one.close()
        raise
    return hosted


class HostedModel:
    """One of them."""

    def __init__(
        self, step: Step, code: Path, instance: Mapping[str, str], *, own_thread: bool
    ) -> None:
        """`instance`: the arguments of the whole model's `initialize`. Raises ValueError."""
        self._step = step
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1) if own_thread else None
        try:
            self._model = self._call(lambda: self._load(code, instance))
        except BaseException:
            self._end_thread()
            raise

    def run(self, feed: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """See `wired.Hosted`."""
        request = pb_utils.InferenceRequest(
            model_name=self._step.model,
            requested_output_names=list(outputs),
            inputs=[pb_utils.Tensor(name, array) for name, array in feed.items()],
        )
        with self._lock:
            responses = self._call(lambda: self._model.execute([request]))
        if not isinstance(responses, Sequence) or len(responses) != 1 or responses[0] is None:
            raise StepError("its execute did not return one response for one request")
        (response,) = responses
        if response.has_error():
            error = response.error()
            code = getattr(error, "code", lambda: None)()
            wrong = code == pb_utils.TritonError.INVALID_ARG
            raise (RequestError if wrong else StepError)(error.message())
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}

    def close(self) -> None:
        """Once is enough; what it raises concerns nobody any more."""
        finalize = getattr(self._model, "finalize", None)
        if finalize is not None:
            try:
                self._call(finalize)
            except Exception as error:  # whatever its author raises
                print(f"member '{self._step.module}': finalize: {_line(error)}", file=sys.stderr)
        self._end_thread()

    def _call(self, what: Callable[[], T]) -> T:
        return what() if self._thread is None else self._thread.submit(what).result()

    def _end_thread(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def _load(self, code: Path, instance: Mapping[str, str]) -> Any:
        step = self._step
        own = code / step.module
        file = own / step.version / "model.py"
        if not file.is_file():
            raise ValueError(f"member '{step.module}': {file}: missing; compile the model again")
        sys.path.insert(0, str(file.parent))
        name = f"paceline_member_{step.module.replace('-', '_')}"
        try:
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            model = module.TritonPythonModel()
            if inspect.iscoroutinefunction(model.execute):
                raise ValueError("its execute is a coroutine, which a group cannot have")
            if hasattr(model, "initialize"):
                model.initialize(
                    {
                        **instance,
                        "model_name": step.model,
                        "model_repository": str(own),
                        "model_version": step.version,
                        "model_config": json.dumps(step.config),
                    }
                )
            return model
        except Exception as error:  # whatever its author raises
            raise ValueError(
                f"member '{step.module}' ({step.model}) does not load: {_line(error)}"
            ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
