"""Models from a store are fetched while Triton starts their processes, on a real Triton."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from scripts.blocks_link import LinkServer
from tests.integration.blocks_models import WIDTH, compiled, write_mlp
from tests.integration.blocks_triton import ended
from tests.integration.conftest import Start
from tests.integration.test_load_bandwidth import FAST_BYTES_S, store
from tests.integration.test_serve_inference import TIMEOUT_S

pytestmark = pytest.mark.integration

__all__ = ["store"]


def fetchers(server_pid: int) -> list[psutil.Process]:
    """The server's processes that fetch ahead."""
    found = []
    for child in psutil.Process(server_pid).children():
        # Others come and go.
        with suppress(psutil.NoSuchProcess):
            if "paceline.blocks.backend.ahead" in child.cmdline():
                found.append(child)
    return found


def test_models_load_with_the_fetching_process_and_without_it(
    start_paceline: Start, store: LinkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, served, cache = tmp_path / "models", tmp_path / "served", tmp_path / "cache"
    served.mkdir()
    monkeypatch.setenv("PACELINE_BLOCKS_LEDGER", str(tmp_path / "table"))
    store.link.set_rate(FAST_BYTES_S)
    parameters = {"pool": store.url, "cache": str(cache)}
    for seed, name in enumerate(("first", "second")):
        network = write_mlp(tmp_path / f"{name}.onnx", seed=seed)
        compiled(models, name, {"": network}, parameters=parameters, budget_mib=None)
    server = start_paceline("--model-repository", str(served)).wait_ready()
    assert not fetchers(server.process.pid), "nothing comes from a store yet"
    with server.client() as client:

        def ask(name: str) -> None:
            (models / name).rename(served / name)
            client.load_model(name, client_timeout=TIMEOUT_S)
            sent = triton.InferInput("x", [1, WIDTH], "FP32")
            sent.set_data_from_numpy(np.ones((1, WIDTH), np.float32))
            answer = client.infer(name, [sent], client_timeout=TIMEOUT_S).as_numpy("y")
            assert answer is not None and np.isfinite(answer).all() and answer.any()

        ask("first")
        (fetcher,) = fetchers(server.process.pid)
        kept = sum(path.stat().st_size for path in (cache / "objects").iterdir())
        assert kept >= 12 * WIDTH * WIDTH * 4
        fetcher.kill()
        # Its first thread is a zombie before the others have ended; nobody can wait for it so long.
        while not ended(fetcher) or fetcher.num_threads() > 1:
            time.sleep(0.01)
        ask("second")
        (again,) = fetchers(server.process.pid)
        assert again.pid != fetcher.pid
    assert server.stop() == 0
    assert not again.is_running()
