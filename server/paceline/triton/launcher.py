"""A local Triton as a supervised child process: started, restarted when it dies, never left behind.

Invariants: whatever ends Paceline ends Triton - the child asks the kernel for SIGTERM at its
parent's death (PR_SET_PDEATHSIG) before it becomes tritonserver; whatever ends tritonserver ends
its model processes - they share its process group, which is killed before a restart; shared
memory carries a prefix that says whose it is and is removed by the next owner. Only Paceline gets
a terminal's Ctrl-C: the child has a session of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from paceline.core.errors import BackendError, ResidencyError
from paceline.triton.child import Child
from paceline.triton.client import TritonClient
from paceline.triton.installation import (
    BACKENDS,
    TritonInstallation,
    TritonRuntime,
    find_installation,
    prepare,
)

logger = logging.getLogger(__name__)

SHARED_MEMORY_DIRECTORY = Path("/dev/shm")
LOG_LIMIT_BYTES = 16 * 2**20
LOG_TAIL_LINES = 6
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
STEADY_LIFE_S = 60.0
"""A Triton that lived this long starts over with the shortest back-off."""
GROUP_GONE_S = 2.0
PORT_ATTEMPTS = 5
_PORT_TAKEN = ("already in use", "Address already in use", "Failed to bind")
_EXIT_TIMEOUT_S = 5

# Runs in the child: SIGTERM at the parent's death, unless it is dead already; then the command.
_SHIM = """\
import ctypes, os, sys
if ctypes.CDLL(None, use_errno=True).prctl(1, 15, 0, 0, 0) != 0:
    sys.exit("prctl(PR_SET_PDEATHSIG) failed")
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""

_instances = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTritonSettings:
    """How to run it. `state_directory` is private to Paceline and made when missing."""

    state_directory: Path
    model_repositories: tuple[Path, ...]
    ready_timeout_s: float = 60.0
    stop_timeout_s: float = 10.0
    threads_per_model: int = 1
    model_load_threads: int = 8
    backends: Mapping[str, Path] = field(default_factory=lambda: dict(BACKENDS))
    installation: TritonInstallation | None = None
    extra_arguments: tuple[str, ...] = ()


@dataclass(slots=True)
class _Ports:
    grpc: int
    metrics: int


