"""Arrivals: when requests come, as lists of instants in seconds from the start of a run.

Every generator is a pure function of its arguments and the `random.Random` it is given, and
returns instants in order. Evenly spaced arrivals are what the published bounds assume; Poisson
and traces are what plans are verified against (algorithms.md 1.4.5).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

from paceline.core.errors import ConfigError


def uniform(rate_rps: float, count: int, *, start_s: float = 0.0) -> list[float]:
    """`count` evenly spaced arrivals.

    >>> uniform(2.0, 3)
    [0.0, 0.5, 1.0]
    """
    return [start_s + index / rate_rps for index in range(count)]


def poisson(rate_rps: float, count: int, rng: Random, *, start_s: float = 0.0) -> list[float]:
    """`count` arrivals with exponential gaps."""
    at_s = start_s
    arrivals = []
    for _ in range(count):
        at_s += rng.expovariate(rate_rps)
        arrivals.append(at_s)
    return arrivals


def bursts(
    rate_rps: float, count: int, rng: Random, *, size: int, start_s: float = 0.0
) -> list[float]:
    """`count` arrivals at the mean rate `rate_rps`, in groups of `size` at the same instant."""
    starts = poisson(rate_rps / size, -(-count // size), rng, start_s=start_s)
    return [at_s for at_s in starts for _ in range(size)][:count]


def from_counts(
    counts: Iterable[float], *, bucket_s: float, rng: Random | None = None, start_s: float = 0.0
) -> list[float]:
    """Arrivals from counts per bucket: spread at random inside each, or evenly without `rng`.

    A fractional count is rounded so that the running total is kept.

    >>> from_counts([2, 0.5, 0.5], bucket_s=1.0)
    [0.0, 0.5, 2.0]
    """
    arrivals: list[float] = []
    total = 0.0
    for index, count in enumerate(counts):
        total += count
        number = int(total + 1e-9) - len(arrivals)
        begin_s = start_s + index * bucket_s
        if rng is None:
            arrivals += [begin_s + bucket_s * i / number for i in range(number)]
        else:
            arrivals += sorted(begin_s + bucket_s * rng.random() for _ in range(number))
    return arrivals


def scaled(arrivals: Sequence[float], rate_rps: float) -> list[float]:
    """The same arrivals with time stretched so that the mean rate is `rate_rps`, from 0 on."""
    if len(arrivals) < 2 or arrivals[-1] <= arrivals[0]:
        return [0.0] * len(arrivals)
    mean_rps = (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])
    return [(at_s - arrivals[0]) * mean_rps / rate_rps for at_s in arrivals]


MOST_REQUESTS = 1_000_000
"""A run of more requests takes minutes and gigabytes."""

_TIMESTAMPS = ("arrival_s", "timestamp_s")
_COUNTS = {"second": 1.0, "second_in_window": 1.0, "minute": 60.0}


def read_trace(
    path: Path, rng: Random, *, rate_rps: float | None = None, window: str = ""
) -> list[float]:
    """Arrivals of a trace file, scaled to a mean rate when one is given.

    Two forms of CSV with a header: a column `arrival_s` of instants (scaling stretches time), or
    a column `requests` of counts beside `second`, `second_in_window` or `minute` (scaling
    multiplies the counts; arrivals are spread at random inside each bucket). `window` selects
    rows whose column `window` says so. Raises ConfigError with file and line, also for more than
    `MOST_REQUESTS`.
    """
    rows = _rows(path, window)
    header = list(rows[0][1])
    stamps = next((name for name in _TIMESTAMPS if name in header), None)
    if stamps is not None:
        arrivals = sorted(_number(path, line, row, stamps) for line, row in rows)
        if rate_rps is not None:
            return scaled(arrivals, rate_rps)
        return [at_s - arrivals[0] for at_s in arrivals]
    bucket_s = next((bucket_s for name, bucket_s in _COUNTS.items() if name in header), None)
    if bucket_s is None or "requests" not in header:
        raise ConfigError(
            f"a trace has a column {_TIMESTAMPS[0]!r}, or 'requests' beside one of "
            f"{', '.join(_COUNTS)}; this one has {', '.join(header)}",
            where=f"{path}:1",
        )
    counts = [_number(path, line, row, "requests") for line, row in rows]
    total = sum(counts)
    if total <= 0:
        raise ConfigError("the trace holds no requests", where=str(path))
    factor = 1.0 if rate_rps is None else rate_rps * bucket_s * len(counts) / total
    if total * factor > MOST_REQUESTS:
        raise ConfigError(
            f"{total * factor:.0f} requests, more than {MOST_REQUESTS}; scale it down, or take one "
            "of its windows",
            where=str(path),
        )
    return from_counts((count * factor for count in counts), bucket_s=bucket_s, rng=rng)


def _rows(path: Path, window: str) -> list[tuple[int, dict[str, str]]]:
    """Line number and cells of each row, at least one."""
    known: set[str] = set()
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            numbers: list[int] = []
            reader = csv.DictReader(_without_comments(file, numbers))
            for row in reader:
                known.add(row.get("window") or "")
                if window and row.get("window") != window:
                    continue
                rows.append((numbers[reader.line_num - 1], row))
                if len(rows) > MOST_REQUESTS:
                    raise ConfigError(
                        f"more than {MOST_REQUESTS} rows; take one of its windows, or a part of it",
                        where=str(path),
                    )
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text", where=str(path)) from None
    except csv.Error as error:
        raise ConfigError(f"not CSV: {error}", where=str(path)) from None
    if window and not rows:
        raise ConfigError(
            f"no window {window!r}; it has {', '.join(filter(None, sorted(known))) or 'none'}",
            where=str(path),
        )
    if not rows:
        raise ConfigError("the trace has no rows", where=str(path))
    return rows


def _without_comments(lines: Iterable[str], numbers: list[int]) -> Iterator[str]:
    """Those that are no comments; `numbers` gets which of the file each is."""
    for number, line in enumerate(lines, start=1):
        if not line.startswith("#"):
            numbers.append(number)
            yield line


def _number(path: Path, line: int, row: dict[str, str], column: str) -> float:
    text = row.get(column)
    try:
        value = float(text or "")
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(
            f"{column} must be a number of at least 0, got {text!r}", where=f"{path}:{line}"
        )
    return value
