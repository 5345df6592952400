"""A model that runs as blocks: everything but Triton.

`BlockModel` opens a manifest, maps its objects, starts to build sessions and to load weights, each
on a thread of its own, and can take requests at once: a request waits for just what it needs.
Without a budget everything is loaded, in the order of computation, and stays. With one, runs go
through a window of that size, one at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .loader import Loader, Turns
from .manifest import Block, Manifest, Member, PoolError, pages, runtime_here
from .mapping import MappedObject
from .plan import Plan, choose
from .run import Durations, compute
from .settings import MIB, Settings
from .skeleton import Skeleton, ort_version, to_value
from .source import LocalSource, Source, objects_of
from .window import Window

_DEFAULT_RATE_BYTES_S = 1e9
"""Swap-in before anything was measured: what a local disk gives."""
_TABLE_SHARE = 1 / 16
"""Of the budget, for rows of tables that are paged in on demand."""
_REPLAN_RUNS = 16


class BlockModel:
    """One model in one process. `infer` may be called by several threads."""

    def __init__(self, settings: Settings, source: Source, *, turns: Turns | None = None) -> None:
        self._source = source
        self._settings = settings
        self.manifest: Manifest = source.manifest(settings.manifest)
        different = self.manifest.runtime.difference(runtime_here(ort_version()))
        if different:
            raise PoolError(
                f"model {self.manifest.model!r} was compiled for {different}: compile it again"
            )
        self._members: dict[str, tuple[Member, int]] = {}
        blocks: list[Block] = []
        for member in self.manifest.members:
            self._members[member.name] = (member, len(blocks))
            blocks.extend(member.blocks)
        self._blocks = tuple(blocks)
        self._sizes = objects_of(self.manifest)
        self._needs = [_loaded_objects(block) for block in self._blocks]
        self._budget_bytes = settings.memory_budget_bytes
        loaded = {name for names in self._needs for name in names}
        self._tables = [name for name in self._sizes if name not in loaded]
        self._table_bytes = 0
        limit = self._limit_bytes()
        self._objects: dict[str, MappedObject] = {
            name: source.open(name, size) for name, size in self._sizes.items()
        }
        for name in self._tables:
            self._objects[name].expect_rows()
        self._unchecked_tables = list(self._tables)
        self._window = Window(self._needs, self._page_sizes(), limit_bytes=limit)
        self._durations = Durations(self._blocks)
        self._loader = Loader(
            self._window,
            self._objects,
            source,
            turns=turns,
            keep_page_cache=settings.keep_page_cache,
        )
        self._skeleton = Skeleton(
            self._blocks,
            lambda block: source.graph(block.graph, self.manifest.objects[block.graph]),
            self._objects,
            settings.threads,
        )
        self._one_at_a_time = threading.Lock()
        self._runs = 0
        self.plan: Plan | None = None
        if limit is not None:
            self._replan(1)

    @classmethod
    def open(cls, settings: Settings, name: str) -> BlockModel:
        """The model that a config.pbtxt describes. Raises PoolError."""
        assert isinstance(settings.pool, Path)
        return cls(settings, LocalSource(settings.pool))

    def start(self) -> BlockModel:
        """Building and loading begin; requests may come."""
        self._skeleton.start()
        self._loader.start()
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

        Raises PoolError when weights cannot be had, and whatever ONNX Runtime raises.
        """
        if self._limit_bytes() is None:
            return self._infer(member, feed, outputs, rows)
        with self._one_at_a_time:
            results = self._infer(member, feed, outputs, rows)
            self._after_run(rows)
            return results

    def close(self) -> None:
        """Ends the threads; call it when no request is under way."""
        self._loader.close()
        self._skeleton.close()
        self._source.close()

    def _infer(
        self, name: str, feed: Mapping[str, Any], outputs: Sequence[str], rows: int
    ) -> dict[str, Any]:
        member, first = self._members[name]
        given = {tensor.value: to_value(feed[tensor.name]) for tensor in member.inputs}
        wanted = {tensor.name: tensor.value for tensor in member.outputs if tensor.name in outputs}
        self._check_tables()
        values = compute(
            member,
            first,
            given,
            tuple(dict.fromkeys(wanted.values())),
            rows=rows,
            weights=self._loader,
            sessions=self._skeleton,
            durations=self._durations if rows else None,
        )
        return {output: values[value].numpy() for output, value in wanted.items()}

    def _check_tables(self) -> None:
        """Tables that are paged in on demand are hashed before their first use."""
        while self._unchecked_tables:
            self._source.check(self._unchecked_tables[-1])
            self._unchecked_tables.pop()

    def _after_run(self, rows: int) -> None:
        cached = sum(self._objects[name].cached_bytes() for name in self._tables)
        if cached > self._table_bytes:
            for name in self._tables:
                self._objects[name].drop(page_cache=not self._settings.keep_page_cache)
        self._runs += 1
        if self._runs in (1, 2, 4, 8) or self._runs % _REPLAN_RUNS == 0:
            self._replan(rows)

    def _replan(self, rows: int) -> None:
        """Pins what is best by what has been measured so far."""
        limit = self._limit_bytes()
        assert limit is not None
        self.plan = choose(
            [sum(self._page_sizes()[name] for name in names) for names in self._needs],
            self._durations.at(rows),
            limit_bytes=limit,
            rate_bytes_s=self._loader.rate() or _DEFAULT_RATE_BYTES_S,
        )
        self._loader.pin(self.plan.pinned, limit)

    def _limit_bytes(self) -> int | None:
        """For blocks; what is left of the budget is for rows of tables. Raises PoolError."""
        budget = self._budget_bytes
        if budget is None:
            return None
        self._table_bytes = int(budget * _TABLE_SHARE) if self._tables else 0
        limit = budget - self._table_bytes
        sizes = self._page_sizes()
        largest = max(sum(sizes[name] for name in names) for names in self._needs)
        if limit < largest:
            needed = largest / (1 - _TABLE_SHARE if self._tables else 1) / MIB
            raise PoolError(
                f"model {self.manifest.model!r}: memory_budget_mib {budget / MIB:g} is below "
                f"{needed:.1f}, what its largest block needs; raise it, or compile the model "
                f"with --budget-mib {budget / MIB:g}, which makes smaller blocks"
            )
        return limit

    def _page_sizes(self) -> Mapping[str, int]:
        return {name: pages(size) for name, size in self._sizes.items()}


def _loaded_objects(block: Block) -> tuple[str, ...]:
    """Objects that must be in memory for the block to compute: all but tables."""
    tables = {weight.object for weight in block.weights if weight.access == "rows"}
    names = dict.fromkeys(weight.object for weight in block.weights)
    return tuple(name for name in names if name not in tables)
