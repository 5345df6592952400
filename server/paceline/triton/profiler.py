"""Measuring models on a Triton (a `Profiler`): p95 and p99 duration of one batch, by batch size.

Invariants: one call at a time, so that a batch is measured alone on its machine; durations never
fall as the batch grows (a faster larger batch is noise, and the planner relies on d(b) being
monotone); a cached profile is used only for the same model content on the same machine.
Harpagon (arXiv 2412.06161) section 2 takes such profiles as its input.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paceline.core.errors import BackendError, ErrorKind, ResidencyError
from paceline.core.model import ModelSpec
from paceline.core.ports import ModelCall
from paceline.core.profile import ProfileRow
from paceline.core.quantities import percentile
from paceline.triton.client import PROCESS_DIED
from paceline.triton.config import instances_of
from paceline.triton.profile_cache import (
    DURATION_DIGITS,
    ProfileCache,
    content_hash,
    machine_identity,
)
from paceline.triton.repository import TritonRepository
from paceline.triton.samples import Sample, rows_of, sample_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much measuring is enough for one batch size."""

    warm_up_calls: int = 2
    long_s: float = 0.5
    """One call that takes so long is warm-up enough."""
    least_calls: int = 3
    enough_calls: int = 10
    """From here on, calls that agree (p95 within `agreement` of the median) are enough."""
    most_calls: int = 50
    agreement: float = 0.1
    time_s: float = 2.0
    rounds: int = 2
    """Where calls do not agree they are made so many times in all, and the calmest round counts."""
    longest_batch_s: float = 5.0
    """A batch that takes longer ends the growing."""
    call_timeout_s: float = 120.0


