"""Where a graph can be cut: narrow points, pieces between them, blocks of pieces by size. Pure.

A cut after a node is as narrow as few values are needed on both sides of it (SwapNet's criterion).
Not counted: the model's inputs, which every block can have, and weights. Values of a width that
stays (an attention mask used by every layer) raise the whole graph's width instead of forbidding
every cut: the width allowed is the least at which pieces are small enough.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

MAX_WIDTH = 6


@dataclass(frozen=True, slots=True)
class Step:
    """A node, as far as cutting goes: values it reads and makes, weights it reads."""

    reads: tuple[str, ...]
    makes: tuple[str, ...]
    weights: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Steps `start` to `stop`, and the bytes of the weights first used there."""

    start: int
    stop: int
    bytes: int


def live_after(steps: Sequence[Step], outputs: Collection[str]) -> list[tuple[str, ...]]:
    """For every step the values made so far that a later step reads, or that are outputs.

    >>> chain = [Step(("x",), ("a",), ()), Step(("a",), ("b",), ()), Step(("b", "a"), ("y",), ())]
    >>> live_after(chain, ["y"])
    [('a',), ('a', 'b'), ('y',)]
    """
    last: dict[str, int] = {}
    for position, step in enumerate(steps):
        last.update(dict.fromkeys(step.reads, position))
    last.update(dict.fromkeys(outputs, len(steps)))
    live: dict[str, None] = {}
    result = []
    for position, step in enumerate(steps):
        live.update(dict.fromkeys(name for name in step.makes if last.get(name, -1) > position))
        live = {name: None for name in live if last[name] > position}
        result.append(tuple(live))
    return result


def pieces(
    steps: Sequence[Step],
    sizes: Mapping[str, int],
    *,
    limit_bytes: int,
    uncut: Collection[str] = (),
    parts: Mapping[str, str] | None = None,
) -> list[Piece]:
    """The finest pieces at the least width that keeps each within `limit_bytes`, if one does.

    `sizes` are bytes of weights; a cut never crosses a value in `uncut`; `parts` names what a value
    is a part of: parts of one count as one. If no width up to MAX_WIDTH keeps the limit, the
    width with the smallest largest piece is taken.

    >>> chain = [Step(("x",), ("a",), ("u",)), Step(("a",), ("y",), ("v",))]
    >>> pieces(chain, {"u": 5, "v": 6}, limit_bytes=8)
    [Piece(start=0, stop=1, bytes=5), Piece(start=1, stop=2, bytes=6)]
    """
    # An output that is made and that nobody else reads passes no cut.
    widths = [_width(names, uncut, parts or {}) for names in live_after(steps, ())]
    fresh = _fresh_bytes(steps, sizes)
    best: list[Piece] = []
    for allowed in range(1, MAX_WIDTH + 1):
        found = _between(widths, fresh, allowed)
        if not best or _largest(found) < _largest(best):
            best = found
        if _largest(best) <= limit_bytes:
            break
    return best


def blocks(pieces: Sequence[Piece], target_bytes: int) -> list[Piece]:
    """Neighbouring pieces joined up to `target_bytes`, from the start, so that models which begin
    alike are divided alike; what has no weights joins what precedes it.

    >>> blocks([Piece(0, 1, 3), Piece(1, 2, 4), Piece(2, 3, 9), Piece(3, 4, 0)], 8)
    [Piece(start=0, stop=2, bytes=7), Piece(start=2, stop=4, bytes=9)]
    """
    joined: list[Piece] = []
    for piece in pieces:
        if joined and (
            not piece.bytes
            or not joined[-1].bytes
            or joined[-1].bytes + piece.bytes <= target_bytes
        ):
            last = joined.pop()
            joined.append(Piece(last.start, piece.stop, last.bytes + piece.bytes))
        else:
            joined.append(piece)
    return joined


def joined(pieces: Sequence[Piece], stops: Sequence[int]) -> list[Piece]:
    """The first `stops[0]` pieces as one, and so on.

    >>> joined([Piece(0, 1, 3), Piece(1, 2, 4), Piece(2, 5, 9)], [2, 3])
    [Piece(start=0, stop=2, bytes=7), Piece(start=2, stop=5, bytes=9)]
    """
    return [
        Piece(
            pieces[first].start,
            pieces[stop - 1].stop,
            sum(piece.bytes for piece in pieces[first:stop]),
        )
        for first, stop in pairwise((0, *stops))
    ]


def finest(
    steps: Sequence[Step],
    sizes: Mapping[str, int],
    *,
    least_bytes: int,
    kept: Collection[int],
    values: Mapping[str, int],
    uncut: Collection[str] = (),
    parts: Mapping[str, str] | None = None,
) -> list[Piece]:
    """The pieces between all cuts of any width up to MAX_WIDTH; see `pieces`.

    But one of less than `least_bytes`, or of no more than the values that are alive where it begins
    (bytes of each in `values`), which a cut would hold longer, joins what precedes it; not at the
    cuts before the steps `kept`.

    >>> chain = [Step(("x",), ("a",), ("u",)), Step(("a",), ("b",), ("v",)),
    ...          Step(("b",), ("y",), ("w",))]
    >>> finest(chain, {"u": 5, "v": 1, "w": 2}, least_bytes=2, kept=(), values={"b": 1})
    [Piece(start=0, stop=2, bytes=6), Piece(start=2, stop=3, bytes=2)]
    """
    live = live_after(steps, ())
    widths = [_width(names, uncut, parts or {}) for names in live]
    found: list[Piece] = []
    for piece in _between(widths, _fresh_bytes(steps, sizes), MAX_WIDTH):
        alive = live[piece.start - 1] if piece.start else ()
        least = max(least_bytes, 1 + sum(values.get(name, 0) for name in alive))
        if found and piece.bytes < least and piece.start not in kept:
            last = found.pop()
            found.append(Piece(last.start, piece.stop, last.bytes + piece.bytes))
        else:
            found.append(piece)
    return found


def _width(names: Sequence[str], uncut: Collection[str], parts: Mapping[str, str]) -> int:
    if any(name in uncut for name in names):
        return MAX_WIDTH + 1
    return len({parts.get(name, name) for name in names})


def _fresh_bytes(steps: Sequence[Step], sizes: Mapping[str, int]) -> list[int]:
    """Per step the bytes of the weights that no earlier step read."""
    seen: set[str] = set()
    result = []
    for step in steps:
        fresh = [name for name in dict.fromkeys(step.weights) if name not in seen]
        seen.update(fresh)
        result.append(sum(sizes.get(name, 0) for name in fresh))
    return result


def _between(widths: Sequence[int], fresh: Sequence[int], allowed: int) -> list[Piece]:
    found = []
    start = 0
    for position, width in enumerate(widths):
        if width <= allowed or position == len(widths) - 1:
            found.append(Piece(start, position + 1, sum(fresh[start : position + 1])))
            start = position + 1
    return found


def _largest(pieces: Sequence[Piece]) -> int:
    return max((piece.bytes for piece in pieces), default=0)
