"""What processes hold on this machine's NVIDIA GPUs, as NVML tells (the extra `gpu`).

Not run on a GPU: no machine with one was at hand. Models without a process of their own (TensorRT,
ONNX Runtime inside tritonserver) cannot be told apart by NVML: their sizes stay guessed.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


class GpuMemory:
    """`nvml` is the module `pynvml`, or what stands for it; it is initialised."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml

    @classmethod
    def find(cls) -> GpuMemory | None:
        """None where the library, the driver or a GPU is missing."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            return cls(pynvml) if pynvml.nvmlDeviceGetCount() else None
        except pynvml.NVMLError as error:
            logger.info("no GPU is looked at: %s", error)
            return None

    def by_process(self) -> dict[int, int]:
        """Bytes on all GPUs by process id; what a GPU does not tell is left out."""
        found: dict[int, int] = {}
        try:
            for index in range(self._nvml.nvmlDeviceGetCount()):
                device = self._nvml.nvmlDeviceGetHandleByIndex(index)
                for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(device):
                    found[process.pid] = found.get(process.pid, 0) + (process.usedGpuMemory or 0)
        except self._nvml.NVMLError as error:
            logger.warning("the GPUs' memory is not measured: %s", error)
        return found
