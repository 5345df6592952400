"""How spans come from this machine's disk into memory, and how little comes along.

Both kinds of source read from a pool on the disk; a remote one from the cache that it has written.
With a memory budget everything counts that is in the page cache: `counted` readers bring exactly
what is asked for, and what else was written or read on the way leaves memory at once. Otherwise the
kernel reads ahead as it sees fit, in larger pages, which are mapped faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .mapping import MappedObject
from .objects import PASSING_BYTES
from .partial import PartialObject
from .window import CHUNK_BYTES, Span


class Reader:
    """Of one source. `counted`: no more than what is asked for, and the span expected next."""

    def __init__(self, *, counted: bool) -> None:
        self.counted = counted
        self._next: Sequence[Span] = ()

    @property
    def chunk_bytes(self) -> int:
        """Most bytes that are fetched at once without being held."""
        return PASSING_BYTES if self.counted else CHUNK_BYTES

    def expect(self, spans: Sequence[Span]) -> None:
        """Spans on the disk that will be brought after the next one, in this order."""
        self._next = spans[:1]

    def bring(self, objects: Mapping[str, MappedObject], span: Span) -> None:
        """The span's bytes, which are on the disk or in the page cache, are in memory then."""
        if self.counted:
            for each in (span, *self._next):  # the disk reads on while pages are mapped
                objects[each.name].read_ahead(each.offset, each.size_bytes)
        objects[span.name].populate(span.offset, span.size_bytes)

    def wrote_span(self, part: PartialObject, offset: int, size_bytes: int) -> None:
        """It will be brought next. To be dropped later it has to be on the disk: that begins."""
        if self.counted:
            part.begin_writing(offset, size_bytes)

    def wrote(self, part: PartialObject, offset: int, size_bytes: int) -> None:
        """It is not held: whoever needs it has it read."""
        if self.counted:
            part.forget(offset, size_bytes)
