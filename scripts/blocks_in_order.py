"""PISeL's pipeline, which Cicada is compared with: fetch, construct and compute in layer order.

Over blocks of the graph as it came (or compiled ones), each stage on a thread of its own. Imports
little: on Triton (`blocks_in_order_model.py`) importing is a part of the load.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from paceline.blocks.backend.manifest import Block, Manifest
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.backend.skeleton import DTYPES, FOLDER
from paceline.blocks.backend.store import HttpStore, Part

Bytes = bytes | memoryview


class Stages:
    """How long each stage of a pipeline was at work."""

    def __init__(self) -> None:
        self.busy_s: dict[str, float] = {}

    def timed(self, stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return work(*arguments, **named)
            finally:
                took_s = time.perf_counter() - began_s
                self.busy_s[stage] = self.busy_s.get(stage, 0.0) + took_s

        return timed


class InOrder:
    """A model that begins to load when it is made, and takes requests at once.

    `url`: of a store with the pool's objects; its requests are out as far ahead as ours. Blocks are
    constructed as ONNX Runtime does by default: optimised, weights copied and packed. Of compiled
    blocks nothing is left to `optimise`: what then is left is the pipeline alone.
    """

    def __init__(
        self, store: ObjectStore, manifest: Manifest, url: str, stages: Stages, *, optimise: bool
    ) -> None:
        self.member = manifest.members[0]
        self._store = store
        self._remote = HttpStore(url) if url else None
        self._optimise = optimise
        self._parts = {
            digest: Part(f"objects/{digest}", 0, manifest.objects[digest].size_bytes)
            for block in self.member.blocks
            for digest in (*(weight.object for weight in block.weights), block.graph)
        }
        self._kept: list[Any] = []
        self._sessions: list[ort.InferenceSession] = []
        self._read = stages.timed("fetch", self._read_one)
        self._build = stages.timed("construct", self._session_of)
        self._compute = stages.timed("compute", ort.InferenceSession.run)
        self._fetched: queue.Queue[tuple[Block, Bytes, dict[str, Bytes]]] = queue.Queue()
        self._built: queue.Queue[ort.InferenceSession] = queue.Queue()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._fetch, self._construct)
        ]
        for thread in self._threads:
            thread.start()

    def infer(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """All values by name, from those of the inputs; one call at a time."""
        values = dict(feed)
        for position, block in enumerate(self.member.blocks):
            if position == len(self._sessions):
                self._sessions.append(self._built.get())
            session = self._sessions[position]
            given = {
                node.name: values[value]
                for node, value in zip(session.get_inputs(), block.inputs, strict=True)
            }
            results = self._compute(session, None, given)
            values.update(zip(block.outputs, results, strict=True))
        return values

    def join(self) -> None:
        """Waits for the end of the load."""
        for thread in self._threads:
            thread.join()

    def _fetch(self) -> None:
        have: dict[str, Bytes] = {}
        for block in self.member.blocks:
            for digest in (*(weight.object for weight in block.weights), block.graph):
                if digest not in have:
                    have[digest] = self._read(digest)
            needed = {weight.object: have[weight.object] for weight in block.weights}
            self._fetched.put((block, have[block.graph], needed))

    def _read_one(self, digest: str) -> Bytes:
        if self._remote is None:
            return self._store.path(digest).read_bytes()
        part = self._parts.pop(digest)
        self._remote.expect(tuple(self._parts.values()))
        return self._remote.read(part)

    def _construct(self) -> None:
        for _ in self.member.blocks:
            self._built.put(self._build(*self._fetched.get()))

    def _session_of(
        self, block: Block, graph: Bytes, objects: Mapping[str, Bytes]
    ) -> ort.InferenceSession:
        """As ONNX Runtime makes them; what must live as long is kept."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        values = []
        for weight in block.weights:
            text = objects[weight.object][weight.offset : weight.offset + weight.bytes]
            array = np.frombuffer(text, DTYPES[weight.dtype]).reshape(weight.shape)
            values.append(ort.OrtValue.ortvalue_from_numpy(array))
        names = [weight.name for weight in block.weights]
        if self._optimise:  # the optimiser cannot see through `add_initializer`; this copies
            options.add_external_initializers(names, values)
            values.clear()
        for name, value in zip(names, values, strict=False):
            options.add_initializer(name, value)
            self._kept.append((objects, value))
        if self._remote is not None:
            options.add_session_config_entry(FOLDER, str(self._store.root / "objects"))
        model = str(self._store.path(block.graph)) if self._remote is None else bytes(graph)
        return ort.InferenceSession(model, options, ["CPUExecutionProvider"])
