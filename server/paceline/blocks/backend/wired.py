"""Members that are wired: arrays go from one to the next in memory, none leaves the process.

Members are networks that run as blocks and models of Triton's Python backend (`hosted`). A request
runs the steps that the outputs it asks for need, each as soon as what it takes is there: in the
request's own thread, or, beside others where the chain forks, in one of its own. Values are as
Triton has them - with the batch axis if the whole model has one, BYTES as `bytes` - and fitted to
each member: one that batches, in a model that does not, gets an axis of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import numpy as np

from .batching import Call, RequestError
from .manifest import Member, Tensor
from .wiring import GIVEN, Planned, Port, Step, Wiring


class Blocks(Protocol):
    """What is needed of a `BlockModel`."""

    @property
    def members(self) -> Sequence[Member]: ...

    def infer(
        self, member: str, feed: Mapping[str, Any], outputs: Sequence[str], rows: int = 1
    ) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Hosted(Protocol):
    """A Python model. `run` raises RequestError for what the request got wrong."""

    def run(self, feed: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]: ...

    def close(self) -> None: ...


class WiredModel:
    """See the module docstring. `infer` may be called by several threads."""

    def __init__(
        self,
        wiring: Wiring,
        blocks: Blocks,
        hosted: Mapping[str, Hosted],
        parallel: int = 1,
    ) -> None:
        """`hosted` by module; `parallel`: requests at a time, for each of which there are threads
        enough for all the steps that can be beside one another.
        """
        self._wiring = wiring
        self._blocks = blocks
        self._hosted = hosted
        self._members = {member.name: member for member in blocks.members}
        self._axes = 1 if wiring.max_batch else 0
        self._forking = frozenset(s.module for s in wiring.steps if wiring.forks(s.module))
        self._threads = ThreadPoolExecutor(max(1, len(self._forking)) * parallel)

    def call(self, request: int, given: Mapping[str, Any], outputs: Sequence[str]) -> Call:
        """What a request wants. Raises RequestError when an input that it needs is missing."""
        plan = self._wiring.needed(outputs, given)
        needed = {value for planned in plan for value in planned.takes.values()}
        missing = [p.name for p in self._wiring.inputs if p.name in needed and p.name not in given]
        if missing:
            raise RequestError(f"the request lacks the input {', '.join(missing)}")
        brought = {name: a for name, a in given.items() if {name, GIVEN + name} & needed}
        return Call(request, "", brought, tuple(outputs))

    def infer(
        self, member: str, feed: Mapping[str, Any], outputs: Sequence[str], rows: int = 1
    ) -> dict[str, Any]:
        """Arrays of `outputs`; `member` is "", the whole, whose `rows` count if it batches.

        Raises RequestError or StepError that name the step which failed.
        """
        left = list(self._wiring.needed(outputs, feed))
        rows = rows if self._axes else 1
        uses = Counter(value for planned in left for value in planned.takes.values())
        uses.update(outputs)
        values = {GIVEN + n if GIVEN + n in uses else n: array for n, array in feed.items()}
        beside: list[Future[dict[str, Any]]] = []
        try:
            while left or beside:
                ready = [one for one in left if values.keys() >= {*one.takes.values()}]
                alone = len(ready) == 1 and not beside
                mine = []
                for planned in ready:
                    left.remove(planned)
                    given = _take(values, uses, planned)
                    if alone or planned.step.module not in self._forking:
                        mine.append((planned, given))
                    else:
                        beside.append(self._threads.submit(self._step, planned, given, rows))
                for planned, given in mine:
                    values.update(self._step(planned, given, rows))
                if beside and not mine:
                    done = wait(beside, return_when=FIRST_COMPLETED).done
                    for ran in [ran for ran in beside if ran in done]:
                        beside.remove(ran)
                        values.update(ran.result())
        finally:
            wait(beside)  # after a failure: no step outlives its request
        return {name: values[name] for name in outputs}

    def close(self) -> None:
        self._threads.shutdown()
        try:
            for hosted in self._hosted.values():
                hosted.close()
        finally:
            self._blocks.close()

    def _step(self, planned: Planned, given: Mapping[str, Any], rows: int) -> dict[str, Any]:
        """The values that a step gives. Raises RequestError or StepError that name it."""
        step = planned.step
        try:
            made = self._run(step, given, planned.gives, rows)
        except RequestError as error:
            raise RequestError(f"{_told(step)}: {error}") from None
        except Exception as error:  # ONNX Runtime's own exceptions share no useful base class
            raise StepError(f"{_told(step)}: {error}") from None
        return {step.value(name): array for name, array in made.items()}

    def _run(
        self, step: Step, given: Mapping[str, Any], names: Sequence[str], rows: int
    ) -> dict[str, Any]:
        widened = step.batched and not self._axes
        feed = {name: array[np.newaxis] for name, array in given.items()} if widened else given
        if step.kind == "python":
            made = self._hosted[step.module].run(feed, names)
        else:
            made = self._run_blocks(step, feed, names, rows)
        missing = [name for name in names if name not in made]
        if missing:
            raise StepError(f"gave no {', '.join(missing)}")
        return {name: _only_row(name, made[name]) if widened else made[name] for name in names}

    def _run_blocks(
        self, step: Step, feed: Mapping[str, Any], names: Sequence[str], rows: int
    ) -> dict[str, Any]:
        member = self._members[step.module]
        # A fused model's tensors are called MEMBER/TENSOR.
        known = {tensor.name.partition("/")[2]: tensor for tensor in member.inputs}
        axes = int(step.batched)
        fed = {
            known[name].name: _of_rank(_as_text(array), len(known[name].shape))
            for name, array in feed.items()
            if name in known
        }
        wanted = [f"{step.module}/{name}" for name in names]

        def run(one: Mapping[str, Any], count: int) -> dict[str, Any]:
            return self._blocks.infer(step.module, one, wanted, count)

        if step.batched and not member.batching and rows > 1:
            made = _row_by_row(run, fed, rows)
        else:
            made = run(fed, rows)
        ranks = {port.name: axes + len(port.dims) for port in step.outputs}
        return {
            name: _of_rank(_as_bytes(made[full]), ranks[name])
            for name, full in zip(names, wanted, strict=True)
        }


def tensors_of(wiring: Wiring, ports: Sequence[Port]) -> list[Tensor]:
    """Ports of the whole as a manifest's tensors, the batch axis with them."""
    axes = (-1,) if wiring.max_batch else ()
    return [Tensor(port.name, port.name, port.dtype, (*axes, *port.dims)) for port in ports]


