"""What the reference pipeline reads in an image: `rapidocr_onnxruntime.RapidOCR`, run directly.

The oracle of the OCR chain's tests. It shares no code with the model repository.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt


def reference_lines(image: npt.NDArray[np.uint8]) -> list[tuple[str, float]]:
    """Lines of an RGB image in reading order, with confidence; those below 0.5 are left out."""
    found, _ = _pipeline()(np.ascontiguousarray(image[:, :, ::-1]))  # the pipeline takes BGR
    return [(text, float(confidence)) for _, text, confidence in found or []]


def reference_boxes(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Corners [N, 4, 2] (x, y) of the same lines, in pixels of the image."""
    found, _ = _pipeline()(np.ascontiguousarray(image[:, :, ::-1]))
    corners = [box for box, _, _ in found or []]
    return np.asarray(corners, dtype=np.float32).reshape(-1, 4, 2)


@functools.cache
def _pipeline() -> Any:
    from rapidocr_onnxruntime import RapidOCR

    return RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)
