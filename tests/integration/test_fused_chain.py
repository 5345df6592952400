"""The OCR example with its five models fused into two reads what its reference pipeline reads."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tests import ocr_images
from tests.integration.conftest import EXAMPLE_CHAIN, GENEROUS_SLO_MS, OCR_START_TIMEOUT_S
from tests.integration.paceline_process import Paceline
from tests.integration.test_ocr_chain import TIMEOUT_S, image_input, lines_of, reference

from paceline.blocks.compile import compile_model
from paceline.blocks.group import group_of, read_group
from paceline.blocks.member import Options
from paceline.blocks.observed import from_server
from paceline.config import read_chain

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

FUSED_CHAIN = EXAMPLE_CHAIN.parents[1] / "fused" / "ocr.yaml"
GROUPS = {"ocr_front": ["prepare", "detect", "extract"], "ocr_lines": ["classify", "recognize"]}
NAMES = ["lines", "upside_down", "blank"]


@pytest.fixture(scope="module")
def fused(ocr_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paceline]:
    """A server whose repository has the two models, and the names of what they are made of."""
    root = tmp_path_factory.mktemp("fused")
    chain = read_chain(EXAMPLE_CHAIN)
    options = Options(max_batch=2, measure=False)  # small, because every size is measured
    for name, modules in GROUPS.items():
        group = read_group(group_of(chain, modules, [], name), [ocr_models])
        directory = root / "models" / name
        compile_model(group.sources, directory, root / "blocks", options, group=group)
    text = re.sub(r"(?m)^slo_ms: \d+", f"slo_ms: {GENEROUS_SLO_MS}", FUSED_CHAIN.read_text("utf-8"))
    (root / "ocr.yaml").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACELINE_BLOCKS_LEDGER", str(root / "ledger"))  # not that of others here
        server = Paceline(
            root / "state",
            ["--model-repository", str(root / "models"), "--chains", str(root / "ocr.yaml")],
        )
    try:
        yield server.wait_ready(OCR_START_TIMEOUT_S)
    finally:
        code = server.stop()
    assert code == 0


async def test_images_read_as_in_the_reference_pipeline(fused: Paceline) -> None:
    """All at once, so that rows of several are batched in what was fused."""
    async with triton_aio.InferenceServerClient(fused.address) as client:
        answers = await asyncio.gather(
            *(
                client.infer("ocr", [image_input(ocr_images.ALL[n]())], client_timeout=TIMEOUT_S)
                for n in NAMES
            )
        )
    for name, answer in zip(NAMES, answers, strict=True):
        texts, confidences, boxes = lines_of(answer)
        expected, corners = reference(name)
        assert texts == [text for text, _ in expected], name
        assert confidences == pytest.approx([sure for _, sure in expected], abs=0.02), name
        assert boxes == pytest.approx(corners, abs=2.0), name


def test_a_group_is_one_process(fused: Paceline) -> None:
    """Five models are two, and names of members are no processes."""
    children = psutil.Process(fused.process.pid).children(recursive=True)
    stubs = [child for child in children if "triton_python_backend_stub" in child.name()]
    told = [word for stub in stubs for word in stub.cmdline() if re.fullmatch(r"ocr_\w+_\d", word)]
    assert {re.sub(r"_\d+_\d+$", "", word) for word in told} == set(GROUPS)


def test_members_that_batch_alike_keep_their_own_names(fused: Paceline) -> None:
    """`ocr_classify` alone, on crops that the front gives when it is asked for them alone."""
    with fused.client() as client:
        wanted = [triton.InferRequestedOutput(f"extract/{n}") for n in ("crops", "crop_sizes")]
        image = image_input(ocr_images.upside_down())
        front = client.infer("ocr_front", [image], outputs=wanted, client_timeout=TIMEOUT_S)
        crops, sizes = (front.as_numpy(f"extract/{name}") for name in ("crops", "crop_sizes"))
        inputs = [
            triton.InferInput("crop", [2, 1], "BYTES"),
            triton.InferInput("crop_size", [2, 2], "INT32"),
        ]
        for tensor, array in zip(inputs, (crops[:2], sizes[:2]), strict=True):
            tensor.set_data_from_numpy(array)
        answer = client.infer("ocr_classify", inputs, client_timeout=TIMEOUT_S)
    assert answer.as_numpy("upside_down").tolist() == [[True], [True]]
    assert answer.as_numpy("score").shape == (2, 1)


def test_a_member_that_refuses_a_request_is_named(fused: Paceline) -> None:
    """What a client did wrong stays INVALID_ARGUMENT, whichever member finds it."""
    sliver = np.zeros((1, 2000, 3), np.uint8)
    with fused.client() as client, pytest.raises(triton.InferenceServerException) as failed:
        client.infer("ocr_front", [image_input(sliver)], client_timeout=TIMEOUT_S)
    assert failed.value.status() == "StatusCode.INVALID_ARGUMENT"
    message = failed.value.message()
    assert "model 'ocr_front': member 'prepare' (ocr_prepare): " in message
    assert "too long and thin" in message


def test_what_the_server_observed_is_what_suggestions_rest_on(fused: Paceline) -> None:
    """After the tests before: three pages a run, six lines on two of them."""
    observed = from_server(fused.address)
    assert observed.rates_rps["ocr"] > 0
    assert not observed.fan_outs, "three requests are too few to believe their fan-out"
    assert observed.rows_rps["ocr_lines"] > observed.rates_rps["ocr"]
