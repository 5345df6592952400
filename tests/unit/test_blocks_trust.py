"""What a manifest says of an object holds for that manifest alone, in a cache of several stores."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from blake3 import blake3
from tests.http_stores import StoreHandler, answering
from tests.integration.blocks_models import VOCABULARY, WIDTH, write_embedding, write_mlp

from paceline.blocks.backend.manifest import Chunks, PoolError, PoolObject, parse
from paceline.blocks.backend.mapping import MappedObject
from paceline.blocks.backend.objects import Altered, ObjectStore
from paceline.blocks.backend.remote import RemoteSource
from paceline.blocks.backend.source import LocalSource, objects_of
from paceline.blocks.backend.store import HttpStore
from paceline.blocks.backend.window import Span
from paceline.blocks.compile import compile_model
from paceline.blocks.member import Options
from paceline.blocks.pool import PoolWriter
from paceline.blocks.repository import CompiledModel, find_compiled
from paceline.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RIGHT = b"what the name promises" * 3000
FORGED = b"what another store says" * 3000
NAME = sha256(RIGHT).hexdigest()


def said_of(text: bytes) -> PoolObject:
    return PoolObject(len(text), blake3(text).hexdigest())


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    with PoolWriter(tmp_path / "pool") as writer:
        assert writer.add_bytes(RIGHT) == (NAME, said_of(RIGHT))
    return tmp_path / "pool"


def put(pool: Path, text: bytes) -> None:
    """Another file with these bytes takes the name's place."""
    fresh = pool / "fresh"
    fresh.write_bytes(text)
    fresh.replace(pool / "objects" / NAME)


def test_a_marker_counts_for_who_states_the_same_blake3(pool: Path) -> None:
    """Whoever states another one hashes again, and finds out."""
    put(pool, FORGED)
    ObjectStore(pool).verified(NAME, said_of(FORGED))
    assert (pool / "verified" / NAME).read_text().endswith(f" {said_of(FORGED).blake3}")
    for store in (ObjectStore(pool), ObjectStore(pool)):
        store.verified(NAME, said_of(FORGED))
        right = PoolObject(len(FORGED), said_of(RIGHT).blake3)
        for _ in range(2):
            with pytest.raises(Altered, match="its hash is another"):
                store.verified(NAME, right)
            with pytest.raises(Altered, match="its hash is another"):
                store.read(NAME, right)


def test_what_is_mapped_is_what_counts(pool: Path) -> None:
    """Right bytes that take the place of wrong ones are not what was mapped before."""
    put(pool, FORGED)
    size = len(FORGED)
    mapped = MappedObject(pool / "objects" / NAME, size)
    store = ObjectStore(pool)
    right = PoolObject(size, blake3(RIGHT[:1].ljust(size)).hexdigest())
    put(pool, RIGHT[:1].ljust(size))
    store.verified(NAME, right)
    with pytest.raises(Altered):
        store.verify(mapped.handle, NAME, right)
    store.verify(mapped.handle, NAME, said_of(FORGED))
    with pytest.raises(Altered):
        store.verify(mapped.handle, NAME, right)
    mapped.close()


def test_only_what_is_not_what_its_name_promises_is_discarded(pool: Path) -> None:
    store = ObjectStore(pool)
    assert not store.discard_wrong(NAME)
    assert store.path(NAME).read_bytes() == RIGHT
    put(pool, FORGED)
    assert store.discard_wrong(NAME)
    assert not store.path(NAME).exists()
    assert store.discard_wrong(NAME), "another process was faster"


def test_a_compile_replaces_what_another_manifest_was_right_about(pool: Path) -> None:
    put(pool, FORGED)
    ObjectStore(pool).verified(NAME, said_of(FORGED))
    with PoolWriter(pool) as writer:
        writer.add_bytes(RIGHT)
        assert writer.written_bytes == len(RIGHT)
    assert (pool / "objects" / NAME).read_bytes() == RIGHT
    ObjectStore(pool).verified(NAME, said_of(RIGHT))


