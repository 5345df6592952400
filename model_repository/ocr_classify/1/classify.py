"""Is a crop upside down? What `ocr_classify` computes, without Triton.

Invariant: a crop's answer does not depend on the batch it is in, for every crop is scaled to a
height of 48 px and padded to the same width. Constants are those of RapidOCR 1.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

HEIGHT_PX = 48
WIDTH_PX = 192
TURNED = 1  # class 0 is upright, class 1 turned by 180 degrees
MIN_SCORE = 0.9

# Normalised value of each of the 256 levels.
_LEVELS = (np.arange(256, dtype=np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)


def decode_crop(pixels: bytes, height: int, width: int) -> npt.NDArray[np.uint8]:
    """The crop as [height, width, 3]. Raises ValueError if the bytes don't fit the size."""
    if height < 1 or width < 1 or len(pixels) != height * width * 3:
        raise ValueError(
            f"crop of {len(pixels)} bytes does not fit crop_size {height} x {width}: "
            f"send height * width * 3 bytes"
        )
    return np.frombuffer(pixels, dtype=np.uint8).reshape(height, width, 3)


def network_input(crops: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
    """The batch [rows, 3, 48, 192], padded with zeros on the right."""
    batch = np.zeros((len(crops), 3, HEIGHT_PX, WIDTH_PX), dtype=np.float32)
    for row, crop in zip(batch, crops, strict=True):
        height, width = crop.shape[:2]
        scaled_w = min(WIDTH_PX, math.ceil(HEIGHT_PX * (width / height)))
        scaled = cv2.resize(crop, (scaled_w, HEIGHT_PX))
        row[:, :, :scaled_w] = cv2.LUT(scaled, _LEVELS).transpose(2, 0, 1)
    return batch


def verdicts(
    scores: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Class scores [rows, 2] -> upside down or not [rows], and the winning class's score [rows]."""
    best = scores.argmax(axis=1)
    score = scores.max(axis=1)
    return (best == TURNED) & (score > MIN_SCORE), score
