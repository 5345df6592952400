"""Which Tritons there are: named one by one, all addresses of a DNS name, or the lines of a file.

A DNS name stands for whatever it resolves to (a Kubernetes headless service has an address per
pod), a file for its lines; both are looked at again while serving. Invariant: a look that fails
changes nothing - a name server that is away takes no machine with it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paceline.core.errors import ConfigError, ResidencyError
from paceline.triton.client import checked_url

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
RESOLVE_TIMEOUT_S = 5.0
MAX_MACHINES = 256
MAX_FILE_BYTES = 1 << 20

Kind = Literal["address", "dns", "file"]


@dataclass(frozen=True, slots=True)
class TritonTarget:
    """Tritons that somebody else runs: one (`HOST:PORT`), those of a name, or those of a file."""

    url: str
    hardware: str = "gpu"
    kind: Kind = "address"

    @classmethod
    def parse(cls, text: str) -> TritonTarget:
        """`[HARDWARE@]HOST:PORT`, `[HARDWARE@]dns:NAME:PORT` or `file:PATH`.

        >>> TritonTarget.parse("t4@10.0.0.7:8001")
        TritonTarget(url='10.0.0.7:8001', hardware='t4', kind='address')
        >>> TritonTarget.parse("t4@dns:triton.models:8001")
        TritonTarget(url='triton.models:8001', hardware='t4', kind='dns')
        """
        if text.startswith("file:"):
            return cls(text.removeprefix("file:"), "", "file")
        hardware, at, url = text.rpartition("@")
        bare = url.removeprefix("dns:")
        try:
            checked_url(bare)
        except ResidencyError:
            raise ConfigError(
                f"{text!r} is not [HARDWARE@]HOST:PORT, [HARDWARE@]dns:NAME:PORT or file:PATH",
                key="--triton",
            ) from None
        if at and not hardware:
            raise ConfigError(f"{text!r} names no hardware before the @", key="--triton")
        kind: Kind = "address" if bare == url else "dns"
        return cls(bare, hardware, kind) if at else cls(bare, kind=kind)

    def __str__(self) -> str:
        where = {"address": self.url, "dns": f"dns:{self.url}", "file": f"file:{self.url}"}
        prefix = "" if self.kind == "file" else f"{self.hardware}@"
        return prefix + where[self.kind]


class Discovery:
    """Looks targets up, again and again, and remembers the last answer of each."""

    def __init__(self, targets: Sequence[TritonTarget]) -> None:
        self._targets = tuple(targets)
        self._last: dict[TritonTarget, tuple[TritonTarget, ...]] = {}
        self._failing: set[TritonTarget] = set()

    @property
    def changes(self) -> bool:
        """Whether looking again can find something else."""
        return any(target.kind != "address" for target in self._targets)

    async def look(self) -> tuple[TritonTarget, ...]:
        """Every machine by its address, each once, in a stable order.

        Raises ConfigError when the first look at a name or a file fails, or finds too many.
        """
        found: dict[str, TritonTarget] = {}
        for target in self._targets:
            for machine in await self._machines(target):
                found.setdefault(machine.url, machine)
        if len(found) > MAX_MACHINES:
            raise ConfigError(f"{len(found)} machines; {MAX_MACHINES} are allowed", key="--triton")
        return tuple(found.values())

    async def _machines(self, target: TritonTarget) -> tuple[TritonTarget, ...]:
        if target.kind == "address":
            return (target,)
        try:
            found = await _resolve(target) if target.kind == "dns" else _read(Path(target.url))
        except ConfigError as error:
            if target not in self._last:
                raise
            if target not in self._failing:
                logger.warning("%s; going on with the machines known", error)
            self._failing.add(target)
            return self._last[target]
        self._failing.discard(target)
        self._last[target] = found
        return found


async def _resolve(target: TritonTarget) -> tuple[TritonTarget, ...]:
    """Every address of a DNS name."""
    name, _, port = target.url.rpartition(":")
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            answers = await loop.getaddrinfo(name, int(port), type=socket.SOCK_STREAM)
    except TimeoutError:
        reason = f"no answer within {RESOLVE_TIMEOUT_S:g} s"
    except OSError as error:
        reason = str(error.strerror or error)
    else:
        hosts = sorted({str(address[0]) for _, _, _, _, address in answers})
        return tuple(
            TritonTarget(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", target.hardware)
            for host in hosts
        )
    raise ConfigError(f"{name!r} cannot be resolved: {reason}", key="--triton")


def _read(path: Path) -> tuple[TritonTarget, ...]:
    """A line a machine, `[HARDWARE@]HOST:PORT`; `#` begins a comment."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"larger than {MAX_FILE_BYTES >> 20} MiB", where=str(path))
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no text"
        raise ConfigError(f"{path}: {reason}", key="--triton") from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (entry := line.partition("#")[0].strip()):
            continue
        try:
            target = TritonTarget.parse(entry)
        except ConfigError:
            target = None
        if target is None or target.kind != "address":
            raise ConfigError(f"{entry!r} is not [HARDWARE@]HOST:PORT", where=f"{path}:{number}")
        found.append(target)
    return tuple(found)
