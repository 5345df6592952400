"""A batch on its machine, and what becomes of the outputs it brings back."""

from __future__ import annotations

from math import prod

from paceline.core.bind import Carry
from paceline.core.errors import BackendError
from paceline.core.request import Span
from paceline.core.tensor import ITEM_BYTES, Tensor, split_rows
from paceline.core.values import value
from paceline.dispatch.holders import Machine
from paceline.dispatch.queue import Piece
from paceline.dispatch.stage import Stage

ONE = Carry.ONE


@value
class Batch:
    """Rows of one module that a machine executes; `lot` is its collector's.

    `overdue`: its rows are tried elsewhere as well.
    """

    machine: Machine
    stage: Stage
    lot: int
    pieces: tuple[Piece, ...]
    rows: int
    started_s: float
    overdue: bool = False

    def span(self, piece: Piece, now_s: float) -> Span:
        """What happened to one of its pieces."""
        route = self.stage.route
        return Span(
            route.name,
            route.model,
            self.machine.name,
            piece.count,
            self.rows,
            piece.entry.queued_s,
            self.started_s,
            now_s,
        )

    def split(self, outputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """The outputs of each piece, with a row axis but for modules that run once.

        BackendError where they cannot be the batch's.
        """
        bound = self.stage.route.bound
        spec, step = bound.spec, self.pieces[0].entry.step
        if len(outputs) != len(step.wanted):
            raise BackendError(
                f"model '{spec.name}' returned {len(outputs)} of {len(step.wanted)} outputs"
            )
        for name, declared, tensor in zip(step.wanted, step.declared, outputs, strict=True):
            shape = tensor.shape[1:] if spec.batches else tensor.shape
            fits = shape == declared.shape or declared.accepts(shape)
            if declared.datatype != tensor.datatype or not fits:
                raise BackendError(
                    f"model '{spec.name}' returned a malformed output: {name} is "
                    f"{tensor.datatype} {list(shape)}, declared {declared.datatype} "
                    f"{list(declared.shape)}"
                )
        if not spec.batches:
            if bound.carry is ONE:
                return [outputs]
            return [tuple(tensor.reshaped((1, *tensor.shape)) for tensor in outputs)]
        try:
            split = _split_single if bound.carry is ONE else _split
            return list(zip(*[split(tensor, self.pieces) for tensor in outputs], strict=True))
        except ValueError as error:
            message = f"model '{spec.name}' returned a malformed output: {error}"
            raise BackendError(message) from None


def _split(tensor: Tensor, pieces: tuple[Piece, ...]) -> list[Tensor]:
    return split_rows(tensor, [piece.count for piece in pieces])


def _split_single(tensor: Tensor, pieces: tuple[Piece, ...]) -> list[Tensor]:
    """Pieces of one row each, without the row axis."""
    shape = tensor.shape[1:]
    item = ITEM_BYTES.get(tensor.datatype)
    rows = len(pieces)
    if item is None or not tensor.shape or tensor.shape[0] != rows:
        return [row.reshaped(shape) for row in _split(tensor, pieces)]
    name, datatype, view = tensor.name, tensor.datatype, memoryview(tensor.data)
    if rows == 1:
        return [Tensor(name, datatype, shape, tensor.data)]
    size = item * prod(shape)
    return [
        Tensor(name, datatype, shape, view[row * size : (row + 1) * size]) for row in range(rows)
    ]
