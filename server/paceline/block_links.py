"""The links through which a local Triton's blocks models load, for residency to split.

Their processes keep a table (`blocks.backend.ledger`): what each still has to load, and its share
of its disk or store, by which the turns there are dealt out. Other backends load as they like, and
nobody can hold them back once Triton has begun: for them order and number of loads are the split.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic

import psutil

from paceline.blocks.backend.ledger import Row, default_directory, read_rows, share_out
from paceline.blocks.backend.manifest import PoolError

logger = logging.getLogger(__name__)

WEIGHT = 0.3
"""Of the newest rate."""
LEAST_BYTES = 1 << 20
"""That are moved before they say something about a link: a turn's bytes are told at its end, and
the few of a model's beginning took mostly time of the processes.
"""


class BlockLinks:
    """Implements `core.ports.LoadLinks`; `pid` is the Triton's process while it runs."""

    def __init__(
        self,
        pid: Callable[[], int | None],
        directory: Path | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._pid = pid
        self._directory = directory
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}
        """When a link's rate was learned last, or it began to be used, and what had been moved."""
        self._rates: dict[str, float] = {}

    def moving(self) -> Mapping[str, tuple[float | None, Mapping[str, int]]]:
        """See `LoadLinks.moving`. A table that cannot be read is as good as none."""
        now_s = self._clock()
        found: dict[str, dict[str, int]] = {}
        moved: dict[str, int] = {}
        for row in self._rows().values():
            link = row.load.channel
            moved[link] = moved.get(link, 0) + row.moved_bytes
            if row.left_bytes:
                left = found.setdefault(link, {})
                left[row.model] = left.get(row.model, 0) + row.left_bytes
        for link, size_bytes in moved.items():
            self._learn(link, size_bytes, now_s)
        # A link that is idle now says nothing about its rate the next time.
        self._seen = {link: self._seen.get(link, (now_s, moved[link])) for link in found}
        return {link: (self._rates.get(link), left) for link, left in found.items()}

    def split(self, shares: Mapping[str, float]) -> None:
        """See `LoadLinks.split`; processes of one model divide its share."""
        by_model: dict[str, list[str]] = {}
        for name, row in self._rows().items():
            if row.left_bytes:
                by_model.setdefault(row.model, []).append(name)
        rows = {
            name: shares[model] / len(names)
            for model, names in by_model.items()
            if model in shares
            for name in names
        }
        if not rows:
            return
        try:
            share_out(self._where, rows)
        except PoolError as error:
            logger.warning("loads are not split: %s", error)

    @property
    def _where(self) -> Path:
        return self._directory or default_directory()

    def _rows(self) -> Mapping[str, Row]:
        """Of our Triton's processes: others of this user may load models of the same name."""
        pid = self._pid()
        try:
            rows = read_rows(self._where)
        except (PoolError, OSError) as error:
            logger.warning("loads are not split: %s", error)
            return {}
        return {name: row for name, row in rows.items() if pid is not None and _of(row, pid)}

    def _learn(self, link: str, moved_bytes: int, now_s: float) -> None:
        before_s, before_bytes = self._seen.get(link, (now_s, moved_bytes))
        if moved_bytes < before_bytes:  # a process has left, and took what it had moved with it
            self._seen[link] = now_s, moved_bytes
        if moved_bytes - before_bytes < LEAST_BYTES or now_s <= before_s:
            return
        rate = (moved_bytes - before_bytes) / (now_s - before_s)
        known = self._rates.get(link)
        self._rates[link] = rate if known is None else known + WEIGHT * (rate - known)
        self._seen[link] = now_s, moved_bytes


def _of(row: Row, triton_pid: int) -> bool:
    try:
        return psutil.Process(row.pid).ppid() == triton_pid
    except psutil.Error:
        return False
