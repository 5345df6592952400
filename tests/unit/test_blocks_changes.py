"""Objects that change under a loaded model: no answer comes of them, and what heals them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.http_stores import StoreHandler, answering
from tests.integration.blocks_models import (
    VOCABULARY,
    WIDTH,
    compiled,
    write_embedding,
    write_mlp,
)

from paceline.blocks.backend import loader as loader_module
from paceline.blocks.backend.blockmodel import BlockModel
from paceline.blocks.backend.changes import Changes
from paceline.blocks.backend.manifest import PoolError, PoolObject
from paceline.blocks.backend.mapping import LazyObjects, MappedObject
from paceline.blocks.backend.settings import read_settings
from paceline.blocks.backend.source import objects_of
from paceline.blocks.repository import CompiledModel, compiled_model

LAYERS = 8
OBJECT_BYTES = WIDTH * WIDTH * 4
TABLE_BYTES = VOCABULARY * WIDTH * 4
TIMEOUT_S = 30.0
CHANGED = "its file changed while the model used it; there is no answer"
ALTERED = r"altered \(its hash is another\)"
BUDGETS: list[dict[str, str]] = [{}, {"memory_budget_mib": "1.2"}, {"memory_budget_mib": "1.7"}]
"""All of 2 MiB stays; most of it is swapped; some of it is pinned."""
Open = Callable[..., BlockModel]


@dataclass
class Object:
    """An object of a pool, and what somebody does to its file."""

    path: Path
    right: bytes
    mtime_ns: int

    @classmethod
    def at(cls, path: Path) -> Object:
        return cls(path, path.read_bytes(), path.stat().st_mtime_ns)

    @property
    def name(self) -> str:
        return self.path.name

    def write(self, text: bytes) -> None:
        """In place, at another second than ever before: clocks of files tick slowly."""
        self.path.chmod(0o644)
        with self.path.open("r+b") as file:
            file.truncate(len(text))
            file.write(text)
        self.mtime_ns += 10**9
        os.utime(self.path, ns=(self.mtime_ns, self.mtime_ns))

    def alter(self) -> None:
        self.write(bytes([self.right[0] ^ 0x80]) + self.right[1:])

    def restore(self) -> None:
        self.write(self.right)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mlp` of two blocks, `table`; each in a pool of its own, which tests leave as it was."""
    root = tmp_path_factory.mktemp("changes")
    mlp = write_mlp(root / "mlp.onnx", layers=LAYERS)
    compiled(root / "mlp", "mlp", {"": mlp}, budget_mib=1)
    compiled(root / "table", "table", {"": write_embedding(root / "table.onnx")})
    return root


def model_of(repository: Path, name: str) -> CompiledModel:
    found = compiled_model(repository / name / name)
    assert found is not None
    return found


