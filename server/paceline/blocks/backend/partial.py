"""An object on its way into a local pool: a file that is written, locked and given its name.

The file is locked by the process that fetches it; others that need it wait for the lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

from .manifest import PoolError
from .objects import hash_file


class PartialObject:
    """An object that is being fetched: a file of its full size."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._handle = os.open(path, flags, 0o644)
        except OSError as error:
            raise PoolError(f"cache {path}: {error.strerror}") from None
        try:
            # Allocated, not just long: writing into a hole of a full disk would kill the process.
            os.posix_fallocate(self._handle, 0, size_bytes)
            os.ftruncate(self._handle, size_bytes)
        except OSError as error:
            os.close(self._handle)
            path.unlink(missing_ok=True)
            raise PoolError(
                f"cache {path.parent}: {error.strerror} for an object of {size_bytes} bytes"
            ) from None
        self.inode = os.fstat(self._handle).st_ino
        self._hash = hashlib.sha256()
        self._hashed_bytes = 0
        self.chunks: set[int] = set()
        """Of a table: those that are there, their hashes right."""
        self.parts_lock = threading.Lock()
        self.ours = False
        """Locked by us, and known not to be complete under its name."""

    def remove(self) -> None:
        """Unless somebody else uses it."""
        if self.try_lock():
            self.path.unlink(missing_ok=True)
        self.close()

    def try_lock(self) -> bool:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def lock(self) -> None:
        fcntl.flock(self._handle, fcntl.LOCK_EX)

    def release(self) -> None:
        self.ours = False
        fcntl.flock(self._handle, fcntl.LOCK_UN)

    def write(self, offset: int, text: memoryview) -> None:
        try:
            while text:
                count = os.pwrite(self._handle, text, offset)
                text, offset = text[count:], offset + count
        except OSError as error:
            raise PoolError(f"cache {self.path}: {error.strerror}") from None

    def add_to_hash(self, offset: int, written: Any) -> None:
        """Bytes of the file, in order from the first on or of no use."""
        if offset == 0:
            self._hash, self._hashed_bytes = hashlib.sha256(), 0
        if offset == self._hashed_bytes:
            self._hash.update(written)
            self._hashed_bytes += len(written)

    def forget_hash(self) -> None:
        """Something was written again."""
        self._hash, self._hashed_bytes = hashlib.sha256(), 0

    def hash(self) -> str:
        """Of the file; what came in order was hashed on the way."""
        if self._hashed_bytes == self.size_bytes:
            return self._hash.hexdigest()
        with os.fdopen(os.dup(self._handle), "rb", buffering=0) as file:
            file.seek(0)
            return hash_file(file)

    def publish(self, path: Path) -> None:
        """Under its name, in memory at least; ends the lock."""
        try:
            os.fchmod(self._handle, 0o444)
            self.path.rename(path)
        except OSError as error:
            raise PoolError(f"cache {path}: {error.strerror}") from None
        self.close()

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
