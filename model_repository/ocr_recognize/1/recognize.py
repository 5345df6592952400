"""Text out of crops: what `ocr_recognize` computes, without Triton.

Invariant: a crop's text depends on the crop, its line width and its direction, not on the batch it
is served in. Constants and rounding are those of RapidOCR 1.4; decoding is greedy CTC: the best
class of each step, repetitions merged, blanks dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

HEIGHT_PX = 48
MAX_WIDTH_PX = 48 * 2000  # one pixel high and as wide as a canvas gets
BLANK = 0

# Normalised value of each of the 256 levels.
_LEVELS = (np.arange(256, dtype=np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)


@dataclass(frozen=True)
class Line:
    """One crop [height, width, 3], turned upright, and the width it is padded to."""

    pixels: npt.NDArray[np.uint8]
    width_px: int


def decode_line(pixels: bytes, size: tuple[int, int], width_px: int, upside_down: bool) -> Line:
    """The crop, turned upright. Raises ValueError if bytes and sizes don't fit."""
    height, width = size
    if height < 1 or width < 1 or len(pixels) != height * width * 3:
        raise ValueError(
            f"crop of {len(pixels)} bytes does not fit crop_size {height} x {width}: "
            f"send height * width * 3 bytes"
        )
    if not HEIGHT_PX <= width_px <= MAX_WIDTH_PX:
        raise ValueError(f"line_width {width_px} is outside {HEIGHT_PX}..{MAX_WIDTH_PX}")
    crop = np.frombuffer(pixels, dtype=np.uint8).reshape(height, width, 3)
    if upside_down:
        crop = np.ascontiguousarray(crop[::-1, ::-1])
    return Line(crop, width_px)


def same_width(lines: Sequence[Line]) -> dict[int, list[int]]:
    """Positions of the lines of each width: one run of the network each."""
    groups: dict[int, list[int]] = {}
    for position, line in enumerate(lines):
        groups.setdefault(line.width_px, []).append(position)
    return groups


def network_input(lines: Sequence[Line]) -> npt.NDArray[np.float32]:
    """Lines of one width as a batch [rows, 3, 48, width], padded with zeros on the right."""
    batch = np.zeros((len(lines), 3, HEIGHT_PX, lines[0].width_px), dtype=np.float32)
    for row, line in zip(batch, lines, strict=True):
        height, width = line.pixels.shape[:2]
        scaled_w = min(line.width_px, math.ceil(HEIGHT_PX * (width / height)))
        scaled = cv2.resize(line.pixels, (scaled_w, HEIGHT_PX))
        row[:, :, :scaled_w] = cv2.LUT(scaled, _LEVELS).transpose(2, 0, 1)
    return batch


def alphabet(character: str) -> list[str]:
    """Class number -> character, from the model's metadata: blank, one a line, space."""
    return ["", *character.splitlines(), " "]


def read(scores: npt.NDArray[np.float32], characters: Sequence[str]) -> list[tuple[str, float]]:
    """Class scores [rows, steps, classes] -> text and mean confidence of each row."""
    answers = []
    for best, score in zip(scores.argmax(axis=2), scores.max(axis=2), strict=True):
        starts = np.append(True, best[1:] != best[:-1]) & (best != BLANK)
        text = "".join(characters[index] for index in best[starts])
        confidence = float(score[starts].mean(dtype=np.float64)) if text else 0.0
        answers.append((text, confidence))
    return answers
