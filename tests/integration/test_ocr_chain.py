"""The OCR example on a real Triton reads what its reference pipeline reads."""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from PIL import Image
from tests import ocr_images
from tests.integration.ocr_reference import reference_boxes, reference_lines
from tests.integration.paceline_process import Paceline, run_cli

# The first test also waits for the server, which measures five models.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

LEAST_CONFIDENCE = 0.5
"""Below it the reference pipeline drops a line."""
TIMEOUT_S = 60.0
PIXELS = 2.0
"""The reference rounds corners at other places."""

Line = tuple[str, float]
Answer = tuple[list[str], npt.NDArray[np.float32], npt.NDArray[np.float32]]


@functools.cache
def reference(name: str) -> tuple[list[Line], npt.NDArray[np.float32]]:
    """Lines and boxes of an image, read once a session."""
    image = ocr_images.ALL[name]()
    return reference_lines(image), reference_boxes(image)


def image_input(image: ocr_images.RgbImage) -> triton.InferInput:
    tensor = triton.InferInput("image", list(image.shape), "UINT8")
    tensor.set_data_from_numpy(image)
    return tensor


def lines_of(answer: Any) -> Answer:
    """Texts, confidences and boxes of the lines that count."""
    texts = answer.as_numpy("text")
    confidences = answer.as_numpy("confidence")
    boxes = answer.as_numpy("boxes")
    rows = len(texts)
    assert (texts.shape, confidences.shape, boxes.shape) == ((rows, 1), (rows, 1), (rows, 4, 2))
    sure = confidences.reshape(-1) >= LEAST_CONFIDENCE
    read = [text.decode() for text in texts[sure].reshape(-1)]
    return read, confidences[sure].reshape(-1), boxes[sure]


@pytest.mark.parametrize("name", ocr_images.ALL)
def test_an_image_reads_as_in_the_reference_pipeline(ocr: Paceline, name: str) -> None:
    image = ocr_images.ALL[name]()
    with ocr.client() as client:
        answer = client.infer("ocr", [image_input(image)], client_timeout=TIMEOUT_S)
    texts, confidences, boxes = lines_of(answer)
    expected, corners = reference(name)
    assert texts == [text for text, _ in expected]
    assert confidences == pytest.approx([sure for _, sure in expected], abs=0.02)
    assert boxes == pytest.approx(corners, abs=PIXELS)


@pytest.mark.parametrize("name", ["blank", "speck"])
def test_no_text_is_an_answer_with_no_rows(ocr: Paceline, name: str) -> None:
    with ocr.client() as client:
        tensor = image_input(ocr_images.ALL[name]())
        answer = client.infer("ocr", [tensor], client_timeout=TIMEOUT_S)
    shapes = {output.name: list(output.shape) for output in answer.get_response().outputs}
    assert shapes == {"text": [0, 1], "confidence": [0, 1], "boxes": [0, 4, 2]}
    datatypes = {output.name: output.datatype for output in answer.get_response().outputs}
    assert datatypes == {"text": "BYTES", "confidence": "FP32", "boxes": "FP32"}


async def test_images_sent_at_once_each_get_their_own_text(ocr: Paceline) -> None:
    names = ["lines", "tiny", "coloured", "page", "blank", "banner"]
    images = {name: ocr_images.ALL[name]() for name in names}
    async with triton_aio.InferenceServerClient(ocr.address) as client:
        answers = await asyncio.gather(
            *(
                client.infer(
                    "ocr", [image_input(images[name])], request_id=name, client_timeout=TIMEOUT_S
                )
                for name in names
            )
        )
    for name, answer in zip(names, answers, strict=True):
        assert answer.get_response().id == name
        assert lines_of(answer)[0] == [text for text, _ in reference(name)[0]], name


def test_only_what_is_asked_for_is_computed_and_returned(ocr: Paceline) -> None:
    with ocr.client() as client:
        answer = client.infer(
            "ocr",
            [image_input(ocr_images.tiny())],
            outputs=[triton.InferRequestedOutput("boxes")],
            request_id="boxes-only",
            client_timeout=TIMEOUT_S,
        )
    assert [output.name for output in answer.get_response().outputs] == ["boxes"]
    assert answer.as_numpy("boxes").shape[1:] == (4, 2)
    told = run_cli("explain", "boxes-only", "--server", ocr.address, "--format", "json")
    modules = [span["module"] for span in json.loads(told.stdout)["spans"]]
    assert modules == ["prepare", "detect", "extract"]


def test_the_command_line_reads_an_image_file(ocr: Paceline, tmp_path: Path) -> None:
    file = tmp_path / "tiny.png"
    Image.fromarray(ocr_images.tiny()).save(file)
    ended = run_cli(
        *("infer", "ocr", "--input", f"image={file}", "--server", ocr.address),
        *("--format", "json"),
    )
    assert ended.returncode == 0, ended.stderr
    outputs = json.loads(ended.stdout)["outputs"]
    sure = [
        text
        for (text,), (confidence,) in zip(outputs["text"], outputs["confidence"], strict=True)
        if confidence >= LEAST_CONFIDENCE
    ]
    assert sure == [text for text, _ in reference("tiny")[0]]