@dataclass
class Stores:
    """One pool, and a forged one: of one object other bytes, and a manifest that says just that."""

    honest: str
    forged: str
    manifests: tuple[str, str]
    name: str
    right: bytes
    wrong: bytes
    cache: Path

    def source(self, *, forged: bool) -> RemoteSource:
        url = self.forged if forged else self.honest
        return RemoteSource(lambda: HttpStore(url), self.cache)

    def load(self, source: RemoteSource, *, forged: bool) -> bytes:
        """The object's bytes, fetched and checked as a model's are."""
        objects = source.open(objects_of(source.manifest(self.manifests[forged])))
        opened = objects[self.name]
        source.check(self.name)
        return opened.bytes.tobytes()


def forge(pool: Path, model: CompiledModel, name: str, wrong: bytes) -> str:
    """The digest of a manifest that is right about the wrong bytes."""
    document = json.loads(json.dumps(model.manifest.document))
    document["objects"][name] = said_of(wrong).as_json()
    if name in document["chunks"]:
        size = document["chunks"][name]["bytes"]
        chunks = (wrong[start : start + size] for start in range(0, len(wrong), size))
        document["chunks"][name]["blake3"] = b"".join(blake3(c).digest() for c in chunks).hex()
    text = json.dumps(document).encode()
    digest = sha256(text).hexdigest()
    (pool / "manifests" / f"{digest}.json").write_bytes(text)
    path = pool / "objects" / name
    path.unlink()
    path.write_bytes(wrong)
    return digest


@pytest.fixture(params=["weights", "table"])
def stores(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stores]:
    """The object that differs is fetched as a whole, or by rows."""
    onnx, size = tmp_path / "model.onnx", VOCABULARY * WIDTH * 4
    if request.param == "weights":
        write_mlp(onnx, layers=2)
        size = WIDTH * WIDTH * 4
    else:
        write_embedding(onnx)
    pool = tmp_path / "honest"
    options = Options(measure=False)
    model = compile_model({"": onnx}, tmp_path / "repo" / "m", pool, options).model
    (name, *_) = [n for n, one in objects_of(model.manifest).items() if one.size_bytes == size]
    assert (name in model.manifest.chunks) == (request.param == "table")
    right = (pool / "objects" / name).read_bytes()
    wrong = bytes([right[0] ^ 1]) + right[1:]
    shutil.copytree(pool, tmp_path / "forged")
    digest = forge(tmp_path / "forged", model, name, wrong)

    class Handler(StoreHandler):
        def do_GET(self) -> None:
            body = self.part((tmp_path / self.path.lstrip("/")).read_bytes())
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    manifests, cache = (model.digest, digest), tmp_path / "cache"
    with answering(Handler) as url:
        yield Stores(f"{url}/honest", f"{url}/forged", manifests, name, right, wrong, cache)


def test_what_a_forged_manifest_fetched_is_not_what_another_one_computes_with(
    stores: Stores,
) -> None:
    """It is found, removed, and the next load has the right bytes."""
    source = stores.source(forged=True)
    assert stores.load(source, forged=True) == stores.wrong
    source.close()
    source = stores.source(forged=False)
    with pytest.raises(PoolError, match="removed from the cache: load the model again"):
        stores.load(source, forged=False)
    source.close()
    source = stores.source(forged=False)
    assert stores.load(source, forged=False) == stores.right
    source.close()


def test_a_forged_manifest_does_not_remove_what_is_right(stores: Stores) -> None:
    source = stores.source(forged=False)
    assert stores.load(source, forged=False) == stores.right
    source.close()
    source = stores.source(forged=True)
    with pytest.raises(PoolError, match="those of its name: compile the model again"):
        stores.load(source, forged=True)
    source.close()
    assert (stores.cache / "objects" / stores.name).read_bytes() == stores.right


