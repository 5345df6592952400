"""What comes after a load from a remote pool: its objects are brought to the disk."""

from __future__ import annotations

import contextlib
import os
import threading

from .manifest import PoolObject
from .objects import ObjectStore

_SETTLE_S = 0.5
"""So long nothing must have come before the disk is kept busy."""


class Settler:
    """Brings objects to the disk when nothing is being loaded, and remembers them as verified.

    Before that a crash of the machine may leave other bytes under their names: without a marker
    they are hashed before use.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._waiting: list[tuple[str, PoolObject, os.stat_result]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="blocks-settler", daemon=True)
        self._thread.start()

    def add(self, digest: str, stated: PoolObject, status: os.stat_result) -> None:
        """An object that looked like this when its bytes were found to be those stated."""
        with self._changed:
            self._waiting.append((digest, stated, status))
            self._changed.notify_all()

    def close(self) -> None:
        """What was not settled will be hashed by the next who uses it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return  # looked at in here: `close` says so once
                count = len(self._waiting)
                self._changed.wait(_SETTLE_S if count else None)
                if not count or len(self._waiting) > count:
                    continue  # something is being loaded
            while self._waiting and len(self._waiting) <= count and not self._closed:
                count = len(self._waiting)
                self._settle(*self._waiting.pop())

    def _settle(self, digest: str, stated: PoolObject, status: os.stat_result) -> None:
        with contextlib.suppress(OSError):
            handle = os.open(self._store.path(digest), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            self._store.mark_verified(digest, stated, status)
