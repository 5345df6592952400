"""The files of a block pool on this machine's disk, found by name and checked before use.

A name is an object's SHA-256; a manifest says the BLAKE3 as well, and that is what bytes are
checked by. Another manifest may say another one for the same name, and be wrong: whatever is
remembered of a file says by which BLAKE3 it was right, and holds for who states the same.
Invariant: what `verify` or `read` let pass had the BLAKE3 that their caller's manifest states.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from functools import cache
from pathlib import Path
from typing import Any

from blake3 import blake3

from .manifest import MAX_MANIFEST_BYTES, Manifest, PoolError, PoolObject, checked, parse

_CHUNK_BYTES = 8 << 20
PASSING_BYTES = 1 << 20
"""Of what a budget's owner reads or writes without keeping it: so much is in memory, uncounted."""


class Altered(PoolError):
    """The bytes of an object are not those its manifest states."""


class ObjectStore:
    """A pool on this machine's disk, read-only but for what is known to be verified.

    `counted`: what is hashed leaves memory again.
    """

    def __init__(self, root: Path, *, counted: bool = False) -> None:
        self.root = root
        self._counted = counted
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

    def verified(self, digest: str, stated: PoolObject) -> Path:
        """The object's path, its bytes checked. Raises PoolError if missing or altered."""
        path = self.path(digest)
        with self._open(path) as file:
            self.verify(file.fileno(), digest, stated)
        return path

    def verify(self, handle: int, digest: str, stated: PoolObject) -> os.stat_result:
        """What an open object looks like, its bytes checked. Raises Altered, or PoolError for one
        of another size.

        It may have another path by now, or none: others replace what they find to be altered. So
        who has mapped it asks by its handle.
        """
        path = self.path(digest)
        # Two compiles at a time write what both found missing: the later copy takes the place of
        # the earlier, which may be the one that is being read.
        for _ in range(2):
            status = os.fstat(handle)
            if self._is_verified(handle, status, path, digest, stated):
                return status
        raise PoolError(f"{path}: changed while it was read")

    def _is_verified(
        self, handle: int, status: os.stat_result, path: Path, digest: str, stated: PoolObject
    ) -> bool:
        """False if the file was changed or replaced since it looked like this."""
        _check_size(status, path, stated)
        state = _state(status, stated.blake3)
        if self._verified.get(digest) == state or self._marker(digest) in (
            state,
            _unsettled(state),
        ):
            self._verified[digest] = state
            return True
        found = hash_file(handle, keep=not self._counted)
        if _state(os.fstat(handle), stated.blake3) != state:
            return False
        if found != stated.blake3:
            raise Altered(f"{path}: altered (its hash is another); compile the model again")
        self.mark_verified(digest, stated, status)
        return True

    def find(self, digest: str, stated: PoolObject) -> None:
        """Raises PoolError if the object is missing or has another size; reads nothing."""
        path = self.path(digest)
        with self._open(path) as file:
            _check_size(os.fstat(file.fileno()), path, stated)

    def read(self, digest: str, stated: PoolObject) -> bytes:
        """All of a small object. Raises PoolError if missing or altered."""
        path = self.path(digest)
        with self._open(path) as file:
            text: bytes = file.read(stated.size_bytes + 1)
        if not is_right(text, stated):
            raise Altered(f"{path}: altered (its hash is another); compile the model again")
        return text

    def discard_wrong(self, digest: str) -> bool:
        """Removes the object unless its bytes are those its name promises; whether it did.

        If they are, it is the manifest that is wrong.
        """
        path = self.path(digest)
        try:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == digest:
                    return False
            path.unlink()
        except FileNotFoundError:
            return True
        except OSError as error:
            raise PoolError(f"{path}: {error.strerror}") from None
        return True

    def mark_verified(self, digest: str, stated: PoolObject, status: os.stat_result) -> None:
        """Remembers that an object that looks like this has the bytes that are stated."""
        self._mark(digest, self.remember(digest, stated, status))

    def mark_unsettled(self, digest: str, stated: PoolObject, status: os.stat_result) -> None:
        """The same of one that is not on the disk yet, until this machine is started again."""
        self._mark(digest, _unsettled(self.remember(digest, stated, status)))

    def _mark(self, digest: str, state: str) -> None:
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

    def remember(self, digest: str, stated: PoolObject, status: os.stat_result) -> str:
        """As `mark_verified`, but for this store alone; what a marker says of it."""
        state = self._verified[digest] = _state(status, stated.blake3)
        return state

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


def is_right(text: Any, stated: PoolObject) -> bool:
    """Whether these bytes are all of the object."""
    return len(text) == stated.size_bytes and blake3(text).hexdigest() == stated.blake3


def hash_file(handle: int, *, keep: bool = True) -> str:
    """BLAKE3 of an open file, from its first byte on.

    Unless `keep`, it passes through memory in small pieces, and stays only where it is mapped.
    """
    digest, offset = blake3(), 0
    buffer = memoryview(bytearray(_CHUNK_BYTES if keep else PASSING_BYTES))
    if not keep:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)  # read what is asked for, not ahead
    try:
        while count := os.preadv(handle, [buffer], offset):
            digest.update(buffer[:count])
            if not keep:
                os.posix_fadvise(handle, offset, count, os.POSIX_FADV_DONTNEED)
            offset += count
    finally:
        if not keep:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_NORMAL)
    return digest.hexdigest()


def _check_size(status: os.stat_result, path: Path, stated: PoolObject) -> None:
    if status.st_size != stated.size_bytes:
        raise PoolError(
            f"{path}: {status.st_size} bytes instead of {stated.size_bytes}; "
            "compile the model again"
        )


def _state(status: os.stat_result, hashed: str) -> str:
    return f"{status.st_size} {status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns} {hashed}"


@cache
def _boot() -> str:
    """Another one after each start of the machine; empty where that is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _unsettled(state: str) -> str:
    """As a marker says of an object that a crash of the machine may alter; unlike any other if
    nobody could tell that there was one.
    """
    return f"{state} {_boot() or os.getpid()}"
