"""PISeL's pipeline as a Triton model: the model.py that `bench_blocks.py served` writes.

Like blocks, it answers Triton as soon as requests can come, and its first one overlaps with the
load. Parameters: `python` (directories of our modules), `pool`, `manifest` (its digest), `url` (of
a store; empty: the pool).
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: Mapping[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        given = {name: value["string_value"] for name, value in parameters.items()}
        sys.path[:0] = given["python"].split(os.pathsep)
        from scripts.blocks_in_order import InOrder, Stages

        from paceline.blocks.backend.objects import ObjectStore

        gc.freeze()  # as the backend for blocks does
        store = ObjectStore(Path(given["pool"]))
        manifest = store.manifest(given["manifest"])
        self._model = InOrder(store, manifest, given["url"], Stages(), optimise=True)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        member = self._model.member
        responses = []
        for request in requests:
            given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            values = self._model.infer({one.value: given[one.name] for one in member.inputs})
            outputs = [pb_utils.Tensor(one.name, values[one.value]) for one in member.outputs]
            responses.append(pb_utils.InferenceResponse(outputs))
        return responses

    def finalize(self) -> None:
        self._model.join()