class StepError(RuntimeError):
    """A member failed."""


def _take(values: dict[str, Any], uses: Counter[str], planned: Planned) -> dict[str, Any]:
    """A step's arrays, by the names of its inputs; those that nobody else needs are let go."""
    given = {name: values[value] for name, value in planned.takes.items()}
    for value in planned.takes.values():
        uses[value] -= 1
        if not uses[value]:
            values.pop(value, None)
    return given


def _told(step: Step) -> str:
    return f"member '{step.module}' ({step.model})"


def _row_by_row(
    run: Callable[[Mapping[str, Any], int], dict[str, Any]], feed: Mapping[str, Any], rows: int
) -> dict[str, Any]:
    parts = [run({k: a[row : row + 1] for k, a in feed.items()}, 1) for row in range(rows)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _only_row(name: str, array: Any) -> Any:
    if array.ndim == 0 or len(array) != 1:
        raise StepError(f"output {name} {array.shape} has not one row for one request")
    return array[0]


def _of_rank(array: Any, rank: int) -> Any:
    """Triton has no empty shapes: a scalar has an axis of 1 there, and none in its network."""
    if array.ndim == rank + 1 and array.shape[-1] == 1:
        return array.reshape(array.shape[:-1])
    return array.reshape(*array.shape, 1) if array.ndim == rank - 1 else array


def _as_text(array: Any) -> Any:
    """BYTES as the `str` that ONNX Runtime takes."""
    if array.dtype != np.object_:
        return array
    texts = [element.decode() for element in array.ravel()]
    return np.array(texts, dtype=np.object_).reshape(array.shape)


def _as_bytes(array: Any) -> Any:
    if array.dtype.kind not in "OU":
        return array
    made = np.empty(array.size, dtype=np.object_)
    made[:] = [str(element).encode() for element in array.ravel()]
    return made.reshape(array.shape)
