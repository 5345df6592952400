"""The thread that keeps a model's weights where its runs need them.

It performs what a `Window` decides, one step at a time, in turn with the other loads of the
machine; runs wait here for their blocks. Locking: `_changed` guards the window and is never held
while bytes move. A fetch that fails fails the runs that wait, and is tried again for the next run
after a back-off: a store that comes back is enough to heal a model.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from .held_turn import FreeTurns, HeldTurn, Turns
from .manifest import PoolError
from .mapping import MappedObject
from .source import Source
from .window import Span, Step, Window

FIRST_BACKOFF_S = 0.25
LONGEST_BACKOFF_S = 8.0


class LoadTurns(Turns, Protocol):
    """Permission to move bytes, shared by all loads of the machine."""

    def moved(self, size_bytes: int) -> None:
        """So many bytes are there that took no turn."""


class Loader:
    """Weights of one model in this process. Every public method may be called by any thread."""

    def __init__(
        self,
        window: Window,
        objects: Mapping[str, MappedObject],
        source: Source,
        *,
        turns: LoadTurns | None = None,
        keep_page_cache: bool = False,
        on_drop: Callable[[], None] | None = None,
    ) -> None:
        self._window = window
        self._objects = objects
        self._source = source
        self._turns = turns or FreeTurns()
        self._turn = HeldTurn(self._turns, self.waited_for)
        self._keep_page_cache = keep_page_cache
        self._on_drop = on_drop
        self._changed = threading.Condition()
        self._error: PoolError | None = None
        self._backoff_s = FIRST_BACKOFF_S
        self._retry_at_s = 0.0
        self._closed = False
        self._dropping = False
        self._following: Step | None = None
        """What was asked for ahead of its turn."""
        self._found_bytes = 0
        self._peak_bytes = 0
        self._moved_bytes = 0
        self._moving_s = 0.0
        self._stalled_s = 0.0
        # Within a budget the next step may drop what this one fetched: one after the other.
        self._in_turn = not window.unlimited
        self._thread = threading.Thread(target=self._work, name="blocks-loader", daemon=True)

    @property
    def error(self) -> PoolError | None:
        """Why the last fetch failed; None once one succeeded."""
        return self._error

    @property
    def peak_bytes(self) -> int:
        """Most bytes of weights that were held at once, tables that are paged aside."""
        return self._peak_bytes

    @property
    def moved_bytes(self) -> int:
        """All bytes swapped in so far."""
        return self._moved_bytes

    @property
    def stalled_s(self) -> float:
        """How long runs have waited for weights so far."""
        return self._stalled_s

    def rate(self) -> float | None:
        """Bytes a second that swapping in has reached; None before the first 8 MiB."""
        with self._changed:
            if self._moved_bytes < 8 * 2**20 or self._moving_s <= 0:
                return None
            return self._moved_bytes / self._moving_s

    def start(self) -> None:
        """Begins to load what the window wants."""
        self._thread.start()

    def pin(self, pinned: Iterable[int], limit_bytes: int | None) -> None:
        """See `Window.pin`."""
        with self._changed:
            self._window.pin(pinned, limit_bytes)
            self._changed.notify_all()

    @property
    def held_bytes(self) -> int:
        with self._changed:
            return self._window.held_bytes

    def wait_within_limit(self) -> None:
        """Until no more is held than the limit that `pin` has set."""

        def within() -> bool:
            return not self._dropping and self._window.within_limit

        with self._changed:  # no longer than a back-off: an error is for the run to meet
            self._changed.wait_for(lambda: within() or self._error or self._closed)

    def begin(self, order: Sequence[int]) -> int:
        """A run that needs these blocks; `end` it in any case."""
        with self._changed:
            run = self._window.begin(order)
            self._changed.notify_all()
            return run

    def take(self, run: int, candidates: Sequence[int]) -> int:
        """Waits until one of the blocks is in memory; the first that is, marked as computing.

        Raises PoolError when the weights cannot be had.
        """
        began_s = time.perf_counter()
        with self._changed:
            try:
                while True:
                    for block in candidates:
                        if self._window.ready(block):
                            self._window.start(run, block)
                            return block
                    if self._closed:
                        raise PoolError("the model is being unloaded")
                    if self._error is not None and time.monotonic() < self._retry_at_s:
                        raise self._error
                    self._changed.wait()
            finally:
                self._stalled_s += time.perf_counter() - began_s

    def finish(self, run: int, block: int) -> None:
        with self._changed:
            self._window.finish(run, block)
            self._changed.notify_all()

    def end(self, run: int) -> None:
        with self._changed:
            self._window.end(run)
            self._changed.notify_all()

    def lose(self, names: Iterable[str]) -> None:
        """These objects are not what they were: they are fetched, so checked, again before another
        run takes a block that needs them.
        """
        with self._changed:
            for name in names:
                self._objects[name].found_changed()  # before anybody can begin to fetch it
                self._lose(name)
            self._changed.notify_all()

    def waited_for(self) -> bool:
        """Whether a run waits for weights."""
        with self._changed:
            return self._window.waited_for

    def wait_complete(self, timeout_s: float) -> bool:
        """Whether everything is in memory within that time. Raises PoolError if it cannot be."""
        with self._changed:
            self._changed.wait_for(lambda: self._window.complete or self._error, timeout_s)
            if self._error is not None:
                raise self._error
            return self._window.complete

    def close(self) -> None:
        """Ends the thread; runs that wait fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                step = None if self._closed else self._ready_step()
            if step is None:
                self._turn.end()  # nobody else waits for one that is idle
                self._tell_found()
                with self._changed:
                    step = self._next_step()
            if step is None:
                return
            self._perform(step)
            if self._on_drop is not None and step.drop and not step.fetch:
                self._on_drop()

    def _next_step(self) -> Step | None:
        """Waits for one; None when closed."""
        while not self._closed:
            pause_s = self._retry_at_s - time.monotonic() if self._error is not None else 0.0
            if pause_s > 0:
                self._changed.wait(pause_s)
                continue
            step = self._ready_step()
            if step is not None:
                return step
            self._changed.wait()
        return None

    def _ready_step(self) -> Step | None:
        """What can be done at once."""
        if self._error is not None and time.monotonic() < self._retry_at_s:
            return None
        step, self._following = self._following, None
        if step is None:
            step = self._window.next_step()
        self._dropping = step is not None and bool(step.drop)
        self._peak_bytes = max(self._peak_bytes, self._window.held_bytes)
        return step

    def _perform(self, step: Step) -> None:
        for name in step.drop:
            with contextlib.suppress(OSError):  # then they stay for the kernel to drop
                self._objects[name].drop(page_cache=not self._keep_page_cache)
        if step.drop:
            with self._changed:
                self._dropping = False
                self._changed.notify_all()
        if not step.fetch:
            return
        moved = 0
        began_s = time.perf_counter()
        try:
            later: tuple[Span, ...] = ()
            for number, span in enumerate(step.fetch, 1):
                if not self._turn.held and self._source.takes_turn(span):
                    asked_s = time.perf_counter()
                    self._turn.begin()
                    began_s += time.perf_counter() - asked_s
                if self._turn.held:
                    later = later or self._fetched_next()
                self._source.expect((*step.fetch[number:], *later))
                self._source.fetch(span, self._turn.without)
                moved += span.size_bytes
                if self._turn.held:
                    self._turn.used(span.size_bytes)
                else:
                    self._found_bytes += span.size_bytes
                with self._changed:
                    self._window.fetched(span)
                    self._error, self._backoff_s = None, FIRST_BACKOFF_S
                    self._changed.notify_all()
        except Exception as error:  # a thread that died would leave runs waiting for ever
            self._fail(step.fetch, error)
        finally:
            now_s = time.perf_counter()
            with self._changed:
                self._moved_bytes += moved
                self._moving_s += now_s - began_s
            self._turn.end_if_due()

    def _fetched_next(self) -> tuple[Span, ...]:
        """What the step after this one will fetch, if it can be asked for before its turn.

        A link that waits for the next request at the end of every turn is idle for as long. But
        what is on its way cannot be overtaken: so only while there is nobody to give a turn to.
        """
        if self._in_turn or not self._turn.alone or not self._source.distant:
            return ()
        with self._changed:
            self._following = self._window.next_step()
            return () if self._following is None else self._following.fetch

    def _tell_found(self) -> None:
        if self._found_bytes:
            with contextlib.suppress(PoolError, OSError):  # of use to who divides links, no more
                self._turns.moved(self._found_bytes)
            self._found_bytes = 0

    def _fail(self, spans: Sequence[Span], error: Exception) -> None:
        wrong = error if isinstance(error, PoolError) else PoolError(f"weights: {error!r}")
        with self._changed:
            following, self._following = self._following, None
            spans = (*spans, *(following.fetch if following is not None else ()))
            for span in spans:
                if not self._window.holds(span.name):
                    self._lose(span.name)
            self._error = wrong
            self._retry_at_s = time.monotonic() + self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, LONGEST_BACKOFF_S)
            self._changed.notify_all()

    def _lose(self, name: str) -> None:
        self._window.lost(name)
        # Within a budget it would count: what is fetched again comes from the store.
        counts = self._in_turn and not self._keep_page_cache
        with contextlib.suppress(OSError, PoolError):  # there is nothing of one that is not open
            opened = self._objects[name]
            if opened.right is not None and opened.look()[:2] != opened.right[:2]:
                opened.found_changed()
            opened.drop(page_cache=counts)
