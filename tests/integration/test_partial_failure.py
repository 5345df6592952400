"""Items that fail and modules that do not run, on a real Triton (`on_error`, `when`)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tests.integration.paceline_process import Paceline
from tests.integration.test_serve_inference import TIMEOUT_S, explained, tensor

from paceline.v1 import control_pb2

pytestmark = pytest.mark.integration

BAD = -1.0
"""What the model `picky` does not take."""

CHAIN = """\
chain: {name}
slo_ms: 60000
rate_rps: 5
inputs:
  head: {{dtype: FP32, shape: [4]}}
  x: {{dtype: FP32, shape: [-1, 4]}}
modules:
  look:
    model: picky
    inputs: {{x: inputs.head}}
  each:
    model: picky
    for_each: inputs.x
    on_error: {on_error}
    fan_out: 5
    inputs: {{x: inputs.x}}
  rare:
    model: picky
    when: look.large
    fan_out: 0.5
    inputs: {{x: look.y}}
outputs:
  y: each.y
  large: each.large
  again: rare.y
"""


@pytest.fixture(scope="module")
def chains(front: Paceline) -> Iterator[Paceline]:
    """`front` with the chains `skips` and `fails`, which differ in `on_error`."""
    with front.channel() as channel:
        control = front.control(channel)
        documents = [
            control_pb2.ChainDocument(
                name=f"{name}.yaml", yaml=CHAIN.format(name=name, on_error=does)
            )
            for name, does in (("skips", "skip"), ("fails", "fail"))
        ]
        control.Apply(control_pb2.ApplyRequest(chains=documents), timeout=TIMEOUT_S)
        try:
            yield front
        finally:
            for name in ("skips", "fails"):
                control.Delete(control_pb2.DeleteRequest(chain=name), timeout=TIMEOUT_S)


def inputs_of(head: float, *items: float) -> list[triton.InferInput]:
    """One row `head`, and a row of each item."""
    rows = np.repeat(np.array(items, np.float32), 4).reshape(-1, 4)
    return [tensor("head", np.full((4,), head, np.float32)), tensor("x", rows)]


def test_an_item_that_fails_is_a_typed_null_in_its_place_and_costs_no_other(
    chains: Paceline,
) -> None:
    items = (1.0, 2.0, BAD, 200.0, 5.0, BAD, 7.0, 8.0, 9.0)
    with chains.client() as client:
        answer = client.infer("skips", inputs_of(1.0, *items), client_timeout=TIMEOUT_S)
    expected = [0.0 if item == BAD else 2 * item for item in items]
    assert answer.as_numpy("y").tolist() == [[value] * 4 for value in expected]
    assert answer.as_numpy("large").ravel().tolist() == [item == 200.0 for item in items]


async def test_a_bad_item_fails_its_request_and_none_that_shares_its_batches(
    chains: Paceline,
) -> None:
    async with triton_aio.InferenceServerClient(chains.address) as client:
        calls = [
            client.infer("fails", inputs_of(1.0, number, bad), client_timeout=TIMEOUT_S)
            for number, bad in ((3.0, 4.0), (5.0, BAD), (6.0, 7.0), (8.0, 9.0))
        ]
        answers: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
    failed = answers.pop(1)
    assert failed.status() == "StatusCode.INVALID_ARGUMENT" and "a bad item" in failed.message()
    first = [answer.as_numpy("y")[:, 0].tolist() for answer in answers]
    assert first == [[6.0, 8.0], [12.0, 14.0], [16.0, 18.0]]


@pytest.mark.parametrize(("head", "runs"), [(1.0, False), (101.0, True)])
def test_a_module_runs_only_when_its_condition_holds(
    chains: Paceline, head: float, runs: bool
) -> None:
    request_id = f"when-{runs}"
    with chains.client() as client, chains.channel() as channel:
        answer = client.infer(
            "skips", inputs_of(head, 1.0), request_id=request_id, client_timeout=TIMEOUT_S
        )
        spans = explained(chains, channel, request_id)
    assert [span.module for span in spans].count("rare") == runs
    again = answer.as_numpy("again")
    assert again.tolist() == ([4 * head] * 4 if runs else []), "empty where nothing ran"
