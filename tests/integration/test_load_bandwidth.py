"""Concurrent loads of blocks models split the link to their store, on a real Triton."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper, numpy_helper
from scripts.blocks_link import LinkServer
from tests.integration.blocks_models import WIDTH, compiled, save
from tests.integration.conftest import Start
from tests.integration.test_serve_inference import TIMEOUT_S

from paceline.blocks.backend.ledger import Row, read_rows

pytestmark = pytest.mark.integration

MIDDLE = 3072
"""Of the layers' widths: 42 MiB of weights a model."""
SLOW_BYTES_S, FAST_BYTES_S = 4e6, 1e9
"""Of the link: a turn of 8 MiB takes two seconds, both models 20, until it becomes fast."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LinkServer]:
    """A store of blocks behind a slow link."""
    (tmp_path / "blocks").mkdir()
    with LinkServer(tmp_path / "blocks", SLOW_BYTES_S) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


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
    """What the process of a model has in the machine's table; others only fetch ahead for it."""
    rows = (row for row in read_rows(table).values() if row.model == model and row.loading_bytes)
    return next(rows, None)


def shares_of(table: Path, names: tuple[str, ...]) -> list[float] | None:
    """What each gets of the link; None unless that is decided for all, while they load."""
    rows = [row_of(table, name) for name in names]
    if not all(row is not None and row.left_bytes and row.load.share for row in rows):
        return None
    return [row.load.share for row in rows if row is not None]


def divided_for(
    table: Path, names: tuple[str, str], loads: tuple[Future[None], ...]
) -> list[float]:
    """Their shares once the first one has more than twice the other's, which it has not before
    somebody waits for both: they are loaded first, and asked then.
    """
    seen = None
    while not any(load.done() for load in loads):
        shares = shares_of(table, names)
        seen = shares or seen
        # Between the two rows others may be divided anew: such a reading does not come to one.
        whole = shares is not None and sum(shares) == pytest.approx(1.0)
        if shares is not None and whole and shares[0] > 2 * shares[1]:
            return shares
        time.sleep(0.005)
    raise AssertionError(f"a load was over, and the shares were {seen}")


def test_who_is_due_first_gets_its_weights_first_while_the_other_goes_on(
    start_paceline: Start, store: LinkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both need as many bytes, one of them much sooner; both can be in time. Turns follow shares:
    tests/unit/test_blocks_ledger.py.
    """
    models, served = tmp_path / "models", tmp_path / "served"
    cache, table = tmp_path / "cache", tmp_path / "table"
    served.mkdir()
    monkeypatch.setenv("PACELINE_BLOCKS_LEDGER", str(table))
    for seed, name in enumerate(("later", "soon")):
        network = write_wide(tmp_path / f"{name}.onnx", seed)
        parameters = {"pool": store.url, "cache": str(cache)}
        compiled(models, name, {"": network}, parameters=parameters, budget_mib=None)
    server = start_paceline("--model-repository", str(served), "--memory-mib", "1000").wait_ready()
    for name in ("later", "soon"):  # what is there at the start would be loaded then
        (models / name).rename(served / name)
    with server.client() as client:

        def ask(name: str, slo_s: int) -> None:
            """Loaded, and asked."""
            client.load_model(name, client_timeout=TIMEOUT_S)
            sent = triton.InferInput("x", [1, WIDTH], "FP32")
            sent.set_data_from_numpy(np.ones((1, WIDTH), np.float32))
            parameters = {"slo_ms": 1000 * slo_s}
            client.infer(name, [sent], parameters=parameters, client_timeout=slo_s)

        with ThreadPoolExecutor(2) as pool:
            try:
                later, soon = pool.submit(ask, "later", 600), pool.submit(ask, "soon", 60)
                its, others = divided_for(table, ("soon", "later"), (soon, later))
            finally:
                store.link.set_rate(FAST_BYTES_S)
            soon.result()
            later.result()
        assert its + others == pytest.approx(1.0) and others > 0, "it goes on all the same"
    assert server.stop() == 0
