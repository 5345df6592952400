"""The threads that keep a model's weights where its runs need them.

They perform what a `Window` decides, one step at a time, in turn with the other loads of the
machine; runs wait here for their blocks. Within a budget a thread of its own makes room for the
next step while this one's bytes come: to drop 300 MiB takes 60 to 90 ms, in which the disk would
have nothing to do. Locking: `_changed` guards the window and is never held
while bytes move. An object that cannot be had is put aside, and the others are fetched meanwhile: a
run whose branches are parallel computes what it can. It is tried again; if it fails in a way that
does not pass, or too often, it fails the runs that have nothing else to compute, and is still tried
again after a back-off: a store that comes back is enough to heal a model.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from .held_turn import FreeTurns, HeldTurn, Turns
from .manifest import PoolError
from .mapping import MappedObject
from .source import Later, Source
from .window import Span, Step, Window

ATTEMPTS = 5
"""In a row, until a failure that may pass is told."""
FIRST_PAUSE_S = 0.1
"""Between those, at most; doubles from one to the next."""
SLOW_S = 1.0
"""An attempt that failed after so long is not made again while there is something else to fetch."""
FIRST_BACKOFF_S = 0.25
LONGEST_BACKOFF_S = 8.0


class LoadTurns(Turns, Protocol):
    """Permission to move bytes, shared by all loads of the machine."""

    def moved(self, size_bytes: int) -> None:
        """So many bytes are there that took no turn."""


@dataclass(slots=True)
class _Aside:
    """An object that could not be had. `error` is told until `retry_at_s`, and then again."""

    failures: int = 0
    slow: bool = False
    retry_at_s: float = 0.0
    backoff_s: float = 0.0
    error: PoolError | None = None

    def failed(self, error: PoolError, took_s: float) -> None:
        self.failures += 1
        self.slow = took_s >= SLOW_S
        if isinstance(error, Later) and self.failures < ATTEMPTS:
            # Many that failed together shall not come back together.
            pause_s = FIRST_PAUSE_S * 2 ** (self.failures - 1) * random.uniform(0.5, 1.0)
        else:
            passing = isinstance(error, Later)
            self.error = PoolError(f"{error}, {self.failures} times in a row") if passing else error
            self.backoff_s = min(2 * self.backoff_s or FIRST_BACKOFF_S, LONGEST_BACKOFF_S)
            pause_s = self.backoff_s
        self.retry_at_s = time.monotonic() + pause_s


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
        self._aside: dict[str, _Aside] = {}
        self._closed = False
        self._dropping = False
        self._following: Step | None = None
        """What comes after the step that is performed, if that was decided already."""
        self._found_bytes = 0
        self._peak_bytes = 0
        self._moved_bytes = 0
        self._moving_s = 0.0
        self._stalled_s = 0.0
        self._limited = not window.unlimited
        self._thread = threading.Thread(target=self._work, name="blocks-loader", daemon=True)
        self._room_thread = threading.Thread(
            target=self._make_room, name="blocks-room", daemon=True
        )

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
        if self._limited:
            self._room_thread.start()
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

        with self._changed:
            self._changed.wait_for(lambda: within() or self._closed)

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
                    errors = [self._told(self._window.needs(block)) for block in candidates]
                    if errors[0] is not None and None not in errors:
                        raise errors[0]
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
        """See `Window.waited_for`."""
        with self._changed:
            return self._window.waited_for

    def wait_complete(self, timeout_s: float) -> bool:
        """Whether everything is in memory within that time. Raises PoolError if it cannot be."""
        with self._changed:
            error = None

            def settled() -> bool:
                nonlocal error
                error = self._told(self._aside)
                return error is not None or self._window.complete

            self._changed.wait_for(settled, timeout_s)
            if error is not None:
                raise error
            return self._window.complete

    def close(self) -> None:
        """Ends the threads; runs that wait fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in (self._thread, self._room_thread):
            if thread.is_alive():
                thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or not self._dropping)
                step = None if self._closed else self._ready_step()
            if step is None:
                self._turn.end()  # nobody else waits for one that is idle
                self._tell_found()
                with self._changed:
                    step = self._wait_for(self._ready_step)
            if step is None:
                return
            self._perform(step)

    def _make_room(self) -> None:
        """Decides on the next step as soon as there is none, and drops what it says."""
        while True:
            with self._changed:
                step = self._wait_for(self._step_ahead)
                if step is None:
                    return
                self._following, self._dropping = step, bool(step.drop)
            for name in step.drop:
                with contextlib.suppress(OSError):  # then they stay for the kernel to drop
                    self._objects[name].drop(page_cache=not self._keep_page_cache)
            with self._changed:
                self._dropping = False
                if not step.fetch:
                    self._following = None
                self._changed.notify_all()
            if self._on_drop is not None and not step.fetch:
                self._on_drop()

    def _wait_for(self, ready: Callable[[], Step | None]) -> Step | None:
        """A step, as soon as there is one; None when closed."""
        while not self._closed:
            step = ready()
            if step is not None:
                return step
            now_s = time.monotonic()
            pauses = [one.retry_at_s - now_s for one in self._aside.values()]
            self._changed.wait(min((pause_s for pause_s in pauses if pause_s > 0), default=None))
        return None

    def _ready_step(self) -> Step | None:
        """What can be fetched at once."""
        if self._dropping:
            return None  # there is no room yet
        step, self._following = self._following, None
        if not self._limited:
            return step if step is not None else self._next_of_window()
        if step is not None:
            self._changed.notify_all()  # the next one can be decided
        return step

    def _step_ahead(self) -> Step | None:
        return None if self._following is not None else self._next_of_window()

    def _perform(self, step: Step) -> None:
        moved = 0
        began_s = time.perf_counter()
        try:
            later: tuple[Span, ...] = ()
            number, span_s = 0, began_s
            for number, span in enumerate(step.fetch, 1):
                if self._turn.over and (number == 1 or not self._turn.held):
                    asked_s = time.perf_counter()
                    if self._source.takes_turn(span):
                        self._turn.begin()
                    else:
                        self._turn.end()
                    began_s += time.perf_counter() - asked_s
                if self._turn.held:
                    later = later or self._fetched_next()
                self._source.expect((*step.fetch[number:], *later))
                before = self._aside.get(span.name)
                patient = before is not None and before.slow
                span_s = time.perf_counter()
                self._source.fetch(span, self._turn.without, patient=patient)
                moved += span.size_bytes
                if self._turn.held:
                    self._turn.used(span.size_bytes)
                else:
                    self._found_bytes += span.size_bytes
                with self._changed:
                    self._window.fetched(span)
                    if span.last or (before is not None and before.error is None):
                        self._aside.pop(span.name, None)
                    self._changed.notify_all()
        except Exception as error:  # a thread that died would leave runs waiting for ever
            self._fail(step.fetch[number - 1 :], error, time.perf_counter() - span_s)
        finally:
            now_s = time.perf_counter()
            with self._changed:
                self._moved_bytes += moved
                self._moving_s += now_s - began_s

    def _fetched_next(self) -> tuple[Span, ...]:
        """What the step after this one will fetch, if it can be asked for before its turn.

        A link that waits for the next request at the end of every turn is idle for as long. But
        what is on its way cannot be overtaken: so only while there is nobody to give a turn to.
        """
        if not self._turn.alone:
            return ()
        with self._changed:
            if not self._limited and self._source.distant:
                self._following = self._next_of_window()
            return () if self._following is None or self._dropping else self._following.fetch

    def _tell_found(self) -> None:
        if self._found_bytes:
            with contextlib.suppress(PoolError, OSError):  # of use to who divides links, no more
                self._turns.moved(self._found_bytes)
            self._found_bytes = 0

    def _fail(self, spans: Sequence[Span], error: Exception, took_s: float) -> None:
        """The first of them could not be fetched, the others were not tried."""
        wrong = error if isinstance(error, PoolError) else PoolError(f"weights: {error!r}")
        name = spans[0].name
        with self._changed:
            following, self._following = self._following, None
            for span in reversed((*spans, *(following.fetch if following is not None else ()))):
                self._window.unfetched(span)
            if not isinstance(wrong, Later):
                self._lose(name)
            self._aside.setdefault(name, _Aside()).failed(wrong, took_s)
            self._changed.notify_all()

    def _next_of_window(self) -> Step | None:
        now_s = time.monotonic()
        aside = {name: now_s < one.retry_at_s for name, one in self._aside.items()}
        slow = [name for name, one in self._aside.items() if aside[name] or one.slow]
        step = self._window.next_step(slow)
        if step is None and slow:
            step = self._window.next_step([name for name in slow if aside[name]])
        self._peak_bytes = max(self._peak_bytes, self._window.held_bytes)
        return step

    def _told(self, names: Iterable[str]) -> PoolError | None:
        """Why one of these cannot be had, if that is to be told."""
        now_s = time.monotonic()
        for name in names:
            one = self._aside.get(name)
            if one is not None and one.error is not None and now_s < one.retry_at_s:
                return one.error
        return None

    def _lose(self, name: str) -> None:
        self._window.lost(name)
        # Within a budget it would count: what is fetched again comes from the store.
        counts = self._limited and not self._keep_page_cache
        with contextlib.suppress(OSError, PoolError):  # there is nothing of one that is not open
            opened = self._objects[name]
            if opened.right is not None and opened.look()[:2] != opened.right[:2]:
                opened.found_changed()
            opened.drop(page_cache=counts)
