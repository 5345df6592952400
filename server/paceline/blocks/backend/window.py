"""Which weights to fetch and to drop next, for runs that need blocks in a known order.

A `Window` knows what is in memory, what the runs under way still need and, while none is under
way, that the next one will look like the last. It fetches strictly in the order of need, and drops
only what is needed later than what it fetches, so that the block a run waits for always comes
first. Of several runs that wait the earliest comes first, and may take the others' room: so one of
them always goes on, whatever the limit. Pinned blocks stay. No I/O, no clock: the loader performs
what `next_step` says, one step at a time. Section 3 of the papers' digest (SwapNet: prefetch,
swap-out by reference).

Invariant: the bytes in memory never exceed the limit, except that after the limit was lowered what
is being computed is not taken away, and that a block larger than the limit could never run (the
caller refuses such a limit).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

CHUNK_BYTES = 8 * 2**20
"""Most bytes of one step: what an urgent load waits for, and what an eviction lags behind."""
_NEVER = 1 << 60


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of an object; `last` if they complete it."""

    name: str
    offset: int
    size_bytes: int
    last: bool


@dataclass(frozen=True, slots=True)
class Step:
    """Drop these objects, then fetch these spans, in this order."""

    drop: tuple[str, ...] = ()
    fetch: tuple[Span, ...] = ()


@dataclass(slots=True)
class _Run:
    """Blocks still to be computed, and those being computed now."""

    rest: list[int]
    active: set[int] = field(default_factory=set)


