"""Blocks models without Triton: bytes read, budgets kept, remote pools with all their faults."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from tests.http_stores import StoreHandler, answering
from tests.integration.blocks_models import (
    VOCABULARY,
    WIDTH,
    compiled,
    write_embedding,
    write_mlp,
    write_towers,
)

from paceline.blocks.backend import store
from paceline.blocks.backend.blockmodel import BlockModel
from paceline.blocks.backend.manifest import PoolError
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.backend.remote import RemoteSource
from paceline.blocks.backend.settings import SettingsError, read_settings
from paceline.blocks.backend.source import objects_of
from paceline.blocks.measure import BlockRunner
from paceline.blocks.repository import compiled_model

LAYERS = 24
OBJECT_BYTES = WIDTH * WIDTH * 4
TABLE_BYTES = VOCABULARY * WIDTH * 4
Open = Callable[..., BlockModel]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mlp` in six blocks, `sibling` that shares all but the last layer, `table`."""
    root = tmp_path_factory.mktemp("blocks")
    for name, head in (("mlp", 0), ("sibling", 1)):
        onnx = write_mlp(root / f"{name}.onnx", layers=LAYERS, head_seed=head)
        compiled(root / "models", name, {"": onnx})
    compiled(root / "models", "table", {"": write_embedding(root / "table.onnx")})
    compiled(root / "models", "towers", {"": write_towers(root / "towers.onnx")})
    both = {name: root / f"{name}.onnx" for name in ("mlp", "sibling")}
    compiled(root / "models", "fused", both)
    return root / "models"


@pytest.fixture
def opened(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., BlockModel]]:
    """`opened(model, parameter=value, ...)`: started, and closed in the end."""
    monkeypatch.setenv("PACELINE_BLOCKS_LEDGER", str(tmp_path / "ledger"))
    monkeypatch.setattr(store, "FIRST_PAUSE_S", 0.001)
    models = []

    def opened(name: str, **parameters: str) -> BlockModel:
        found = compiled_model(repository / name)
        assert found is not None
        texts = {"manifest": found.digest, "pool": str(found.pool), **parameters}
        given = {key: {"string_value": text} for key, text in texts.items()}
        model = BlockModel.open(read_settings(given, repository / name))
        models.append(model)
        return model.start()

    yield opened
    for model in models:
        model.close()
    assert not (tmp_path / "ledger").exists()


def batch_of(rows: int) -> Any:
    return np.random.default_rng(rows).standard_normal((rows, WIDTH), dtype=np.float32)


def check(model: BlockModel, repository: Path, name: str = "mlp", seed: int = 0) -> None:
    """It computes what plain ONNX Runtime does."""
    if name == "table":
        feed: dict[str, Any] = {"ids": np.arange(4).reshape(1, 4) + seed}
    else:
        drawn = np.random.default_rng(seed).standard_normal((2, WIDTH), dtype=np.float32)
        feed = {"x": drawn}
    plain = ort.InferenceSession(repository.parent / f"{name}.onnx").run(None, feed)[0]
    got = model.infer("", feed, ["y"])["y"]
    np.testing.assert_allclose(got, plain, rtol=1e-4, atol=1e-5)


def test_a_budgeted_model_never_holds_more_and_reads_only_what_is_not_pinned(
    opened: Open, repository: Path
) -> None:
    model = opened("mlp", memory_budget_mib="3")
    for seed in range(12):
        check(model, repository, seed=seed)
    assert model.budget is not None and model.budget.plan is not None
    assert 0 < model.loader.peak_bytes <= 3 * 2**20
    assert model.loader.moved_bytes > 12 * 2 * 2**20, "it does not fit, so it was read again"


def test_a_model_without_a_budget_is_read_once(opened: Open, repository: Path) -> None:
    model = opened("mlp")
    for seed in range(3):
        check(model, repository, seed=seed)
    assert model.loader.wait_complete(10)
    assert model.loader.moved_bytes == LAYERS * OBJECT_BYTES


