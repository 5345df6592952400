"""A loader: what it asks for ahead, whose turn it leaves alone, when it makes room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import pytest

from paceline.blocks.backend import loader as loader_module
from paceline.blocks.backend.loader import Loader
from paceline.blocks.backend.manifest import PAGE_BYTES, Chunks, Manifest, PoolError, PoolObject
from paceline.blocks.backend.mapping import LazyObjects, MappedObject
from paceline.blocks.backend.source import Later, Waiting
from paceline.blocks.backend.window import Span, Window

TIMEOUT_S = 30.0
PAGES = {"a": 1, "b": 3, "c": 1, "d": 2, "e": 5}
CHUNK_PAGES = 2


class Link:
    """A `Source` that notes what is expected and fetched; some fetches fail, once each.

    Those of `late` spans fail as often as it says, in a way that may pass.
    """

    def __init__(
        self,
        distant: bool = True,
        failing: Sequence[Span] = (),
        late: Mapping[Span, int] | None = None,
    ) -> None:
        self.distant = distant
        self.fetched: list[Span] = []
        self.expected: list[tuple[Span, ...]] = []
        """Before each of those."""
        self.failing = list(failing)
        self.late = dict(late or {})
        self.patient: list[tuple[Span, bool]] = []
        self._now: tuple[Span, ...] = ()

    def expect(self, spans: Sequence[Span]) -> None:
        self._now = tuple(spans)

    def takes_turn(self, span: Span) -> bool:
        return True

    def fetch(self, span: Span, waiting: Waiting = nullcontext, *, patient: bool = True) -> None:
        self.patient.append((span, patient))
        if span in self.failing:
            self.failing.remove(span)
            raise PoolError("the link is down")
        if self.late.get(span, 0):
            self.late[span] -= 1
            raise Later("nothing came")
        self.fetched.append(span)
        self.expected.append(self._now)

    def manifest(self, digest: str) -> Manifest:
        raise NotImplementedError

    def open(self, stated: Mapping[str, PoolObject]) -> LazyObjects:
        raise NotImplementedError

    def find_graphs(self, stated: Mapping[str, PoolObject]) -> None:
        raise NotImplementedError

    def graph(self, digest: str, stated: PoolObject, waiting: Waiting = nullcontext) -> bytes:
        raise NotImplementedError

    @property
    def graphs(self) -> Path:
        raise NotImplementedError

    def check(self, digest: str) -> None: ...

    @property
    def by_parts(self) -> Mapping[str, Chunks]:
        return {}

    def check_part(self, digest: str, wanted: object) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


class Turns:
    """`alone` or not, all turns are had at once."""

    def __init__(self, alone: bool) -> None:
        self._alone = alone

    def begin(self, urgent: Callable[[], bool]) -> bool:
        return self._alone

    def renew(self, amount: float, urgent: Callable[[], bool]) -> bool:
        return self._alone

    def end(self, amount: float) -> None: ...

    def moved(self, size_bytes: int) -> None: ...


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[Mapping[str, MappedObject]]:
    made = {}
    for name, pages in PAGES.items():
        (tmp_path / name).write_bytes(bytes(pages * PAGE_BYTES))
        made[name] = MappedObject(tmp_path / name, pages * PAGE_BYTES)
    yield made
    for each in made.values():
        each.close()


def run_through(loader: Loader, blocks: range) -> None:
    """A run of all blocks, each asked for again until it is there; then the loader is closed."""
    run = loader.begin(blocks)
    try:
        for block in blocks:
            while True:
                try:
                    assert loader.take(run, [block]) == block
                    break
                except PoolError:
                    continue
            loader.finish(run, block)
    finally:
        loader.end(run)
        loader.close()


def loaded(
    objects: Mapping[str, MappedObject],
    link: Link,
    *,
    alone: bool = True,
    limit_bytes: int | None = None,
) -> None:
    """Everything, one block an object."""
    sizes = {name: pages * PAGE_BYTES for name, pages in PAGES.items()}
    window = Window(
        [[name] for name in PAGES],
        sizes,
        limit_bytes=limit_bytes,
        chunk_bytes=CHUNK_PAGES * PAGE_BYTES,
    )
    loader = Loader(window, objects, link, turns=Turns(alone))
    loader.start()
    run_through(loader, range(len(PAGES)))


def test_the_next_steps_spans_are_expected_with_this_ones(
    objects: Mapping[str, MappedObject],
) -> None:
    """So the link has always something to do: at no span but the last is nothing expected."""
    link = Link()
    loaded(objects, link)
    assert sum(span.size_bytes for span in link.fetched) == sum(PAGES.values()) * PAGE_BYTES
    for number, span in enumerate(link.fetched[1:]):
        assert link.expected[number][0] == span
    assert link.expected[-1] == ()
    # One step ahead and no more: what is on its way cannot be overtaken.
    most = max(sum(span.size_bytes for span in spans) for spans in link.expected)
    assert most <= 2 * CHUNK_PAGES * PAGE_BYTES


@pytest.mark.parametrize(
    ("distant", "alone", "limited"),
    [(True, False, False), (False, True, False), (False, False, True)],
    ids=["others load, too", "a disk", "others load, and a budget"],
)
def test_nothing_is_asked_for_beyond_a_turn_that_somebody_else_may_get_next(
    objects: Mapping[str, MappedObject], distant: bool, alone: bool, limited: bool
) -> None:
    """Nor where it gains nothing."""
    link = Link(distant)
    limit = max(PAGES.values()) * PAGE_BYTES if limited else None
    loaded(objects, link, alone=alone, limit_bytes=limit)
    left = 0
    for span, after in zip(link.fetched, link.expected, strict=True):
        within = sum(later.size_bytes for later in after)
        if not left:
            left = span.size_bytes + within
            assert left <= CHUNK_PAGES * PAGE_BYTES
        left -= span.size_bytes
        assert within == left


@pytest.mark.parametrize(
    "failing", [Span("a", 0, PAGE_BYTES, True), Span("e", 0, PAGE_BYTES, False)]
)
def test_what_was_expected_when_a_fetch_failed_comes_from_its_start(
    objects: Mapping[str, MappedObject], failing: Span, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "FIRST_BACKOFF_S", 0.001)
    link = Link(failing=[failing])
    loaded(objects, link)
    assert not link.failing
    for name, pages in PAGES.items():
        mine = [span for span in link.fetched if span.name == name]
        start = max(number for number, span in enumerate(mine) if span.offset == 0)
        assert sum(span.size_bytes for span in mine[start:]) == pages * PAGE_BYTES
        assert mine[-1].last


def test_an_object_that_cannot_be_opened_fails_who_waits_and_is_tried_again(
    objects: Mapping[str, MappedObject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk of a cache is full, say, when its file is made: there is nothing to be dropped."""
    monkeypatch.setattr(loader_module, "FIRST_BACKOFF_S", 0.001)
    full = True

    def opener(name: str, size_bytes: int) -> MappedObject:
        if full and name == "b":
            raise PoolError("cache: No space left on device")
        return objects[name]

    stated = {name: PoolObject(pages * PAGE_BYTES, "") for name, pages in PAGES.items()}
    opened = LazyObjects(stated, opener)

    class Opening(Link):
        def fetch(
            self, span: Span, waiting: Waiting = nullcontext, *, patient: bool = True
        ) -> None:
            assert opened[span.name].size_bytes
            super().fetch(span, waiting, patient=patient)

    window = Window([[name] for name in PAGES], {n: one.size_bytes for n, one in stated.items()})
    loader = Loader(window, opened, Opening())
    loader.start()
    run = loader.begin([1])
    try:
        with pytest.raises(PoolError, match="No space left on device"):
            loader.take(run, [1])
        full = False
        while True:
            try:
                assert loader.take(run, [1]) == 1
                break
            except PoolError:
                continue
    finally:
        loader.close()


