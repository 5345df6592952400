"""Models of one backbone on a real Triton, from a local pool and from a store: their processes map
the same pages, what they share counts once, and loads are ordered by what of it is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper, numpy_helper
from tests.http_stores import StoreHandler, answering
from tests.integration.blocks_models import WIDTH, compiled, elsewhere, save, write_mlp
from tests.integration.blocks_triton import batch, started
from tests.integration.conftest import Start
from tests.integration.test_residency import held, status_until
from tests.integration.test_serve_inference import TIMEOUT_S

from paceline.block_fetches import BlockFetches
from paceline.block_sizes import blocks_of
from paceline.core.bind import single_model_chain
from paceline.core.request import InferRequest
from paceline.core.tensor import Tensor
from paceline.dispatch import route_chain
from paceline.fleet import connected_machine
from paceline.residency.state import Limits
from paceline.runtime.engine import Engine
from paceline.runtime.machines import Machines
from paceline.runtime.placement import Share, Site
from paceline.triton.client import TritonClient, TritonFleet
from paceline.triton.config import ModelConfig
from paceline.triton.launcher import LocalTriton
from paceline.triton.processes import model_processes
from paceline.triton.repository import TritonRepository

pytestmark = pytest.mark.integration

MIB = 1 << 20
MIDDLE = 3584
"""Of the layers' widths."""
BACKBONE_MIB, HEAD_MIB = 52.5, 3.5
BUDGET_MIB = 300
"""With processes of 30 MiB four models take 239 MiB, each backbone counted twice 344 MiB. Right for
processes of 19 to 44 MiB: before it was measured, the last one counts as 48 MiB.
"""
PAIRS = (("local0", "local1"), ("remote0", "remote1"))


