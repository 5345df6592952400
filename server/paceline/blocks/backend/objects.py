"""The files of a block pool on this machine's disk, found by name and checked before use.

Invariant: an object that `ObjectStore.verified` returned had the bytes its name promises.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

from .manifest import MAX_MANIFEST_BYTES, Manifest, PoolError, checked, parse

_CHUNK_BYTES = 8 << 20


class ObjectStore:
    """A pool on this machine's disk, read-only but for what is known to be verified."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._verified: dict[str, str] = {}

    def manifest(self, digest: str) -> Manifest:
        """Raises PoolError if it is missing, altered or unsound."""
        path = self.root / "manifests" / f"{checked(digest)}.json"
        with self._open(path) as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
        if hashlib.sha256(text).hexdigest() != digest:
            raise PoolError(f"{path}: altered or truncated; compile the model again")
        return parse(text, str(path))

    def path(self, digest: str) -> Path:
        """Where the object is, or would be."""
        return self.root / "objects" / checked(digest)

    def verified(self, digest: str, size_bytes: int) -> Path:
        """The object's path, its bytes checked. Raises PoolError if missing or altered."""
        path = self.path(digest)
        # Two compiles at a time write what both found missing: the later copy takes the place of
        # the earlier, which may be the one that is being read.
        if not any(self._is_verified(path, digest, size_bytes) for _ in range(2)):
            raise PoolError(f"{path}: changed while it was read")
        return path

    def _is_verified(self, path: Path, digest: str, size_bytes: int) -> bool:
        """False if the file was changed or replaced meanwhile."""
        with self._open(path) as file:
            status = os.fstat(file.fileno())
            state = _state(status)
            if status.st_size != size_bytes:
                raise PoolError(
                    f"{path}: {status.st_size} bytes instead of {size_bytes}; "
                    "compile the model again"
                )
            if self._verified.get(digest) == state or self._marker(digest) == state:
                self._verified[digest] = state
                return True
            if hash_file(file) != digest:
                raise PoolError(f"{path}: altered (its hash is another); compile the model again")
            if _state(os.fstat(file.fileno())) != state:
                return False
        self.mark_verified(digest, state)
        return True

    def mark_verified(self, digest: str, state: str | None = None) -> None:
        """Remembers that the object as it is now (or was in `state`) has the right bytes."""
        state = state or _state(self.path(digest).stat())
        self._verified[digest] = state
        marker = self.root / "verified" / digest
        fresh = marker.with_name(f".{digest}.{os.getpid()}.{os.urandom(4).hex()}")
        # A pool that cannot be written is hashed by every process once.
        with contextlib.suppress(OSError):
            marker.parent.mkdir(exist_ok=True)
            try:
                fresh.write_text(state, encoding="ascii")
                fresh.replace(marker)
            finally:
                fresh.unlink(missing_ok=True)

    def _marker(self, digest: str) -> str:
        try:
            return (self.root / "verified" / digest).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            return ""

    def _open(self, path: Path) -> Any:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise PoolError(f"{path}: missing; compile the model again") from None
        except OSError as error:
            raise PoolError(f"{path}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise PoolError(f"{path}: not a regular file")
        return os.fdopen(handle, "rb", buffering=0)


def hash_file(file: Any) -> str:
    """SHA-256 of what is left to read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()


def _state(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}"
