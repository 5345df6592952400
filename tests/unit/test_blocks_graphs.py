"""Graphs that cannot be had: clear errors, for who needs them alone, until they are there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.http_stores import StoreHandler, answering
from tests.integration.blocks_models import WIDTH, compiled, write_mlp

from paceline.blocks.backend import skeleton as skeleton_module
from paceline.blocks.backend import store
from paceline.blocks.backend.blockmodel import BlockModel
from paceline.blocks.backend.manifest import Block, PoolError
from paceline.blocks.backend.settings import read_settings
from paceline.blocks.backend.skeleton import Skeleton
from paceline.blocks.backend.source import Waiting, graphs_of
from paceline.blocks.repository import CompiledModel, compiled_model

LAYERS = 24
TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    """A model in six blocks, of which the last has a graph of its own."""
    root = tmp_path_factory.mktemp("graphs")
    onnx = write_mlp(root / "mlp.onnx", layers=LAYERS)
    compiled(root / "models", "mlp", {"": onnx})
    found = compiled_model(root / "models" / "mlp")
    assert found is not None
    return found


@pytest.fixture
def opened(
    built: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., BlockModel]]:
    """`opened(parameter=value, ...)`: started, and closed in the end."""
    monkeypatch.setenv("PACELINE_BLOCKS_LEDGER", str(tmp_path / "ledger"))
    models = []

    def opened(**parameters: str) -> BlockModel:
        texts = {"manifest": built.digest, "pool": str(built.pool), **parameters}
        given = {key: {"string_value": text} for key, text in texts.items()}
        model = BlockModel.open(read_settings(given, built.directory))
        models.append(model)
        return model.start()

    yield opened
    for model in models:
        model.close()
    assert not (tmp_path / "ledger").exists(), "a model that is not there is still accounted for"


class Graphs:
    """What a skeleton fetches and builds; a session is its graph's name."""

    def __init__(self, blocks: tuple[Block, ...], missing: set[str]) -> None:
        self.missing = missing
        self.asked: list[str] = []
        self.under_way = False
        self.turns: list[bool] = []
        """Whether each was urgent."""
        self.turn_comes = threading.Event()
        self.turn_comes.set()
        self.skeleton = Skeleton(blocks, self.graph, Path(), {}, 1, on_device=self.make, turns=self)

    def begin(self, urgent: Callable[[], bool]) -> bool:
        """See `held_turn.Turns`."""
        assert self.turn_comes.wait(TIMEOUT_S) and not self.under_way
        self.under_way = True
        self.turns.append(urgent())
        return True

    def renew(self, amount: float, urgent: Callable[[], bool]) -> bool:
        self.end(amount)
        return self.begin(urgent)

    def end(self, amount: float) -> None:
        assert self.under_way
        self.under_way = False

    def graph(self, block: Block, waiting: Waiting) -> bytes:
        self.asked.append(block.key)
        if block.key in self.missing:
            with waiting():
                assert not self.under_way, "others could use the core"
            raise PoolError(f"graph {block.graph} is missing")
        return block.graph.encode()

    def make(self, graph: bytes, block: Block) -> Any:
        assert self.under_way, "it is not this load's turn"

        class Session:
            def run(self, values: list[Any]) -> list[Any]:
                return [graph.decode(), *values]

        return Session()


def keys_of(blocks: tuple[Block, ...]) -> list[str]:
    return list(dict.fromkeys(block.key for block in blocks))


