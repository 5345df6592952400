"""Text boxes out of a heat map, and their crops: what `ocr_extract` computes, without Triton.

Invariant: item i of every result belongs to box i, and boxes are in reading order. The method is
that of DB ("Real-time Scene Text Detection with Differentiable Binarization", section 3.5: shrunk
text kernels are grown back by area * ratio / perimeter), with the constants and the rounding of
RapidOCR 1.4, so that the chain reads the same strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyclipper

Box = npt.NDArray[np.float32]  # [4, 2]: x, y of top left, top right, bottom right, bottom left
Image = npt.NDArray[np.uint8]
Points = npt.NDArray[np.integer[Any] | np.floating[Any]]

PIXEL_THRESHOLD = 0.3
BOX_THRESHOLD = 0.5
GROWTH = 1.6
MAX_CANDIDATES = 1000
MIN_KERNEL_SIDE_PX = 3
SAME_LINE_PX = 10
UPRIGHT_ASPECT = 1.5  # height / width from which a crop is taken to run upwards

LINE_HEIGHT_PX = 48  # of the recogniser's input
MIN_LINE_WIDTH_PX = 320
LINES_PER_GROUP = 6


def find_boxes(heatmap: npt.NDArray[np.float32], canvas_h: int, canvas_w: int) -> list[Box]:
    """Boxes on the canvas, whole pixels, in reading order.

    `heatmap` [h, w] holds the probability of text for each pixel of the detector's input.
    """
    mask = (heatmap > PIXEL_THRESHOLD).astype(np.uint8)
    bright = cv2.dilate(mask * 255, np.ones((2, 2), dtype=np.uint8))
    contours, _ = cv2.findContours(bright, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    boxes = []
    for contour in contours[:MAX_CANDIDATES]:
        kernel, short_side = _least_rectangle(contour)
        if short_side < MIN_KERNEL_SIDE_PX or _mean_inside(heatmap, kernel) < BOX_THRESHOLD:
            continue
        grown, short_side = _least_rectangle(_grow(kernel))
        if short_side < MIN_KERNEL_SIDE_PX + 2:
            continue
        box = _on_canvas(grown, heatmap.shape, (canvas_h, canvas_w))
        if min(int(_distance(box[0], box[1])), int(_distance(box[0], box[3]))) > 3:
            boxes.append(box)
    return reading_order(boxes)


def reading_order(boxes: Sequence[Box]) -> list[Box]:
    """Top to bottom; boxes whose tops are less than 10 px apart are one line, left to right."""
    ordered: list[Box] = []
    for box in sorted(boxes, key=lambda corners: (corners[0][1], corners[0][0])):
        place = len(ordered)
        while (
            place > 0
            and abs(box[0][1] - ordered[place - 1][0][1]) < SAME_LINE_PX
            and box[0][0] < ordered[place - 1][0][0]
        ):
            place -= 1
        ordered.insert(place, box)
    return ordered


def cut(canvas: Image, box: Box) -> Image:
    """The box as an upright rectangle; text running upwards is turned to run to the right."""
    width = int(max(_distance(box[0], box[1]), _distance(box[2], box[3])))
    height = int(max(_distance(box[0], box[3]), _distance(box[1], box[2])))
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float32)
    crop = cv2.warpPerspective(
        canvas,
        cv2.getPerspectiveTransform(box, corners),
        (width, height),
        flags=cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_REPLICATE,
    )
    if height / width >= UPRIGHT_ASPECT:
        crop = np.rot90(crop)
    return np.ascontiguousarray(crop, dtype=np.uint8)


def line_widths(sizes: Sequence[tuple[int, int]]) -> npt.NDArray[np.int32]:
    """Width in pixels that each crop (height, width) is padded to for recognition.

    Crops are grouped by six in the order of their aspect ratio, and a group is as wide as its
    widest. The recogniser's output depends a little on padding, so the width goes with the crop,
    whatever batch it is then served in.
    """
    ratios = np.array([width / height for height, width in sizes], dtype=np.float64)
    widths = np.zeros(len(ratios), dtype=np.int32)
    order = np.argsort(ratios)  # not stable, on purpose: equal ratios fall as in the reference
    for start in range(0, len(order), LINES_PER_GROUP):
        group = order[start : start + LINES_PER_GROUP]
        widest = max(MIN_LINE_WIDTH_PX / LINE_HEIGHT_PX, float(ratios[group].max()))
        widths[group] = int(LINE_HEIGHT_PX * widest)
    return widths


def to_image(boxes: Sequence[Box], geometry: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Boxes [N, 4, 2] in pixels of the client's image; `geometry` as `ocr_prepare` gives it."""
    scale_y, scale_x, offset_y, offset_x, height, width = geometry
    points = np.array(boxes, dtype=np.float32).reshape(-1, 4, 2)
    points = (points - np.array([offset_x, offset_y])) * np.array([scale_x, scale_y])
    inside: npt.NDArray[np.float32] = np.clip(points, 0, [width, height]).astype(np.float32)
    return inside