@pytest.mark.parametrize("first", [True, False])
def test_two_that_load_at_the_same_time_share_only_what_they_check_alike(
    stores: Stores, first: bool
) -> None:
    """Both are open before either has fetched anything; each gets its own bytes and keeps them."""
    sources = {forged: stores.source(forged=forged) for forged in (False, True)}
    objects = {
        forged: source.open(objects_of(source.manifest(stores.manifests[forged])))
        for forged, source in sources.items()
    }
    opened = {forged: every[stores.name] for forged, every in objects.items()}
    for forged in (first, not first):
        sources[forged].check(stores.name)
    for forged, text in ((False, stores.right), (True, stores.wrong)):
        assert opened[forged].bytes.tobytes() == text
    for source in sources.values():
        source.close()
    later = stores.source(forged=False)
    if first:  # what came last has the name
        assert stores.load(later, forged=False) == stores.right
    else:
        with pytest.raises(PoolError, match="removed from the cache"):
            stores.load(later, forged=False)
    later.close()


@pytest.mark.parametrize("local", [True, False])
def test_a_load_checks_what_it_has_mapped(stores: Stores, local: bool) -> None:
    """Its file was wrong, and another process has put the right one in its place."""
    path = stores.cache / "objects" / stores.name
    path.parent.mkdir(parents=True)
    path.write_bytes(stores.wrong)
    source = stores.source(forged=False)
    manifest = source.manifest(stores.manifests[0])
    reader = LocalSource(stores.cache) if local else source
    opened = reader.open({stores.name: manifest.objects[stores.name]})[stores.name]
    assert opened.bytes.tobytes() == stores.wrong
    fresh = stores.cache / "fresh"
    fresh.write_bytes(stores.right)
    fresh.replace(path)
    for _ in range(2):
        with pytest.raises(PoolError, match="altered"):
            reader.check(stores.name)
    assert path.read_bytes() == stores.right
    reader.close()
    source.close() if local else None


def test_a_file_that_is_used_by_rows_is_shared_by_who_checks_rows_alike(stores: Stores) -> None:
    """The same object, but a manifest may divide it otherwise, or need the whole of it."""
    names = set()
    for chunks in ({}, {stores.name: Chunks(8, (b"0",))}, {stores.name: Chunks(8, (b"1",))}):
        source = stores.source(forged=False)
        source.open(objects_of(source.manifest(stores.manifests[0])))
        source._chunks = chunks
        names.add(source._unfinished(stores.name))
        source.close()
    assert len(names) == 3


def test_rows_in_use_are_never_overwritten_by_bytes_that_nobody_checked(stores: Stores) -> None:
    """A load that needs a whole table asks for spans of it, and gets them by checked parts."""
    source = stores.source(forged=False)
    manifest = source.manifest(stores.manifests[0])
    (opened,) = source.open({stores.name: manifest.objects[stores.name]}).values()
    source._connect = lambda: HttpStore(stores.forged)
    source._threads = threading.local()
    half = len(stores.right) // 2
    with pytest.raises(PoolError, match="the store has other bytes"):
        for span in (
            Span(stores.name, 0, half, last=False),
            Span(stores.name, half, half, last=True),
        ):
            source.fetch(span)
    by_rows = stores.name in manifest.chunks
    assert (opened.bytes.tobytes() == stores.wrong) is not by_rows
    source.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_two_of_one_manifest_share_what_one_of_them_fetches(stores: Stores, replaced: bool) -> None:
    """Both are open before either has fetched anything: the same pages, once; whatever has the
    name when the second one looks."""
    sources = [stores.source(forged=False) for _ in range(2)]
    stated = [objects_of(source.manifest(stores.manifests[0])) for source in sources]
    opened = [
        source.open(every)[stores.name] for source, every in zip(sources, stated, strict=True)
    ]
    inodes = {os.fstat(one.handle).st_ino for one in opened}
    assert len(inodes) == 1
    sources[0].check(stores.name)
    if replaced:
        fresh = stores.cache / "fresh"
        fresh.write_bytes(stores.wrong)
        fresh.replace(stores.cache / "objects" / stores.name)
    sources[1]._connect = lambda: pytest.fail("it is there")
    sources[1].check(stores.name)
    assert [one.bytes.tobytes() for one in opened] == [stores.right] * 2
    at_its_name = (stores.cache / "objects" / stores.name).stat().st_ino
    assert (at_its_name in inodes) is not replaced
    for source in sources:
        source.close()


