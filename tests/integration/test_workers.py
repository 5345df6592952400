"""`paceline serve --workers 2`: two front processes on one port before one real Triton."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tests.integration.conftest import Start
from tests.integration.models import write_add
from tests.integration.paceline_process import Paceline

from paceline.v1 import control_pb2

pytestmark = pytest.mark.integration

CONNECTIONS = 32


def free_ports() -> tuple[int, int]:
    """A gRPC port, and an HTTP port with a free one behind it."""
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        while True:
            # New ones for each try: a socket that is bound cannot be bound again.
            with socket.socket() as second, socket.socket() as third:
                second.bind(("127.0.0.1", 0))
                port = second.getsockname()[1]
                try:
                    third.bind(("127.0.0.1", port + 1))
                except (OSError, OverflowError):  # taken, or no port
                    continue
                return first.getsockname()[1], port


@pytest.fixture
def workers(start_paceline: Start, tmp_path: Path) -> Paceline:
    """A server of two workers and the model `add`."""
    models = tmp_path / "models"
    models.mkdir()
    write_add(models)
    grpc_port, http_port = free_ports()
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


def test_connections_are_dealt_out_to_all_workers_and_every_request_is_answered(
    workers: Paceline,
) -> None:
    a, b = np.arange(16, dtype=np.int32), np.ones(16, dtype=np.int32)
    for _ in range(CONNECTIONS):
        # Each client has a connection of its own: by default they would share one.
        own = [("grpc.use_local_subchannel_pool", 1)]
        with triton.InferenceServerClient(workers.address, channel_args=own) as client:
            inputs = []
            for name, value in (("a", a), ("b", b)):
                tensor = triton.InferInput(name, [1, 16], "INT32")
                tensor.set_data_from_numpy(value.reshape(1, 16))
                inputs.append(tensor)
            answer = client.infer("add", inputs, client_timeout=30)
        assert answer.as_numpy("sum").reshape(-1).tolist() == (a + b).tolist()
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


def test_when_a_worker_ends_by_itself_everything_ends_and_says_so(workers: Paceline) -> None:
    (victim,) = [p for p in workers.descendants() if "0/2" in p.cmdline()]
    victim.kill()
    assert workers.end() == 1
    assert "worker 0 ended with exit code -9" in workers.said
    workers.assert_nothing_left()
