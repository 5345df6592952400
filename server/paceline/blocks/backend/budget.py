"""Keeps a model within its memory budget: what is pinned, its share of a shared budget, its runs.

A thread of its own looks at it when a run count is reached, when the ledger's bell rings and, with
a shared budget, twice a second (loads shift also by ending); requests never wait for it. Of the
budget a part is for the activations of the largest batch so far (what memory a run has taken the
process keeps), a part for the rows of tables that are paged in on demand, the rest is the window's.

Runs begin in the order in which they come, beside others as long as all together find what they
need (`admission`). What they took beside weights is kept for the next ones until a look finds none
under way, or a shared budget is divided anew and leaves no room for it.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from .admission import Admission, Need
from .ledger import Bell, Ledger, ring
from .loader import Loader
from .manifest import PoolError
from .plan import Plan, choose
from .run import Durations
from .settings import MIB, Settings
from .shares import Claim

TABLE_SHARE = 1 / 16
_TOGETHER_SHARE = 1 / 2
"""Of a budget: what runs at the same time may take beside weights."""
_DEFAULT_RATE_BYTES_S = 1e9
"""Swap-in where nobody measured: what a local disk gives."""
_REPLAN_RUNS = 16
_REDIVIDE_S = 0.5
_LOAD_MEMORY_S = 5.0
"""Runs so long ago count 1/e of one just now."""
_CURVE_POINTS = 8


def budget_for(blocks_bytes: int, activations_bytes: int, *, tables: bool) -> int:
    """The least budget that holds so much of blocks, activations, and rows of tables if there are
    any.
    """
    return math.ceil(blocks_bytes / _blocks_share(tables)) + activations_bytes


def blocks_within(budget_bytes: int, activations_bytes: int, *, tables: bool) -> int:
    """What a budget leaves for blocks: the inverse of `budget_for`."""
    return int(max(budget_bytes - activations_bytes, 0) * _blocks_share(tables))


def _blocks_share(tables: bool) -> float:
    return 1 - TABLE_SHARE if tables else 1.0


class Budget:
    """Of one model in one process.

    `needs` are the bytes of each block, `activations` those beside weights by size of the batch, of
    whichever member takes most.
    `empty` empties the arena that these are in. `rate_bytes_s` is what swapping in is planned with
    until it was measured here.
    """

    def __init__(
        self,
        name: str,
        needs: Sequence[int],
        *,
        tables: bool,
        activations: Callable[[int], int],
        empty: Callable[[], None],
        rate_bytes_s: float | None,
        settings: Settings,
        ledger: Ledger,
        most: int = 1,
    ) -> None:
        """`most`: runs at the same time."""
        self._name = name
        self._needs = needs
        self._largest_bytes = max(needs, default=0)
        self._activations = activations
        self._empty = empty
        self._settings = settings
        self._ledger = ledger
        self._tables = tables
        self._rate_bytes_s = rate_bytes_s or _DEFAULT_RATE_BYTES_S
        self._most_rows = 1
        self._attending = threading.Lock()
        self._check(1)
        self._shared = settings.shared_budget_bytes is not None
        self._bytes = 0 if self._shared else settings.memory_budget_bytes or 0
        self._due_bytes = self._bytes
        """What the division of a shared budget says; less than what runs under way still hold."""
        self._admission = Admission(most)
        self._queue: deque[object] = deque()
        """Of runs that wait to begin; the first one makes itself room."""
        self._changed = threading.Condition()
        self._rows = 1
        self._runs = 0
        self._load = 0.0
        self._load_at_s = time.monotonic()
        self._lock = threading.Lock()
        self._closed = False
        self.plan: Plan | None = None
        self._thread = threading.Thread(target=self._work, name="blocks-budget", daemon=True)

    @property
    def bytes(self) -> int:
        """In force now."""
        return self._bytes

    @property
    def limit_bytes(self) -> int:
        """For blocks."""
        return blocks_within(self._bytes, self.activation_bytes, tables=self._tables)

    @property
    def activation_bytes(self) -> int:
        """For batches as large as the largest so far, as many at a time as there were."""
        return max(self._activations(self._most_rows), self._admission.beside_bytes)

    @property
    def table_bytes(self) -> int:
        """For rows of tables."""
        return max(self._bytes - self.activation_bytes, 0) - self.limit_bytes

    def start(self, loader: Loader, durations: Durations) -> None:
        """Plans, claims, and goes on doing so. Raises PoolError if a shared budget is too full."""
        self._loader = loader
        self._durations = durations
        self._join()
        self._attend()
        self._thread.start()

    def need(self, kind: Hashable, blocks: Iterable[int], rows: int, beside_bytes: int) -> Need:
        """Of a run that computes these blocks; see `Need`."""
        largest = max((self._needs[block] for block in blocks), default=0)
        return Need(kind, rows, largest, beside_bytes)

    @contextmanager
    def running(self, need: Need) -> Iterator[None]:
        """A run: waits until it may begin. Raises PoolError if there cannot be enough for it."""
        self._enter(need)
        try:
            yield
        finally:
            self._leave(need)
        self._ran(need.rows)

    def dropped(self) -> None:
        """Memory was given up; others may be waiting for it."""
        if self._shared:
            ring(self._ledger.bell.address)

    def close(self) -> None:
        self._closed = True
        ring(self._ledger.bell.address)
        if self._thread.is_alive():
            self._thread.join()

    def _enter(self, need: Need) -> None:
        turn = object()
        with self._changed:
            self._queue.append(turn)
            try:
                self._changed.wait_for(lambda: self._queue[0] is turn and self._may_begin(need))
                before = self.limit_bytes, self._beside_largest_bytes
                self._begin(need)
            except BaseException:
                self._queue.remove(turn)
                self._changed.notify_all()
                raise
        try:
            if (self.limit_bytes, self._beside_largest_bytes) != before:
                self._attend()
                self._loader.wait_within_limit()
        except BaseException:
            self._leave(need)
            raise
        finally:
            with self._changed:
                self._queue.popleft()
                self._changed.notify_all()

    def _leave(self, need: Need) -> None:
        with self._changed:
            self._admission.end(need)
            self._changed.notify_all()

    def _may_begin(self, need: Need) -> bool:
        if self._admission.idle:
            return True
        if self._admission.full or need.rows > self._most_rows:
            return False  # what makes the model keep room for larger batches does so alone
        blocks, beside = self._admission.with_one_more(need)
        blocks = max(blocks, self._admission.blocks_bytes, self._largest_bytes)
        beside = max(beside, self.activation_bytes)
        return (
            beside <= self._due_bytes * _TOGETHER_SHARE
            and budget_for(blocks, beside, tables=self._tables) <= self._due_bytes
        )

    def _begin(self, need: Need) -> None:
        """Makes room for what the batch needs beside weights. Raises PoolError if there is none."""
        if self._admission.idle:
            if need.rows > self._most_rows:
                self._grow(need.rows)
            if self._due_bytes < self._bytes:
                self._forget()  # others wait for what earlier runs have left here
            elif self._admission.with_one_more(need)[1] > self.activation_bytes:
                # What a run takes beside the leavings of others nobody could foresee.
                self._empty()
                self._admission.emptied()
        self._admission.begin(need)

    def _grow(self, rows: int) -> None:
        self._check(rows)
        before, self._most_rows = self._most_rows, rows
        try:
            self._join()
        except PoolError:
            self._most_rows = before
            raise

    def _forget(self) -> None:
        self._empty()
        self._admission.forget()

    @property
    def _beside_largest_bytes(self) -> int:
        """Room that pinned blocks leave for those of other runs than one."""
        return max(0, self._admission.blocks_bytes - self._largest_bytes)

    def _ran(self, rows: int) -> None:
        with self._lock:
            self._rows = rows
            self._runs += 1
            now_s = time.monotonic()
            self._load = self._decayed(now_s) + 1 / _LOAD_MEMORY_S
            self._load_at_s = now_s
            due = self._runs in (1, 2, 4, 8) or self._runs % _REPLAN_RUNS == 0
        if due:
            ring(self._ledger.bell.address)

    def _floor_bytes(self, rows: int) -> int:
        """The least that batches of `rows` run within."""
        return budget_for(self._largest_bytes, self._activations(rows), tables=self._tables)

    def _check(self, rows: int) -> None:
        floor, activations = self._floor_bytes(rows), self._activations(rows)
        settings = self._settings
        for key, budget in (
            ("memory_budget_mib", settings.memory_budget_bytes),
            ("shared_budget_mib", settings.shared_budget_bytes),
        ):
            if budget is None or budget >= floor:
                continue
            told = f"model {self._name!r}: {key} {budget / MIB:g} is below {floor / MIB:.1f}, what "
            if activations:
                told += f"its largest block and the activations of a batch of {rows} need"
            else:
                told += "its largest block needs"
            if rows > 1:
                raise PoolError(f"{told}; raise it, or send smaller batches")
            if budget <= activations:
                raise PoolError(f"{told}; raise it")
            raise PoolError(
                f"{told}; raise it, or compile the model with --budget-mib "
                f"{(budget - activations) / MIB:.3g}, which makes smaller blocks"
            )

    def _join(self) -> None:
        if self._shared:
            total = self._settings.shared_budget_bytes
            assert total is not None
            floor = self._floor_bytes(self._most_rows)
            self._ledger.join(self._settings.budget_group, total, floor)

    def _work(self) -> None:
        bell: Bell = self._ledger.bell
        while not self._closed:
            bell.wait(_REDIVIDE_S if self._shared else None)
            if self._closed:
                return
            try:
                self._attend()
            except (PoolError, OSError) as error:
                # The limits in force stay; the next look may succeed.
                print(f"paceline_blocks: {error}", file=sys.stderr, flush=True)

    def _attend(self) -> None:
        with self._attending:
            self._attend_alone()

    def _attend_alone(self) -> None:
        rows = self._rows
        claim = self._claim(rows) if self._shared else None
        with self._changed:  # nobody begins meanwhile: what is said here would not hold
            if self._admission.idle and not self._queue and self._admission.beside_bytes:
                self._forget()
            if claim is not None:
                self._exchange(claim)
            self._changed.notify_all()
        if self.limit_bytes < self._largest_bytes:
            self._loader.pin((), 0)  # until others have made room
            return
        self.plan = self._plan(self.limit_bytes, rows)
        self._loader.pin(self.plan.pinned, self.limit_bytes)

    def _exchange(self, claim: Claim) -> None:
        beside = self.activation_bytes
        held = max(self._loader.held_bytes, self.limit_bytes)
        held_bytes = budget_for(held, beside, tables=self._tables)
        held_bytes = min(held_bytes, max(self._bytes, held))
        needed_bytes = 0
        if beside > self._activations(self._most_rows):
            # What runs have taken together cannot be had back before they are over.
            blocks = max(self._admission.blocks_bytes, self._largest_bytes)
            needed_bytes = budget_for(blocks, beside, tables=self._tables)
        self._due_bytes = self._ledger.exchange(claim, max(held_bytes, needed_bytes))
        self._bytes = max(self._due_bytes, needed_bytes)

    def _claim(self, rows: int) -> Claim:
        beside, floor = self._activations(self._most_rows), self._floor_bytes(self._most_rows)
        everything = budget_for(sum(self._needs), beside, tables=self._tables)
        most = min(everything, self._settings.memory_budget_bytes or everything)
        step = max((most - floor) // _CURVE_POINTS, 1)
        sizes = [*range(floor, most, step)][:_CURVE_POINTS] or [floor]
        if most > sizes[-1]:
            sizes.append(most)
        curve = tuple(
            (size, self._plan(blocks_within(size, beside, tables=self._tables), rows).latency_s)
            for size in sizes
        )
        with self._lock:
            rate_rps = self._decayed(time.monotonic())
        return Claim(curve, rate_rps, 0.5 ** min(self._settings.priority, 6))

    def _plan(self, limit_bytes: int, rows: int) -> Plan:
        return choose(
            self._needs,
            self._durations.at(rows),
            limit_bytes=max(limit_bytes - self._beside_largest_bytes, self._largest_bytes),
            rate_bytes_s=self._loader.rate() or self._rate_bytes_s,
        )

    def _decayed(self, now_s: float) -> float:
        """Runs a second, the last ones counting most."""
        return float(self._load * math.exp((self._load_at_s - now_s) / _LOAD_MEMORY_S))
