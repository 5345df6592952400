"""Writes block pools: objects named by their hash, whole or not there; docs/blocks-format.md.

Invariant: everything is written in a directory of its own under `tmp/`, fsynced, and renamed once
the compile has succeeded, so that neither a killed compile, nor a full disk, nor two compiles at a
time leave a name whose bytes are not its own. One that is refused or fails leaves nothing, a killed
one at most some whole objects (between the first rename and the last). What killed compiles left
behind under `tmp/` is swept by the next.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import TracebackType

from blake3 import blake3

from paceline.blocks.backend.manifest import EXTERNAL, PoolError, PoolObject, checked
from paceline.blocks.backend.objects import ObjectStore
from paceline.core.errors import ResidencyError

_STALE_MARKER_S = 3600.0
_STAGED = ".paceline-"
MIB = 1 << 20


class StagedStore(ObjectStore):
    """A pool together with the objects that a compile is about to put there."""

    def __init__(self, root: Path, stage: Path) -> None:
        super().__init__(root)
        self._objects = stage / "objects"

    def path(self, digest: str) -> Path:
        fresh = self._objects / checked(digest)
        return fresh if fresh.is_file() else super().path(digest)

    def mark_verified(self, digest: str, stated: PoolObject, status: os.stat_result) -> None:
        if self.path(digest).parent == self._objects:
            self.remember(digest, stated, status)  # its file changes by being renamed
        else:
            super().mark_verified(digest, stated, status)


class PoolWriter:
    """One compile's access to a pool, in a `with`: what was added is there if that succeeds.

    `stage` is its scratch directory, gone on exit; until then `store` finds what was added.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = -1
        self._added: dict[str, PoolObject] = {}
        self._manifests: dict[str, bytes] = {}

    def __enter__(self) -> PoolWriter:
        with disk_errors(self.root):
            for name in ("objects", "manifests", "verified", "tmp"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            (self.root / "objects" / EXTERNAL).touch(exist_ok=True)
            _sweep(self.root / "tmp")
            self._sweep_markers()
            self.stage, self._lock = _locked_directory(self.root / "tmp")
            (self.stage / "objects").mkdir()
            (self.stage / "objects" / EXTERNAL).touch()
        self.store = StagedStore(self.root, self.stage)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._commit()
        finally:
            shutil.rmtree(self.stage, ignore_errors=True)
            os.close(self._lock)

    @property
    def written_bytes(self) -> int:
        """Of objects that the pool does not have, or did not."""
        return sum(stated.size_bytes for stated in self._added.values())

    def add(self, chunks: Callable[[], Iterable[bytes]], size_bytes: int) -> tuple[str, PoolObject]:
        """Makes an object unless it is there; `chunks` gives its bytes anew at every call.

        Its name, and what a manifest says of it.

        Bytes are read twice rather than written for nothing. Raises ResidencyError if the disk is
        full, or if `chunks` gives other bytes the second time.
        """
        digest, hashed = _hashes(chunks())
        stated = PoolObject(size_bytes, hashed)
        with contextlib.suppress(PoolError):  # missing, or to be replaced because it was altered
            self.store.verified(digest, stated)
            return digest, stated
        fresh = self.stage / secrets.token_hex(8)
        if _write(fresh, chunks()) != digest:
            raise ResidencyError(f"{self.root}: the model's file changed while it was compiled")
        staged = self.stage / "objects" / digest
        self._publish(fresh, staged)
        self.store.mark_verified(digest, stated, staged.stat())
        self._added[digest] = stated
        return digest, stated

    def add_bytes(self, data: bytes) -> tuple[str, PoolObject]:
        return self.add(lambda: (data,), len(data))

    def add_manifest(self, data: bytes, objects: Collection[str]) -> str:
        """Its name. Of what was added only these objects, which it names, go into the pool."""
        digest = hashlib.sha256(data).hexdigest()
        self._manifests[digest] = data
        self._added = {name: self._added[name] for name in self._added if name in objects}
        return digest

    def _commit(self) -> None:
        """Objects, then manifests; all survive a power failure, before something refers to them."""
        pool = ObjectStore(self.root)
        for digest, stated in self._added.items():
            staged = self.stage / "objects" / digest
            with staged.open("rb") as file:  # another file may take its place at once
                self._publish(staged, pool.path(digest))
                pool.mark_verified(digest, stated, os.fstat(file.fileno()))
        sync_directory(self.root / "objects")
        for digest, data in self._manifests.items():
            fresh = self.stage / secrets.token_hex(8)
            _write(fresh, (data,))
            self._publish(fresh, self.root / "manifests" / f"{digest}.json")
        sync_directory(self.root / "manifests")

    def _publish(self, fresh: Path, path: Path) -> None:
        with disk_errors(path):
            fresh.chmod(0o444)
            fresh.replace(path)

    def _sweep_markers(self) -> None:
        for path in (self.root / "verified").glob(".*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - _STALE_MARKER_S:
                    path.unlink()


@contextlib.contextmanager
def staged(repository: Path) -> Iterator[Path]:
    """A new directory within `repository`, to be renamed to its place; gone on exit.

    One compile at a time publishes into a repository, however many there are, so that whatever
    is staged there before was left behind by one that was killed.
    """
    lock = os.open(repository, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in repository.glob(f"{_STAGED}*"):
            shutil.rmtree(path, ignore_errors=True)
        stage = repository / f"{_STAGED}{secrets.token_hex(8)}"
        stage.mkdir()
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    finally:
        os.close(lock)


def _locked_directory(parent: Path) -> tuple[Path, int]:
    """A new directory and the lock on it, a descriptor to close when it is gone."""
    while True:
        path = parent / secrets.token_hex(8)
        path.mkdir()
        # A sweeper may be faster than the lock, and even than the opening.
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(handle, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(handle).st_ino:
                    return path, handle
            os.close(handle)


def _sweep(parent: Path) -> None:
    """Removes the directories of `_locked_directory` whose owner is gone."""
    for path in parent.iterdir():
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the file system says into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path if path.is_dir() else path.parent).free
            raise ResidencyError(
                f"{path}: the disk is full ({free // MIB} MiB free); nothing was changed: "
                "make room or choose another place with --pool"
            ) from None
        raise ResidencyError(f"{error.filename or path}: {error.strerror}") from None


def write_file(path: Path, text: str) -> None:
    """Writes and fsyncs a new file."""
    _write(path, (text.encode(),))


def sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    with disk_errors(path), path.open("wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _hashes(chunks: Iterable[bytes]) -> tuple[str, str]:
    """SHA-256 and BLAKE3."""
    name, hashed = hashlib.sha256(), blake3()
    for chunk in chunks:
        name.update(chunk)
        hashed.update(chunk)
    return name.hexdigest(), hashed.hexdigest()