@dataclass(slots=True)
class LocalTriton:
    """One tritonserver of ours. `start` and `stop` once each, from the main thread's loop.

    `on_down(reason)` is awaited when it died, `on_up(url)` when it answers again: with no models
    loaded, and at another port if its old one was taken meanwhile.
    """

    settings: LocalTritonSettings
    on_down: Callable[[str], Awaitable[None]] | None = None
    on_up: Callable[[str], Awaitable[None]] | None = None
    restarts: int = field(default=0, init=False)
    _ports: _Ports | None = field(default=None, init=False)
    _process: Child | None = field(default=None, init=False)
    _runtime: TritonRuntime | None = field(default=None, init=False)
    _supervisor: asyncio.Task[None] | None = field(default=None, init=False)
    _shm_prefix: str = field(default="", init=False)

    @property
    def url(self) -> str:
        """host:port of its gRPC endpoint, once started."""
        assert self._ports is not None, "a Triton that was not started has no address"
        return f"127.0.0.1:{self._ports.grpc}"

    @property
    def log_path(self) -> Path:
        return self.settings.state_directory / "triton.log"

    @property
    def pid(self) -> int | None:
        """Process id while it runs (also that of its process group)."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def shm_prefix(self) -> str:
        """Start of the names of its shared memory in /dev/shm, once started."""
        return self._shm_prefix

    async def start(self) -> str:
        """Start it and wait until it is ready; its URL. Raises ResidencyError."""
        assert self._supervisor is None, "this Triton was started before"
        for repository in self.settings.model_repositories:
            if not repository.is_dir():
                raise ResidencyError(f"model repository {repository} is not a directory")
        self._shm_prefix = f"{shm_owner_prefix(os.getpid())}{next(_instances)}_"
        remove_stale_shared_memory()
        await self._launch()
        self._supervisor = asyncio.create_task(self._supervise(), name="triton-supervisor")
        return self.url

    def restart(self) -> None:
        """End it at once; it is started again as after any other end, without models."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self) -> None:
        """SIGTERM, a bounded wait, SIGKILL; returns when every process of it is gone."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.wait((supervisor,))
        await self._end()

    async def __aenter__(self) -> LocalTriton:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        backoff_s = FIRST_BACKOFF_S
        while True:
            assert self._process is not None
            started_s = loop.time()
            code = await self._process.wait()
            reason = f"Triton (process {self._process.pid}) {_ending(code)}"
            await self._bury(self._process.pid)
            self._process = None
            logger.warning("%s; its log is %s", reason, self.log_path)
            await self._tell(self.on_down, reason)
            if loop.time() - started_s >= STEADY_LIFE_S:
                backoff_s = FIRST_BACKOFF_S
            while True:
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
                try:
                    await self._launch()
                    break
                except (ResidencyError, OSError) as error:
                    logger.warning("Triton did not restart: %s", error)
            self.restarts += 1
            logger.info("Triton answers again at %s", self.url)
            await self._tell(self.on_up, self.url)

    async def _tell(self, callback: Callable[[str], Awaitable[None]] | None, text: str) -> None:
        """A failing callback must not end the supervision."""
        if callback is None:
            return
        try:
            await callback(text)
        except Exception:
            logger.exception("a callback of the local Triton failed")

    async def _launch(self) -> None:
        """A process that is ready, at the old ports if they are still free."""
        limit_s = self.settings.ready_timeout_s
        installation = self.settings.installation or find_installation()
        self._runtime = await asyncio.to_thread(
            prepare,
            installation,
            self.settings.state_directory.resolve(),
            backends=self.settings.backends,
            threads=self.settings.threads_per_model,
        )
        rotate_log(self.log_path)
        for _ in range(PORT_ATTEMPTS):
            if self._ports is None:
                self._ports = _free_ports()
            log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
            server_id = f"paceline-{uuid.uuid4().hex[:12]}"
            self._process = self._spawn(installation.binary, server_id)
            try:
                failure = await self._await_ready(self._process, server_id, limit_s)
            except BaseException:
                await self._kill()
                raise
            if not failure:
                return
            await self._kill()
            said = log_tail(self.log_path, log_start)
            if not any(words in line for words in _PORT_TAKEN for line in said):
                raise ResidencyError(
                    f"Triton {failure}; end of {self.log_path}: {' | '.join(said) or '(empty)'}"
                )
            self._ports = None
        raise ResidencyError(f"Triton found its ports taken {PORT_ATTEMPTS} times in a row")

    def _spawn(self, binary: Path, server_id: str) -> Child:
        if threading.current_thread() is not threading.main_thread():
            raise ResidencyError(
                "a local Triton must be started from the main thread: it ends with the thread "
                "that started it"
            )
        assert self._runtime is not None
        with self.log_path.open("ab") as log:
            return Child(
                ending_with_parent(str(binary), *self._arguments(server_id)),
                environment=self._runtime.environment,
                output=log,
            )

    def _arguments(self, server_id: str) -> list[str]:
        assert self._runtime is not None and self._ports is not None
        return [
            f"--id={server_id}",
            *(f"--model-repository={p.resolve()}" for p in self._repositories()),
            "--model-control-mode=explicit",
            f"--backend-directory={self._runtime.backend_directory}",
            "--disable-auto-complete-config",
            f"--model-load-thread-count={self.settings.model_load_threads}",
            "--allow-http=false",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self._ports.grpc}",
            "--metrics-address=127.0.0.1",
            f"--metrics-port={self._ports.metrics}",
            f"--exit-timeout-secs={_EXIT_TIMEOUT_S}",
            # Every python-based backend has a prefix of its own.
            *(
                f"--backend-config={backend},shm-region-prefix-name={self._shm_prefix}{backend}_"
                for backend in self._runtime.backends
            ),
            *self.settings.extra_arguments,
        ]

    def _repositories(self) -> tuple[Path, ...]:
        """Triton insists on one; without any it gets an empty one."""
        if self.settings.model_repositories:
            return self.settings.model_repositories
        empty = self.settings.state_directory / "no-models"
        empty.mkdir(exist_ok=True)
        return (empty,)

    async def _await_ready(self, process: Child, server_id: str, limit_s: float) -> str:
        """ "" once it is ready, else how it failed."""
        client = TritonClient(self.url)
        answer = asyncio.create_task(client.identity(timeout_s=limit_s, wait_for_ready=True))
        ended = asyncio.create_task(process.wait())
        try:
            await asyncio.wait((answer, ended), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return f"{_ending(ended.result())} before it was ready"
            try:
                identity = answer.result()
            except BackendError:
                return f"was not ready within {limit_s:g} s"
            # Another server may have taken the port between the choice and the start.
            if identity.name == server_id and await client.ready():
                return ""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    return f"{_ending(await asyncio.shield(ended))} before it was ready"
            return f"was not ready within {limit_s:g} s"
        finally:
            for task in (answer, ended):
                task.cancel()
            await asyncio.gather(answer, ended, return_exceptions=True)
            await client.close()

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        try:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.settings.stop_timeout_s):
                        await process.wait()
        finally:
            await self._kill()

    async def _kill(self) -> None:
        """The whole process group, now; awaited."""
        process = self._process
        if process is None:
            return
        process.kill()
        await process.wait()
        await self._bury(process.pid)
        self._process = None

    async def _bury(self, pgid: int) -> None:
        """Model processes and shared memory of a tritonserver that has ended.

        They are init's children now, so nothing tells when they are gone: their group is asked.
        """
        with contextlib.suppress(TimeoutError, ProcessLookupError, PermissionError):
            async with asyncio.timeout(GROUP_GONE_S):
                os.killpg(pgid, signal.SIGKILL)
                while _lives(pgid):  # noqa: ASYNC110 - no event tells of it
                    await asyncio.sleep(0.01)
        remove_shared_memory(self._shm_prefix)


def _lives(pgid: int) -> bool:
    """Whether a process group has a member that is more than a zombie nobody has reaped yet."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # "pid (name) state ppid pgrp ..."; a name may hold anything.
            state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(group) == pgid and state not in "ZX":
                return True
    return False


