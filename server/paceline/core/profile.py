"""Measured durations and prices: what the planner chooses from.

A configuration is (hardware, batch size); its duration is that of one batch on one machine.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from paceline.core.errors import ConfigError

MOST_KNOWN = 4096
"""Batch sizes whose interpolated duration is kept."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """A kind of machine that can be rented; `memory_bytes` 0 means unknown."""

    name: str
    price_per_hour: float
    memory_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.price_per_hour > 0:
            raise ConfigError(f"price_per_hour of {self.name!r} must be above 0")


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way to run a module: `batch_size` requests in `duration_s` on a machine of `hardware`.

    >>> c = Configuration("gpu", 32, 0.8, 1.0)
    >>> c.throughput_rps, c.tc_ratio
    (40.0, 40.0)
    """

    hardware: str
    batch_size: int
    duration_s: float
    price_per_hour: float

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not self.duration_s > 0 or not self.price_per_hour > 0:
            raise ConfigError(
                f"configuration ({self.hardware}, b{self.batch_size}) needs batch_size >= 1, "
                f"duration > 0 and price > 0, got {self.duration_s} s at {self.price_per_hour}"
            )

    @property
    def throughput_rps(self) -> float:
        """t = b/d."""
        return self.batch_size / self.duration_s

    @property
    def tc_ratio(self) -> float:
        """Throughput-cost ratio r = t/p (Harpagon section 1)."""
        return self.throughput_rps / self.price_per_hour


@dataclass(frozen=True, slots=True)
class Durations:
    """Duration of one batch by batch size: measured points, linear between and beyond them.

    `points` are what is planned with (p95), `slow` what a batch hardly ever exceeds (p99), where
    that was measured.

    >>> Durations(((1, 0.1), (4, 0.25))).at(2)
    0.15
    >>> Durations(((1, 0.1), (4, 0.25)), ((1, 0.2), (4, 0.5))).slow_at(2)
    0.3
    """

    points: tuple[tuple[int, float], ...]
    slow: tuple[tuple[int, float], ...] = ()
    _known: dict[int, float] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )
    """What `at` found; asked for the same few sizes with every request."""
    _slow: dict[int, float] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )
    """What `slow_at` found."""

    def __post_init__(self) -> None:
        for points in (self.points, self.slow or self.points):
            sizes = [size for size, _ in points]
            if not sizes or sizes != sorted(set(sizes)):
                raise ConfigError("durations need at least one point, in order of batch size")

    def at(self, batch_size: int) -> float:
        """Duration in seconds of a batch of `batch_size`."""
        found = self._known.get(batch_size)
        if found is None:
            found = _interpolated(self.points, batch_size)
            if len(self._known) < MOST_KNOWN:
                self._known[batch_size] = found
        return found

    def slow_at(self, batch_size: int) -> float:
        """What a batch of `batch_size` hardly ever exceeds; `at` where that is not known."""
        found = self._slow.get(batch_size)
        if found is None:
            usual_s = self.at(batch_size)
            found = max(usual_s, _interpolated(self.slow, batch_size)) if self.slow else usual_s
            if len(self._slow) < MOST_KNOWN:
                self._slow[batch_size] = found
        return found


def _interpolated(points: tuple[tuple[int, float], ...], batch_size: int) -> float:
    sizes = [size for size, _ in points]
    index = bisect_left(sizes, batch_size)
    if index < len(sizes) and sizes[index] == batch_size:
        return points[index][1]
    if len(sizes) == 1:
        return points[0][1] * max(1.0, batch_size / sizes[0])
    high = min(max(index, 1), len(sizes) - 1)
    (b0, d0), (b1, d1) = points[high - 1], points[high]
    return max(1e-9, d0 + (d1 - d0) * (batch_size - b0) / (b1 - b0))


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """One measured line of a profile file: p95 of one batch's duration, and its p99 (0: unknown).

    What hangs is told from the p99, everything else is planned with the p95.
    """

    model: str
    hardware: str
    batch_size: int
    duration_s: float
    memory_bytes: int = 0
    p99_s: float = 0.0


@dataclass(frozen=True)
class Profiles:
    """Measured rows by model and hardware."""

    rows: tuple[ProfileRow, ...] = ()
    _table: dict[tuple[str, str], Durations] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows: dict[tuple[str, str], dict[int, ProfileRow]] = {}
        for row in self.rows:
            rows.setdefault((row.model, row.hardware), {})[row.batch_size] = row
        table: dict[tuple[str, str], Durations] = {}
        for key, by_size in sorted(rows.items()):
            ordered = sorted(by_size.items())
            points = tuple((size, row.duration_s) for size, row in ordered)
            slow = tuple((size, row.p99_s) for size, row in ordered if row.p99_s)
            table[key] = Durations(points, slow)
        object.__setattr__(self, "_table", table)

    def durations(self, model: str, hardware: str) -> Durations | None:
        """Batch durations of `model` on `hardware`, or None when it was never measured there."""
        return self._table.get((model, hardware))

    def hardware_of(self, model: str) -> tuple[str, ...]:
        """The hardware `model` was measured on, by name."""
        return tuple(hardware for name, hardware in self._table if name == model)

    def configurations(
        self, model: str, hardware: Mapping[str, Hardware], *, limit: int = 1 << 30
    ) -> tuple[Configuration, ...]:
        """Every measured configuration of `model` with batch size at most `limit`.

        Raises ConfigError when the model has no profile or its hardware has no price.
        """
        found: list[Configuration] = []
        for name in self.hardware_of(model):
            kind = hardware.get(name)
            if kind is None:
                continue
            found += [
                Configuration(name, size, duration_s, kind.price_per_hour)
                for size, duration_s in self._table[model, name].points
                if size <= limit
            ]
        if not found:
            measured = ", ".join(self.hardware_of(model)) or "nothing"
            raise ConfigError(
                f"no profile of model {model!r} on any priced hardware (measured on: {measured}; "
                f"priced: {', '.join(sorted(hardware)) or 'nothing'}); measure it with "
                "`paceline profile`"
            )
        return tuple(found)

    def merged(self, rows: Iterable[ProfileRow]) -> Profiles:
        """These rows with `rows` added; the later one wins where both measured the same."""
        return Profiles((*self.rows, *rows))
