"""`ocr_prepare` on Triton's Python backend: image -> x, canvas, geometry (see prepare.py)."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import triton_python_backend_utils as pb_utils
from prepare import prepare


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        cv2.setNumThreads(1)  # Paceline scales by instances
        self._model = args["model_name"]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            images = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
            x, canvas, geometry = zip(*(prepare(image) for image in images), strict=True)
        except ValueError as error:
            message = f"{self._model}: {error}"
            failure = pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=failure)
        wanted = set(request.requested_output_names())
        results = {"x": x, "canvas": canvas, "geometry": geometry}
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(n, np.stack(rows)) for n, rows in results.items() if n in wanted]
        )
