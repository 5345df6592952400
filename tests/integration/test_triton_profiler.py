"""Profiling models on a real Triton: an emulated accelerator is measured as what it is."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from scripts.timed_model import write_timed
from tests.integration.models import write_add

from paceline.core.errors import ConfigError, ResidencyError
from paceline.database import connect
from paceline.triton.client import TritonClient
from paceline.triton.launcher import LocalTriton
from paceline.triton.processes import model_processes
from paceline.triton.profiler import Effort, TritonProfiler
from paceline.triton.repository import TritonRepository

pytest_plugins = ["tests.integration.triton_fixtures"]
pytestmark = pytest.mark.integration

QUICK = Effort(warm_up_calls=1, most_calls=5, time_s=0.5)
TABLE_MS = {1: 50, 2: 55, 4: 60, 8: 75}


async def test_a_timed_model_is_measured_as_its_table_and_cached(
    triton_repository: TritonRepository, tmp_path: Path
) -> None:
    await triton_repository.load("timed", instances=1)
    spec = await triton_repository.spec("timed")
    profiler = TritonProfiler(triton_repository, cache_directory=tmp_path, local=True, effort=QUICK)
    progress: list[tuple[int, int]] = []
    rows = await profiler.measure(
        spec, "cpu", on_progress=lambda done, total: progress.append((done, total))
    )
    assert progress[0] == (0, 4) and progress[-1] == (4, 4)
    assert [(row.model, row.hardware, row.batch_size) for row in rows] == [
        ("timed", "cpu", size) for size in TABLE_MS
    ]
    for row in rows:
        # Never less than it sleeps; the rest is the round trip on a machine that others use too.
        assert TABLE_MS[row.batch_size] / 1e3 <= row.duration_s
    assert [row.duration_s for row in rows] == sorted(row.duration_s for row in rows)
    assert rows[-1].duration_s < 8 * rows[0].duration_s, "batching pays, as in the table"

    calls = profiler.measured_calls
    again = TritonProfiler(triton_repository, cache_directory=tmp_path, local=True, effort=QUICK)
    progress.clear()
    cached = await again.measure(
        spec, "cpu", on_progress=lambda done, total: progress.append((done, total))
    )
    assert (cached, again.measured_calls, progress) == (rows, 0, [(0, 4), (4, 4)])
    assert calls > 0
    other = await again.measure(replace(spec, max_batch_size=1), "gpu")
    assert again.measured_calls > 0, "other hardware is another profile"
    assert [row.hardware for row in other] == ["gpu"]


async def test_a_changed_model_or_a_corrupt_cache_is_measured_again(
    triton_client: TritonClient,
    tiny_models: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory = write_add(tiny_models, "edited", max_batch_size=1)
    repository = TritonRepository(triton_client, (tiny_models,))
    await repository.load("edited", instances=1)
    spec = await repository.spec("edited")
    cache = tmp_path

    async def calls() -> int:
        profiler = TritonProfiler(repository, cache_directory=cache, local=True, effort=QUICK)
        assert len(await profiler.measure(spec, "cpu")) == 1
        return profiler.measured_calls

    assert await calls() > 0
    assert await calls() == 0
    code = directory / "1" / "model.py"
    code.write_text(code.read_text() + "# edited\n")
    assert await calls() > 0
    assert await calls() == 0
    with closing(connect(cache)) as database, database:
        database.execute("UPDATE profiles SET document = '{ this is no JSON'")
    with caplog.at_level(logging.WARNING):
        assert await calls() > 0
    assert "unusable" in caplog.text
    assert await calls() == 0


async def test_a_declared_sample_is_what_is_sent_and_axes_of_any_length_ask_for_one(
    triton: LocalTriton,
    triton_client: TritonClient,
    tiny_models: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory = write_timed(tiny_models, {1: 1}, "any_length", max_batch_size=2, dims="[-1]")
    repository = TritonRepository(triton_client, (tiny_models,))
    profiler = TritonProfiler(repository, effort=QUICK)
    await repository.load("any_length", instances=1)
    with caplog.at_level(logging.WARNING):
        await profiler.measure(await repository.spec("any_length"), "cpu")
    assert "declare a `model_warmup` sample" in caplog.text

    config = directory / "config.pbtxt"
    config.write_text(
        config.read_text()
        + """
        model_warmup [{
          name: "typical" batch_size: 1
          inputs [{key: "x" value: {
            data_type: TYPE_FP32 dims: [5] input_data_file: "x.bin"
          }}]
        }]
        """
    )
    (directory / "warmup").mkdir()
    (directory / "warmup" / "x.bin").write_bytes(bytes(20))
    caplog.clear()
    await repository.load("any_length", instances=1)
    with caplog.at_level(logging.WARNING):
        rows = await profiler.measure(await repository.spec("any_length"), "cpu")
    assert [row.batch_size for row in rows] == [1, 2]
    assert "model_warmup" not in caplog.text

    (directory / "warmup" / "x.bin").write_bytes(bytes(19))
    with pytest.raises(ConfigError, match=r"x.bin has 19 bytes, FP32 \[5\] takes 20"):
        await profiler.measure(await repository.spec("any_length"), "cpu")


async def test_growing_stops_at_a_batch_that_takes_too_long(
    triton_repository: TritonRepository, caplog: pytest.LogCaptureFixture
) -> None:
    await triton_repository.load("timed", instances=1)
    profiler = TritonProfiler(triton_repository, effort=replace(QUICK, longest_batch_s=0.028))
    with caplog.at_level(logging.WARNING):
        rows = await profiler.measure(await triton_repository.spec("timed"), "cpu")
    assert [row.batch_size for row in rows][-1] in (1, 2)
    assert "larger batches are not measured" in caplog.text


async def test_a_model_that_fails_on_its_sample_cannot_be_profiled(
    triton_repository: TritonRepository,
) -> None:
    await triton_repository.load("failing", instances=1)
    profiler = TritonProfiler(triton_repository)
    with pytest.raises(
        ResidencyError, match="'failing' fails on its sample at batch size 1: deliberate failure"
    ):
        await profiler.measure(await triton_repository.spec("failing"), "cpu")


async def test_a_model_whose_process_is_lost_is_loaded_afresh_and_measured_on(
    triton: LocalTriton,
    triton_repository: TritonRepository,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await triton_repository.load("timed", instances=1)
    assert triton.pid is not None
    pid, lost = triton.pid, []

    def progress(done: int, total: int) -> None:
        if done == 1:
            (process,) = model_processes(pid, "timed")
            process.kill()
            lost.append(process.pid)

    profiler = TritonProfiler(triton_repository, effort=QUICK)
    spec = await triton_repository.spec("timed")
    with caplog.at_level(logging.WARNING):
        rows = await profiler.measure(spec, "cpu", on_progress=progress)
    assert [row.batch_size for row in rows] == list(TABLE_MS)
    assert "its process was lost while it was measured" in caplog.text
    (process,) = model_processes(pid, "timed")
    assert [process.pid] != lost
