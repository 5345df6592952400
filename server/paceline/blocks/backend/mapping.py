"""Objects of a pool mapped into memory: swapped in and out by advising the kernel.

The mapping never changes while it lives, so sessions refer to its pages once ("assembly by
reference"); whether the pages are there is the kernel's business, and ours to advise. Pages that
were dropped come back, bit for bit, when touched. Shared mappings: processes that map the same
object share its pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .manifest import PAGE_BYTES, PoolError, PoolObject

Bytes = npt.NDArray[np.uint8]
Look = tuple[int, int, int]
"""What a file looks like: its size, its mtime and its ctime in ns."""

MADV_RANDOM = 1
MADV_WILLNEED = 3
MADV_DONTNEED = 4
MADV_POPULATE_READ = 22  # Linux 5.14

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


class MappedObject:
    """A file of the pool, `size_bytes` long, mapped read-only for as long as this object lives."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise PoolError(f"{path}: missing; compile the model again") from None
        except OSError as error:
            raise PoolError(f"{path}: {error.strerror}") from None
        try:
            found = os.fstat(self._handle).st_size
            if found != size_bytes:
                # Pages behind the end of a file cannot be read: the process would get SIGBUS.
                raise PoolError(
                    f"{path}: {found} bytes instead of {size_bytes}; compile the model again"
                )
            self._map = mmap.mmap(self._handle, max(size_bytes, 1), mmap.MAP_SHARED, mmap.PROT_READ)
        except PoolError:
            os.close(self._handle)
            raise
        except (OSError, ValueError) as error:
            os.close(self._handle)
            raise PoolError(f"{path}: cannot be mapped: {error}") from None
        self.bytes: Bytes = np.frombuffer(self._map, np.uint8, count=size_bytes)
        self._address = int(self.bytes.ctypes.data)
        self.right: Look | None = None
        """What the file looked like when its bytes were found to be right; None if nobody knows."""
        self.changes = 0
        """How often its bytes may have become others since they were found right first."""
        self.written = False
        """Maybe not all of the file is on the disk yet; what is not cannot leave memory."""

    def view(self, offset: int, size_bytes: int, dtype: npt.DTypeLike, shape: Any) -> Any:
        """A tensor over the mapped pages; nothing is read."""
        return self.bytes[offset : offset + size_bytes].view(dtype).reshape(shape)

    def read_ahead(self, offset: int, size_bytes: int) -> None:
        """The disk begins to read exactly this range."""
        self._bring(offset, size_bytes, MADV_WILLNEED)

    def populate(self, offset: int, size_bytes: int) -> None:
        """Swap in: the pages are in memory and in the page table when this returns.

        Pages that are on their way (`read_ahead`) are waited for, others are read together with as
        much behind them as the kernel sees fit, on some disks 8 MiB.
        """
        self._bring(offset, size_bytes, MADV_POPULATE_READ)

    def drop(self, *, page_cache: bool) -> None:
        """Swap out: no copy, no pause; also out of the page cache unless somebody else maps it.

        What was written is waited for, once: the kernel keeps what is not on the disk.
        """
        self._advise(0, self.size_bytes, MADV_DONTNEED)
        if page_cache:
            if self.written:
                self.written = False
                os.fdatasync(self._handle)
            os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_DONTNEED)

    def expect_rows(self) -> None:
        """Demand paging without read-ahead, for a table of which few rows are used."""
        self._advise(0, self.size_bytes, MADV_RANDOM)

    def cached_bytes(self) -> int:
        """Of the object's bytes those in the page cache, whoever brought them there."""
        count = -(-self.size_bytes // PAGE_BYTES)
        present = np.zeros(count, np.uint8)
        if _libc.mincore(self._address, self.size_bytes, present.ctypes.data) != 0:
            return 0
        return int(np.count_nonzero(present & 1)) * PAGE_BYTES

    @property
    def handle(self) -> int:
        """The file's descriptor, until `close`."""
        return self._handle

    def found_right(self, look: Look) -> None:
        """The file's bytes are what they should be, and it looks like this."""
        if self.right is not None and self.right[:2] != look[:2]:
            self.changes += 1  # it was written to, and maybe the right bytes again
        self.right = look

    def found_changed(self) -> None:
        """The file is not what it was when its bytes were found right."""
        self.changes += 1
        self.right = None

    def look(self) -> Look:
        """What the file looks like now."""
        status = os.fstat(self._handle)  # no call more: every run looks at all of its objects
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    @property
    def truncated(self) -> bool:
        """Whether the file has not its size any more: to touch its pages may kill the process."""
        return os.lseek(self._handle, 0, os.SEEK_END) != self.size_bytes  # a fifth of an fstat

    def has_path(self, path: Path) -> bool:
        """Whether it is this file that has the path now."""
        try:
            return os.path.samestat(os.fstat(self._handle), path.stat())
        except OSError:
            return False

    def close(self) -> None:
        """The descriptor only: sessions may still refer to the pages, which end with the last."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _bring(self, offset: int, size_bytes: int, advice: int) -> None:
        start = offset // PAGE_BYTES * PAGE_BYTES
        try:
            self._advise(start, offset + size_bytes - start, advice)
        except OSError as error:
            raise PoolError(f"{self.path}: cannot be read: {error.strerror}") from None

    def _advise(self, offset: int, size_bytes: int, advice: int) -> None:
        if size_bytes <= 0:
            return
        if _libc.madvise(self._address + offset, size_bytes, advice) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


def look_of(status: os.stat_result) -> Look:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class LazyObjects(Mapping[str, MappedObject]):
    """Objects that are opened when somebody asks for them, whoever that is."""

    def __init__(
        self, stated: Mapping[str, PoolObject], opener: Callable[[str, int], MappedObject]
    ) -> None:
        self._stated = stated
        self._open = opener
        self._opened: dict[str, MappedObject] = {}
        self._lock = threading.Lock()

    def __getitem__(self, digest: str) -> MappedObject:
        with self._lock:
            if digest not in self._opened:
                self._opened[digest] = self._open(digest, self._stated[digest].size_bytes)
            return self._opened[digest]

    @property
    def opened(self) -> Mapping[str, MappedObject]:
        """Those that somebody has asked for."""
        return self._opened

    def open_all(self) -> LazyObjects:
        """Raises PoolError if one cannot be."""
        assert len(tuple(self.values())) == len(self)
        return self

    def __iter__(self) -> Iterator[str]:
        return iter(self._stated)

    def __len__(self) -> int:
        return len(self._stated)

    def close(self) -> None:
        for opened in self._opened.values():
            opened.close()
