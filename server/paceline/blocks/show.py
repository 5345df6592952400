"""`paceline blocks show`: blocks, sizes, and what models have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from paceline.blocks.backend.manifest import Block, pages
from paceline.blocks.repository import CompiledModel

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Sharing:
    """Compiled models and which objects each reads; bytes are in whole pages."""

    models: Mapping[str, CompiledModel]
    weights: Mapping[str, Mapping[str, int]]
    """Per model: bytes by weights object (of a pool: two pools share nothing)."""

    @property
    def total_bytes(self) -> int:
        """If every model had its own."""
        return sum(sum(objects.values()) for objects in self.weights.values())

    @property
    def once_bytes(self) -> int:
        """As it is: every object once."""
        return sum({k: v for objects in self.weights.values() for k, v in objects.items()}.values())

    def shared_bytes(self, one: str, other: str) -> int:
        return sum(size for name, size in self.weights[one].items() if name in self.weights[other])

    def own_bytes(self, model: str) -> int:
        """What goes when the model goes."""
        elsewhere = {
            name for other, objects in self.weights.items() if other != model for name in objects
        }
        return sum(size for name, size in self.weights[model].items() if name not in elsewhere)

    def sharers(self, model: str, block: Block) -> list[str]:
        """The other models that read all of the block's weights."""
        pool = self.models[model].pool
        mine = {f"{pool}/{weight.object}" for weight in block.weights}
        return [
            other
            for other, objects in self.weights.items()
            if other != model and mine and mine <= objects.keys()
        ]


def sharing(models: Sequence[CompiledModel]) -> Sharing:
    named: dict[str, CompiledModel] = {}
    for model in models:
        name = model.manifest.model
        named[name if name not in named else str(model.directory)] = model
    weights = {}
    for name, model in named.items():
        blocks = (block for member in model.manifest.members for block in member.blocks)
        weights[name] = {
            f"{model.pool}/{weight.object}": pages(model.manifest.objects[weight.object].size_bytes)
            for block in blocks
            for weight in block.weights
        }
    return Sharing(named, weights)


def as_json(shown: Sharing) -> dict[str, Any]:
    """Bytes; times in seconds."""
    return {
        "total_bytes": shown.total_bytes,
        "once_bytes": shown.once_bytes,
        "models": [
            {
                "model": name,
                "directory": str(model.directory),
                "pool": str(model.pool),
                "manifest": model.digest,
                "weights_bytes": sum(shown.weights[name].values()),
                "own_bytes": shown.own_bytes(name),
                "largest_block_bytes": model.manifest.largest_block_bytes,
                "activations_bytes": {
                    str(rows): size for rows, size in model.manifest.activations.items()
                },
                "shared_bytes": {
                    other: count
                    for other in shown.models
                    if other != name and (count := shown.shared_bytes(name, other))
                },
                "members": [
                    {
                        "member": member.name,
                        "batching": member.batching,
                        "notes": list(member.notes),
                        "blocks": [_block_json(shown, name, block) for block in member.blocks],
                    }
                    for member in model.manifest.members
                ],
            }
            for name, model in shown.models.items()
        ],
    }


def _block_json(shown: Sharing, model: str, block: Block) -> dict[str, Any]:
    return {
        "key": block.key,
        "nodes": block.nodes,
        "weights_bytes": block.weights_bytes,
        "paged_bytes": block.paged_bytes,
        "live": list(block.live),
        "live_bytes": block.live_bytes,
        "execute_s": {str(size): took for size, took in block.execute_s.items()},
        "swap_in_s": block.swap_in_s,
        "shared_with": shown.sharers(model, block),
    }


def tables(shown: Sharing) -> Iterator[Table]:
    """One per model, then one of all."""
    for name, model in shown.models.items():
        yield _blocks_table(shown, name, model)
    yield _models_table(shown)


def _blocks_table(shown: Sharing, name: str, model: CompiledModel) -> Table:
    table = Table(title=f"{name} ({model.directory})", title_justify="left", box=None)
    for title in ("block", "nodes", "MiB", "paged", "live KiB", "run ms", "swap-in ms"):
        table.add_column(title, justify="left" if title == "block" else "right")
    table.add_column("also in")
    for member in model.manifest.members:
        for index, block in enumerate(member.blocks):
            table.add_row(
                f"{member.name}/{index}" if member.name else str(index),
                str(block.nodes),
                f"{block.swapped_bytes / MIB:.1f}",
                f"{block.paged_bytes / MIB:.1f}" if block.paged_bytes else "",
                f"{block.live_bytes / 1024:.0f}",
                _ms(block.execute_s.get(1)),
                _ms(block.swap_in_s),
                ", ".join(shown.sharers(name, block)),
            )
    table.caption = "\n".join(
        f"{f'{member.name}: ' if member.name else ''}{note}"
        for member in model.manifest.members
        for note in member.notes
    )
    return table


def _models_table(shown: Sharing) -> Table:
    table = Table(title="models", title_justify="left", box=None, caption_justify="left")
    for title in ("model", "blocks", "MiB", "own MiB", "largest block MiB", "activations MiB"):
        table.add_column(title, justify="left" if title == "model" else "right")
    table.add_column("shares")
    for name, model in shown.models.items():
        shares = (
            f"{count / MIB:.1f} MiB with {other}"
            for other in shown.models
            if other != name and (count := shown.shared_bytes(name, other))
        )
        table.add_row(
            name,
            str(sum(len(member.blocks) for member in model.manifest.members)),
            f"{sum(shown.weights[name].values()) / MIB:.1f}",
            f"{shown.own_bytes(name) / MIB:.1f}",
            f"{model.manifest.largest_block_bytes / MIB:.1f}",
            f"{model.manifest.activation_bytes(1) / MIB:.1f}" if model.manifest.activations else "",
            ", ".join(shares),
        )
    table.caption = (
        f"{shown.once_bytes / MIB:.1f} MiB; {shown.total_bytes / MIB:.1f} MiB if nothing was shared"
    )
    return table


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"
