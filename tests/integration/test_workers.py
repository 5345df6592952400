"""`paceline serve --workers 2`: two front processes on one port before one real Triton."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tests.integration.conftest import Start
from tests.integration.models import write_add
from tests.integration.paceline_process import Paceline, free_ports

from paceline.v1 import control_pb2

pytestmark = pytest.mark.integration

CONNECTIONS = 32


@pytest.fixture
def workers(start_paceline: Start, tmp_path: Path) -> Paceline:
    """A server of two workers and the model `add`."""
    models = tmp_path / "models"
    models.mkdir()
    write_add(models)
    grpc_port, http_port = free_ports(2)
    server = start_paceline(
        *("--model-repository", str(models), "--workers", "2"),
        *("--grpc-port", str(grpc_port), "--http-port", str(http_port)),
    )
    server.wait_line("2 workers serve gRPC", 60)
    server.grpc_port, server.http_port = grpc_port, http_port
    return server


def served(server: Paceline, worker: int) -> int:
    """Successful requests for `add`, as that worker counts them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port + worker}/metrics") as page:
        text = page.read().decode()
    (line,) = [
        line
        for line in text.splitlines()
        if line.startswith('nv_inference_request_success{model="add"')
    ]
    return int(float(line.split()[-1]))


def kill(server: Paceline, worker: int) -> None:
    (victim,) = [p for p in server.descendants() if f"{worker}/2" in p.cmdline()]
    victim.kill()


def add_once(server: Paceline) -> None:
    """One request, on a connection of its own: by default clients would share one."""
    a, b = np.arange(16, dtype=np.int32), np.ones(16, dtype=np.int32)
    own = [("grpc.use_local_subchannel_pool", 1)]
    with triton.InferenceServerClient(server.address, channel_args=own) as client:
        inputs = []
        for name, value in (("a", a), ("b", b)):
            tensor = triton.InferInput(name, [1, 16], "INT32")
            tensor.set_data_from_numpy(value.reshape(1, 16))
            inputs.append(tensor)
        answer = client.infer("add", inputs, client_timeout=30)
    assert answer.as_numpy("sum").reshape(-1).tolist() == (a + b).tolist()


def test_connections_are_dealt_out_to_all_workers_and_every_request_is_answered(
    workers: Paceline,
) -> None:
    for _ in range(CONNECTIONS):
        add_once(workers)
    counts = [served(workers, worker) for worker in range(2)]
    assert sum(counts) == CONNECTIONS and min(counts) > 0, counts
    assert workers.stop() == 0


def test_chains_cannot_be_changed_where_only_one_worker_would_hear_of_it(
    workers: Paceline,
) -> None:
    with workers.channel() as channel:
        control = workers.control(channel)
        with pytest.raises(grpc.RpcError) as refused:
            control.Delete(control_pb2.DeleteRequest(chain="add"), timeout=10)
    assert "restart to change them" in str(refused.value.details())


def test_a_worker_that_ends_by_itself_is_started_anew_while_the_other_serves(
    workers: Paceline,
) -> None:
    kill(workers, 0)
    workers.wait_line("worker 0 ended with exit code -9; started anew", 20)
    for _ in range(CONNECTIONS // 4):
        add_once(workers)
    workers.wait_line(r"worker 0 serves again \(start 2\)", 60)
    for _ in range(CONNECTIONS):
        add_once(workers)
    assert min(served(workers, worker) for worker in range(2)) > 0
    assert workers.stop() == 0
    workers.assert_nothing_left()


def test_a_worker_that_ends_again_and_again_ends_everything(workers: Paceline) -> None:
    for start in range(1, 4):
        kill(workers, 1)
        workers.wait_line(rf"worker 1 serves again \(start {start + 1}\)", 60)
    kill(workers, 1)
    assert workers.end() == 1
    assert "worker 1 ended with exit code -9, 4 times within 300 s" in workers.said
    workers.assert_nothing_left()
