"""What a model's config.pbtxt asks of this backend; docs/blocks-format.md and ARCHITECTURE.md.

Raises SettingsError, one line that names the parameter and what to write instead, before anything
else happens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
_GROUP = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
_DEVICE = re.compile(r"cpu\Z|cuda(?::(\d{1,3}))?\Z")
KNOWN = (
    "manifest",
    "pool",
    "cache",
    "memory_budget_mib",
    "shared_budget_mib",
    "budget_group",
    "page_cache",
    "priority",
    "threads",
    "parallel",
    "s3_endpoint",
    "device",
    "device_pool_mib",
)


class SettingsError(ValueError):
    """A parameter that cannot be."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one model. `pool` is a directory or a URL; `cache` the local pool of a remote one."""

    manifest: str
    pool: Path | str
    cache: Path
    memory_budget_bytes: int | None
    shared_budget_bytes: int | None
    budget_group: str
    keep_page_cache: bool
    priority: int
    threads: int
    parallel: int | None
    s3_endpoint: str
    gpu: int | None = None
    device_pool_bytes: int | None = None

    @property
    def has_budget(self) -> bool:
        """Whether the model's memory is limited, alone or together with others'."""
        return self.memory_budget_bytes is not None or self.shared_budget_bytes is not None


def read_settings(parameters: Mapping[str, Mapping[str, str]], model_directory: Path) -> Settings:
    """`parameters` as Triton hands them over; paths are relative to the model's directory."""
    texts = {key: value.get("string_value", "") for key, value in parameters.items()}
    for key in texts:
        # Triton's own are in capitals; the server that loads the model adds some, too.
        if key not in KNOWN and not key.isupper() and not key.startswith("paceline_"):
            raise SettingsError(f"parameter {key} is unknown; known are {', '.join(KNOWN)}")
    for key in ("manifest", "pool"):
        if not texts.get(key):
            raise SettingsError(f"parameter {key} is missing: `paceline blocks compile` writes it")
    base = model_directory.resolve()
    remote = "://" in texts["pool"]
    page_cache = texts.get("page_cache", "drop")
    if page_cache not in ("drop", "keep"):
        raise SettingsError(f"parameter page_cache is {page_cache!r}: give drop or keep")
    shared = _mebibytes(texts, "shared_budget_mib")
    group = texts.get("budget_group", "default")
    if not _GROUP.match(group):
        raise SettingsError(f"parameter budget_group is {group!r}: give letters, digits, - _ .")
    device = _DEVICE.match(texts.get("device", "cpu"))
    if device is None:
        raise SettingsError(f"parameter device is {texts['device']!r}: give cpu, cuda or cuda:N")
    return Settings(
        manifest=texts["manifest"],
        pool=texts["pool"].rstrip("/") if remote else base / texts["pool"],
        cache=base / texts.get("cache", "../../blocks"),
        memory_budget_bytes=_mebibytes(texts, "memory_budget_mib"),
        shared_budget_bytes=shared,
        budget_group=group,
        keep_page_cache=page_cache == "keep",
        priority=_whole(texts, "priority", 0, 0, 1000),
        threads=_whole(texts, "threads", 1, 0, 1024),
        parallel=_whole(texts, "parallel", 0, 1, 64) if "parallel" in texts else None,
        s3_endpoint=texts.get("s3_endpoint", ""),
        gpu=int(device[1] or 0) if device[0] != "cpu" else None,
        device_pool_bytes=_mebibytes(texts, "device_pool_mib"),
    )


def _mebibytes(texts: Mapping[str, str], key: str) -> int | None:
    if key not in texts:
        return None
    try:
        value = float(texts[key])
    except ValueError:
        value = 0.0
    if not 0 < value < 1 << 30:
        raise SettingsError(f"parameter {key} is {texts[key]!r}: give a number of MiB above 0")
    return int(value * MIB)


def _whole(texts: Mapping[str, str], key: str, default: int, least: int, most: int) -> int:
    text = texts.get(key, str(default))
    if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
        raise SettingsError(f"parameter {key} is {text!r}: give a whole number {least} to {most}")
    return int(text)
