"""A model's process that is killed before Triton has heard of it, as where memory is short: Triton
waits for it without end, so that Paceline starts it anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.integration.conftest import Start
from tests.integration.models import write_add
from tests.integration.test_serve_inference import pair
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.integration

LIMIT_S = 60.0


def test_a_load_whose_process_dies_at_once_fails_and_everything_is_served_again(
    start_paceline: Start, tmp_path: Path
) -> None:
    models, flag = tmp_path / "models", tmp_path / "flag"
    models.mkdir()
    write_add(models)
    server = start_paceline("--model-repository", str(models)).wait_ready()
    (packages,) = server.state.rglob("site-packages")
    # The first interpreter to find the flag dies as it starts.
    dies = f"os.path.exists({str(flag)!r}) and (os.remove({str(flag)!r}), os.kill(os.getpid(), 9))"
    (packages / "dies.pth").write_text(f"import os; {dies}\n", encoding="utf-8")
    write_add(models, "late")
    flag.touch()
    with server.client() as client:
        with pytest.raises(InferenceServerException, match="died before Triton had heard of it"):
            client.load_model("late", client_timeout=LIMIT_S)
        assert not flag.exists()
        server.wait_line("the local Triton is back, models loaded", LIMIT_S)
        client.load_model("late", client_timeout=LIMIT_S)
        for model in ("add", "late"):
            answer = client.infer(model, pair(3, rows=1), client_timeout=LIMIT_S)
            assert answer.as_numpy("sum").tolist() == [[4] * 16]
    assert server.stop() == 0
    server.assert_nothing_left()
