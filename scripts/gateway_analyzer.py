"""NVIDIA's perf_analyzer as the load generator of `bench_gateway.py`.

Written in C++, it leaves more of the shared cores to what it measures than a generator in Python
does; and it is what Triton's users measure with. It has to know the model it asks for, so it
cannot measure the bare echo servers.
"""

from __future__ import annotations

import contextlib
import queue
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from scripts.gateway_peers import Peer, process
from scripts.gateway_report import Cell

PROGRAM = Path(__file__).resolve().parent / "perf_analyzer"
CASES = ("relay", "naive", "triton", "dynamic", "ensemble")
"""What it can ask, besides Paceline's chains."""
_WINDOWS = 3
"""The fewest it accepts. The first one warms up, and counts for nothing."""
_START_S = 30.0
_WINDOW = re.compile(r"Pass \[\d+\] throughput: ([\d.]+) infer/sec\. p50 latency: (\d+) usec")


def measure(peer: Peer, cell: Cell, seconds_s: float) -> dict[str, float]:
    """Median latency, answers a second and CPU time per answer of two windows of `seconds_s`.

    Raises RuntimeError when it fails or does not end.
    """
    command = [
        *(PROGRAM, "-m", peer.model, "-u", peer.target, "-i", "grpc", "-x", "1", "--async"),
        *("--concurrency-range", cell.in_flight, "--percentile", "50", "-v"),
        # Three windows, however far apart they are: the repeats tell how stable it is.
        *("--measurement-interval", round(seconds_s * 1e3), "-r", _WINDOWS, "-s", "999"),
        *(("--streaming",) if cell.stream else ()),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    processes = [psutil.Process(pid) for pid in peer.pids()]
    marks: list[tuple[float, float]] = []
    windows: list[tuple[float, float]] = []
    said: list[str] = []
    with process([str(part) for part in command], **pipes) as child:
        for line in _lines(child, _START_S + 4 * _WINDOWS * seconds_s):
            said.append(line.strip())
            if (window := _WINDOW.search(line)) is not None:
                spent = (running.cpu_times() for running in processes)
                marks.append((time.perf_counter(), sum(s.user + s.system for s in spent)))
                windows.append((float(window[1]), float(window[2]) / 1e3))
    if len(windows) < _WINDOWS:
        raise RuntimeError(f"perf_analyzer: {' '.join(said)[-300:] or 'said nothing'}")
    rps = statistics.mean(window[0] for window in windows[1:])
    (begun_s, before_s), (ended_s, after_s) = marks[0], marks[-1]
    return {
        "p50_ms": statistics.median(window[1] for window in windows[1:]),
        "rps": rps,
        "cpu_us": (after_s - before_s) / (ended_s - begun_s) / rps * 1e6,
    }


def _lines(child: subprocess.Popen[str], limit_s: float) -> Iterator[str]:
    """What a process prints, as it does, for no longer than that."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    end_s = time.monotonic() + limit_s
    with contextlib.suppress(queue.Empty):
        while (line := lines.get(timeout=max(end_s - time.monotonic(), 0.0))) is not None:
            yield line
