"""What a local Triton's blocks models need from a store comes while their processes start.

One process of ours (`blocks.backend.ahead`) begins to fetch a model into its cache when Triton is
told to load it; the model's own finds it there. Nothing depends on it: where it cannot be started,
or dies, models fetch for themselves. A model with a memory budget of its own does so anyway: what
is fetched ahead would count, and nobody would drop it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

from paceline.block_sizes import kept_blocks
from paceline.triton.config import ModelConfig

logger = logging.getLogger(__name__)

_COMMAND = (sys.executable, "-m", "paceline.blocks.backend.ahead")
_END_WITHIN_S = 5.0


class BlockFetches:
    """The process, started with the first model that it can help, and again when it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, while it runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def begin(self, directory: Path, config: ModelConfig) -> None:
        """The model in that directory is about to be loaded."""
        settings = kept_blocks(directory, config)
        if settings is None or isinstance(settings.pool, Path):
            return
        request = {
            "model": config.name or directory.name,
            "directory": str(directory),
            "parameters": {
                key: {"string_value": value.string_value}
                for key, value in config.parameters.items()
            },
        }
        try:
            self._send(json.dumps(request).encode() + b"\n")
        except OSError as error:
            logger.warning("%s is not fetched ahead: %s", request["model"], error)

    def close(self) -> None:
        """Ends it, whatever it fetches."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(_END_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _send(self, line: bytes) -> None:
        """Raises OSError."""
        if self.pid is None:
            self.close()
            self._process = subprocess.Popen(
                _COMMAND, stdin=subprocess.PIPE, bufsize=0, start_new_session=True
            )
            assert self._process.stdin is not None
            # A process that hangs must not hang us.
            os.set_blocking(self._process.stdin.fileno(), False)
        assert self._process is not None and self._process.stdin is not None
        if self._process.stdin.write(line) != len(line):
            self._process.kill()  # it reads no more, and would read half a line
            raise BlockingIOError("the process that fetches does not listen")
