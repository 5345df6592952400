"""Each step of the OCR example against the same step of the reference pipeline.

The steps are the Triton-free halves of the models. Equality is exact where the arithmetic is the
same; the strings of whole images are compared on a real Triton, in tests/integration.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts.prepare_models import REPOSITORY, load_step
from tests import ocr_images

prepare, extract, classify, recognize = (
    load_step(REPOSITORY, f"ocr_{step}") for step in ("prepare", "extract", "classify", "recognize")
)

IMAGES = pytest.mark.parametrize("name", [n for n in ocr_images.ALL if n != "large"])
sides = st.integers(min_value=4, max_value=400)
sizes = st.lists(st.tuples(sides, sides), min_size=0, max_size=40)


@functools.cache
def reference() -> Any:
    from rapidocr_onnxruntime import RapidOCR

    return RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)


def reference_canvas(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    scaled, _, _ = reference().preprocess(np.ascontiguousarray(image[:, :, ::-1]))
    canvas, _ = reference().maybe_add_letterbox(scaled, {})
    return np.asarray(canvas, dtype=np.uint8)


@pytest.mark.parametrize("name", list(ocr_images.ALL))
def test_detector_input_and_canvas_are_those_of_the_reference(name: str) -> None:
    image = ocr_images.ALL[name]()
    x, canvas, _ = prepare.prepare(image)
    expected = reference_canvas(image)
    detector = reference().text_det
    preprocess = detector.get_preprocess(max(expected.shape[:2]))
    np.testing.assert_array_equal(canvas, expected)
    np.testing.assert_array_equal(x, preprocess(expected)[0])


@IMAGES
def test_boxes_and_their_order_are_those_of_the_reference(name: str) -> None:
    x, canvas, _ = prepare.prepare(ocr_images.ALL[name]())
    detector = reference().text_det
    heatmap = detector.infer(x[np.newaxis])[0]
    raw, _ = detector.postprocess_op(heatmap, canvas.shape[:2])
    found = detector.filter_tag_det_res(raw, canvas.shape[:2])
    expected = reference().sorted_boxes(found) if len(found) else []
    boxes = extract.find_boxes(heatmap[0, 0], *canvas.shape[:2])
    assert [box.tolist() for box in boxes] == [box.tolist() for box in expected]
    cuts = reference().get_crop_img_list(canvas, expected)
    for box, cut in zip(boxes, cuts, strict=True):
        np.testing.assert_array_equal(extract.cut(canvas, box), cut)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=25))
def test_reading_order_is_that_of_the_reference(corners: list[tuple[int, int]]) -> None:
    boxes = [np.array([[x, y]] * 4, dtype=np.float32) for x, y in corners]
    expected = reference().sorted_boxes(np.array(boxes).reshape(-1, 4, 2))
    ordered = extract.reading_order(boxes)
    assert [box.tolist() for box in ordered] == [box.tolist() for box in expected]


@settings(deadline=None)
@given(sizes)
def test_line_widths_are_what_the_reference_pads_to(crop_sizes: list[tuple[int, int]]) -> None:
    seen = _RecordingSession()
    recognizer = reference().text_rec
    network, recognizer.session = recognizer.session, seen
    try:
        recognizer([_crop_of_size(h, w, number) for number, (h, w) in enumerate(crop_sizes)])
    finally:
        recognizer.session = network
    widths = extract.line_widths(crop_sizes)
    assert {n: int(w) for n, w in enumerate(widths)} == seen.width_of_crop


def test_boxes_are_mapped_back_through_scale_and_bars_and_clipped_to_the_image() -> None:
    geometry = np.array([2.0, 3.0, 10, 0, 100, 300], dtype=np.float32)
    box = np.array([[5, 20], [90, 20], [200, 70], [5, 5]], dtype=np.float32)
    mapped = extract.to_image([box], geometry)
    assert mapped.tolist() == [[[15, 20], [270, 20], [300, 100], [15, 0]]]


def test_no_boxes_are_mapped_to_an_empty_tensor_of_the_same_rank() -> None:
    geometry = np.array([1, 1, 0, 0, 10, 10], dtype=np.float32)
    assert extract.to_image([], geometry).shape == (0, 4, 2)
    assert extract.line_widths([]).shape == (0,)


@pytest.mark.parametrize(("height", "width"), [(0, 10), (10, 0)])
def test_an_empty_image_is_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match="image is empty"):
        prepare.lay_out(height, width)


def test_a_strip_that_shrinking_would_erase_keeps_one_stride() -> None:
    image = ocr_images.render(("one line",), 16, (20, 3000), 2)
    with pytest.raises(Exception):  # noqa: B017 - the reference's error has no message
        reference().preprocess(image)
    assert prepare.lay_out(20, 3000).scaled == (32, 1984)
    x, canvas, _ = prepare.prepare(image)
    assert canvas.shape[1:] == (1984, 3)
    assert x.shape[0] == 3


def test_a_sliver_that_would_take_gigabytes_is_refused_before_any_pixel_is_touched() -> None:
    with pytest.raises(ValueError, match="too long and thin"):
        prepare.lay_out(1, 1000)


@given(st.integers(1, 8000), st.integers(1, 8000))
def test_accepted_images_keep_the_detector_within_its_limit(height: int, width: int) -> None:
    try:
        layout = prepare.lay_out(height, width)
    except ValueError:
        return
    assert layout.detector[0] * layout.detector[1] <= prepare.MAX_DETECTOR_PIXELS
    assert all(side % prepare.STRIDE_PX == 0 and side > 0 for side in layout.detector)


@given(st.integers(1, 90), st.integers(1, 400))
@settings(deadline=None, max_examples=30)
def test_network_inputs_are_those_of_the_reference(height: int, width: int) -> None:
    crop = _crop_of_size(height, width, 7)
    expected = reference().text_cls.resize_norm_img(crop)
    np.testing.assert_array_equal(classify.network_input([crop])[0], expected)
    line_px = int(extract.line_widths([(height, width)])[0])
    line = recognize.Line(crop, line_px)
    ratio = max(320 / 48, width / height)
    expected = reference().text_rec.resize_norm_img(crop, ratio)
    np.testing.assert_array_equal(recognize.network_input([line])[0], expected)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(0, 2**31))
@settings(deadline=None)
def test_decoding_is_that_of_the_reference(classes: list[int], seed: int) -> None:
    decode = reference().text_rec.postprocess_op
    characters = decode.character
    scores = np.random.default_rng(seed).random((1, len(classes), len(characters)))
    scores = scores.astype(np.float32) * np.float32(0.5)
    scores[0, np.arange(len(classes)), classes] += np.float32(0.5)
    ((text, confidence),) = recognize.read(scores, _alphabet_of_the_network())
    ((expected_text, expected_confidence),) = decode(scores)
    assert text == expected_text
    assert confidence == pytest.approx(expected_confidence)


def test_repeated_characters_merge_unless_a_blank_is_between() -> None:
    scores = np.eye(4, dtype=np.float32)[[1, 1, 0, 1, 2, 0]][np.newaxis]
    assert recognize.read(scores, recognize.alphabet("a\nb")) == [("aab", 1.0)]


def test_a_line_of_blanks_is_an_empty_text_of_no_confidence() -> None:
    scores = np.eye(3, dtype=np.float32)[[0, 0]][np.newaxis]
    assert recognize.read(scores, recognize.alphabet("a")) == [("", 0.0)]


def test_a_crop_upside_down_is_turned_before_it_is_read() -> None:
    crop = _crop_of_size(4, 6, 1)
    line = recognize.decode_line(crop.tobytes(), (4, 6), 320, True)
    np.testing.assert_array_equal(line.pixels, np.rot90(crop, 2))


@pytest.mark.parametrize(("height", "width"), [(4, 7), (0, 6), (-4, -6)])
def test_a_crop_that_does_not_fit_its_size_is_refused(height: int, width: int) -> None:
    pixels = _crop_of_size(4, 6, 1).tobytes()
    with pytest.raises(ValueError, match="crop of 72 bytes does not fit"):
        classify.decode_crop(pixels, height, width)
    with pytest.raises(ValueError, match="crop of 72 bytes does not fit"):
        recognize.decode_line(pixels, (height, width), 320, False)


@pytest.mark.parametrize("width_px", [-1, 0, 10**9])
def test_an_absurd_line_width_is_refused(width_px: int) -> None:
    with pytest.raises(ValueError, match=f"line_width {width_px} is outside"):
        recognize.decode_line(bytes(72), (4, 6), width_px, False)


def test_only_a_confident_verdict_turns_a_crop() -> None:
    scores = np.array([[0.05, 0.95], [0.2, 0.8], [0.99, 0.01]], dtype=np.float32)
    turned, score = classify.verdicts(scores)
    assert turned.tolist() == [True, False, False]
    assert score.tolist() == pytest.approx([0.95, 0.8, 0.99])


def test_lines_of_one_width_run_together() -> None:
    lines = [recognize.Line(_crop_of_size(4, 6, 1), width) for width in (320, 400, 320)]
    assert recognize.same_width(lines) == {320: [0, 2], 400: [1]}


class _RecordingSession:
    """Stands in for the recognition network: notes how wide each crop comes, reads nothing.

    A crop is known by its number, which is the value of all its pixels.
    """

    def __init__(self) -> None:
        self.width_of_crop: dict[int, int] = {}

    def __call__(self, batch: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        for row in batch:
            number = round((float(row[0, 0, 0]) * 0.5 + 0.5) * 255)
            self.width_of_crop[number] = row.shape[2]
        return [np.zeros((len(batch), 1, 2), dtype=np.float32)]


def _crop_of_size(height: int, width: int, number: int) -> npt.NDArray[np.uint8]:
    return np.full((height, width, 3), number, dtype=np.uint8)


@functools.cache
def _alphabet_of_the_network() -> list[str]:
    session = reference().text_rec.session.session
    return list(recognize.alphabet(session.get_modelmeta().custom_metadata_map["character"]))