class Window:
    """`blocks[i]` are the objects that block `i` needs; `sizes` the objects' bytes."""

    def __init__(
        self,
        blocks: Sequence[Sequence[str]],
        sizes: Mapping[str, int],
        *,
        limit_bytes: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._blocks = tuple(tuple(dict.fromkeys(names)) for names in blocks)
        self._sizes = sizes
        self._limit_bytes = limit_bytes
        self._chunk_bytes = chunk_bytes
        self._have: dict[str, int] = {}  # bytes fetched or being fetched
        self._ready: set[str] = set()
        self._coming: list[Span] = []
        """Of steps that were told; each is a span of its own, though another may be equal."""
        self._pinned: frozenset[int] = frozenset(range(len(blocks)) if limit_bytes is None else ())
        self._pinned_objects = self._objects(self._pinned)
        self._runs: dict[int, _Run] = {}
        self._next_run = 0
        self._expected: tuple[int, ...] = tuple(range(len(blocks)))

    @property
    def held_bytes(self) -> int:
        """What is in memory or on its way there."""
        return sum(self._have.values())

    @property
    def within_limit(self) -> bool:
        """Whether no more is held than may be; for a moment not, when the limit was lowered."""
        return self._limit_bytes is None or self.held_bytes <= self._limit_bytes

    @property
    def unlimited(self) -> bool:
        """Whether nothing is ever dropped."""
        return self._limit_bytes is None

    @property
    def complete(self) -> bool:
        """Whether everything that a model without limit needs is in memory."""
        return all(name in self._ready for names in self._blocks for name in names)

    @property
    def waited_for(self) -> bool:
        """Whether a run is under way that needs weights which are not there: it waits for them, or
        will when it has computed what it can.
        """
        return any(not self.ready(block) for run in self._runs.values() for block in run.rest)

    def ready(self, block: int) -> bool:
        """Whether everything that the block needs is in memory."""
        return all(name in self._ready for name in self._blocks[block])

    def needs(self, block: int) -> Sequence[str]:
        """The objects that the block needs."""
        return self._blocks[block]

    def holds(self, name: str) -> bool:
        """Whether the whole object is in memory."""
        return name in self._ready

    def pin(self, pinned: Iterable[int], limit_bytes: int | None) -> None:
        """The blocks that stay from now on, and the most bytes that may be held."""
        self._pinned = frozenset(pinned)
        self._pinned_objects = self._objects(self._pinned)
        self._limit_bytes = limit_bytes

    def begin(self, order: Sequence[int]) -> int:
        """A run that will compute these blocks in about this order; its number."""
        number, self._next_run = self._next_run, self._next_run + 1
        self._runs[number] = _Run(list(order))
        self._expected = tuple(order)
        return number

    def start(self, run: int, block: int) -> None:
        """The run computes a block now, which must be `ready`."""
        assert self.ready(block), (run, block, sorted(self._have))
        self._runs[run].active.add(block)

    def finish(self, run: int, block: int) -> None:
        """The run has computed the block."""
        self._runs[run].active.discard(block)
        self._runs[run].rest.remove(block)

    def end(self, run: int) -> None:
        """The run is over, computed or failed."""
        del self._runs[run]

    def fetched(self, span: Span) -> None:
        """A span of a step is in memory; the last of an object: and was checked."""
        # What was lost on its way may be on its way again: this one says nothing of that.
        if self._has_come(span) and span.last and self._have[span.name] == self._sizes[span.name]:
            self._ready.add(span.name)

    def unfetched(self, span: Span) -> None:
        """A span of a step was not fetched; what came of the object before stays.

        Of several the last one first.
        """
        if not self._has_come(span):
            return
        self._have[span.name] = min(span.offset, self._have.get(span.name, 0))
        if not self._have[span.name]:
            del self._have[span.name]

    def lost(self, name: str) -> None:
        """The object could not be fetched: nothing of it is in memory."""
        self._have.pop(name, None)
        self._ready.discard(name)
        self._coming = [span for span in self._coming if span.name != name]

    def next_step(self, aside: Collection[str] = ()) -> Step | None:
        """What to do now, None if nothing. Its spans count as held from here on.

        Objects that are `aside` are not fetched now, whoever needs them. What earlier steps fetch
        may still be on its way: it is not dropped.
        """
        step = self._step(aside)
        self._coming += step.fetch if step is not None else ()
        return step

    def _step(self, aside: Collection[str]) -> Step | None:
        distances = self._distances()
        drop: list[str] = []
        limit = _NEVER if self._limit_bytes is None else self._limit_bytes
        self._make_room(limit, -1, distances, drop)
        fetch: list[Span] = []
        planned = 0
        for name, distance in self._wanted(distances):
            if name in aside:
                continue
            size, have = self._sizes[name], self._have.get(name, 0)
            while have < size and planned < self._chunk_bytes:
                take = min(size - have, self._chunk_bytes - planned)
                if fetch and self.held_bytes + take > limit:
                    return Step(tuple(drop), tuple(fetch))  # room is made by a step of its own
                if not self._make_room(limit - take, distance, distances, drop):
                    return Step(tuple(drop), tuple(fetch)) if drop or fetch else None
                fetch.append(Span(name, have, take, have + take == size))
                have += take
                planned += take
                self._have[name] = have
            if planned >= self._chunk_bytes:
                break
        return Step(tuple(drop), tuple(fetch)) if drop or fetch else None

    def _make_room(
        self, limit: int, distance: int, distances: Mapping[str, int], drop: list[str]
    ) -> bool:
        """Drop what is needed later than `distance`, the latest first, until `limit` is kept.

        With a distance of -1 (a lowered limit) pinned objects go too, after all others.
        """
        held = self.held_bytes
        if held <= limit:
            return True
        busy = {
            name
            for run in self._runs.values()
            for block in run.active
            for name in self._blocks[block]
        }
        busy.update(span.name for span in self._coming)
        candidates = [
            (name in self._pinned_objects, -distances.get(name, _NEVER), name)
            for name in self._have
            if name not in busy
            and distances.get(name, _NEVER) > distance
            and (distance == -1 or name not in self._pinned_objects)
        ]
        candidates.sort()
        if distance >= 0:
            possible = sum(self._have[name] for _, _, name in candidates)
            if held - possible > limit:
                return False  # dropping some would not help
        for _, _, name in candidates:
            if held <= limit:
                break
            held -= self._have.pop(name)
            self._ready.discard(name)
            drop.append(name)
        return held <= limit

    def _has_come(self, span: Span) -> bool:
        """Whether it was on its way; it is not any more."""
        for position, coming in enumerate(self._coming):
            if coming is span:
                del self._coming[position]
                return True
        return False

    def _wanted(self, distances: Mapping[str, int]) -> list[tuple[str, int]]:
        """Objects that are not complete yet, by when they are needed."""
        return sorted(
            (
                (name, distance)
                for name, distance in distances.items()
                if self._have.get(name, 0) < self._sizes[name]
            ),
            key=lambda item: item[1],
        )

    def _distances(self) -> dict[str, int]:
        """When an object is needed, by object: a number that is higher for what is needed later.

        Runs under way come first, their blocks in turn by position; no two of them share a number,
        or each could wait for the room that the other one holds. Then comes what is expected next.
        """
        found: dict[str, int] = {}
        longest, runs = 0, len(self._runs) or 1
        for rank, run in enumerate(self._runs.values()):
            longest = max(longest, len(run.rest))
            for position, block in enumerate(run.rest):
                for name in self._blocks[block]:
                    found[name] = min(position * runs + rank, found.get(name, _NEVER))
        later = [*self._expected, *sorted(self._pinned.difference(self._expected))]
        for position, block in enumerate(later, longest * runs):
            for name in self._blocks[block]:
                found.setdefault(name, position)
        return found

    def _objects(self, blocks: Iterable[int]) -> frozenset[str]:
        return frozenset(name for block in blocks for name in self._blocks[block])
