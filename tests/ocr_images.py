"""Images for the OCR tests and benches: RGB, uint8, height x width x 3.

One image comes from the scikit-image wheel, the others are rendered here with Pillow's built-in
font, so nothing binary is committed. Together they cover what changes the path through the chain:
several lines, text the classifier must turn, text the extractor must turn, slanted text, no text,
letterboxing, enlarging and shrinking.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

RgbImage = npt.NDArray[np.uint8]

PANGRAMS = (
    "The quick brown fox",
    "jumps over the lazy dog",
    "Invoice No. 2024-0815",
    "Total: 1,234.56 EUR",
    "Sphinx of black quartz",
    "judge my vow",
)


def page() -> RgbImage:
    """A photographed page of text in uneven light (scikit-image's page.png)."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("page.png ships in scikit-image, which is not installed")
    with Image.open(Path(spec.origin).parent / "data" / "page.png") as image:
        return np.asarray(image.convert("RGB"))


def lines() -> RgbImage:
    """Six lines of different length and size on white."""
    return render(PANGRAMS, size_px=28, shape=(360, 520))


def upside_down() -> RgbImage:
    """The same lines turned by 180 degrees: the classifier must turn each crop back."""
    return np.ascontiguousarray(np.rot90(lines(), 2))


def sideways() -> RgbImage:
    """Lines running from bottom to top: the extractor must turn tall crops."""
    return np.ascontiguousarray(np.rot90(render(PANGRAMS[:3], size_px=30, shape=(200, 480))))


def skewed() -> RgbImage:
    """Lines slanted by seven degrees: crops need a perspective correction."""
    image = Image.fromarray(render(PANGRAMS[:4], size_px=28, shape=(380, 560)))
    turned = image.rotate(7, resample=Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))
    return np.asarray(turned)


def blank() -> RgbImage:
    """No text at all: zero boxes, zero sub-requests."""
    return np.full((240, 320, 3), 255, dtype=np.uint8)


def tiny() -> RgbImage:
    """20 x 60 pixels with one short word: enlarged before detection."""
    return render(("Hi 42",), size_px=15, shape=(20, 60), margin_px=2)


def speck() -> RgbImage:
    """3 x 5 pixels: smaller than any glyph."""
    return np.full((3, 5, 3), 128, dtype=np.uint8)


def banner() -> RgbImage:
    """A strip more than eight times as wide as high: letterboxed before detection."""
    return render(("Serving chains of networks at the edge of the SLO",), 26, (44, 720), 6)


def large() -> RgbImage:
    """3000 x 2400 pixels, more lines than one batch holds: shrunk before detection."""
    texts = tuple(f"Row {i + 1:02d}: {PANGRAMS[i % len(PANGRAMS)]}" for i in range(14))
    return render(texts, size_px=96, shape=(2400, 3000), margin_px=80)


def coloured() -> RgbImage:
    """Red on blue: a mix-up of RGB and BGR changes what the detector sees."""
    return render(PANGRAMS[2:4], 34, (140, 480), ink=(250, 220, 40), paper=(10, 40, 160))


ALL: dict[str, Callable[[], RgbImage]] = {
    function.__name__: function
    for function in (
        page,
        lines,
        upside_down,
        sideways,
        skewed,
        blank,
        tiny,
        speck,
        banner,
        large,
        coloured,
    )
}


def render(
    texts: Sequence[str],
    size_px: int,
    shape: tuple[int, int],
    margin_px: int = 24,
    ink: tuple[int, int, int] = (0, 0, 0),
    paper: tuple[int, int, int] = (255, 255, 255),
) -> RgbImage:
    """`texts` below each other, evenly spread over an image of `shape` (height, width)."""
    height, width = shape
    image = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=size_px)
    pitch_px = (height - 2 * margin_px) / len(texts)
    for row, text in enumerate(texts):
        centre = margin_px + pitch_px * (row + 0.5)
        draw.text((margin_px, centre), text, fill=ink, font=font, anchor="lm")
    return np.asarray(image)
