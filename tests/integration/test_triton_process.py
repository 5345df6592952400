"""A local Triton as a process: started, restarted, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
import uvloop
from scripts.timed_model import write_timed
from tests.integration.models import write_add

from paceline.core.errors import BackendError, ResidencyError
from paceline.core.ports import ModelCall
from paceline.core.tensor import BatchTensor
from paceline.triton import launcher
from paceline.triton.client import TritonClient
from paceline.triton.installation import find_installation, prepare
from paceline.triton.launcher import LocalTriton, LocalTritonSettings
from paceline.triton.repository import TritonRepository

pytestmark = pytest.mark.integration

OWNER = Path(__file__).with_name("triton_owner.py")
SOURCES = Path(launcher.__file__).parents[2]
GONE_WITHIN_S = 20.0
ADD = ModelCall(
    "add",
    (
        BatchTensor("a", "INT32", (1, 16), (bytes(64),)),
        BatchTensor("b", "INT32", (1, 16), (bytes(64),)),
    ),
    ("sum",),
)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    directory = tmp_path / "models"
    directory.mkdir()
    write_add(directory)
    write_timed(directory, {1: 60_000}, "endless")
    return directory


def settings(tmp_path: Path, models: Path, *, stop_timeout_s: float = 0.5) -> LocalTritonSettings:
    return LocalTritonSettings(
        state_directory=tmp_path / "state",
        model_repositories=(models,),
        stop_timeout_s=stop_timeout_s,
    )


def group(pgid: int) -> list[psutil.Process]:
    """Living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == pgid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def regions(of: LocalTriton | int) -> list[Path]:
    """Shared memory of a Triton of ours, or of every Triton that a process owned."""
    prefix = launcher.shm_owner_prefix(of) if isinstance(of, int) else of.shm_prefix
    return sorted(launcher.SHARED_MEMORY_DIRECTORY.glob(f"{prefix}*"))


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that the kernel or another process does."""
    try:
        async with asyncio.timeout(GONE_WITHIN_S):
            while not condition():  # noqa: ASYNC110 - no event tells of a process group
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"not within {GONE_WITHIN_S:g} s: {what}")


@contextlib.asynccontextmanager
async def owner(tmp_path: Path, models: Path, *arguments: str) -> AsyncIterator[tuple[int, int]]:
    """A process that owns a Triton: (its pid, Triton's)."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(OWNER), str(tmp_path / "state"), str(models), *arguments),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), 30)
        yield process.pid, int(line.split()[0])
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def run_under_uvloop(main: Callable[[], object]) -> None:
    """Run a test's body under uvloop in this (main) thread, after the test's own loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())  # type: ignore[arg-type]


async def start_use_and_stop(tmp_path: Path, models: Path) -> None:
    local = LocalTriton(settings(tmp_path, models, stop_timeout_s=10))
    assert local.pid is None
    url = await local.start()
    client = await TritonClient.connect(url)
    try:
        assert await client.live() and await client.ready()
        await TritonRepository(client, (models,)).load("add", instances=2)
        await client.execute(ADD, timeout_s=10)
        pid = local.pid
        assert pid is not None
        assert len(group(pid)) == 3, "tritonserver and a stub per instance"
        assert os.getsid(pid) == pid != os.getsid(0), "Ctrl-C in a terminal does not reach it"
        assert regions(local)
    finally:
        await local.stop()
        await client.close()
    assert local.pid is None
    assert not group(pid)
    assert not regions(local)
    await local.stop()


async def test_it_starts_serves_and_stops_without_leaving_anything(
    tmp_path: Path, models: Path
) -> None:
    await start_use_and_stop(tmp_path, models)
    assert "TRITONBACKEND_ModelInstanceInitialize" in (tmp_path / "state/triton.log").read_text()


def test_it_does_the_same_under_uvloop(tmp_path: Path, models: Path) -> None:
    run_under_uvloop(lambda: start_use_and_stop(tmp_path, models))


async def test_a_killed_tritonserver_is_restarted_and_usable_after_a_reload(
    tmp_path: Path, models: Path
) -> None:
    told: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    async def on_down(reason: str) -> None:
        await told.put(("down", reason))
        raise ValueError("a failing callback does not end the supervision")

    async def on_up(url: str) -> None:
        await told.put(("up", url))

    local = LocalTriton(settings(tmp_path, models), on_down=on_down, on_up=on_up)
    async with local:
        client = await TritonClient.connect(local.url)
        repository = TritonRepository(client, (models,))
        await repository.load("add", instances=2)
        for restarts in (1, 2):
            pid = local.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            event, reason = await asyncio.wait_for(told.get(), 20)
            assert (event, "was ended by SIGKILL" in reason) == ("down", True)
            assert not group(pid), "its stubs are gone before it is restarted"
            with pytest.raises(BackendError, match="is not reachable"):
                await client.execute(ADD, timeout_s=0.2)
            event, url = await asyncio.wait_for(told.get(), 20)
            assert (event, url, local.restarts) == ("up", local.url, restarts)
            await client.retarget(url)
            with pytest.raises(BackendError, match="unknown model"):
                await client.execute(ADD, timeout_s=10)
            await repository.load("add", instances=1)
            await client.execute(ADD, timeout_s=10)
        await client.close()


async def test_stopping_does_not_wait_for_a_model_that_never_ends(
    tmp_path: Path, models: Path
) -> None:
    async with LocalTriton(settings(tmp_path, models)) as local:
        client = await TritonClient.connect(local.url)
        await TritonRepository(client, (models,)).load("endless", instances=1)
        x = BatchTensor("x", "FP32", (1, 4), (bytes(16),))
        call = asyncio.create_task(
            client.execute(ModelCall("endless", (x,), ("y",)), timeout_s=100)
        )
        await asyncio.wait((call,), timeout=0.2)
        pid = local.pid
    assert pid is not None and not group(pid)
    with pytest.raises(BackendError):
        await call
    await client.close()
    assert not regions(local)


@pytest.mark.parametrize("busy", ["idle", "busy"])
async def test_sigkill_of_its_owner_takes_tritonserver_and_every_stub_along(
    tmp_path: Path, models: Path, busy: str
) -> None:
    arguments = ("endless", "busy") if busy == "busy" else ("add",)
    async with owner(tmp_path, models, *arguments) as (pid, triton_pid):
        assert len(group(triton_pid)) == 3
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not group(triton_pid), "tritonserver and its stubs are gone")
    launcher.remove_stale_shared_memory()
    assert not regions(pid)


async def test_even_when_owner_and_tritonserver_are_killed_at_once(
    tmp_path: Path, models: Path
) -> None:
    async with owner(tmp_path, models, "add") as (pid, triton_pid):
        os.kill(pid, signal.SIGKILL)
        os.kill(triton_pid, signal.SIGKILL)
        await until(lambda: not group(triton_pid), "every stub is gone")
    launcher.remove_stale_shared_memory()
    assert not regions(pid), "what they could not clean up, the next start does"


async def test_a_start_that_fails_quotes_the_log(tmp_path: Path, models: Path) -> None:
    local = LocalTriton(
        LocalTritonSettings(
            state_directory=tmp_path / "state",
            model_repositories=(models,),
            extra_arguments=("--no-such-option",),
        )
    )
    with pytest.raises(
        ResidencyError, match=r"exited with status 1 before it was ready; end of .*triton\.log: \S+"
    ) as caught:
        await local.start()
    assert "\n" not in str(caught.value)
    assert local.pid is None
    await local.stop()


async def test_a_taken_port_is_replaced_by_another(tmp_path: Path, models: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        local = LocalTriton(settings(tmp_path, models))
        local._ports = launcher._Ports(grpc=port, metrics=launcher._free_ports().metrics)
        async with local:
            assert local.url != f"127.0.0.1:{port}"


async def test_a_triton_on_a_taken_port_is_not_mistaken_for_ours(
    tmp_path: Path, models: Path
) -> None:
    async with LocalTriton(settings(tmp_path / "a", models)) as first:
        second = LocalTriton(settings(tmp_path / "b", models))
        assert first._ports is not None
        second._ports = launcher._Ports(first._ports.grpc, launcher._free_ports().metrics)
        async with second:
            assert second.url != first.url


async def test_connecting_says_what_is_wrong_with_the_server(tmp_path: Path, models: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ResidencyError, match=rf"no Triton answered at {url} within 0.3 s \("):
            await TritonClient.connect(url, timeout_s=0.3)
    for url in ("http://127.0.0.1:8001", "127.0.0.1", "host:99999", ""):
        with pytest.raises(ResidencyError, match="is not host:port of a gRPC port"):
            await TritonClient.connect(url)


async def test_a_triton_without_explicit_model_control_is_refused(
    tmp_path: Path, models: Path
) -> None:
    installation = find_installation()
    runtime = prepare(installation, tmp_path / "state", backends={})
    port = launcher._free_ports().grpc
    (tmp_path / "empty").mkdir()
    process = await asyncio.create_subprocess_exec(
        str(installation.binary),
        *(f"--model-repository={tmp_path / 'empty'}", "--model-control-mode=none"),
        *("--grpc-address=127.0.0.1", f"--grpc-port={port}"),
        *("--allow-http=false", "--allow-metrics=false"),
        env=dict(runtime.environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with pytest.raises(ResidencyError, match="start it with --model-control-mode=explicit"):
            await TritonClient.connect(f"127.0.0.1:{port}", timeout_s=20)
    finally:
        process.kill()
        await process.wait()
