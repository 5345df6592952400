"""An image, ready for the text detector: what `ocr_prepare` computes, without Triton.

Invariant: the detector's input depends on the image alone, and `geometry` is all that is needed to
map a point of the canvas back to the image. Sizes and rounding are those of RapidOCR 1.4, so that
the chain reads the same strings: the longer side is shrunk to 2000 px, the shorter one enlarged to
30 px, a strip gets black bars above and below, and the detector sees a shorter side of 736 px or
more in multiples of 32 px.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

MAX_SIDE_PX = 2000
MIN_SIDE_PX = 30
MAX_ASPECT = 8  # width / height; a longer strip is letterboxed
DETECTOR_SIDE_PX = 736
STRIDE_PX = 32  # the detector halves its input five times

# A sliver of 1 x 1000 pixels would be enlarged to 30 x 30,000; what the detector would then need
# in memory is no longer a matter of the request's size, so it is bounded here.
MAX_DETECTOR_PIXELS = 8_000_000

# Normalised value of each of the 256 levels, rounded as the reference does: in double precision.
_LEVELS = ((np.arange(256, dtype=np.float32) * (1 / 255.0) - np.array([0.5])) / 0.5).astype(
    np.float32
)


@dataclass(frozen=True)
class Layout:
    """Sizes in pixels between an image (height, width) and the detector's input."""

    image: tuple[int, int]
    scaled: tuple[int, int]
    bar_px: int  # black bar above, and as high below
    detector: tuple[int, int]

    @property
    def geometry(self) -> npt.NDArray[np.float32]:
        """[scale y, scale x, offset y, offset x, image height, image width].

        image point = (canvas point - offset) * scale, clipped to the image.
        """
        height, width = self.image
        scale = (height / self.scaled[0], width / self.scaled[1])
        return np.array([*scale, self.bar_px, 0, height, width], dtype=np.float32)


def lay_out(height: int, width: int) -> Layout:
    """Sizes for an image of `height` x `width`.

    Raises ValueError for an empty image and for one so long and thin that the detector's input
    would exceed `MAX_DETECTOR_PIXELS`.
    """
    if height < 1 or width < 1:
        raise ValueError(f"image is empty ({height} x {width}): send at least one pixel")
    scaled_h, scaled_w = height, width
    if max(height, width) > MAX_SIDE_PX:
        scaled_h, scaled_w = _scale(height, width, MAX_SIDE_PX / max(height, width))
    elif min(height, width) < MIN_SIDE_PX:
        scaled_h, scaled_w = _scale(height, width, MIN_SIDE_PX / min(height, width))
    bar_px = 0
    if scaled_h <= MIN_SIDE_PX or scaled_w / scaled_h > MAX_ASPECT:
        boxed_h = 2 * max(int(scaled_w / MAX_ASPECT), MIN_SIDE_PX)
        bar_px = abs(boxed_h - scaled_h) // 2
    canvas_h = scaled_h + 2 * bar_px
    ratio = max(1.0, DETECTOR_SIDE_PX / min(canvas_h, scaled_w))
    detector = _scale(canvas_h, scaled_w, ratio)
    if detector[0] * detector[1] > MAX_DETECTOR_PIXELS:
        raise ValueError(
            f"image of {height} x {width} pixels is too long and thin: it would be scaled to "
            f"{detector[0]} x {detector[1]} (limit {MAX_DETECTOR_PIXELS:,} pixels): send parts"
        )
    return Layout((height, width), (scaled_h, scaled_w), bar_px, detector)


def prepare(
    image: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """RGB uint8 [H, W, 3] -> detector input float32 [3, h, w], canvas BGR uint8, geometry [6]."""
    layout = lay_out(image.shape[0], image.shape[1])
    canvas = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    if layout.scaled != layout.image:
        canvas = cv2.resize(canvas, layout.scaled[::-1])
    if layout.bar_px:
        black = (0, 0, 0)
        bar = layout.bar_px
        canvas = cv2.copyMakeBorder(canvas, bar, bar, 0, 0, cv2.BORDER_CONSTANT, value=black)
    seen = cv2.resize(canvas, layout.detector[::-1])
    planes = [cv2.LUT(channel, _LEVELS) for channel in cv2.split(seen)]
    x = np.stack(planes).astype(np.float32, copy=False)
    return x, canvas.astype(np.uint8, copy=False), layout.geometry


def _scale(height: int, width: int, ratio: float) -> tuple[int, int]:
    """Both sides times `ratio`, rounded to multiples of the stride, at least one stride."""
    scaled = (int(height * ratio), int(width * ratio))
    return (
        max(STRIDE_PX, round(scaled[0] / STRIDE_PX) * STRIDE_PX),
        max(STRIDE_PX, round(scaled[1] / STRIDE_PX) * STRIDE_PX),
    )
