"""One machine that runs whichever batch is due first and finishes what it has begun.

Invariant: in `Due` every batch is done by its deadline, whatever the phases of its streams.

A stream's batches are released every `duration_s / busy` or later, each by up to `jitter_s` late
once, and are due `deadline_s` after their release. Without interruption, and with the earliest
deadline first, all are in time if in every interval t the batches both released and due in it,
and the longest of those due later that may have just begun, fit (George, Rivierre and Spuri 1996).
The batches of a stream within t take at most duration + busy * (t - deadline + jitter) (Devi 2003),
which is linear between deadlines and no steeper than 1, so that only t = each deadline matters:

    sum over streams due within t of (duration + busy * (t - deadline + jitter))
        + the longest duration due later <= t

>>> due = Due().joined(Stream(0.004, 0.010, 0.3))
>>> round(due.room(0.006, 0.050, 0.0), 3), round(due.room(0.007, 0.050, 0.0), 3)
(0.7, 0.0)
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.planner.schedule import TOLERANCE


@dataclass(frozen=True, slots=True)
class Stream:
    """Batches of `duration_s` that keep a machine `busy` for that share of its time."""

    duration_s: float
    deadline_s: float
    busy: float
    jitter_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Due:
    """Streams by deadline; for each the time left at its deadline, and the longest due later."""

    streams: tuple[Stream, ...] = ()
    left_s: tuple[float, ...] = ()
    later_s: tuple[float, ...] = ()
    busy: float = 0.0

    def room(self, duration_s: float, deadline_s: float, jitter_s: float) -> float:
        """The share of its time that the machine may give such a stream, beside what it has."""
        own_s, most, blocked_s = deadline_s - duration_s, 1.0 - self.busy, 0.0
        for stream, left_s, later_s in zip(self.streams, self.left_s, self.later_s, strict=True):
            if stream.deadline_s < deadline_s:
                if duration_s > left_s + TOLERANCE:
                    return 0.0
            else:
                over_s = stream.deadline_s - deadline_s + jitter_s
                spare_s = left_s - later_s - duration_s
                if spare_s < -TOLERANCE:
                    return 0.0
                if over_s > 0 and spare_s < most * over_s:
                    most = spare_s / over_s
            if stream.deadline_s <= deadline_s:
                late_s = deadline_s - stream.deadline_s + stream.jitter_s
                own_s -= stream.duration_s + stream.busy * late_s
            elif stream.duration_s > blocked_s:
                blocked_s = stream.duration_s
        own_s -= blocked_s
        if own_s < -TOLERANCE:
            return 0.0
        if jitter_s > 0 and own_s < most * jitter_s:
            most = own_s / jitter_s
        return max(0.0, most)

    def joined(self, stream: Stream) -> Due:
        """With one stream more; whether there is `room` is the caller's to ask."""
        return Due.of((*self.streams, stream))

    @classmethod
    def of(cls, streams: tuple[Stream, ...]) -> Due:
        """Of these streams, in order of their deadlines."""
        ordered = tuple(sorted(streams, key=lambda s: (s.deadline_s, s.duration_s, s.busy)))
        left_s, later_s = [], []
        for stream in ordered:
            within = [s for s in ordered if s.deadline_s <= stream.deadline_s]
            taken_s = sum(
                s.duration_s + s.busy * (stream.deadline_s - s.deadline_s + s.jitter_s)
                for s in within
            )
            left_s.append(stream.deadline_s - taken_s)
            later_s.append(max((s.duration_s for s in ordered[len(within) :]), default=0.0))
        return cls(ordered, tuple(left_s), tuple(later_s), sum(s.busy for s in ordered))

    @property
    def in_time(self) -> bool:
        """Whether every batch is."""
        return self.busy <= 1 + TOLERANCE and all(
            left_s >= later_s - TOLERANCE
            for left_s, later_s in zip(self.left_s, self.later_s, strict=True)
        )
