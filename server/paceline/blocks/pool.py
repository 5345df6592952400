"""Writes block pools: objects named by their hash, whole or not there; docs/blocks-format.md.

Invariant: everything is written in a directory of its own under `tmp/`, fsynced, and renamed, so
that neither a killed compile, nor a full disk, nor two compiles at a time leave a name whose bytes
are not its own. What killed compiles left behind is swept by the next.
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType

from blake3 import blake3

from paceline.blocks.backend.manifest import EXTERNAL, PoolError, PoolObject
from paceline.blocks.backend.objects import ObjectStore
from paceline.core.errors import ResidencyError

_STALE_MARKER_S = 3600.0
_STAGED = ".paceline-"
MIB = 1 << 20


class PoolWriter:
    """One compile's access to a pool; `stage` is its scratch directory, gone on exit."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = ObjectStore(root)
        self.written_bytes = 0
        self._lock = -1

    def __enter__(self) -> PoolWriter:
        with disk_errors(self.root):
            for name in ("objects", "manifests", "verified", "tmp"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            (self.root / "objects" / EXTERNAL).touch(exist_ok=True)
            _sweep(self.root / "tmp")
            self._sweep_markers()
            self.stage, self._lock = _locked_directory(self.root / "tmp")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.stage, ignore_errors=True)
        os.close(self._lock)

    def add(self, chunks: Callable[[], Iterable[bytes]], size_bytes: int) -> tuple[str, PoolObject]:
        """Puts an object there unless it is; `chunks` gives its bytes anew at every call.

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
        with fresh.open("rb") as file:  # another file may take its place at once
            self._publish(fresh, self.store.path(digest))
            self.store.mark_verified(digest, stated, os.fstat(file.fileno()))
        self.written_bytes += size_bytes
        return digest, stated

    def add_bytes(self, data: bytes) -> tuple[str, PoolObject]:
        return self.add(lambda: (data,), len(data))

    def add_manifest(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        fresh = self.stage / secrets.token_hex(8)
        _write(fresh, (data,))
        self._publish(fresh, self.root / "manifests" / f"{digest}.json")
        return digest

    def settle(self) -> None:
        """Makes all renames so far survive a power failure; before something refers to them."""
        for name in ("objects", "manifests"):
            sync_directory(self.root / name)

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
