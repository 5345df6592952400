"""A `paceline serve` process as a user starts it, for tests: its ports, what it says, its end.

Nothing here sleeps: lines are awaited on a condition that the thread reading stderr notifies,
process ends on the processes themselves.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import psutil
import tritonclient.grpc as triton

from paceline.v1 import control_pb2_grpc

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
GONE_TIMEOUT_S = 15.0
READY = re.compile(r"serving gRPC on 127\.0\.0\.1:(\d+), HTTP on 127\.0\.0\.1:(\d+)")


def free_ports(workers: int) -> tuple[int, int]:
    """A gRPC port, and an HTTP port with as many free ones behind it as further workers need."""
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        while True:
            with ExitStack() as stack:
                # New ones for each try: a socket that is bound cannot be bound again.
                sockets = [stack.enter_context(socket.socket()) for _ in range(workers)]
                sockets[0].bind(("127.0.0.1", 0))
                port: int = sockets[0].getsockname()[1]
                try:
                    for further, each in enumerate(sockets[1:], 1):
                        each.bind(("127.0.0.1", port + further))
                except (OSError, OverflowError):  # taken, or no port
                    continue
                return first.getsockname()[1], port


class Paceline:
    """One server on free ports with a state directory of its own."""

    def __init__(self, state: Path, arguments: Sequence[str]) -> None:
        self.state = state
        self.lines: list[str] = []
        self._told = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "paceline", "serve", "--state-dir", str(state)),
                *("--grpc-port", "0", "--http-port", "0"),
                *arguments,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.grpc_port = 0
        self.http_port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def said(self) -> str:
        """Everything on stderr so far."""
        with self._told:
            return "\n".join(self.lines)

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> Paceline:
        """Until it serves."""
        found = self.wait_line(READY, timeout_s)
        self.grpc_port, self.http_port = int(found[1]), int(found[2])
        return self

    def wait_line(self, pattern: str | re.Pattern[str], timeout_s: float = 30.0) -> re.Match[str]:
        """The first line on stderr that matches; AssertionError when it ends or time is up."""
        wanted = re.compile(pattern)

        def match() -> re.Match[str] | None:
            return next(filter(None, map(wanted.search, self.lines)), None)

        with self._told:
            self._told.wait_for(lambda: self._ended or match(), timeout_s)
            found = match()
            text = "\n".join(self.lines)
        assert found is not None, f"no line matches {wanted.pattern!r}:\n{text}"
        return found

    def client(self) -> triton.InferenceServerClient:
        """An unmodified Triton client."""
        return triton.InferenceServerClient(self.address)

    def control(self, channel: grpc.Channel) -> Any:
        """paceline.v1.Control."""
        return control_pb2_grpc.ControlStub(channel)

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.address)

    def triton_process(self) -> psutil.Process:
        """The tritonserver that it started."""
        (found,) = [p for p in self.descendants() if p.name() == "tritonserver"]
        return found

    def descendants(self) -> list[psutil.Process]:
        """Every process that works in its state directory, Paceline itself left out."""
        return [p for p in processes_of(self.state) if p.pid != self.process.pid]

    def end(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait for its end: the exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join(5)
        if self.process.stderr is not None:
            self.process.stderr.close()
        return code

    def stop(self) -> int:
        """SIGTERM and wait; SIGKILL when that takes too long. Nothing of it is left."""
        self.process.terminate()
        try:
            return self.end()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.end()
            raise
        finally:
            self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        """No tritonserver and no model process outlives it."""
        _, alive = psutil.wait_procs(self.descendants(), timeout=GONE_TIMEOUT_S)
        commands = [" ".join(process.cmdline()) for process in alive]
        for process in alive:
            process.kill()
        assert not commands, f"left behind: {commands}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._told:
                self.lines.append(line.rstrip("\n"))
                self._told.notify_all()
        with self._told:
            self._ended = True
            self._told.notify_all()


def processes_of(state: Path) -> list[psutil.Process]:
    """Living processes with `state` in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if process.status() != psutil.STATUS_ZOMBIE and any(str(state) in a for a in command):
                found.append(process)
        except psutil.Error:
            continue
    return found


def run_cli(*arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """`paceline ARGUMENTS`, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "paceline", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
