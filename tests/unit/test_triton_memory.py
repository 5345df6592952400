"""What processes take, where the system and the GPUs' library tell it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import psutil

from paceline.triton.gpu_memory import GpuMemory
from paceline.triton.memory import anonymous_bytes, gpu_bytes

MIB = 1 << 20


@dataclass(frozen=True)
class OnGpu:
    pid: int
    usedGpuMemory: int | None


class Nvml:
    """Two GPUs, as nvidia-ml-py shows them."""

    class NVMLError(Exception):
        pass

    def __init__(self, held: list[list[OnGpu]]) -> None:
        self.held = held
        self.broken = False

    def nvmlDeviceGetCount(self) -> int:
        return len(self.held)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, device: int) -> list[OnGpu]:
        if self.broken:
            raise self.NVMLError("the driver is gone")
        return self.held[device]


def test_a_models_processes_are_summed_over_gpus_and_nobody_elses() -> None:
    wait = [sys.executable, "-c", "input()", "net_0_0", "token"]
    with subprocess.Popen(wait, stdin=subprocess.PIPE) as one:
        held = [[OnGpu(one.pid, 70), OnGpu(1, 900)], [OnGpu(one.pid, 30), OnGpu(2, None)]]
        nvml = Nvml(held)
        gpu = GpuMemory(nvml)
        assert gpu_bytes(os.getpid(), "net", gpu) == 100
        assert gpu_bytes(os.getpid(), "other", gpu) == 0
        nvml.broken = True
        assert gpu.by_process() == {}
        one.communicate(b"\n")


def test_a_process_is_measured_without_its_files() -> None:
    hold = f"held = bytearray(b'x' * {32 * MIB}); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        size = anonymous_bytes(process.pid)
        assert size is not None
        assert 32 * MIB < size <= psutil.Process(process.pid).memory_info().rss
        process.communicate(b"\n")
    assert anonymous_bytes(process.pid) is None