def write_network(path: Path, head_seed: int) -> Path:
    """y = x W0 W1 W2, of which W2 is the head."""
    nodes, weights, value = [], [], "x"
    for layer, shape in enumerate(((WIDTH, MIDDLE), (MIDDLE, MIDDLE), (MIDDLE, WIDTH))):
        drawn = np.random.default_rng([head_seed if layer == 2 else 0, layer])
        matrix = drawn.standard_normal(shape, dtype=np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        after = "y" if layer == 2 else f"h{layer}"
        nodes.append(helper.make_node("MatMul", [value, f"w{layer}"], [after]))
        value = after
    return save(path, nodes, weights, ("x", TensorProto.FLOAT, ["N", WIDTH]))


class Pool(StoreHandler):
    """Serves the files of `root`."""

    root: Path
    sent: list[tuple[str, int]]

    def do_GET(self) -> None:
        body = (self.root / self.path.lstrip("/")).read_bytes()
        ranged = "Range" in self.headers
        body = self.part(body) if ranged else body
        self.sent.append((self.path, len(body)))
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Models `0` and `1` of one backbone and `alone`, beside their pool; the URL of its store."""
    models = tmp_path_factory.mktemp("blocks") / "compiled"
    for seed in (0, 1):
        network = write_network(models.parent / f"{seed}.onnx", seed)
        compiled(models, str(seed), {"": network}, budget_mib=None)
    compiled(models, "alone", {"": write_mlp(models.parent / "alone.onnx")}, budget_mib=None)
    Pool.root, Pool.sent = models.parent / "blocks", []
    with answering(Pool) as url:
        yield models, url


def mappings(pid: int, paths: set[str]) -> Mapping[str, Mapping[str, int]]:
    """Of these files what a process has mapped: inode, and KiB in memory (Rss, Pss)."""
    found: dict[str, dict[str, int]] = {}
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):
            path = words[5] if len(words) == 6 else ""
            found.setdefault(path, {"inode": int(words[4])})
        elif words[0] in ("Rss:", "Pss:"):
            found[path][words[0]] = found[path].get(words[0], 0) + int(words[1])
    return {path: found[path] for path in paths & found.keys()}


def assert_same_pages(triton_pid: int, models: Path, names: tuple[str, str]) -> None:
    """Each file of the backbone is mapped by both, and is in memory once; the heads are not."""
    first, second = (set(blocks_of(models / name)) for name in names)
    pids = [process.pid for name in names for process in model_processes(triton_pid, name)]
    assert len(pids) == 2
    one, other = (mappings(pid, first | second) for pid in pids)
    assert (set(one), set(other)) == (first, second) and len(first & second) == len(first) - 1
    for path in first & second:
        assert one[path]["inode"] == other[path]["inode"] == Path(path).stat().st_ino
        for its in (one[path], other[path]):
            assert 0 < its["Pss:"] < 0.6 * its["Rss:"], "half of each page"


def test_a_second_model_of_a_backbone_maps_loads_and_counts_its_head_alone(
    start_paceline: Start,
    pool: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PACELINE_BLOCKS_LEDGER", str(tmp_path / "table"))
    networks, url = pool
    served = tmp_path / "served"
    served.mkdir()
    server = start_paceline("--model-repository", str(served), "--memory-mib", str(BUDGET_MIB))
    server.wait_ready()
    triton_pid = server.triton_process().pid
    with server.client() as client:
        for pair in PAIRS:
            where = url if pair[0].startswith("remote") else str(Pool.root)
            for number, name in enumerate(pair):
                elsewhere(networks / str(number), served / name, where, tmp_path / "cache")
                Pool.sent.clear()
                client.load_model(name, client_timeout=TIMEOUT_S)
                sent = triton.InferInput("x", [1, WIDTH], "FP32")
                sent.set_data_from_numpy(np.ones((1, WIDTH), np.float32))
                assert client.infer(name, [sent], client_timeout=TIMEOUT_S).as_numpy("y").any()
            assert_same_pages(triton_pid, served, pair)
    came = sum(size for path, size in Pool.sent if path.startswith("/objects/"))
    assert HEAD_MIB * MIB <= came < (HEAD_MIB + 1) * MIB, "the rest was in the cache"
    names = [name for pair in PAIRS for name in pair]
    status = status_until(server, lambda status: True)
    (machine,) = status["machines"]
    assert held(status) == dict.fromkeys(names, "resident"), "and nothing had to go"
    assert status["residency"]["evictions"] == 0
    whole_mib = sum(entry["mib"] for entry in machine["held"])
    assert machine["memory_used_mib"] == pytest.approx(whole_mib - 2 * BACKBONE_MIB, abs=0.5)
    assert machine["memory_used_mib"] < BUDGET_MIB < whole_mib
    assert server.stop() == 0


class Loads(BlockFetches):
    """Remembers what Triton was told to load, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def begin(self, directory: Path, config: ModelConfig) -> None:
        self.names.append(directory.name)
        super().begin(directory, config)


@asynccontextmanager
async def residing(
    local: LocalTriton, models: Path, names: Iterable[str], state: Path, loads: Loads
) -> AsyncIterator[tuple[Engine, Machines]]:
    """The machine as `paceline serve` has it; all its models can be called, none is loaded."""
    client = await TritonClient.connect(local.url, name="m")
    fleet = TritonFleet()
    fleet.add("m", client)
    engine = Engine(fleet)
    machines = Machines(engine, Share())
    machine = await connected_machine(
        client,
        Site("m", "cpu", 2),
        (models,),
        state,
        local=True,
        budget_bytes=1 << 40,
        process=local,
        fetches=loads,
    )
    machines.add(machine)
    assert machine.memory is not None
    repository = TritonRepository(client, (models,))
    for name in names:
        await machine.memory.find_blocks(name)
        engine.install(route_chain(single_model_chain(repository.declaration(name))))
    machines.announce("m")
    try:
        yield engine, machines
    finally:
        await machines.close()
        await engine.close()
        loads.close()
        await fleet.close()


async def test_what_is_behind_a_link_is_loaded_in_the_order_that_its_manifests_say(
    pool: tuple[Path, str], tmp_path: Path
) -> None:
    """Two wait for loads that take 100 s each; only who shares what is there can follow in time.

    `alone` is first by deadline and by name.
    """
    networks, url = pool
    models, loads = tmp_path / "models", Loads()
    sources = {"first": "0", "sibling": "1", "alone": "alone"}
    for name, source in sources.items():
        elsewhere(networks / source, models / name, url, tmp_path / "cache")
    row = batch(1)

    async def ask(name: str) -> None:
        tensor = Tensor("x", "FP32", row.shape, row.tobytes())
        answer = await engine.infer(InferRequest(name, (tensor,), budget_s=120.0))
        assert np.frombuffer(answer.outputs[0].data, np.float32).any()

    async def asked(name: str) -> asyncio.Task[None]:
        """Once it waits for its model."""
        task = asyncio.create_task(ask(name))
        for _ in range(20):
            await asyncio.sleep(0)
        assert state.leases.any(name)
        return task

    async with (
        started(models, tmp_path / "triton", tmp_path / "table") as local,
        residing(local, models, sources, tmp_path / "state", loads) as (engine, machines),
    ):
        state = machines.residence.state
        state.limits = Limits(most_loads=1, paced=False)
        async with machines.residence.lock("m", "first"):
            tasks = [await asked(name) for name in ("first", "alone", "sibling")]
            for name in ("alone", "sibling"):
                state.models[name].load_s = 100.0
        await asyncio.gather(*tasks)
        assert loads.names == ["first", "sibling", "alone"]