def test_a_load_that_was_overtaken_goes_on_with_what_the_other_one_fetched(
    stores: Stores,
) -> None:
    """Its lock was given up between two spans, and the other one took it and completed."""
    first, second = (stores.source(forged=False) for _ in range(2))
    for source in (first, second):
        source.open(objects_of(source.manifest(stores.manifests[0])))
    half = len(stores.right) // 2
    spans = Span(stores.name, 0, half, last=False), Span(stores.name, half, half, last=True)
    first.fetch(spans[0])
    part = first._parts[stores.name]
    part.release()
    second.check(stores.name)
    first._connect = lambda: pytest.fail("nothing was left to fetch")
    first._threads = threading.local()
    first.fetch(spans[1])
    assert stores.name not in first._parts
    for source in (first, second):
        source.close()


def test_what_takes_an_objects_place_is_not_vouched_for(stores: Stores) -> None:
    """Markers are written when a load is over; until then the name may be another file's."""
    source = stores.source(forged=False)
    stores.load(source, forged=False)
    path = stores.cache / "objects" / stores.name
    fresh = stores.cache / "fresh"
    fresh.write_bytes(stores.wrong)
    fresh.replace(path)
    for job in source._settler._waiting:
        source._settler._settle(*job)
    stated = source._stated[stores.name]
    source.close()
    with pytest.raises(Altered):
        ObjectStore(stores.cache).verified(stores.name, stated)


def test_an_object_of_another_size_in_the_cache_is_fetched_anew(stores: Stores) -> None:
    (stores.cache / "objects").mkdir(parents=True)
    (stores.cache / "objects" / stores.name).write_bytes(b"short")
    source = stores.source(forged=False)
    assert stores.load(source, forged=False) == stores.right
    source.close()


@pytest.fixture
def model(tmp_path: Path) -> CompiledModel:
    write_mlp(tmp_path / "model.onnx", layers=2)
    directory, pool = tmp_path / "repo" / "m", tmp_path / "pool"
    options = Options(measure=False)
    return compile_model({"": tmp_path / "model.onnx"}, directory, pool, options).model


def test_a_model_of_the_former_format_says_so_and_is_compiled_again(
    model: CompiledModel, tmp_path: Path
) -> None:
    document = json.loads(json.dumps(model.manifest.document))
    document["format"] = "paceline-blocks/1"
    document["objects"] = {name: entry["bytes"] for name, entry in document["objects"].items()}
    text = json.dumps(document).encode()
    digest = sha256(text).hexdigest()
    (model.pool / "manifests" / f"{digest}.json").write_bytes(text)
    config = model.directory / "config.pbtxt"
    config.write_text(config.read_text().replace(model.digest, digest))
    said = r"format is 'paceline-blocks/1', this reads paceline-blocks/2: compile the model again"
    with pytest.raises(PoolError, match=said):
        parse(text, "m.json")
    with pytest.raises(ConfigError, match=said):
        find_compiled([model.directory])
    options = Options(measure=False)
    again = compile_model({"": tmp_path / "model.onnx"}, model.directory, model.pool, options)
    assert again.fresh
    assert find_compiled([model.directory])[0].digest == model.digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda entry: entry.pop("blake3"), "lacks 'blake3'"),
        (lambda entry: entry.update(blake3="../../etc/passwd"), "blake3 is '../../etc/passwd'"),
        (lambda entry: entry.update(bytes=-1), "-1 is no whole number"),
    ],
)
def test_an_object_without_a_sound_hash_is_refused(
    model: CompiledModel, change: Callable[[dict[str, object]], object], said: str
) -> None:
    document = json.loads(json.dumps(model.manifest.document))
    change(next(iter(document["objects"].values())))
    with pytest.raises(PoolError, match=said):
        parse(json.dumps(document).encode(), "m.json")


@pytest.mark.parametrize("missing", ["blake3", "onnxruntime"])
def test_what_tritons_python_lacks_is_one_line(missing: str) -> None:
    code = f"""
import sys, types
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
sys.modules[{missing!r}] = None
sys.path.insert(0, "server/paceline/blocks/backend")
import model
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    (*_, last) = done.stderr.splitlines()
    assert last == (
        f"ImportError: backend paceline_blocks: Triton's Python has no {missing}: "
        'pip install "numpy<2" onnxruntime blake3'
    )
