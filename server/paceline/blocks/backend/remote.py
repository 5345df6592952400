"""A remote pool, cached in a local one: what is missing is fetched, checked and kept.

An object that is not in the cache is a file under `tmp/fetch/` at first, with its full size
allocated (a full disk is noticed before anything starts) and mapped at once, so that sessions can
be built over it. When its last byte is there and its hash is right it is renamed into `objects/`;
the mapping stays, and other processes find it. Processes that need the same object take turns: the
file is locked by who fetches it. A killed one leaves a file that the next one takes over.

A cache may be that of several stores, of which one may hold a manifest that says of an object's
name what is not so. Nobody else computes with what it fetched: an unfinished file is shared only
by those who will check it alike, and a finished one is what it is for each manifest by itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from blake3 import blake3

from . import store
from .chunks import requests
from .manifest import Chunks, Manifest, PoolError, PoolObject, is_digest, parse
from .mapping import LazyObjects, MappedObject, look_of
from .objects import Altered, ObjectStore, hash_file, is_right
from .partial import PartialObject
from .reader import Reader
from .settler import Settler
from .source import Waiting
from .store import Part, Store
from .window import Span

_ATTEMPTS = 2
"""To get an object whose hash is right."""


class RemoteSource:
    """See `source.Source`. `connect` opens the store; every thread has one of its own.

    `counted`: see `Reader`.
    """

    distant = True

    def __init__(self, connect: Callable[[], Store], cache: Path, *, counted: bool = False) -> None:
        self._connect = connect
        self._threads = threading.local()
        self._stores: list[Store] = []
        self._stopped = False
        self._cache = cache
        try:
            for name in ("objects", "manifests", "verified", "tmp/fetch"):
                (cache / name).mkdir(parents=True, exist_ok=True)
            (cache / "objects" / "external").touch()
            # Shared while we live: a sweep of tmp/ leaves it alone then.
            self._directory = os.open(cache / "tmp" / "fetch", os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._directory, fcntl.LOCK_SH)
        except OSError as error:
            raise PoolError(f"cache {cache}: {error.strerror}") from None
        self._store = ObjectStore(cache, counted=counted)
        self._reader = Reader(counted=counted)
        self._objects = LazyObjects({}, self._open)
        self._parts: dict[str, PartialObject] = {}
        self._stated: Mapping[str, PoolObject] = {}
        self._chunks: Mapping[str, Chunks] = {}
        self._settler = Settler(self._store)

    @property
    def _remote(self) -> Store:
        if not hasattr(self._threads, "store"):
            self._threads.store = self._connect()
            self._stores.append(self._threads.store)
            if self._stopped:
                self._threads.store.stop()
        store: Store = self._threads.store
        return store

    def manifest(self, digest: str) -> Manifest:
        if not is_digest(digest):
            raise PoolError(f"parameter manifest is {digest!r}: give 64 lower-case hex digits")
        path = self._cache / "manifests" / f"{digest}.json"
        if path.is_file():
            manifest = self._store.manifest(digest)
        else:
            text = self._remote.all(f"manifests/{digest}.json")
            if hashlib.sha256(text).hexdigest() != digest:
                raise PoolError(f"manifest {digest}: the store has other bytes under this name")
            manifest = parse(text, f"manifest {digest}")
            self._write(path, text)
        self._chunks = manifest.chunks
        return manifest

    def open(self, stated: Mapping[str, PoolObject]) -> LazyObjects:
        """Each is opened when it is first used: making a hundred files takes a while."""
        missing = sum(
            one.size_bytes for digest, one in stated.items() if not self._has(digest, one)
        )
        free = shutil.disk_usage(self._cache).free
        if free < missing:
            raise PoolError(
                f"cache {self._cache}: {missing >> 20} MiB are to be fetched and {free >> 20} MiB "
                "are free: make room, or name another one in the parameter cache"
            )
        self._stated = stated
        self._objects = LazyObjects(stated, self._open)
        return self._objects

    def _has(self, digest: str, stated: PoolObject) -> bool:
        """Whether the cache has it; what has the wrong size is removed."""
        path = self._store.path(digest)
        if not path.is_file():
            return False
        size_bytes = path.stat().st_size
        if size_bytes != stated.size_bytes:
            self._discard(digest, f"{size_bytes} bytes instead of {stated.size_bytes}")
            return False
        return True

    def _discard(self, digest: str, why: str) -> None:
        """Removes from the cache what is wrong. Raises PoolError if the manifest is instead."""
        if not self._store.discard_wrong(digest):
            raise PoolError(
                f"object {digest}: {why}, says the manifest, but they are those of its name: "
                "compile the model again"
            )

    def _open(self, digest: str, size_bytes: int) -> MappedObject:
        opened = self._open_anywhere(digest, size_bytes)
        opened.written = True  # by us, or by somebody else just now
        return opened

    def _open_anywhere(self, digest: str, size_bytes: int) -> MappedObject:
        path = self._store.path(digest)
        if path.is_file():
            return MappedObject(path, size_bytes)
        part = PartialObject(self._cache / "tmp" / "fetch" / self._unfinished(digest), size_bytes)
        if path.is_file():  # renamed meanwhile: ours is another, empty one
            part.remove()
            return MappedObject(path, size_bytes)
        try:
            opened = MappedObject(part.path, size_bytes)
        except PoolError:
            part.close()
            if path.is_file():  # renamed since we looked: ours is what was completed
                return MappedObject(path, size_bytes)
            raise
        self._parts[digest] = part
        return opened

    def _unfinished(self, digest: str) -> str:
        """The file's name, of what it will be checked by: parts of it may be before the whole."""
        hashed = self._stated[digest].blake3
        if digest in self._chunks:
            hashed = blake3(b"".join((hashed.encode(), *self._chunks[digest].digests))).hexdigest()
        return f"{digest}.{hashed}"

    def find_graphs(self, stated: Mapping[str, PoolObject]) -> None:
        """Any of them may be in the store."""

    def graph(self, digest: str, stated: PoolObject, waiting: Waiting = nullcontext) -> bytes:
        path = self._store.path(digest)
        if path.is_file():
            try:
                return self._store.read(digest, stated)
            except Altered:
                self._discard(digest, "other bytes")
        with waiting():
            text = self._remote.all(f"objects/{digest}")
        if not is_right(text, stated):
            raise PoolError(f"graph {digest}: the store has other bytes under this name")
        self._write(path, text)
        return text

    @property
    def graphs(self) -> Path:
        return self._cache / "objects"

    def expect(self, spans: Sequence[Span]) -> None:
        self._remote.expect(self._unclaimed(spans))
        self._reader.expect([span for span in spans[:1] if self._is_there(span.name)])

    def _unclaimed(self, spans: Sequence[Span]) -> Iterator[Part]:
        """Up to what somebody else fetches; opens them."""
        for span in spans:
            size = min(span.size_bytes, self._objects[span.name].size_bytes - span.offset)
            part = self._parts.get(span.name)
            if part is None or span.name in self._chunks:
                continue  # it is complete, or comes in other parts
            if not self._is_ours(span.name, part):
                return  # who fetches it is ahead of us, and fetches what follows, too
            yield _remote_part(span.name, span.offset, size)

    def _is_there(self, digest: str) -> bool:
        """Whether all of it is in the cache."""
        assert self._objects[digest].size_bytes  # opens it
        return digest not in self._parts

    def _is_ours(self, digest: str, part: PartialObject) -> bool:
        """Whether nobody else fetches it, or has fetched it; nobody else will then."""
        if not part.ours:
            part.ours = part.try_lock() and not part.is_published(self._store.path(digest))
        return part.ours

    def takes_turn(self, span: Span) -> bool:
        if self._reader.counted:
            return True  # swapped in again and again, from a disk that others want as well
        if self._is_there(span.name):
            return False
        return span.name in self._chunks or self._is_ours(span.name, self._parts[span.name])

    def fetch(self, span: Span, waiting: Waiting = nullcontext, *, patient: bool = True) -> None:
        opened = self._objects[span.name]
        part = self._parts.get(span.name)
        size = min(span.size_bytes, opened.size_bytes - span.offset)  # spans are whole pages
        if span.name in self._chunks:  # others may use its rows: nothing unchecked is written there
            if span.last:
                self.check(span.name)
        elif part is not None and (
            part.ours or not self._came_from_elsewhere(span.name, part, waiting)
        ):
            patience_s = store.TIMEOUT_S if patient else store.SOON_S
            self._download(span.name, part, span.offset, size, patience_s)
            self._reader.wrote_span(part, span.offset, size)
        elif span.offset == 0:
            self.check(span.name)
        self._reader.bring(self._objects, span)
        part = self._parts.get(span.name)
        if span.last and part is not None:
            self._complete(span.name, part, held=True)

    def check(self, digest: str) -> None:
        opened = self._objects[digest]
        if opened.right is not None and opened.right == opened.look():
            return
        part = self._parts.get(digest)
        if part is not None and digest in self._chunks:
            self._check_parts(digest, part)
            return
        if part is not None:
            if not self._came_from_elsewhere(digest, part):
                self._download_unheld(digest, part)
                self._complete(digest, part, held=False)
            return
        try:
            status = self._store.verify(opened.handle, digest, self._stated[digest])
        except Altered as error:
            if opened.has_path(self._store.path(digest)):
                self._discard(digest, "other bytes")
            raise PoolError(f"{error}; removed from the cache: load the model again") from None
        opened.found_right(look_of(status))

    @property
    def by_parts(self) -> Mapping[str, Chunks]:
        return self._chunks

    def check_part(self, digest: str, wanted: Collection[int]) -> None:
        """Fetches the chunks that are not there, each usable once its hash is right."""
        opened = self._objects[digest]
        part = self._parts.get(digest)
        if part is None:
            self.check(digest)
            return
        with part.parts_lock:
            if opened.right is not None:
                return  # complete meanwhile
            if not part.chunks and self._came_from_elsewhere(digest, part):
                return
            size = self._chunks[digest].size_bytes
            most = self._reader.chunk_bytes // size
            runs = list(requests(set(wanted) - part.chunks, size, most=max(1, most)))
            wanted_parts = [self._chunks_part(digest, run) for run in runs]
            for number, run in enumerate(runs, 1):
                self._remote.expect(wanted_parts[number:])
                self._fetch_chunks(digest, part, run)

    def _chunks_part(self, digest: str, run: range) -> Part:
        size = self._chunks[digest].size_bytes
        first = run.start * size
        stop = min(run.stop * size, self._objects[digest].size_bytes)
        return _remote_part(digest, first, stop - first)

    def _fetch_chunks(self, digest: str, part: PartialObject, run: range) -> None:
        size, hashes = self._chunks[digest].size_bytes, self._chunks[digest].digests
        wanted = self._chunks_part(digest, run)
        for _ in range(_ATTEMPTS):
            text = self._remote.read(wanted)
            pieces = [text[start : start + size] for start in range(0, len(text), size)]
            if all(
                blake3(piece).digest() == hashes[number]
                for number, piece in zip(run, pieces, strict=True)
            ):
                # Whoever has completed it meanwhile has it as it is.
                if part.ours or not part.is_published(self._store.path(digest)):
                    part.write(wanted.offset, text)
                self._reader.wrote(part, wanted.offset, wanted.size_bytes)
                part.chunks.update(run)
                return
        raise PoolError(f"object {digest}: the store has other bytes in chunks {run}")

    def _check_parts(self, digest: str, part: PartialObject) -> None:
        """All of it, in runs, so that who needs a few rows waits for one run at most."""
        size = self._chunks[digest].size_bytes
        count = len(self._chunks[digest].digests)
        step = max(1, self._reader.chunk_bytes // size)
        for first in range(0, count, step):
            self.check_part(digest, range(first, min(first + step, count)))
        with part.parts_lock:
            if self._objects[digest].right is None:
                self._complete(digest, part, held=False)

    def stop(self) -> None:
        self._stopped = True  # those that are made from now on
        for each in list(self._stores):
            each.stop()

    def close(self) -> None:
        self._settler.close()
        for each in self._stores:
            each.close()
        for part in self._parts.values():
            part.close()
        self._objects.close()
        # Whatever was fetched in part is of use to somebody only while somebody fetches.
        with contextlib.suppress(OSError):
            fcntl.flock(self._directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in (self._cache / "tmp" / "fetch").iterdir():
                path.unlink(missing_ok=True)
        os.close(self._directory)

    def _download_unheld(self, digest: str, part: PartialObject) -> None:
        """All of it."""
        step = self._reader.chunk_bytes
        for offset in range(0, part.size_bytes, step):
            size = min(step, part.size_bytes - offset)
            self._download(digest, part, offset, size)
            self._reader.wrote(part, offset, size)

    def _download(
        self,
        digest: str,
        part: PartialObject,
        offset: int,
        size_bytes: int,
        patience_s: float | None = None,
    ) -> None:
        """See `Store.copy`."""
        self._objects[digest].written = True

        def write(position: int, piece: memoryview) -> None:
            part.write(offset + position, piece)

        try:
            self._remote.copy(_remote_part(digest, offset, size_bytes), write, patience_s)
        except PoolError:
            part.release()  # whoever waits for it is not to wait for our next try
            raise

    def _complete(self, digest: str, part: PartialObject, *, held: bool) -> None:
        """Checks the whole; what is wrong is fetched once more, then given up.

        `held`: all of it is in memory, and is to be.
        """
        if not part.ours and self._came_from_elsewhere(digest, part):
            return
        stated = self._stated[digest]
        attempts = 1 if digest in self._chunks else _ATTEMPTS
        for attempt in range(attempts):
            if self._objects[digest].truncated:  # to hash what is not there would kill the process
                raise PoolError(f"cache {part.path}: truncated by somebody else")
            written = os.fstat(part.handle)
            if self._is_right(digest, part, held=held):
                status = part.publish(self._store.path(digest))
                # What was written since then nobody has hashed.
                look = written.st_size, written.st_mtime_ns, status.st_ctime_ns
                self._objects[digest].found_right(look)
                del self._parts[digest]
                self._store.mark_unsettled(digest, stated, status)  # who waits need not hash it
                part.close()
                self._settler.add(digest, stated, status)
                return
            if attempt + 1 < attempts:
                if held:
                    self._download(digest, part, 0, part.size_bytes)
                else:
                    self._download_unheld(digest, part)
        part.release()
        raise PoolError(f"object {digest}: the store has other bytes under this name")

    def _is_right(self, digest: str, part: PartialObject, *, held: bool) -> bool:
        if held or not self._reader.counted:
            return is_right(self._objects[digest].bytes, self._stated[digest])
        return hash_file(part.handle, keep=False) == self._stated[digest].blake3

    def _came_from_elsewhere(
        self, digest: str, part: PartialObject, waiting: Waiting = nullcontext
    ) -> bool:
        """Waits for whoever fetches it; whether it is complete then."""
        if not part.try_lock():
            for other in list(self._parts.values()):
                other.release()  # two that wait for each other would wait for ever
            with waiting():
                part.lock()
        part.ours = not part.is_published(self._store.path(digest))
        if part.ours:
            return False
        opened = self._objects[digest]
        opened.written = True
        status = self._store.verify(opened.handle, digest, self._stated[digest])
        opened.found_right(look_of(status))
        part.close()
        del self._parts[digest]
        return True

    def _write(self, path: Path, text: bytes) -> None:
        fresh = self._cache / "tmp" / "fetch" / f"{path.name}.{os.getpid()}"
        try:
            fresh.write_bytes(text)
            fresh.replace(path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise PoolError(f"cache {path}: {error.strerror}") from None


def _remote_part(digest: str, offset: int, size_bytes: int) -> Part:
    return Part(f"objects/{digest}", offset, size_bytes)