@pytest.fixture
def opened(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """`opened(model, parameter=value, ...)`: started, and closed in the end."""
    monkeypatch.setenv("PACELINE_BLOCKS_LEDGER", str(tmp_path / "ledger"))
    monkeypatch.setattr(loader_module, "FIRST_BACKOFF_S", 0.001)
    models = []

    def opened(name: str, **parameters: str) -> BlockModel:
        found = model_of(repository, name)
        texts = {"manifest": found.digest, "pool": str(found.pool), **parameters}
        given = {key: {"string_value": text} for key, text in texts.items()}
        model = BlockModel.open(read_settings(given, found.directory))
        models.append(model)
        return model.start()

    yield opened
    for model in models:
        model.close()


@pytest.fixture
def weights(repository: Path) -> Iterator[list[Object]]:
    """Of `mlp`, in the order of use; as they were in the end."""
    found = model_of(repository, "mlp")
    paths = [found.pool / "objects" / name for name in objects_of(found.manifest)]
    objects = [Object.at(path) for path in paths]
    yield objects
    for each in objects:
        if each.path.read_bytes() != each.right:
            each.path.unlink()
            each.path.write_bytes(each.right)


def ask(model: BlockModel, seed: int = 0) -> Any:
    if "ids" in {tensor.name for tensor in model.members[0].inputs}:
        feed: dict[str, Any] = {"ids": np.arange(4).reshape(1, 4) + seed}
    else:
        feed = {"x": np.random.default_rng(seed).standard_normal((2, WIDTH), dtype=np.float32)}
    return model.infer("", feed, ["y"], 2)["y"].copy()


def healed(model: BlockModel) -> Any:
    """Its next answer; errors may come before."""
    while True:
        try:
            return ask(model)
        except PoolError as error:
            told = ("altered", "bytes instead of", "changed while the model used it")
            assert any(words in str(error) for words in told)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("which", [0, LAYERS // 2, LAYERS - 1])
def test_what_is_altered_under_a_loaded_model_is_in_no_answer(
    opened: Open, weights: list[Object], budget: dict[str, str], which: int
) -> None:
    """Not until it is restored, however often somebody asks, whatever is pinned; twice."""
    model = opened("mlp", **budget)
    for _ in range(5):
        expected = ask(model)
    for _ in range(2):
        weights[which].alter()
        with pytest.raises(PoolError, match=f"{weights[which].name}.*({CHANGED}|{ALTERED})"):
            ask(model)
        for _ in range(3):
            with pytest.raises(PoolError, match=f"{weights[which].name}.*{ALTERED}"):
                ask(model)
        weights[which].restore()
        np.testing.assert_array_equal(healed(model), expected)
        np.testing.assert_array_equal(ask(model), expected)


def test_an_mtime_that_was_set_back_hides_nothing(opened: Open, weights: list[Object]) -> None:
    model = opened("mlp")
    ask(model)
    status = weights[0].path.stat()
    weights[0].alter()
    os.utime(weights[0].path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(PoolError, match=f"{weights[0].name}: {CHANGED}"):
        ask(model)


@pytest.mark.parametrize("budget", BUDGETS)
def test_links_modes_and_other_files_of_the_name_are_no_changes(
    opened: Open, weights: list[Object], budget: dict[str, str], tmp_path: Path
) -> None:
    """They alter a ctime, or nothing at all; what is mapped stays what it was."""
    model = opened("mlp", **budget)
    expected = ask(model)
    for one in weights:
        one.path.chmod(0o600)
        np.testing.assert_array_equal(ask(model), expected)
        os.link(one.path, tmp_path / one.name)
        np.testing.assert_array_equal(ask(model), expected)
        one.path.unlink()
        np.testing.assert_array_equal(ask(model), expected)
        one.path.write_bytes(b"?" * len(one.right))
        np.testing.assert_array_equal(ask(model), expected)
    if not budget:
        assert model.loader.moved_bytes == LAYERS * OBJECT_BYTES, "nothing was fetched again"


class Runs:
    """Sessions that do something before they compute a block; see `run.Sessions`."""

    def __init__(self, runs: Any, at: dict[int, Callable[[], None]]) -> None:
        self._runs = runs
        self._at = at

    def run(self, block: int, values: list[Any]) -> list[Any]:
        self._at.pop(block, lambda: None)()
        results: list[Any] = self._runs.run(block, values)
        return results


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_is_altered_and_restored_within_a_run_is_found(
    opened: Open, weights: list[Object], budget: dict[str, str]
) -> None:
    model = opened("mlp", **budget)
    expected = ask(model)
    blocks = len(model.members[0].blocks)
    assert blocks > 1
    model._runs = Runs(model._runs, {0: weights[0].alter, blocks - 1: weights[0].restore})
    with pytest.raises(PoolError, match=f"{weights[0].name}.*({CHANGED}|{ALTERED})"):
        ask(model)
    np.testing.assert_array_equal(healed(model), expected)


@pytest.mark.parametrize("found_by", ["swapping in", "another run"])
def test_a_run_during_which_others_found_a_change_has_no_answer(
    tmp_path: Path, found_by: str
) -> None:
    """It may have used what was there meanwhile, though all is right again; the next has one."""
    (tmp_path / "a").write_bytes(b"right")
    a = Object.at(tmp_path / "a")
    objects = LazyObjects(
        {"a": PoolObject(5, "")}, lambda name, size: MappedObject(tmp_path / name, size)
    )
    lost: list[str] = []
    changes = Changes(objects, lambda _: None, lost.extend)
    objects["a"].found_right(objects["a"].look())
    counts = changes.before(["a"])
    a.alter()
    a.restore()
    if found_by == "another run":
        objects["a"].found_changed()
    objects["a"].found_right(objects["a"].look())
    with pytest.raises(PoolError, match=f"object a: {CHANGED}"):
        changes.after(["a"], counts, ())
    assert not lost, "what was checked since then is there"
    changes.after(["a"], changes.before(["a"]), ())
    objects.close()


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_truncated_object_is_an_error_before_its_pages_are_touched(
    opened: Open, weights: list[Object], budget: dict[str, str]
) -> None:
    """Which would kill the process; and a whole one heals."""
    model = opened("mlp", **budget)
    expected = ask(model)
    runs = model._runs

    def never() -> None:
        raise AssertionError("a block computes")

    model._runs = Runs(runs, dict.fromkeys(range(len(model.members[0].blocks)), never))
    for one in weights:  # all of them: a block before the one with the truncated one may compute
        one.write(one.right[:4096])
    for _ in range(3):
        with pytest.raises(PoolError, match=f"({CHANGED}|4096 bytes instead of {OBJECT_BYTES})"):
            ask(model)
    for one in weights:
        one.restore()
    model._runs = runs
    np.testing.assert_array_equal(healed(model), expected)


@pytest.mark.parametrize("budget", BUDGETS)
def test_whoever_asks_while_objects_change_gets_the_right_answer_or_none(
    opened: Open, weights: list[Object], budget: dict[str, str]
) -> None:
    """Four threads; both happen, the answers are those of before."""
    model = opened("mlp", **budget)
    expected = [ask(model, seed) for seed in range(4)]
    ended = threading.Event()
    counts = {True: 0, False: 0}
    lock = threading.Lock()

    def keep_asking(seed: int) -> None:
        while not ended.is_set():
            try:
                np.testing.assert_array_equal(ask(model, seed), expected[seed])
                answered = True
            except PoolError:
                answered = False
            with lock:
                counts[answered] += 1

    def seen(answered: bool) -> None:
        """Some of these come."""
        before = counts[answered]
        while counts[answered] < before + 4 and not any(each.done() for each in asking):
            ended.wait(0.001)

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(keep_asking, seed) for seed in range(4)]
        try:
            for one in (weights[0], weights[-1], weights[0]):
                one.alter()
                seen(False)
                one.restore()
                seen(True)
        finally:
            ended.set()
        for each in asking:
            each.result()


def test_a_table_that_changes_is_in_no_answer(opened: Open, repository: Path) -> None:
    """Rows are paged in on demand."""
    model = opened("table")
    (name,) = model._tables
    table = Object.at(model_of(repository, "table").pool / "objects" / name)
    expected = ask(model)
    try:
        table.alter()
        with pytest.raises(PoolError, match=f"{name}: {CHANGED}"):
            ask(model)
        for _ in range(2):
            with pytest.raises(PoolError, match=f"{name}: {ALTERED}"):
                ask(model)
    finally:
        table.restore()
    np.testing.assert_array_equal(healed(model), expected)


@pytest.mark.parametrize("name", ["mlp", "table"])
def test_a_cache_that_changes_under_a_model_is_in_no_answer(
    opened: Open, repository: Path, tmp_path: Path, name: str
) -> None:
    """What is wrong is removed from it, and the next load has it from the store again."""
    found = model_of(repository, name)

    class Handler(StoreHandler):
        def do_GET(self) -> None:
            body = self.part((found.pool / self.path.lstrip("/")).read_bytes())
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with answering(Handler) as url:
        cached = {"pool": url, "cache": str(tmp_path / "cache")}
        model = opened(name, **cached)
        expected = ask(model)
        model._tables_thread.join(TIMEOUT_S)
        assert model.loader.wait_complete(TIMEOUT_S)
        sizes = {"mlp": OBJECT_BYTES, "table": TABLE_BYTES}
        (first, *_) = [
            each
            for each, one in objects_of(found.manifest).items()
            if one.size_bytes == sizes[name]
        ]
        path = tmp_path / "cache" / "objects" / first
        Object.at(path).alter()
        with pytest.raises(PoolError, match=f"{first}: {CHANGED}"):
            ask(model)
        for _ in range(2):
            with pytest.raises(PoolError, match=f"{first}: {ALTERED}.*: load the model again"):
                ask(model)
        assert not path.exists()
        model.close()
        np.testing.assert_array_equal(ask(opened(name, **cached)), expected)
