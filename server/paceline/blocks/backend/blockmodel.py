"""A model that runs as blocks: everything but Triton.

`BlockModel` opens a manifest, maps its objects, starts to build sessions and to load weights, each
on a thread of its own, and can take requests at once: a request waits for just what it needs.
Without a budget everything is loaded, in the order of computation, and stays. With one, runs go
through a window of that size, as many at a time as find room there (`budget`).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from .budget import Budget
from .changes import Changes
from .chunks import chunks_of
from .device import DevicePool, DeviceRuns, DeviceSession, Driver, open_cuda
from .ledger import Ledger
from .loader import Loader
from .malloc import keep_little
from .manifest import (
    Block,
    Chunks,
    Manifest,
    Member,
    PoolError,
    pages,
    runtime_here,
    swap_rate_bytes_s,
)
from .run import Durations, Sessions, compute, needed_blocks
from .settings import Settings
from .skeleton import Skeleton, available_providers, empty_arena, ort_version, to_value
from .source import Source, graphs_of, loaded_objects, objects_of, open_source, tables_of
from .window import Window


class BlockModel:
    """One model in one process. `infer` may be called by several threads."""

    def __init__(self, settings: Settings, source: Source, ledger: Ledger, name: str = "") -> None:
        self._source = source
        self._settings = settings
        self._ledger = ledger
        self.manifest: Manifest = source.manifest(settings.manifest)
        different = self.manifest.runtime.difference(runtime_here(ort_version()))
        if different:
            raise PoolError(
                f"model {self.manifest.model!r} was compiled for {different}: compile it again"
            )
        self._driver = _open_device(settings, self.manifest)
        self._members: dict[str, tuple[Member, int]] = {}
        blocks: list[Block] = []
        for member in self.manifest.members:
            self._members[member.name] = (member, len(blocks))
            blocks.extend(member.blocks)
        stated = objects_of(self.manifest)
        needs = [loaded_objects(block) for block in blocks]
        self._tables = tables_of(self.manifest)
        # A device does not page on demand: its tables are there, and checked, as a whole.
        self._by_rows = {} if self._driver is not None else self._tables_by_rows(blocks)
        self._unchecked_tables = [name for name in self._tables if name not in self._by_rows]
        self._ran = threading.Event()
        self._blocks = blocks
        self._tables_lock = threading.Lock()
        self._tables_thread = threading.Thread(target=self._check_tables_early, daemon=True)
        held = {name: pages(one.size_bytes) for name, one in stated.items()}
        self.budget: Budget | None = None
        if settings.has_budget:
            keep_little()
            cores = len(os.sched_getaffinity(0))
            self.budget = Budget(
                self.manifest.model,
                [sum(held[name] for name in names) for names in needs],
                tables=bool(self._tables),
                activations=self.manifest.activation_bytes,
                empty=empty_arena,
                rate_bytes_s=swap_rate_bytes_s(blocks),
                settings=settings,
                ledger=ledger,
                most=max(1, cores // (settings.threads or cores)),
            )
        else:
            ledger.expect(
                name or self.manifest.model,
                sum(held[each] for each in stated if each not in self._tables),
            )
        source.find_graphs(graphs_of(self.manifest))
        self._objects = source.open(stated)
        for name in self._tables:
            self._objects[name].expect_rows()
        self._durations = Durations(blocks)
        self._loader = Loader(
            Window(needs, held, limit_bytes=None if self.budget is None else 0),
            self._objects,
            source,
            turns=ledger,
            keep_page_cache=settings.keep_page_cache,
            on_drop=None if self.budget is None else self.budget.dropped,
        )
        self._skeleton = Skeleton(
            blocks,
            lambda block, waiting: source.graph(
                block.graph, self.manifest.objects[block.graph], waiting
            ),
            source.graphs,
            self._objects,
            settings.threads,
            None if self._driver is None else self._on_device,
            turns=ledger.building,
            urgent=self._loader.waited_for,
        )
        self._runs: Sessions = self._skeleton
        if self._driver is not None:
            self._pool = DevicePool(
                self._driver,
                [tuple(dict.fromkeys(w.object for w in block.weights)) for block in blocks],
                self._objects,
                settings.device_pool_bytes,
            )
            fetched = partial(self._loader.wait_complete, 0.0)
            self._runs = DeviceRuns(self._skeleton, self._pool, len(blocks), fetched)
        self._changes = Changes(self._objects, source.check, self._lose)
        self._used: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {}
        self._closed = False

    @classmethod
    def open(cls, settings: Settings, name: str = "") -> BlockModel:
        """The model that a config.pbtxt describes, called so by its server. Raises PoolError."""
        source, channel = open_source(settings)
        ledger = Ledger(channel, priority=settings.priority)
        try:
            return cls(settings, source, ledger, name)
        except BaseException:
            source.close()
            ledger.close()
            raise

    def start(self) -> BlockModel:
        """Building and loading begin; requests may come. Raises PoolError."""
        if self.budget is not None:
            self.budget.start(self._loader, self._durations)
        self._loader.start()  # first: what takes longest is to fetch
        self._skeleton.start()
        self._tables_thread.start()
        return self

    @property
    def members(self) -> Sequence[Member]:
        return self.manifest.members

    @property
    def loader(self) -> Loader:
        return self._loader

    def infer(
        self, member: str, feed: Mapping[str, Any], outputs: Sequence[str], rows: int = 1
    ) -> dict[str, Any]:
        """Arrays of the member's `outputs` from those of its inputs, by Triton's names.

        Raises PoolError when weights cannot be had or the batch is too large for the budget, and
        whatever ONNX Runtime raises.
        """
        if self.budget is None:
            return self._infer(member, feed, outputs, rows)
        network, first = self._members[member]
        kind = (member, *(feed[tensor.name].shape for tensor in network.inputs))
        beside_bytes = self.manifest.member_activation_bytes(network, rows)
        need = self.budget.need(kind, range(first, first + len(network.blocks)), rows, beside_bytes)
        with self.budget.running(need):
            results = self._infer(member, feed, outputs, rows)
            self._trim_tables(self.budget.table_bytes)
        return results

    def close(self) -> None:
        """Ends the threads; call it when no request is under way. Once is enough."""
        if self._closed:
            return
        self._closed = True
        self._ran.set()
        if self.budget is not None:
            self.budget.close()
        self._source.stop()
        self._loader.close()
        self._skeleton.close()
        if self._tables_thread.is_alive():
            self._tables_thread.join()
        self._source.close()
        self._ledger.close()
        if self._driver is not None:
            self._driver.close()

    def _on_device(self, graph: bytes, block: Block) -> DeviceSession:
        threads, number = self._settings.threads, self._settings.gpu
        assert number is not None
        return DeviceSession(graph, block, self._source.graphs, threads, self._pool, number)

    def _infer(
        self, name: str, feed: Mapping[str, Any], outputs: Sequence[str], rows: int
    ) -> dict[str, Any]:
        member, first = self._members[name]
        given = {tensor.value: to_value(feed[tensor.name]) for tensor in member.inputs}
        wanted = {tensor.name: tensor.value for tensor in member.outputs if tensor.name in outputs}
        asked = tuple(dict.fromkeys(wanted.values()))
        used = self._used.get((name, asked)) or self._use(member, asked)
        self._check_tables()
        by_rows = self._by_rows
        counts = self._changes.before(used)
        values = compute(
            member,
            first,
            given,
            asked,
            rows=rows,
            weights=self._loader,
            sessions=self,
            durations=self._durations,
        )
        self._changes.after(used, counts, by_rows)
        self._ran.set()
        return {output: values[value].numpy() for output, value in wanted.items()}

    def _use(self, member: Member, values: tuple[str, ...]) -> tuple[str, ...]:
        """Objects that a run reads which computes these values."""
        blocks = (member.blocks[position] for position in needed_blocks(member.blocks, values))
        names = tuple(dict.fromkeys(w.object for block in blocks for w in block.weights))
        self._used[member.name, values] = names
        return names

    def _lose(self, names: Sequence[str]) -> None:
        """These objects are not what they were when they were checked."""
        with self._tables_lock:
            self._unchecked_tables.extend(name for name in names if name in self._tables)
            self._loader.lose(names)

    def run(self, block: int, values: list[Any]) -> list[Any]:
        """See `run.Sessions`: after the rows that the block reads were checked."""
        if self._by_rows:
            for weight in self._blocks[block].weights:
                chunks = self._by_rows.get(weight.object)
                if chunks is not None:
                    rows = values[self._blocks[block].inputs.index(weight.index)].numpy()
                    self._source.check_part(weight.object, chunks_of(rows, weight, chunks))
        return self._runs.run(block, values)

    def _tables_by_rows(self, blocks: Sequence[Block]) -> dict[str, Chunks]:
        """Tables of which the rows that a run reads are known before it reads them."""
        readers = [weight for block in blocks for weight in block.weights]
        unknown = {weight.object for weight in readers if not weight.index}
        parts = self._source.by_parts
        return {name: parts[name] for name in self._tables if name in parts and name not in unknown}

    def _check_tables(self) -> None:
        """Tables that are paged in on demand are fetched and hashed before their first use."""
        if not self._unchecked_tables:
            return
        with self._tables_lock:
            while self._unchecked_tables:
                self._source.check(self._unchecked_tables[-1])
                self._unchecked_tables.pop()

    def _check_tables_early(self) -> None:
        with contextlib.suppress(PoolError):  # the first request tries again, and is told
            self._check_tables()
            if not self._by_rows:
                return
            self._ran.wait()  # the weights come first, and the rows that somebody asked for
            for name in list(self._by_rows):
                if self._closed:
                    return
                self._source.check(name)
            self._by_rows = {}

    def _trim_tables(self, limit_bytes: int) -> None:
        """Rows that were paged in stay as long as there is room for them."""
        if sum(self._objects[name].cached_bytes() for name in self._tables) > limit_bytes:
            for name in self._tables:
                with contextlib.suppress(OSError):  # then they stay for the kernel to drop
                    self._objects[name].drop(page_cache=not self._settings.keep_page_cache)


def _open_device(settings: Settings, manifest: Manifest) -> Driver | None:
    """The GPU a model asks for; None: the CPU. Raises PoolError if it cannot be had."""
    if settings.gpu is None:
        return None
    if manifest.document["options"].get("device") != "cuda":
        raise PoolError(
            f"model {manifest.model!r} was compiled for a CPU: compile it with --device cuda, "
            "or leave the parameter device out (and set KIND_CPU)"
        )
    return open_cuda(settings.gpu, available_providers())