def test_budget_and_load_shift_under_concurrent_requests(opened: Open, repository: Path) -> None:
    """Two models, four threads, a budget of 5 MiB for both; every answer is right."""
    shared = {"shared_budget_mib": "5"}
    models = {name: opened(name, **shared) for name in ("mlp", "sibling")}
    failures: list[BaseException] = []

    def work(name: str, seed: int) -> None:
        try:
            for turn in range(8):
                check(models[name], repository, name, seed + turn)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(name, seed)) for name in models for seed in (0, 100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sum(model.loader.held_bytes for model in models.values()) <= 5 * 2**20


@pytest.mark.parametrize("budget_mib", [None, "4", "2.32", "1.03"])
def test_requests_while_a_model_loads_get_the_bits_of_the_whole_graph(
    opened: Open, repository: Path, budget_mib: str | None
) -> None:
    """The first requests of a fresh model, from four threads at once, and those after them."""
    found = compiled_model(repository / "mlp")
    assert found is not None
    (member,) = found.manifest.members
    runner = BlockRunner(ObjectStore(found.pool), found.manifest.objects)
    batches = [batch_of(rows) for rows in (1, 2, 5, 8)]
    expected = [runner.run(member, {"x": x}, whole=True)["y"] for x in batches]
    model = opened("mlp", **({"memory_budget_mib": budget_mib} if budget_mib else {}))
    with ThreadPoolExecutor(len(batches)) as threads:
        for _ in range(3):
            answers = [threads.submit(model.infer, "", {"x": x}, ["y"], len(x)) for x in batches]
            for answer, want in zip(answers, expected, strict=True):
                np.testing.assert_array_equal(answer.result()["y"], want)


def test_a_pool_is_only_read(opened: Open, repository: Path) -> None:
    """Loading and running a model writes nothing there but which objects were verified."""
    pool = repository.parent / "blocks"

    def there() -> dict[str, tuple[int, int]]:
        files = (path for path in pool.rglob("*") if path.is_file())
        return {
            str(path): (path.stat().st_mtime_ns, path.stat().st_size)
            for path in files
            if not path.is_relative_to(pool / "verified")
        }

    before = there()
    for parameters in ({}, {"memory_budget_mib": "2"}):
        check(opened("mlp", **parameters), repository)
    assert there() == before


class Together:
    """Sessions that compute once two threads are at it; without the other one they fail."""

    def __init__(self, runs: Any) -> None:
        self._runs = runs
        self._barrier = threading.Barrier(2)

    def run(self, block: int, values: list[Any]) -> list[Any]:
        self._barrier.wait(30)
        results: list[Any] = self._runs.run(block, values)
        return results


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
@pytest.mark.parametrize("budget_mib", [None, "4", "2.1"])
def test_members_compute_at_the_same_time(
    opened: Open, repository: Path, budget_mib: str | None
) -> None:
    """Every block of one waits until the other one has begun a block, too.

    A budget of 2.1 MiB has room for two blocks of 1 MiB.
    """
    model = opened("fused", **({"memory_budget_mib": budget_mib} if budget_mib else {}))
    model._runs = Together(model._runs)
    x = batch_of(2)
    with ThreadPoolExecutor(2) as threads:
        answers = {
            name: threads.submit(model.infer, name, {f"{name}/x": x}, [f"{name}/y"])
            for name in ("mlp", "sibling")
        }
    for name, answer in answers.items():
        plain = ort.InferenceSession(repository.parent / f"{name}.onnx").run(None, {"x": x})[0]
        got = answer.result()[f"{name}/y"]
        np.testing.assert_allclose(got, plain, rtol=1e-4, atol=1e-5)
    assert budget_mib is None or model.loader.peak_bytes <= float(budget_mib) * 2**20


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"memory_budget_mib": "much"}, "memory_budget_mib is 'much': give a number of MiB"),
        ({"memory_budget_mib": "0"}, "memory_budget_mib is '0': give a number of MiB above 0"),
        ({"page_cache": "maybe"}, "page_cache is 'maybe': give drop or keep"),
        ({"parallel": "0"}, "parallel is '0': give a whole number 1 to 64"),
        ({"budget": "3"}, "parameter budget is unknown; known are manifest"),
        ({"manifest": "../../etc/passwd"}, "is no name of an object: 64 lower-case hex digits"),
        ({"manifest": "0" * 64}, "0{64}.json: missing; compile the model again"),
        ({"pool": "/nowhere"}, "/nowhere: no such pool: `paceline blocks compile` writes one"),
        ({"pool": "ftp://host/pool"}, r"ftp:// is none of http://, https://, s3://"),
        ({"shared_budget_mib": "0.5"}, "shared_budget_mib 0.5 is below 1.0, what its largest"),
    ],
)
def test_bad_parameters_are_refused_with_what_to_write(
    opened: Open, tmp_path: Path, parameters: dict[str, str], said: str
) -> None:
    with pytest.raises((PoolError, SettingsError), match=said):
        opened("mlp", **{"cache": str(tmp_path / "cache"), **parameters})


