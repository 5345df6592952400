"""ONNX Runtime sessions of blocks, built over mapped pages without touching a weight.

The graphs were optimised by the compiler, so a session neither optimises nor repacks: it is nodes
and pointers (Cicada's MiniLoader taken to its end). Blocks of equal `key` share one session, also
between the members of a fused model. All sessions of the process share one arena: one each would
keep a copy of the largest activations apiece. It grows by large regions, of which only what is
touched is memory: with regions as small as what is asked for, every batch larger than the ones
before finds none that it fits (286 MiB instead of 72 after ViT-B/16 at 1, 2, ... 8). What a run
takes still depends on what ran before it: `empty_arena` is for those whose memory is limited.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from .held_turn import FreeTurns, HeldTurn, Turns
from .loader import FIRST_BACKOFF_S, LONGEST_BACKOFF_S
from .manifest import Block, PoolError
from .mapping import MappedObject
from .source import Waiting

DTYPES: Mapping[str, Any] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
FOLDER = "session.model_external_initializers_file_folder_path"
"""The option for graphs that come as bytes: they have no directory of their own."""
_FIRST_REGION_BYTES = 32 << 20
"""Of an empty arena; later ones double."""
_KEPT_REGION_BYTES = 64 << 10
"""The very first region is never given back, so it is a small one."""
NOTHING = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a0179"
    "120a0a08080112040a02080142040a00100d"
)
"""An ONNX model: y = Identity(x), one float. Running it is how an arena is told to give back."""
_arena_lock = threading.Lock()
_arena: list[Callable[[], None]] = []
"""What empties it, once there is one."""


class Session:
    """A block's session; `run` takes and gives values by position."""

    def __init__(
        self,
        graph: bytes,
        block: Block,
        folder: Path,
        objects: Mapping[str, MappedObject],
        threads: int,
    ) -> None:
        """`folder`: where `external` is, the file that the graph says its weights are in."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # A plan of a run's memory, by shape, is allocated whole beside what runs of other shapes
        # left: twice the memory, and none of the time.
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry(FOLDER, str(folder))
        _share_arena()
        # ONNX Runtime reads them when the session is made and refers to their memory ever after.
        values = []
        for weight in block.weights:
            view = objects[weight.object].view(
                weight.offset, weight.bytes, DTYPES[weight.dtype], weight.shape
            )
            value = ort.OrtValue.ortvalue_from_numpy(view)
            if value.data_ptr() != view.ctypes.data:
                raise PoolError(
                    f"graph {block.graph}: weight {weight.name} would be copied: misaligned"
                )
            options.add_initializer(weight.name, value)
            values.append((value, view))
        try:
            self._session = ort.InferenceSession(graph, options, ["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions share no useful base class
            raise PoolError(
                f"graph {block.graph}: ONNX Runtime refuses it: {_line(error)}"
            ) from None
        self._views = [view for _, view in values]
        self._inputs = [node.name for node in self._session.get_inputs()]
        self._outputs = [node.name for node in self._session.get_outputs()]
        if (len(self._inputs), len(self._outputs)) != (len(block.inputs), len(block.outputs)):
            raise PoolError(f"graph {block.graph}: its inputs and outputs are not the manifest's")

    def run(self, values: list[Any]) -> list[Any]:
        """OrtValues in, OrtValues out."""
        feed = dict(zip(self._inputs, values, strict=True))
        results: list[Any] = self._session.run_with_ort_values(self._outputs, feed)
        return results


class Skeleton:
    """Sessions of all blocks, built in order by a thread; a run waits for the one it needs.

    Building takes turns with the other loads of the machine, as many at a time as there are cores.
    One that cannot be built fails the runs that need it, no others, and is tried again after a
    back-off: a graph that comes back is enough to heal a model, as weights are (`loader`).
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        graph: Callable[[Block, Waiting], bytes],
        folder: Path,
        objects: Mapping[str, MappedObject],
        threads: int,
        on_device: Callable[[bytes, Block], Any] | None = None,
        *,
        turns: Turns | None = None,
        urgent: Callable[[], bool] = lambda: False,
    ) -> None:
        """`on_device` makes sessions whose weights are elsewhere than in `objects`; `urgent` says
        whether a request waits for something else than a session.
        """
        self._blocks = blocks
        self._graph = graph
        self._make = on_device or partial(Session, folder=folder, objects=objects, threads=threads)
        self._built: dict[str, Any] = {}
        self._errors: dict[str, Exception] = {}
        """Of sessions that could not be built, until they are tried again."""
        self._changed = threading.Condition()
        self._awaited = 0
        self._turn = HeldTurn(turns or FreeTurns(), lambda: self._awaited > 0 or urgent())
        self._closed = False
        self._thread = threading.Thread(target=self._build, name="blocks-skeleton", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def run(self, block: int, values: list[Any]) -> list[Any]:
        """See `run.Sessions`. Raises PoolError if the session could not be built."""
        key = self._blocks[block].key
        session = self._built.get(key)
        if session is None:
            session = self._await(key)
        results: list[Any] = session.run(values)
        return results

    def close(self) -> None:
        """Ends the thread; sessions stay usable by runs that have them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _await(self, key: str) -> Any:
        with self._changed:
            self._awaited += 1
            self._changed.wait_for(
                lambda: key in self._built or key in self._errors or self._closed
            )
            self._awaited -= 1
            if key in self._built:
                return self._built[key]
            raise self._errors.get(key) or PoolError("the model is being unloaded")

    def _build(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._build_missing():
            self._turn.end()
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, backoff_s):
                    return
            backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
        self._turn.end()

    def _build_missing(self) -> bool:
        """Tries each session that there is not yet, once; whether none is left to be tried."""
        for block in {block.key: block for block in self._blocks}.values():
            if self._closed:
                return True
            if block.key in self._built:
                continue
            with self._changed:
                self._errors.pop(block.key, None)  # who needs it waits for what comes of this try
            try:
                session = self._build_one(block)
            except Exception as error:  # a thread that died would leave runs waiting for ever
                with self._changed:
                    self._errors[block.key] = error
                    self._changed.notify_all()
                continue
            with self._changed:
                self._built[block.key] = session
                self._changed.notify_all()
        return not self._errors

    def _build_one(self, block: Block) -> Any:
        graph = self._graph(block, self._turn.without)
        if self._turn.over:
            self._turn.begin()
        began_s = time.perf_counter()
        try:
            return self._make(graph, block)
        finally:
            self._turn.used(time.perf_counter() - began_s)


def ort_version() -> str:
    """Of the runtime that is here."""
    return str(ort.__version__)


def available_providers() -> list[str]:
    """What this ONNX Runtime runs on."""
    return list(ort.get_available_providers())


def to_value(array: Any) -> Any:
    """An OrtValue over the array's memory, or over a copy of one that is not contiguous."""
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array).reshape(array.shape))


def empty_arena() -> None:
    """Gives back what no run holds, so that the next one finds it as the first did."""
    with _arena_lock:
        for empty in _arena:
            empty()


def _share_arena() -> None:
    with _arena_lock:
        if _arena:
            return
        memory = ort.OrtMemoryInfo(
            "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
        )
        grow = ort.OrtArenaCfg(
            {
                "initial_chunk_size_bytes": _KEPT_REGION_BYTES,
                "initial_growth_chunk_size_bytes": _FIRST_REGION_BYTES,
            }
        )
        ort.create_and_register_allocator(memory, grow)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.use_env_allocators", "1")
        session = ort.InferenceSession(NOTHING, options, ["CPUExecutionProvider"])
        giving_back = ort.RunOptions()
        giving_back.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        one = {"x": ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32))}

        def empty() -> None:
            session.run_with_ort_values(["y"], one, giving_back)

        empty()  # regions as large as after a shrinkage, from the first on
        _arena.append(empty)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