def test_a_graph_that_is_missing_fails_only_who_needs_it(
    built: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often they ask, it is tried once a back-off; and the end does not wait for that."""
    monkeypatch.setattr(skeleton_module, "FIRST_BACKOFF_S", 1000.0)
    blocks = built.manifest.members[0].blocks
    graphs = Graphs(blocks, {blocks[1].key})
    graphs.skeleton.start()
    for number, block in enumerate(blocks):
        for _ in range(5):
            if block.key == blocks[1].key:
                with pytest.raises(PoolError, match=f"graph {block.graph} is missing"):
                    graphs.skeleton.run(number, [])
            else:
                assert graphs.skeleton.run(number, [7]) == [block.graph, 7]
    assert graphs.asked == keys_of(blocks)
    ending = threading.Thread(target=graphs.skeleton.close, daemon=True)
    ending.start()
    ending.join(TIMEOUT_S)
    assert not ending.is_alive()


def test_sessions_are_built_in_turns_that_are_urgent_when_a_run_waits(
    built: CompiledModel,
) -> None:
    """And short ones are one turn, which ends with the last of them."""
    blocks = built.manifest.members[0].blocks
    graphs = Graphs(blocks, set())
    graphs.turn_comes.clear()
    run = threading.Thread(target=graphs.skeleton.run, args=(0, []))
    run.start()
    while not graphs.skeleton._awaited:
        pass
    graphs.skeleton.start()
    graphs.turn_comes.set()
    run.join(TIMEOUT_S)
    graphs.skeleton._thread.join(TIMEOUT_S)
    assert graphs.turns[0] is True and not graphs.under_way
    assert len(graphs.turns) < len(keys_of(blocks)) or len(graphs.turns) == 1
    graphs.skeleton.close()


def test_a_graph_that_comes_back_is_all_that_is_tried_again(
    built: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skeleton_module, "FIRST_BACKOFF_S", 0.001)
    blocks = built.manifest.members[0].blocks
    graphs = Graphs(blocks, {blocks[0].key})
    graphs.skeleton.start()
    with pytest.raises(PoolError, match="is missing"):
        graphs.skeleton.run(0, [])
    graphs.missing.clear()
    graphs.skeleton._thread.join(TIMEOUT_S)
    assert not graphs.skeleton._thread.is_alive(), "all is built: nothing is left to do"
    assert graphs.skeleton.run(0, []) == [blocks[0].graph]
    assert [graphs.asked.count(key) for key in keys_of(blocks)[1:]] == [1] * (
        len(keys_of(blocks)) - 1
    )
    graphs.skeleton.close()


def test_a_model_heals_when_its_store_has_graphs_again(
    built: CompiledModel,
    opened: Callable[..., BlockModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights come all the time; the answers then are those of the pool itself."""
    monkeypatch.setattr(skeleton_module, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(store, "FIRST_PAUSE_S", 0.001)
    names = set(graphs_of(built.manifest))
    down = True

    class Handler(StoreHandler):
        def do_GET(self) -> None:
            body, status = (built.pool / self.path.lstrip("/")).read_bytes(), HTTPStatus.OK
            if "Range" in self.headers:
                body, status = self.part(body), HTTPStatus.PARTIAL_CONTENT
            elif down and self.path.rpartition("/")[2] in names:
                body, status = b"", HTTPStatus.SERVICE_UNAVAILABLE
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    x = np.random.default_rng(0).standard_normal((2, WIDTH), dtype=np.float32)
    with answering(Handler) as url:
        model = opened(pool=url, cache=str(tmp_path / "cache"))
        for _ in range(3):
            with pytest.raises(PoolError, match=r"/objects/[0-9a-f]{64}: HTTP 503 .* in a row"):
                model.infer("", {"x": x}, ["y"], 2)
        down = False
        model._skeleton._thread.join(TIMEOUT_S)
        assert not model._skeleton._thread.is_alive()
        got = model.infer("", {"x": x}, ["y"], 2)["y"]
        model.close()
    np.testing.assert_array_equal(got, opened().infer("", {"x": x}, ["y"], 2)["y"])


@pytest.mark.parametrize("truncated", [False, True])
def test_a_graph_that_is_missing_in_a_local_pool_is_a_load_error(
    built: CompiledModel, opened: Callable[..., BlockModel], truncated: bool
) -> None:
    for name, stated in graphs_of(built.manifest).items():
        path = built.pool / "objects" / name
        aside = path.rename(path.with_name("aside"))
        said = f"{name}: missing; compile the model again"
        if truncated:
            path.write_bytes(aside.read_bytes()[:-1])
            size = stated.size_bytes
            said = f"{name}: {size - 1} bytes instead of {size}; compile the model again"
        try:
            with pytest.raises(PoolError, match=said):
                opened()
        finally:
            aside.rename(path)
    x = np.zeros((1, WIDTH), np.float32)
    assert np.isfinite(opened().infer("", {"x": x}, ["y"])["y"]).all()


def test_a_model_whose_store_hangs_can_be_unloaded(
    built: CompiledModel,
    opened: Callable[..., BlockModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither graphs nor weights come, and nobody waits until the store is given up."""
    monkeypatch.setattr(store, "TIMEOUT_S", 1000.0)
    asked = {"graph": threading.Event(), "weights": threading.Event()}
    going_on = threading.Event()

    class Handler(StoreHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/objects/"):
                asked["weights" if "Range" in self.headers else "graph"].set()
                going_on.wait(60)
            body = self.part((built.pool / self.path.lstrip("/")).read_bytes())
            with contextlib.suppress(OSError):  # nobody takes it
                self.send_response(206 if "Range" in self.headers else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

    with answering(Handler) as url:
        model = opened(pool=url, cache=str(tmp_path / "cache"))
        assert all(event.wait(TIMEOUT_S) for event in asked.values())
        ending = threading.Thread(target=model.close, daemon=True)
        ending.start()
        ending.join(TIMEOUT_S)
        ended = not ending.is_alive()
        going_on.set()
    assert ended
    assert not list((tmp_path / "cache" / "tmp" / "fetch").iterdir())