@dataclass
class RemotePool:
    """A pool behind HTTP, and what it does wrong."""

    root: Path
    url: str = ""
    broken: int = 0
    """So many answers are 503 from now on."""
    wrong: bool = False
    """Objects of `wrong_bytes` end in a byte that is another."""
    wrong_bytes: int = OBJECT_BYTES
    ranges: bool = True
    stuck: str = ""
    """An object that comes when `going_on` is set."""
    going_on: threading.Event = field(default_factory=threading.Event)
    sent: list[tuple[str, int]] = field(default_factory=list)

    def sent_bytes(self, kind: str = "objects/") -> int:
        return sum(size for path, size in self.sent if path.startswith(f"/{kind}"))


@pytest.fixture
def pool(repository: Path) -> Iterator[RemotePool]:
    served = RemotePool(repository.parent / "blocks")

    class Handler(StoreHandler):
        def do_GET(self) -> None:
            if served.broken:
                served.broken -= 1
                return self.answer(503, b"")
            path = served.root / self.path.lstrip("/")
            if not path.is_file():
                return self.answer(404, b"")
            body = path.read_bytes()
            if served.wrong and len(body) == served.wrong_bytes:
                body = body[:-1] + bytes([body[-1] ^ 1])
            if served.stuck and served.stuck in self.path:
                served.going_on.wait(30)
            if "Range" in self.headers and served.ranges:
                return self.answer(206, self.part(body))
            return self.answer(200, body)

        def answer(self, status: int, body: bytes) -> None:
            served.sent.append((self.path, len(body)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with answering(Handler) as served.url:
        yield served


def test_a_remote_pool_is_read_once_into_the_cache(
    opened: Open, repository: Path, pool: RemotePool, tmp_path: Path
) -> None:
    """The second model with the same backbone reads its own layer only, the third nothing."""
    cache = {"pool": pool.url, "cache": str(tmp_path / "cache")}
    first = opened("mlp", **cache)
    check(first, repository)
    assert first.loader.wait_complete(10)
    weights = pool.sent_bytes()
    assert LAYERS * OBJECT_BYTES <= weights < (LAYERS + 1) * OBJECT_BYTES
    first.close()
    assert not list((tmp_path / "cache" / "tmp" / "fetch").iterdir())
    second = opened("sibling", **cache)
    check(second, repository, "sibling")
    assert OBJECT_BYTES <= pool.sent_bytes() - weights < 2 * OBJECT_BYTES
    sent = pool.sent_bytes()
    third = opened("sibling", **cache, memory_budget_mib="2.5")
    check(third, repository, "sibling")
    assert pool.sent_bytes() == sent


def test_two_processes_worth_of_models_fetch_every_object_once(
    opened: Open, repository: Path, pool: RemotePool, tmp_path: Path
) -> None:
    """Both load at the same time; each may fetch what the other one has not begun."""
    cache = {"pool": pool.url, "cache": str(tmp_path / "cache")}
    models = [opened("mlp", **cache) for _ in range(2)]
    for model in models:
        check(model, repository)
        assert model.loader.wait_complete(10)
    objects = [path for path, size in pool.sent if size == OBJECT_BYTES]
    assert len(objects) == len(set(objects)) == LAYERS


def test_a_table_comes_whole_from_a_remote_pool(
    opened: Open, repository: Path, pool: RemotePool, tmp_path: Path
) -> None:
    model = opened("table", pool=pool.url, cache=str(tmp_path / "cache"), memory_budget_mib="1")
    for seed in range(3):
        check(model, repository, "table", seed)
    model._tables_thread.join()
    (table,) = model._tables
    assert sum(size for path, size in pool.sent if table in path) == TABLE_BYTES
    assert (tmp_path / "cache" / "objects" / table).stat().st_size == TABLE_BYTES


def test_only_the_rows_that_a_request_reads_come_before_its_answer(
    opened: Open, repository: Path, pool: RemotePool, tmp_path: Path
) -> None:
    """First the chunk with the rows, hashed by itself; the rest of the table after the answer."""
    model = opened("table", pool=pool.url, cache=str(tmp_path / "cache"))
    assert model.loader.wait_complete(10)
    (table,) = model._tables
    assert not [path for path, _ in pool.sent if table in path]
    check(model, repository, "table")
    first, *_ = [size for path, size in pool.sent if table in path]
    assert first == 64 << 10


def test_a_wrong_row_is_found_before_it_is_used(
    opened: Open, repository: Path, pool: RemotePool, tmp_path: Path
) -> None:
    """The table's last byte is another: its other rows can be used, its last one cannot."""
    pool.wrong, pool.wrong_bytes = True, TABLE_BYTES
    model = opened("table", pool=pool.url, cache=str(tmp_path / "cache"))
    last = TABLE_BYTES // (WIDTH * 4) - 4
    with pytest.raises(PoolError, match="the store has other bytes in chunks"):
        check(model, repository, "table", last)
    check(model, repository, "table")
    pool.wrong = False
    check(model, repository, "table", last)


def test_a_store_that_fails_for_a_moment_is_asked_again(
    opened: Open, repository: Path, pool: RemotePool, tmp_path: Path
) -> None:
    pool.broken = 3
    model = opened("mlp", pool=pool.url, cache=str(tmp_path / "cache"))
    pool.broken = 2
    check(model, repository)


def test_a_store_that_does_not_come_back_is_a_clear_load_error(
    opened: Open, pool: RemotePool, tmp_path: Path
) -> None:
    pool.broken = 10_000
    with pytest.raises(PoolError, match=r"http://.*manifests/.*: HTTP 503 .*, 5 times in a row"):
        opened("mlp", pool=pool.url, cache=str(tmp_path / "cache"))
    with pytest.raises(PoolError, match=r"http://127.0.0.1:1/.*refused, 5 times in a row"):
        opened("mlp", pool="http://127.0.0.1:1", cache=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "tmp" / "fetch").iterdir())


def test_a_model_heals_when_its_store_comes_back(
    opened: Open, repository: Path, pool: RemotePool, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("paceline.blocks.backend.loader.FIRST_BACKOFF_S", 0.01)
    pool.wrong = True
    model = opened("mlp", pool=pool.url, cache=str(tmp_path / "cache"))
    with pytest.raises(PoolError, match="the store has other bytes under this name"):
        check(model, repository)
    pool.wrong = False
    for _ in range(100):
        try:
            check(model, repository)
            break
        except PoolError:
            threading.Event().wait(0.02)
    check(model, repository)


def test_what_is_there_is_computed_while_another_object_does_not_come(
    opened: Open, repository: Path, pool: RemotePool, tmp_path: Path, monkeypatch: Any
) -> None:
    """A tower's first object hangs in the store, until the other tower has begun."""
    monkeypatch.setattr(store, "SOON_S", 0.1)
    monkeypatch.setattr("paceline.blocks.backend.loader.SLOW_S", 0.05)
    found = compiled_model(repository / "towers")
    assert found is not None
    pool.stuck = found.manifest.members[0].blocks[0].weights[0].object
    model = opened("towers", pool=pool.url, cache=str(tmp_path / "cache"))
    (member,) = model.members
    first, other = (number for number, one in enumerate(member.blocks) if one.inputs == ("x",))
    assert first == 0

    class Order:
        def __init__(self, runs: Any) -> None:
            self.runs = runs
            self.blocks: list[int] = []

        def run(self, block: int, values: list[Any]) -> list[Any]:
            self.blocks.append(block)
            pool.going_on.set()
            results: list[Any] = self.runs.run(block, values)
            return results

    model._runs = order = Order(model._runs)
    check(model, repository, "towers")
    assert order.blocks[:2] == [other, first] and len(order.blocks) == len(member.blocks)


def test_a_full_disk_is_a_load_error_and_leaves_nothing(
    opened: Open, pool: RemotePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = LAYERS * OBJECT_BYTES - 1

    monkeypatch.setattr("shutil.disk_usage", lambda _: Full)
    with pytest.raises(PoolError, match="6 MiB are to be fetched and 5 MiB are free: make room"):
        opened("mlp", pool=pool.url, cache=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "tmp" / "fetch").iterdir())


def test_a_disk_that_is_too_small_is_a_load_error(
    opened: Open, pool: RemotePool, tmp_path: Path
) -> None:
    """A file system of 4 MiB for a model of 6."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)]
    if subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("no permission to mount")
    try:
        with pytest.raises(PoolError, match=r"6 MiB are to be fetched and \d MiB are free: make"):
            opened("mlp", pool=pool.url, cache=str(disk / "cache"))
        assert not list((disk / "cache" / "tmp" / "fetch").iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_what_a_killed_fetch_left_is_taken_over(
    opened: Open, repository: Path, pool: RemotePool, tmp_path: Path
) -> None:
    """Files of the right size and with anything in them."""
    found = compiled_model(repository / "mlp")
    assert found is not None
    left = tmp_path / "cache" / "tmp" / "fetch"
    killed = RemoteSource(lambda: store.HttpStore(pool.url), tmp_path / "cache")
    objects = killed.open(objects_of(killed.manifest(found.digest)))
    sizes = [one.size_bytes for one in objects.values()]
    names = [path.name for path in left.iterdir()]
    assert len(names) == len(sizes) == LAYERS
    killed.close()
    for name, size in zip(names, sizes, strict=True):
        (left / name).write_bytes(b"?" * size)
    model = opened("mlp", pool=pool.url, cache=str(tmp_path / "cache"))
    check(model, repository)
    model.close()
    assert not list(left.iterdir())


def test_a_server_without_ranges_serves_objects_of_one_chunk(
    opened: Open, repository: Path, pool: RemotePool, tmp_path: Path
) -> None:
    pool.ranges = False
    model = opened("mlp", pool=pool.url, cache=str(tmp_path / "cache"))
    check(model, repository)


def test_an_s3_store_is_read_through_botocore(
    opened: Open, repository: Path, pool: RemotePool, tmp_path: Path, monkeypatch: Any
) -> None:
    """Path-style addresses: the bucket is the first part of the path."""
    for key, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("REGION", "x")):
        monkeypatch.setenv(f"AWS_{key}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    pool.root = pool.root.parent
    settings = {"pool": "s3://blocks", "s3_endpoint": pool.url, "cache": str(tmp_path / "cache")}
    model = opened("mlp", **settings)
    check(model, repository)
    assert model.loader.wait_complete(10)
    assert any(path.startswith("/blocks/objects/") for path, _ in pool.sent)
    with pytest.raises(PoolError, match=r"s3://blocks/none/manifests/.*404"):
        opened("mlp", **{**settings, "pool": "s3://blocks/none", "cache": str(tmp_path / "c2")})
