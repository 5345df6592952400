"""A round: clients that want one inference each, models that share blocks, one uplink, one server.

The server loads models one after the other, keeps of each what the next one shares, and serves all
scheduled clients of the loaded model as one batch. A client's payload has to be there when its
batch starts. Times in seconds from the round's start.

Invariant: a `Round` that exists names only models it describes, and all its quantities are finite
and positive where they have to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

from paceline.core.errors import ConfigError

MAX_USERS = 4096
MAX_MODELS = 256


@dataclass(frozen=True, slots=True)
class EdgeModel:
    """`blocks` are bytes by content; a batch of n takes `batch_s` + n `per_user_s`."""

    name: str
    blocks: Mapping[str, int]
    batch_s: float
    per_user_s: float = 0.0

    def duration_s(self, users: int) -> float:
        return self.batch_s + users * self.per_user_s

    def missing_bytes(self, there: Mapping[str, int]) -> int:
        """What has to be loaded when the blocks `there` are."""
        return sum(size for block, size in self.blocks.items() if block not in there)


@dataclass(frozen=True, slots=True)
class User:
    """Wants one inference of `model` by `deadline_s`, for a payload sent at
    `efficiency_bps_per_hz`.
    """

    name: str
    model: str
    payload_bits: float
    efficiency_bps_per_hz: float
    deadline_s: float

    @property
    def hertz_seconds(self) -> float:
        """Bandwidth times time that the payload takes: D / s."""
        return self.payload_bits / self.efficiency_bps_per_hz


@dataclass(frozen=True, slots=True)
class Round:
    """Everything that is known when the round begins; `there` is in memory already."""

    users: tuple[User, ...]
    models: Mapping[str, EdgeModel]
    bandwidth_hz: float
    load_bytes_per_s: float
    there: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _positive("bandwidth_hz", self.bandwidth_hz)
        _positive("load_mib_per_s", self.load_bytes_per_s)
        if len(self.users) > MAX_USERS or len(self.models) > MAX_MODELS:
            raise ConfigError(f"a round has at most {MAX_USERS} users and {MAX_MODELS} models")
        for model in self.models.values():
            key = f"models.{model.name}"
            _positive(f"{key}.batch_ms", model.batch_s)
            if not (isfinite(model.per_user_s) and model.per_user_s >= 0):
                raise ConfigError("must be 0 or more", key=f"{key}.per_user_ms")
            for block, size in model.blocks.items():
                _positive(f"{key}.blocks.{block}", size)
        sizes: dict[str, tuple[int, str]] = {}
        for model in self.models.values():
            for block, size in model.blocks.items():
                known, other = sizes.setdefault(block, (size, model.name))
                if known != size:
                    raise ConfigError(
                        f"block {block!r} has another size in {other!r}",
                        key=f"models.{model.name}.blocks.{block}",
                    )
        seen: set[str] = set()
        for index, user in enumerate(self.users):
            key = f"users.{index}"
            if user.name in seen:
                raise ConfigError(f"{user.name!r} is there twice", key=f"{key}.user")
            seen.add(user.name)
            if user.model not in self.models:
                known_models = ", ".join(sorted(self.models)) or "none"
                raise ConfigError(
                    f"unknown model {user.model!r}; models: {known_models}", key=f"{key}.model"
                )
            _positive(f"{key}.payload_bits", user.payload_bits)
            _positive(f"{key}.efficiency_bps_per_hz", user.efficiency_bps_per_hz)
            _positive(f"{key}.deadline_ms", user.deadline_s)

    def load_s(self, model: str, after: str | None) -> float:
        """How long loading `model` takes after `after` (None: at the start of the round)."""
        there = self.there if after is None else self.models[after].blocks
        return self.models[model].missing_bytes(there) / self.load_bytes_per_s

    def without_sharing(self) -> Round:
        """The same round with nothing in common between models, for comparison."""
        return Round(
            self.users,
            {
                name: EdgeModel(
                    name,
                    {f"{name}/{block}": size for block, size in model.blocks.items()},
                    model.batch_s,
                    model.per_user_s,
                )
                for name, model in self.models.items()
            },
            self.bandwidth_hz,
            self.load_bytes_per_s,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """`users` of `model`, executed from `starts_s` to `ends_s`; payloads are there by the start."""

    model: str
    users: tuple[str, ...]
    loads_s: float
    """How long its load takes, which ends by `starts_s`."""
    starts_s: float
    ends_s: float


@dataclass(frozen=True, slots=True)
class Grant:
    """A user's share of the uplink. `needed_hz` is the least that is in time."""

    user: str
    needed_hz: float
    bandwidth_hz: float
    bits_per_s: float


@dataclass(frozen=True, slots=True)
class Schedule:
    """Who is served, how. `exact`: proven that nobody can serve more."""

    batches: tuple[Batch, ...]
    grants: tuple[Grant, ...]
    method: str
    exact: bool

    @property
    def served(self) -> int:
        return len(self.grants)

    @property
    def needed_hz(self) -> float:
        return sum(grant.needed_hz for grant in self.grants)


def _positive(key: str, value: float) -> None:
    if not (isfinite(value) and value > 0):
        raise ConfigError(f"must be above 0, got {value}", key=key)
