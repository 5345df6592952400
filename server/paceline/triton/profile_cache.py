"""Measured profiles kept in the database, by model, hardware and content.

Invariant: anything that does not read back as it was written is measured again: a cache may be
lost, never believed wrongly.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from paceline.core.profile import ProfileRow
from paceline.database import Measurements
from paceline.triton.config import ModelConfig, versions_of, with_instances
from paceline.triton.installation import BACKENDS

logger = logging.getLogger(__name__)

FORMAT = 2
DURATION_DIGITS = 9
"""Durations are whole nanoseconds, so that a cached one equals the measured one."""
_CHUNK_BYTES = 1 << 20


class ProfileCache:
    """Profiles by model name and key (what the key holds is the caller's)."""

    def __init__(self, directory: Path) -> None:
        self._measurements = Measurements(directory)

    def read(self, model: str, hardware: str, key: str) -> tuple[ProfileRow, ...] | None:
        """The cached rows, or None; says so when something is there that cannot be used."""
        try:
            text = self._measurements.profile(model, key)
            if text is None:
                return None
            document = json.loads(text)
            if document["format"] != FORMAT:
                return None
            rows = tuple(
                ProfileRow(
                    model,
                    hardware,
                    int(row["batch_size"]),
                    round(float(row["duration_ms"]) / 1e3, DURATION_DIGITS),
                    p99_s=round(float(row.get("p99_ms", 0.0)) / 1e3, DURATION_DIGITS),
                )
                for row in document["rows"]
            )
            if not rows or not all(map(_usable, rows)):
                raise ValueError("no usable rows")
        except (sqlite3.Error, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("the profile of %r is unusable (%s); measuring again", model, error)
            return None
        return rows

    def write(self, model: str, key: str, rows: Sequence[ProfileRow]) -> None:
        """Keep `rows`; a full or read-only disk costs only the cache."""
        document = {
            "format": FORMAT,
            "rows": [
                {
                    "batch_size": row.batch_size,
                    "duration_ms": row.duration_s * 1e3,
                    "p99_ms": row.p99_s * 1e3,
                }
                for row in rows
            ],
        }
        try:
            self._measurements.keep_profile(model, key, json.dumps(document))
        except sqlite3.Error as error:
            logger.warning("the profile of %r could not be cached: %s", model, error)


def _usable(row: ProfileRow) -> bool:
    known = 0 < row.duration_s < math.inf
    return known and (row.p99_s == 0 or row.duration_s <= row.p99_s < math.inf)


def content_hash(directory: Path | None, config: ModelConfig) -> str:
    """SHA-256 of what decides a model's speed.

    The files of its directory (configuration, versions, warm-up samples), or, when only the
    server can see those, its configuration; and Paceline's own backends. How many instances are
    loaded does not matter: one batch is measured alone.
    """
    digest = hashlib.sha256()
    if directory is None:
        neutral = with_instances(config, 1)
        digest.update(neutral.SerializeToString(deterministic=True))
    else:
        parts = [directory / name for name in ("config.pbtxt", "warmup", *versions_of(directory))]
        _update(digest, directory, parts)
    for backend in BACKENDS.values():
        _update(digest, backend, [backend])
    return digest.hexdigest()


def machine_identity(hardware: str, triton_version: str, url: str) -> str:
    """What else a duration depends on; `url` names a machine that is not this one."""
    where = url or f"{_processor()} x{os.cpu_count()}"
    return f"{hardware} | {where} | triton {triton_version}"


def _update(digest: hashlib._Hash, root: Path, parts: Sequence[Path]) -> None:
    files = {
        path
        for part in parts
        for path in ([part] if part.is_file() else part.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    for path in sorted(files):
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()
