"""`ocr_extract` on Triton's Python backend: heat map and canvas -> N boxes and crops.

One request at a time, because the number of boxes differs. No box is a normal answer: every output
then has 0 on axis 0. See extract.py.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import triton_python_backend_utils as pb_utils
from extract import cut, find_boxes, line_widths, to_image


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        cv2.setNumThreads(1)  # Paceline scales by instances

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        heatmap, canvas, geometry = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in ("heatmap", "canvas", "geometry")
        )
        boxes = find_boxes(heatmap[0], canvas.shape[0], canvas.shape[1])
        crops = [cut(canvas, box) for box in boxes]
        sizes = [(crop.shape[0], crop.shape[1]) for crop in crops]
        pixels = np.empty((len(crops), 1), dtype=np.object_)
        pixels[:, 0] = [crop.tobytes() for crop in crops]
        results = {
            "boxes": to_image(boxes, geometry),
            "crops": pixels,
            "crop_sizes": np.array(sizes, dtype=np.int32).reshape(-1, 2),
            "line_widths": line_widths(sizes).reshape(-1, 1),
        }
        wanted = set(request.requested_output_names())
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, array) for name, array in results.items() if name in wanted]
        )
