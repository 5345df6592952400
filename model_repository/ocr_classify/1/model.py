"""`ocr_classify` on Triton's Python backend: crops -> upside down or not (see classify.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils
from classify import decode_crop, network_input, verdicts


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        cv2.setNumThreads(1)  # Paceline scales by instances, here and in the session
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False
        self._model = args["model_name"]
        file = Path(args["model_repository"], args["model_version"], "model.onnx")
        self._session = ort.InferenceSession(file, options, ["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        pixels, sizes = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in ("crop", "crop_size")
        )
        try:
            crops = [
                decode_crop(row, *map(int, size))
                for row, size in zip(pixels[:, 0], sizes, strict=True)
            ]
        except ValueError as error:
            message = f"{self._model}: {error}"
            failure = pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=failure)
        (scores,) = self._session.run(None, {self._input: network_input(crops)})
        upside_down, score = verdicts(np.asarray(scores))
        results = {"upside_down": upside_down, "score": score}
        wanted = set(request.requested_output_names())
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(n, rows.reshape(-1, 1)) for n, rows in results.items() if n in wanted]
        )