def ending_with_parent(program: str, *arguments: str) -> tuple[str, ...]:
    """A command that runs `program` and gets SIGTERM when this process ends, however it does.

    PDEATHSIG belongs to the parent *thread*: start it from one that lives as long as the process.
    """
    shim = (sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid()))
    return (*shim, program, *arguments)


def shm_owner_prefix(pid: int) -> str:
    """Start of the names of shared memory that the Triton of process `pid` makes.

    The namespace is in it because containers may share /dev/shm, where process ids repeat.
    """
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    return f"paceline_{namespace}_{pid}_"


def remove_shared_memory(prefix: str, directory: Path = SHARED_MEMORY_DIRECTORY) -> None:
    """Unlink every region whose name starts with `prefix`."""
    assert prefix.startswith("paceline_"), prefix
    for path in directory.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            path.unlink()


def remove_stale_shared_memory(directory: Path = SHARED_MEMORY_DIRECTORY) -> None:
    """Unlink the regions of Paceline processes that are gone (they were killed)."""
    family = shm_owner_prefix(0).removesuffix("0_")
    for path in directory.glob(f"{family}*"):
        owner = path.name.removeprefix(family).partition("_")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(OSError):
                path.unlink()


def rotate_log(path: Path, limit_bytes: int = LOG_LIMIT_BYTES) -> None:
    """Keep one predecessor of a log that has grown past `limit_bytes`."""
    if path.exists() and path.stat().st_size > limit_bytes:
        path.replace(path.with_name(f"{path.name}.1"))


def log_tail(path: Path, start: int, lines: int = LOG_TAIL_LINES) -> list[str]:
    """The last lines written after offset `start`."""
    try:
        with path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(start, log.tell() - 16_384))
            text = log.read().decode(errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()][-lines:]


def _free_ports() -> _Ports:
    """Two ports that were free just now; a start that finds them taken chooses again."""
    with socket.socket() as first, socket.socket() as second:
        for candidate in (first, second):
            candidate.bind(("127.0.0.1", 0))
        return _Ports(grpc=first.getsockname()[1], metrics=second.getsockname()[1])


def _ending(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"exited with status {code}"