def started(objects: Mapping[str, MappedObject], link: Link) -> Loader:
    sizes = {name: pages * PAGE_BYTES for name, pages in PAGES.items()}
    window = Window([[name] for name in PAGES], sizes, chunk_bytes=CHUNK_PAGES * PAGE_BYTES)
    loader = Loader(window, objects, link)
    loader.start()
    return loader


def test_others_are_fetched_while_an_object_is_tried_again(
    objects: Mapping[str, MappedObject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From where it failed; a run that can computes another block first."""
    monkeypatch.setattr(loader_module, "FIRST_PAUSE_S", 0.2)
    stuck = Span("b", PAGE_BYTES, 2 * PAGE_BYTES, True)
    link = Link(late={stuck: 2})
    loader = started(objects, link)
    run = loader.begin(range(len(PAGES)))
    try:
        taken = []
        left = list(range(len(PAGES)))
        while left:
            taken.append(loader.take(run, left))
            loader.finish(run, taken[-1])
            left.remove(taken[-1])
    finally:
        loader.end(run)
        loader.close()
    assert taken == [0, 2, 3, 4, 1]
    assert link.fetched[-1] == stuck and link.fetched.count(Span("b", 0, PAGE_BYTES, False)) == 1
    assert [patient for span, patient in link.patient if span == stuck] == [False] * 3
    assert sum(span.size_bytes for span in link.fetched) == sum(PAGES.values()) * PAGE_BYTES


def test_an_object_that_is_slow_comes_when_the_others_are_there(
    objects: Mapping[str, MappedObject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then there is all the patience for it, which would have kept them waiting."""
    monkeypatch.setattr(loader_module, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(loader_module, "SLOW_S", 0.0)
    stuck = Span("a", 0, PAGE_BYTES, True)
    link = Link(late={stuck: 1})
    loader = started(objects, link)
    try:
        assert loader.wait_complete(TIMEOUT_S)
    finally:
        loader.close()
    assert [span.name for span in link.fetched][-1] == "a"
    assert [patient for span, patient in link.patient if span == stuck] == [False, True]


def test_an_object_that_fails_too_often_fails_the_runs_that_need_it_and_no_others(
    objects: Mapping[str, MappedObject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(loader_module, "FIRST_BACKOFF_S", 0.001)
    firsts = [Span("b", 0, pages * PAGE_BYTES, False) for pages in (1, 2)]
    link = Link(late=dict.fromkeys(firsts, 1 << 30))
    loader = started(objects, link)
    runs = [loader.begin([1, 2]), loader.begin([2])]
    try:
        with pytest.raises(PoolError, match=r"nothing came, \d+ times in a row"):
            loader.take(runs[0], [1])
        with pytest.raises(PoolError, match=r"nothing came, \d+ times in a row"):
            loader.wait_complete(TIMEOUT_S)
        assert loader.take(runs[1], [2]) == 2
        assert loader.take(runs[0], [1, 2]) == 2, "there is something else to compute"
        loader.finish(runs[0], 2)
        link.late.clear()
        while not loader._window.ready(1):  # after a back-off
            threading.Event().wait(0.01)
        assert loader.take(runs[0], [1]) == 1 and loader.wait_complete(TIMEOUT_S)
    finally:
        loader.close()


class Memory:
    """What is in memory of objects of one page each: `Link.fetch` brings it, a drop takes it.

    Whoever waits for a drop has `dropped`; `keep` holds drops up.
    """

    def __init__(self, objects: Mapping[str, MappedObject]) -> None:
        self.held: set[str] = set()
        self.most = 0
        self.dropped = {name: threading.Event() for name in objects}
        self.keep = threading.Event()
        self.keep.set()
        self._objects = objects

    def __getitem__(self, name: str) -> Memory.Object:
        return Memory.Object(self, name)

    def came(self, name: str) -> None:
        self.held.add(name)
        self.most = max(self.most, len(self.held))

    class Object:
        right = None

        def __init__(self, memory: Memory, name: str) -> None:
            self._memory = memory
            self._name = name

        def drop(self, *, page_cache: bool) -> None:
            assert self._memory.keep.wait(TIMEOUT_S)
            self._memory.held.discard(self._name)
            self._memory.dropped[self._name].set()


class Budgeted(Link):
    """Fetches into a `Memory`; in the middle of fetching `during` it waits for a drop."""

    def __init__(self, memory: Memory, during: str = "", wanted: str = "") -> None:
        super().__init__(distant=False)
        self._memory = memory
        self._during = during
        self._wanted = wanted

    def fetch(self, span: Span, waiting: Waiting = nullcontext, *, patient: bool = True) -> None:
        self._memory.came(span.name)
        if span.name == self._during:
            assert self._memory.dropped[self._wanted].wait(TIMEOUT_S)
        super().fetch(span, waiting, patient=patient)


def within(memory: Memory, link: Link, pages: int) -> Loader:
    """Of objects a, b, c, d of one page, a block each."""
    window = Window(
        [[name] for name in "abcd"],
        dict.fromkeys("abcd", PAGE_BYTES),
        limit_bytes=pages * PAGE_BYTES,
        chunk_bytes=PAGE_BYTES,
    )
    loader = Loader(window, cast(Mapping[str, MappedObject], memory), link, turns=Turns(True))
    loader.start()
    return loader


def test_room_for_the_next_step_is_made_while_this_one_comes(
    objects: Mapping[str, MappedObject],
) -> None:
    memory = Memory(objects)
    loader = within(memory, Budgeted(memory, during="c", wanted="a"), pages=3)
    run = loader.begin(range(4))
    try:
        for block in (0, 2, 1, 3):
            assert loader.take(run, [block]) == block
            loader.finish(run, block)  # `a` is over while `c` comes, and makes room for `d`
    finally:
        loader.end(run)
        loader.close()
    assert memory.most <= 3


def test_nothing_comes_before_its_room_is_there(objects: Mapping[str, MappedObject]) -> None:
    memory = Memory(objects)
    link = Budgeted(memory)
    loader = within(memory, link, pages=2)
    run = loader.begin(range(4))
    memory.keep.clear()
    try:
        assert loader.take(run, [0]) == 0
        assert loader.take(run, [1]) == 1
        loader.finish(run, 0)
        loader.pin((), PAGE_BYTES)  # and now less may be held
        threading.Timer(0.1, memory.keep.set).start()
        loader.wait_within_limit()
        assert memory.dropped["a"].is_set() and len(memory.held) == 1
        loader.finish(run, 1)
        for block in (2, 3):
            assert loader.take(run, [block]) == block
            loader.finish(run, block)
    finally:
        loader.end(run)
        loader.close()
    assert memory.most <= 2


def test_what_was_decided_ahead_of_a_failure_is_decided_again(
    objects: Mapping[str, MappedObject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "FIRST_BACKOFF_S", 0.001)
    memory = Memory(objects)
    link = Budgeted(memory)
    link.failing = [Span("b", 0, PAGE_BYTES, True)]
    loader = within(memory, link, pages=2)
    run_through(loader, range(4))
    assert not link.failing and memory.most <= 2