def _least_rectangle(points: Points) -> tuple[Box, float]:
    """The smallest rectangle, at any angle, around `points`, and its shorter side."""
    rectangle = cv2.minAreaRect(points)
    return _corners_in_order(cv2.boxPoints(rectangle)), min(rectangle[1])


def _corners_in_order(points: Points) -> Box:
    """Top left, top right, bottom right, bottom left: split by x, then each half by y."""
    by_x = points[np.argsort(points[:, 0], kind="stable")]
    left, right = by_x[:2], by_x[2:]
    top_left, bottom_left = left[np.argsort(left[:, 1], kind="stable")]
    top_right, bottom_right = right[np.argsort(right[:, 1], kind="stable")]
    return np.array([top_left, top_right, bottom_right, bottom_left], dtype=np.float32)


def _mean_inside(heatmap: npt.NDArray[np.float32], box: Box) -> float:
    """Mean probability inside the box."""
    height, width = heatmap.shape
    left, right = np.clip([np.floor(box[:, 0].min()), np.ceil(box[:, 0].max())], 0, width - 1)
    top, bottom = np.clip([np.floor(box[:, 1].min()), np.ceil(box[:, 1].max())], 0, height - 1)
    window = heatmap[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
    inside = np.zeros(window.shape, dtype=np.uint8)
    outline = box - np.array([left, top], dtype=np.float32)
    cv2.fillPoly(inside, [outline.astype(np.int32)], 1)  # type: ignore[call-overload]
    return float(cv2.mean(window, inside)[0])


def _grow(box: Box) -> npt.NDArray[np.int32]:
    """The outline moved outwards by area * ratio / perimeter."""
    corners = box.astype(np.float64)
    following = np.roll(corners, -1, axis=0)
    area = abs(np.sum(corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1])) / 2
    perimeter = np.sum(np.hypot(*(following - corners).T))
    offset = pyclipper.PyclipperOffset()
    offset.AddPath(box, pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
    outlines = offset.Execute(area * GROWTH / perimeter)
    outline: npt.NDArray[np.int32] = np.concatenate(outlines).astype(np.int32)
    return outline.reshape(-1, 1, 2)


def _on_canvas(box: Box, heatmap_hw: tuple[int, ...], canvas_hw: tuple[int, int]) -> Box:
    """The box scaled from the heat map to the canvas, on whole pixels inside it."""
    (map_h, map_w), (canvas_h, canvas_w) = heatmap_hw, canvas_hw
    scaled = box / np.array([map_w, map_h], np.float32) * np.array([canvas_w, canvas_h], np.float32)
    inside = np.clip(np.round(scaled), 0, [canvas_w, canvas_h])
    ordered = _corners_in_order(inside)
    return np.minimum(ordered, [canvas_w - 1, canvas_h - 1]).astype(np.float32)


def _distance(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(a - b))
