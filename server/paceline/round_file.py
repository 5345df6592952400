"""Reading a ROUND.yaml: users, models with the blocks they share, the uplink.

Every error is a ConfigError that names file, line and key. Units are converted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paceline.core.errors import ConfigError
from paceline.edge.round import EdgeModel, Round, User
from paceline.files import MIB, first_error, line_of, load_yaml, read_text

EXPECTED = "a round file is a mapping with bandwidth_hz, load_mib_per_s, models and users"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _ModelFile(_Strict):
    blocks: Annotated[dict[str, float], Field(min_length=1)]
    batch_ms: float
    per_user_ms: float = 0.0


class _UserFile(_Strict):
    user: str
    model: str
    payload_bits: float
    efficiency_bps_per_hz: float
    deadline_ms: float


class _RoundFile(_Strict):
    bandwidth_hz: float
    load_mib_per_s: float
    models: Annotated[dict[str, _ModelFile], Field(min_length=1)]
    users: Annotated[list[_UserFile], Field(min_length=1)]


def read_round(path: Path) -> Round:
    """Read one round file; blocks are MiB by name, equal names are the same block."""
    return parse_round(read_text(path), name=path.name)


def parse_round(text: str, *, name: str = "<round>") -> Round:
    """A round file's text as a validated Round; `name` stands for the file in errors."""
    document = load_yaml(text, name, EXPECTED)
    try:
        parsed = _RoundFile.model_validate(document)
    except ValidationError as error:
        raise first_error(error, document, name, _file_model) from None
    try:
        return Round(
            users=tuple(
                User(u.user, u.model, u.payload_bits, u.efficiency_bps_per_hz, u.deadline_ms / 1e3)
                for u in parsed.users
            ),
            models={
                model: EdgeModel(
                    model,
                    {block: round(mib * MIB) for block, mib in m.blocks.items()},
                    m.batch_ms / 1e3,
                    m.per_user_ms / 1e3,
                )
                for model, m in parsed.models.items()
            },
            bandwidth_hz=parsed.bandwidth_hz,
            load_bytes_per_s=parsed.load_mib_per_s * MIB,
        )
    except ConfigError as error:
        path = [int(part) if part.isdigit() else part for part in error.key.split(".")]
        where = f"{name}:{line_of(document, path)}"
        raise ConfigError(error.message, key=error.key, where=where) from None


def _file_model(path: Sequence[Any]) -> type[BaseModel]:
    match list(path):
        case ["models", _]:
            return _ModelFile
        case ["users", _]:
            return _UserFile
        case _:
            return _RoundFile
