"""Names that stand for other models: runs, ensembles of a repository, members of fused models.

An ensemble has no process and no memory of its own: it is there where all the models are whose
processes answer its requests.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

from paceline.core.chain import Module
from paceline.core.model import ModelSpec


class _Repository(Protocol):
    def members(self, model: str) -> tuple[str, ...]: ...


class Ensembles:
    """Which they are; `runs` are those that Paceline composes, with their declarations."""

    def __init__(self) -> None:
        self.runs: dict[str, tuple[Module, ModelSpec]] = {}

    def members(self, repository: _Repository, model: str) -> set[str]:
        """What an ensemble hands its requests to; nothing for other models."""
        if model in self.runs:
            return {member.model for member in self.runs[model][0].members}
        return set(repository.members(model))

    def processes(self, repository: _Repository, model: str) -> tuple[str, ...]:
        """What an ensemble is made of in the end, in order; a model that is none is its own."""
        found: set[str] = set()
        seen: set[str] = set()
        waiting = {model}
        while waiting:
            seen.add(each := waiting.pop())
            members = self.members(repository, each)
            found |= set() if members else {each}
            waiting |= members - seen
        return tuple(sorted(found))

    def made_of(
        self, repository: _Repository, models: Collection[str], among: Iterable[str]
    ) -> list[str]:
        """Those `among` these that any of `models` is a part of, in the order to load them."""
        return self.in_order(
            repository,
            (
                each
                for each in among
                if each not in models
                and not set(models).isdisjoint(self.processes(repository, each))
            ),
        )

    def in_order(self, repository: _Repository, models: Iterable[str]) -> list[str]:
        """Ensembles after the models that they are made of, runs last."""
        return sorted(
            models,
            key=lambda each: (each in self.runs, bool(repository.members(each)), each),
        )