class TritonProfiler:
    """Measures what one Triton has loaded; `cache_directory` None measures every time."""

    def __init__(
        self,
        repository: TritonRepository,
        *,
        cache_directory: Path | None = None,
        local: bool = False,
        effort: Effort | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`local`: the Triton runs on this machine, so its processor is part of the cache's key."""
        self._repository = repository
        self._cache = ProfileCache(cache_directory) if cache_directory is not None else None
        self._local = local
        self._effort = effort or Effort()
        self._clock = clock
        self.measured_calls = 0
        """Calls made since the start; a profile from the cache makes none."""

    async def measure(
        self,
        model: ModelSpec,
        hardware: str,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> tuple[ProfileRow, ...]:
        """See `Profiler.measure`.

        Raises ResidencyError when the model is not loaded or fails on its sample, ConfigError
        when its declared sample is unusable.
        """
        sizes = batch_sizes(model)
        progress = on_progress or _ignore
        progress(0, len(sizes))
        config = await self._repository.config(model.name)
        directory = self._repository.directory(model.name)
        key = ""
        if self._cache is not None:
            client = self._repository.client
            identity = await client.identity()
            machine = machine_identity(
                hardware, identity.version, "" if self._local else client.url
            )
            content = await asyncio.to_thread(content_hash, directory, config)
            key = f"{machine}\n{content}"
            cached = await asyncio.to_thread(self._cache.read, model.name, hardware, key)
            if cached is not None:
                progress(len(sizes), len(sizes))
                return cached
        sample = await asyncio.to_thread(sample_of, model, config, directory)
        if sample.advice:
            logger.warning("%s", sample.advice)
        rows = await self._measure_sizes(
            model, hardware, sample, sizes, progress, instances_of(config)
        )
        if self._cache is not None:
            await asyncio.to_thread(self._cache.write, model.name, key, rows)
        return rows

    async def _measure_sizes(
        self,
        model: ModelSpec,
        hardware: str,
        sample: Sample,
        sizes: Sequence[int],
        progress: Callable[[int, int], None],
        instances: int,
    ) -> tuple[ProfileRow, ...]:
        durations_s: list[float] = []
        slow_s: list[float] = []
        for size in sizes:
            took_s = await self._repairing(model, sample, size, instances)
            durations_s.append(round(percentile(took_s, 0.95), DURATION_DIGITS))
            slow_s.append(round(percentile(took_s, 0.99), DURATION_DIGITS))
            if durations_s[-1] > self._effort.longest_batch_s and size != sizes[-1]:
                logger.warning(
                    "model %r takes %.1f s for a batch of %d: larger batches are not measured",
                    *(model.name, durations_s[-1], size),
                )
                break
            if no_gain(sizes[: len(durations_s)], durations_s):
                logger.info("model %r gains nothing from batches above %d", model.name, size)
                break
            progress(len(durations_s), len(sizes))
        progress(len(sizes), len(sizes))
        repaired = monotone(durations_s)
        for size, was_s, is_s in zip(sizes, durations_s, repaired, strict=False):
            if was_s < is_s:
                logger.info(
                    "model %r: a batch of %d took %.2f ms, less than a smaller one: using %.2f ms",
                    *(model.name, size, was_s * 1e3, is_s * 1e3),
                )
        return tuple(
            ProfileRow(model.name, hardware, size, duration_s, p99_s=p99_s)
            for size, duration_s, p99_s in zip(sizes, repaired, monotone(slow_s), strict=False)
        )

    async def _repairing(
        self, model: ModelSpec, sample: Sample, size: int, instances: int
    ) -> list[float]:
        """`_measure_size`, once more with the model loaded afresh where its process died, or stood
        still for so long that Triton gave it up. Raises ResidencyError.
        """
        try:
            return await self._measure_size(model, sample, size)
        except BackendError as error:
            # What an ensemble is made of is measured, and repaired, by its own name.
            died = error.kind is ErrorKind.UNAVAILABLE and PROCESS_DIED in error.message
            if not died or self._repository.members(model.name):
                raise _fails(model, size, error) from None
            logger.warning(
                "model %r is loaded afresh: its process was lost while it was measured", model.name
            )
        await self._repository.repair(model.name, instances=max(1, instances))
        try:
            return await self._measure_size(model, sample, size)
        except BackendError as error:
            raise _fails(model, size, error) from None

    async def _measure_size(self, model: ModelSpec, sample: Sample, size: int) -> list[float]:
        """What each of as many calls as `effort` asks for took, in seconds. Raises BackendError."""
        effort = self._effort
        call = ModelCall(
            model.name,
            rows_of(sample, size, batches=model.batches),
            tuple(output.name for output in model.outputs),
            request_id=f"profile-{size}",
        )
        for _ in range(effort.warm_up_calls):
            if await self._timed(call) > effort.long_s:
                break
        return await sampled(lambda: self._timed(call), effort)

    async def _timed(self, call: ModelCall) -> float:
        self.measured_calls += 1
        started_s = self._clock()
        await self._repository.client.execute(call, timeout_s=self._effort.call_timeout_s)
        return self._clock() - started_s


def _fails(model: ModelSpec, size: int, error: BackendError) -> ResidencyError:
    return ResidencyError(
        f"model {model.name!r} fails on its sample at batch size {size}: "
        f"{' '.join(error.message.split())}"
    )


def batch_sizes(model: ModelSpec) -> tuple[int, ...]:
    """1, 2, 4, 8, ... below the model's limit, and the limit.

    >>> batch_sizes(ModelSpec("m", 12, (), ())), batch_sizes(ModelSpec("m", 0, (), ()))
    ((1, 2, 4, 8, 12), (1,))
    """
    sizes = []
    size = 1
    while size < model.row_limit:
        sizes.append(size)
        size *= 2
    return (*sizes, model.row_limit)


def no_gain(sizes: Sequence[int], durations_s: Sequence[float]) -> bool:
    """Whether the last two sizes (or one that takes over a second) lost throughput.

    A batch that takes longer *and* serves fewer requests per second than a smaller one is in no
    plan, so measuring further is time for nothing. Machines are noisy: only below 80 % of the best
    is a loss. A batch of over a second has to gain 5 %.

    >>> no_gain((1, 2), (0.55, 1.1)), no_gain((1, 2), (0.01, 0.03))
    (True, False)
    >>> no_gain((1, 2, 4), (0.01, 0.03, 0.06)), no_gain((1, 2, 4), (0.01, 0.03, 0.035))
    (True, False)
    """
    rates = [size / duration_s for size, duration_s in zip(sizes, durations_s, strict=True)]
    if len(rates) > 1 and durations_s[-1] > 1.0:
        return rates[-1] < 1.05 * max(rates[:-1])
    return len(rates) > 2 and max(rates[-2:]) < 0.8 * max(rates)


def monotone(durations_s: Sequence[float]) -> tuple[float, ...]:
    """Running maximum: what a smaller batch took, a larger one takes at least.

    >>> monotone([0.1, 0.09, 0.2])
    (0.1, 0.1, 0.2)
    """
    repaired: list[float] = []
    for duration_s in durations_s:
        repaired.append(max(duration_s, repaired[-1]) if repaired else duration_s)
    return tuple(repaired)


async def sampled(timed: Callable[[], Awaitable[float]], effort: Effort) -> list[float]:
    """What as many calls as `effort` asks for took, in seconds.

    A stall of the machine makes a batch size look slow that is then never executed, so that nothing
    would ever correct it: calls that do not agree are made again, and the calmest round counts.
    What varies by itself does so in every round.
    """
    calmest: list[float] = []
    for _ in range(effort.rounds):
        took_s: list[float] = []
        while not _enough(took_s, effort):
            took_s.append(await timed())
        calmest = min(calmest or took_s, took_s, key=lambda each: percentile(each, 0.95))
        if _agree(calmest, effort):
            break
    return calmest


def _enough(took_s: Sequence[float], effort: Effort) -> bool:
    calls = len(took_s)
    if calls < effort.least_calls:
        return False
    if calls >= effort.most_calls or sum(took_s) >= effort.time_s:
        return True
    if calls < effort.enough_calls:
        return False
    return _agree(took_s, effort)


def _agree(took_s: Sequence[float], effort: Effort) -> bool:
    return percentile(took_s, 0.95) <= (1 + effort.agreement) * percentile(took_s, 0.5)


def _ignore(done: int, total: int) -> None:
    """Nobody watches the progress."""
