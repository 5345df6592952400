"""A process that fetches from a store what models' processes are about to need.

Triton takes 0.2 to 0.3 s to start a model's process and its Python, in which nothing of the model
comes. Whoever has Triton load a model tells this process at the same moment, a line of JSON each:
`{"model", "directory", "parameters"}`, parameters as in a config.pbtxt. It fetches the model into
its cache as the model's own process does, which finds what is there, waits for what is on its way,
and takes over where this process fails, or gives way to other loads: nothing is said here that the
load itself does not say. Ends with its standard input.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .ledger import Ledger
from .loader import Loader
from .manifest import PoolError, pages
from .settings import Settings, SettingsError, read_settings
from .source import loaded_objects, objects_of, open_source
from .window import Window

MOST = 4
"""Models at once; more are left to their own processes."""
LONGEST_S = 600.0
"""As long as Triton is given for a load."""


class _Yielding:
    """Turns until others load as well and the model's own process is there: that one is weighed
    by who waits for it, and must not wait for us. See `loader.LoadTurns`.
    """

    def __init__(self, ledger: Ledger, model: str) -> None:
        self._ledger = ledger
        self._model = model

    def begin(self, urgent: Callable[[], bool]) -> bool:
        """Raises PoolError when there are no more."""
        return self._unless_it_loads(self._ledger.begin(urgent))

    def renew(self, amount: float, urgent: Callable[[], bool]) -> bool:
        """Raises PoolError when there are no more."""
        return self._unless_it_loads(self._ledger.renew(amount, urgent))

    def _unless_it_loads(self, alone: bool) -> bool:
        if not alone and any(
            row.model == self._model and row.loading_bytes for row in self._ledger.rows().values()
        ):
            self._ledger.end(0)
            raise PoolError(f"model {self._model!r} is fetched by its own process now")
        return alone

    def end(self, amount: float) -> None:
        self._ledger.end(amount)

    def moved(self, size_bytes: int) -> None:
        self._ledger.moved(size_bytes)


def serve(lines: Iterable[str]) -> None:
    """Fetches what each line says, until there are no more."""
    free = threading.Semaphore(MOST)
    for line in lines:
        request: dict[str, Any] = json.loads(line)
        if free.acquire(blocking=False):
            arguments = (free, request["model"], request["directory"], request["parameters"])
            threading.Thread(target=_fetch_and_free, args=arguments, daemon=True).start()


def fetch(model: str, settings: Settings) -> None:
    """All that the model, called so by its server, loads from its store. Raises PoolError."""
    with ExitStack() as stack:
        source, channel = open_source(settings)
        stack.callback(source.close)
        ledger = Ledger(channel, priority=settings.priority)
        stack.callback(ledger.close)
        ledger.expect(model, 0)  # the model's own process says how much it is
        manifest = source.manifest(settings.manifest)
        blocks = [block for member in manifest.members for block in member.blocks]
        stated = objects_of(manifest)
        window = Window(
            [loaded_objects(block) for block in blocks],
            {name: pages(one.size_bytes) for name, one in stated.items()},
        )
        loader = Loader(window, source.open(stated), source, turns=_Yielding(ledger, model))
        stack.callback(loader.close)
        loader.start()
        for block in blocks:
            source.graph(block.graph, manifest.objects[block.graph])
        loader.wait_complete(LONGEST_S)


def _fetch_and_free(
    free: threading.Semaphore,
    model: str,
    directory: str,
    parameters: Mapping[str, Mapping[str, str]],
) -> None:
    try:
        fetch(model, read_settings(parameters, Path(directory)))
    except (PoolError, SettingsError, OSError):
        pass  # the model's own process meets it, too, and says so
    finally:
        gc.collect()  # a mapping that lives on keeps its pages from being dropped by their owner
        free.release()


if __name__ == "__main__":
    serve(sys.stdin)
    os._exit(0)  # what is half fetched is of no use: nobody waits for it
