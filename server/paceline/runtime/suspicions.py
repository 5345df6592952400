"""Answers that may be another request's.

Triton 2.51 gives up a python-based model's process that pauses for a second or two ("is not
healthy"), and what waits behind the batch that failed is sent to it all the same: if it goes on, it
answers the next request with what it computed for the one before (measured;
`tests/integration/test_stale_answers.py`). So what was sent to a process before it was found dead,
and comes back after, is no answer. Only where batches wait in Triton for a process: its model is
part of ensembles, or several front processes use it.
"""

from __future__ import annotations

import mmap
import struct
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

_PLACES = 1024
"""Two models that share one by chance are suspected together, which costs a retry."""
_TIME = struct.Struct("=d")


class Suspicions:
    """When models were found dead, by machine; known to all processes that have `shared` open."""

    def __init__(self, shared: Path | None = None) -> None:
        """`shared`: a file that processes of one machine have in common, made by `create`."""
        if shared is None:
            self._times = mmap.mmap(-1, _PLACES * _TIME.size)
        else:
            with shared.open("r+b") as file:
                self._times = mmap.mmap(file.fileno(), _PLACES * _TIME.size)
        self._addresses: dict[str, str] = {}
        self._places: dict[tuple[str, str], int] = {}

    @staticmethod
    def create(shared: Path) -> None:
        """A file in which nothing is suspected."""
        shared.write_bytes(bytes(_PLACES * _TIME.size))

    def know(self, machine: str, address: str) -> None:
        """All processes know that machine by its address."""
        self._addresses[machine] = address

    def tell(self, machine: str, models: Iterable[str]) -> None:
        """A process that answers these models' requests was found dead now."""
        for model in models:
            _TIME.pack_into(self._times, self._place(machine, model), time.monotonic())

    def any(self, machine: str, model: str, sent_s: float) -> bool:
        """Whether what was sent then (`time.monotonic`) is no answer when it comes now."""
        found: tuple[float] = _TIME.unpack_from(self._times, self._place(machine, model))
        return found[0] >= sent_s

    def _place(self, machine: str, model: str) -> int:
        key = machine, model
        place = self._places.get(key)
        if place is None:
            name = f"{self._addresses.get(machine, machine)}\0{model}"
            place = self._places[key] = zlib.crc32(name.encode()) % _PLACES * _TIME.size
        return place
