"""Concurrent loads of blocks models split the link to their store, on a real Triton."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper, numpy_helper
from tests.integration.blocks_models import WIDTH, compiled, save
from tests.integration.conftest import Start
from tests.integration.test_serve_inference import TIMEOUT_S

from paceline.blocks.backend.ledger import Row, read_rows

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
MIDDLE = 4352
"""Of the layers' widths: 80 MiB of weights a model, in ten chunks: one does not decide."""
LINK_MB_S = 16


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """The URL of a store of blocks behind a slow link."""
    (tmp_path / "blocks").mkdir()
    command = [sys.executable, str(ROOT / "scripts" / "blocks_link.py"), str(tmp_path / "blocks")]
    with subprocess.Popen([*command, str(LINK_MB_S)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.terminate()


def write_wide(path: Path, seed: int) -> Path:
    """y = x W0 W1 W2, most of it in the middle."""
    drawn = np.random.default_rng(seed)
    nodes, weights, value = [], [], "x"
    for layer, shape in enumerate(((WIDTH, MIDDLE), (MIDDLE, MIDDLE), (MIDDLE, WIDTH))):
        matrix = drawn.standard_normal(shape, dtype=np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        after = "y" if layer == 2 else f"h{layer}"
        nodes.append(helper.make_node("MatMul", [value, f"w{layer}"], [after]))
        value = after
    return save(path, nodes, weights, ("x", TensorProto.FLOAT, ["N", WIDTH]))


def row_of(table: Path, model: str) -> Row | None:
    """What the process of a model has in the machine's table."""
    rows = [row for row in read_rows(table).values() if row.model == model]
    return rows[0] if rows else None


def moved_together(table: Path, waited: Future[None], names: tuple[str, str]) -> list[int]:
    """Bytes of each that came while both were loading."""
    first: list[int] | None = None
    moved = [0, 0]
    while not waited.done():
        rows = [row_of(table, name) for name in names]
        if all(row is not None and row.loading_bytes for row in rows):
            loading = [row for row in rows if row is not None]
            first = first or [row.moved_bytes for row in loading]
            moved = [row.moved_bytes - begun for row, begun in zip(loading, first, strict=True)]
            if any(row.left_bytes == 0 for row in loading):
                break
        time.sleep(0.005)
    return moved


def test_who_is_due_first_gets_its_weights_first_while_the_other_goes_on(
    start_paceline: Start, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, served = tmp_path / "models", tmp_path / "served"
    cache, table = tmp_path / "cache", tmp_path / "table"
    served.mkdir()
    monkeypatch.setenv("PACELINE_BLOCKS_LEDGER", str(table))
    for seed, name in enumerate(("later", "soon")):
        network = write_wide(tmp_path / f"{name}.onnx", seed)
        parameters = {"pool": store, "cache": str(cache)}
        compiled(models, name, {"": network}, parameters=parameters, budget_mib=None)
    server = start_paceline("--model-repository", str(served), "--memory-mib", "1000").wait_ready()
    for name in ("later", "soon"):  # what is there at the start would be loaded then
        (models / name).rename(served / name)
    with server.client() as client:

        def ask(name: str, slo_ms: int) -> None:
            """Loaded, and asked."""
            client.load_model(name, client_timeout=TIMEOUT_S)
            sent = triton.InferInput("x", [1, WIDTH], "FP32")
            sent.set_data_from_numpy(np.ones((1, WIDTH), np.float32))
            client.infer(name, [sent], parameters={"slo_ms": slo_ms}, client_timeout=TIMEOUT_S)

        with ThreadPoolExecutor(2) as pool:
            later = pool.submit(ask, "later", 100_000)
            soon = pool.submit(ask, "soon", 8_000)
            its, others = moved_together(table, soon, ("soon", "later"))
            assert others < 0.7 * its, "equal shares would have moved as much"
            soon.result()
            later.result()
            row = row_of(table, "later")
            assert row is not None and row.left_bytes == 0, "it went on all the same"
    assert server.stop() == 0
