"""Where a model's objects come from: a pool on this machine's disk (`LocalSource`).

A source opens objects as mappings, at once and without reading them, and brings their bytes into
memory when the loader says so. Invariant: `fetch` succeeds for the last span of an object only if
the whole object's hash was found right, in this process or by a marker that still holds; so no
block computes with bytes that nobody checked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

from .manifest import Block, Chunks, Manifest, PoolError, PoolObject
from .mapping import LazyObjects, MappedObject, look_of
from .objects import ObjectStore
from .reader import Reader
from .settings import Settings
from .window import Span

Waiting = Callable[[], AbstractContextManager[None]]


class Later(PoolError):
    """Bytes could not be had now; another attempt may get them."""


class Source(Protocol):
    """Objects of one model. `fetch`, `graph` and `check` may run at once, each in one thread."""

    distant: bool
    """Whether it takes a while from asking for bytes until the first of them come."""

    def manifest(self, digest: str) -> Manifest:
        """Raises PoolError if it cannot be had or is unsound."""

    def open(self, stated: Mapping[str, PoolObject]) -> LazyObjects:
        """The objects mapped, their bytes maybe not there yet. Raises PoolError."""

    def find_graphs(self, stated: Mapping[str, PoolObject]) -> None:
        """Raises PoolError if one of these should be on this machine already and is not."""

    def graph(self, digest: str, stated: PoolObject, waiting: Waiting = nullcontext) -> bytes:
        """A graph, complete and checked; waits for a store in `waiting()`. Raises PoolError."""

    @property
    def graphs(self) -> Path:
        """The directory that graphs take for theirs: their `external` is there."""

    def expect(self, spans: Sequence[Span]) -> None:
        """What will be fetched after the next span, in this order."""

    def takes_turn(self, span: Span) -> bool:
        """Whether bytes of it would come through what loads share: not what is on this machine
        already, and not what another process is fetching.
        """

    def fetch(self, span: Span, waiting: Waiting = nullcontext, *, patient: bool = True) -> None:
        """Brings the span's bytes into memory. Raises Later, the object is then as it was before,
        or PoolError: nothing of it is held then.

        In `waiting()` it does nothing but wait for another process that fetches the object. Not
        `patient`: it is given up sooner when nothing comes, because there are others to be fetched.
        """

    def check(self, digest: str) -> None:
        """Makes sure that an object has the right bytes; see `MappedObject.right`."""

    @property
    def by_parts(self) -> Mapping[str, Chunks]:
        """Objects of which `check_part` makes a part usable for less than all of it."""

    def check_part(self, digest: str, wanted: Collection[int]) -> None:
        """Makes sure of these chunks of an object of `by_parts`. Raises PoolError."""

    def stop(self) -> None:
        """What is being fetched fails, however long its store would have taken."""

    def close(self) -> None:
        """Nothing is fetched any more."""


class LocalSource:
    """A pool directory. Only markers of what was verified are ever written there.

    `counted`: see `Reader`.
    """

    distant = False

    def __init__(self, root: Path, *, counted: bool = False) -> None:
        if not root.is_dir():
            raise PoolError(f"{root}: no such pool: `paceline blocks compile` writes one")
        self._store = ObjectStore(root, counted=counted)
        self._objects = LazyObjects({}, self._open)
        self._reader = Reader(counted=counted)
        self._stated: Mapping[str, PoolObject] = {}

    def manifest(self, digest: str) -> Manifest:
        return self._store.manifest(digest)

    def open(self, stated: Mapping[str, PoolObject]) -> LazyObjects:
        """All of them at once: what is missing is found before the load answers."""
        self._stated = stated
        self._objects = LazyObjects(stated, self._open)
        return self._objects.open_all()

    def _open(self, digest: str, size_bytes: int) -> MappedObject:
        return MappedObject(self._store.path(digest), size_bytes)

    def find_graphs(self, stated: Mapping[str, PoolObject]) -> None:
        for digest, one in stated.items():
            self._store.find(digest, one)

    def graph(self, digest: str, stated: PoolObject, waiting: Waiting = nullcontext) -> bytes:
        return self._store.read(digest, stated)

    @property
    def graphs(self) -> Path:
        return self._store.root / "objects"

    def expect(self, spans: Sequence[Span]) -> None:
        self._reader.expect(spans)

    def takes_turn(self, span: Span) -> bool:
        return True

    def fetch(self, span: Span, waiting: Waiting = nullcontext, *, patient: bool = True) -> None:
        if span.offset == 0:
            self.check(span.name)
        self._reader.bring(self._objects, span)

    def check(self, digest: str) -> None:
        opened = self._objects[digest]
        status = self._store.verify(opened.handle, digest, self._stated[digest])
        opened.found_right(look_of(status))

    @property
    def by_parts(self) -> Mapping[str, Chunks]:
        return {}

    def check_part(self, digest: str, wanted: Collection[int]) -> None:
        self.check(digest)

    def stop(self) -> None:
        """A disk answers."""

    def close(self) -> None:
        self._objects.close()


def loaded_objects(block: Block) -> tuple[str, ...]:
    """Objects that must be in memory for the block to compute: all but tables."""
    tables = {weight.object for weight in block.weights if weight.access == "rows"}
    names = dict.fromkeys(weight.object for weight in block.weights)
    return tuple(name for name in names if name not in tables)


def tables_of(manifest: Manifest) -> list[str]:
    """Objects of which no block needs more than rows, which are paged in on demand."""
    blocks = (block for member in manifest.members for block in member.blocks)
    loaded = {name for block in blocks for name in loaded_objects(block)}
    return [name for name in objects_of(manifest) if name not in loaded]


def objects_of(manifest: Manifest) -> Mapping[str, PoolObject]:
    """Weights objects of the blocks, in the order of first use."""
    names = (
        weight.object
        for member in manifest.members
        for block in member.blocks
        for weight in block.weights
    )
    return {name: manifest.objects[name] for name in dict.fromkeys(names)}


def graphs_of(manifest: Manifest) -> Mapping[str, PoolObject]:
    """Graphs of the blocks."""
    names = (block.graph for member in manifest.members for block in member.blocks)
    return {name: manifest.objects[name] for name in dict.fromkeys(names)}


def open_source(settings: Settings) -> tuple[Source, str]:
    """Where the model's objects come from, and the name of what they come through."""
    if isinstance(settings.pool, Path):
        local = LocalSource(settings.pool, counted=settings.has_budget)
        return local, f"disk {settings.pool.stat().st_dev}"
    from . import remote, store  # a local pool needs no HTTP

    url, endpoint = settings.pool, settings.s3_endpoint
    source = remote.RemoteSource(
        lambda: store.open_store(url, s3_endpoint=endpoint),
        settings.cache,
        counted=settings.has_budget,
    )
    return source, store.channel(url)
