"""What a model of the repository takes and gives, as its Triton configuration declares it."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.core.tensor import TensorSpec


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model. Shapes exclude the batch axis when `max_batch_size` > 0, as in config.pbtxt."""

    name: str
    max_batch_size: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    platform: str = ""
    versions: tuple[str, ...] = ("1",)

    @property
    def batches(self) -> bool:
        """Whether requests carry a batch axis (axis 0) that Paceline may fill."""
        return self.max_batch_size > 0

    @property
    def row_limit(self) -> int:
        """The most rows one execution takes."""
        return max(1, self.max_batch_size)

    def input(self, name: str) -> TensorSpec | None:
        return next((spec for spec in self.inputs if spec.name == name), None)

    def output(self, name: str) -> TensorSpec | None:
        return next((spec for spec in self.outputs if spec.name == name), None)
