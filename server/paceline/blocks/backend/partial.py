"""An object on its way into a local pool: a file that is written, locked and given its name.

The file is locked by the process that fetches it; others that need it wait for the lock. All of
them map it from the start: so only those may share one that will check it by the same hashes.
"""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

from .manifest import PoolError


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
            # Another process may have completed it just now: it is to look as it did then.
            if os.fstat(self._handle).st_size != size_bytes:
                # Allocated, not just long: writing into a hole of a full disk would kill us.
                os.posix_fallocate(self._handle, 0, size_bytes)
                os.ftruncate(self._handle, size_bytes)
        except OSError as error:
            os.close(self._handle)
            path.unlink(missing_ok=True)
            raise PoolError(
                f"cache {path.parent}: {error.strerror} for an object of {size_bytes} bytes"
            ) from None
        self.chunks: set[int] = set()
        """Of a table: those that are there, their hashes right."""
        self.parts_lock = threading.Lock()
        self.ours = False
        """Locked by us, and known not to be complete."""

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

    def begin_writing(self, offset: int, size_bytes: int) -> None:
        """The disk begins to write these bytes (which is what this advice does to new ones)."""
        os.posix_fadvise(self._handle, offset, size_bytes, os.POSIX_FADV_DONTNEED)

    def forget(self, offset: int, size_bytes: int) -> None:
        """These bytes are on the disk, and no more in memory unless somebody maps them."""
        try:
            os.fdatasync(self._handle)
            os.posix_fadvise(self._handle, offset, size_bytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise PoolError(f"cache {self.path}: {error.strerror}") from None

    @property
    def handle(self) -> int:
        """The file's descriptor, until it is published or closed."""
        return self._handle

    def publish(self, path: Path) -> os.stat_result:
        """Under its name, in memory at least, and locked until `close`. What it looks like then."""
        try:
            self.path.rename(path)
            os.fchmod(self._handle, 0o444)
            status = os.fstat(self._handle)
        except OSError as error:
            raise PoolError(f"cache {path}: {error.strerror}") from None
        return status

    def is_published(self, path: Path) -> bool:
        """Whether another process has completed it, whatever has that path by now."""
        mine = os.fstat(self._handle)
        try:
            return not mine.st_mode & 0o222 or os.path.samestat(mine, path.stat())
        except OSError:
            return False

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
