"""What can be called by its name: the models of the repository, and the chains made of them.

Invariant: a name stands for a model or a chain, never both; what is withdrawn keeps its name and
is not callable. The controller's; changed by one change at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from paceline.core.bind import BoundChain, bind, single_model_chain
from paceline.core.chain import Chain
from paceline.core.errors import ConfigError, ErrorKind, RequestError, ResidencyError
from paceline.core.model import ModelSpec
from paceline.core.ports import ModelState


class Catalogue:
    """See the module docstring."""

    def __init__(self) -> None:
        self.models: dict[str, ModelSpec] = {}
        """As declared when they were loaded last; also those that were unloaded since."""
        self._failed: dict[str, str] = {}
        self._bound: dict[str, BoundChain] = {}
        self._withdrawn: set[str] = set()

    # -- what can be called -----------------------------------------------------------------

    def callable(self, name: str, version: str = "") -> BoundChain:
        """See `core.ports.Control.callable`."""
        bound = self._bound.get(name)
        if bound is None:
            if name in self._failed:
                message = f"Request for unknown model: '{name}' has no available versions"
                raise RequestError(ErrorKind.NOT_READY, message)
            message = f"Request for unknown model: '{name}' is not found"
            raise RequestError(ErrorKind.UNKNOWN_MODEL, message)
        versions = bound.modules[0].spec.versions if bound.direct else ("1",)
        if version and version not in versions:
            message = f"Request for unknown model: '{name}' version {version} is not found"
            raise RequestError(ErrorKind.UNKNOWN_MODEL, message)
        if name in self._withdrawn:
            message = f"Request for unknown model: '{name}' has no available versions"
            raise RequestError(ErrorKind.NOT_READY, message)
        return bound

    def callables(self) -> tuple[BoundChain, ...]:
        """See `core.ports.Control.callables`."""
        return tuple(b for name, b in sorted(self._bound.items()) if name not in self._withdrawn)

    def chains(self) -> tuple[Chain, ...]:
        """See `core.ports.Control.chains`."""
        return tuple(bound.chain for bound in self.callables() if not bound.direct)

    def index(self) -> tuple[ModelState, ...]:
        """Chains first, then models."""
        chains: list[ModelState] = []
        models: list[ModelState] = []
        for name, bound in sorted(self._bound.items()):
            gone = name in self._withdrawn
            state = ModelState(
                name, "1", "UNAVAILABLE" if gone else "READY", "unloaded" if gone else ""
            )
            (models if bound.direct else chains).append(state)
        models += [
            ModelState(name, "1", "UNAVAILABLE", reason)
            for name, reason in sorted(self._failed.items())
        ]
        return (*chains, *models)

    def get(self, name: str) -> BoundChain | None:
        """A chain or model, withdrawn or not."""
        return self._bound.get(name)

    def names(self) -> list[str]:
        """Every chain and model, withdrawn or not."""
        return sorted(self._bound)

    def is_withdrawn(self, name: str) -> bool:
        return name in self._withdrawn

    def declared(self) -> tuple[BoundChain, ...]:
        """Every chain, withdrawn or not."""
        return tuple(bound for _, bound in sorted(self._bound.items()) if not bound.direct)

    def loaded(self) -> list[str]:
        """Models that are not withdrawn."""
        return sorted(name for name in self.models if name not in self._withdrawn)

    def users(self, model: str) -> list[str]:
        """Chains that a model belongs to."""
        return [b.name for b in self.declared() if any(m.spec.name == model for m in b.modules)]

    # -- changes ----------------------------------------------------------------------------

    def add_model(self, spec: ModelSpec) -> BoundChain:
        """A model was loaded: callable by its own name. Raises ConfigError."""
        bound = single_model_chain(spec)
        self._failed.pop(spec.name, None)
        self.models[spec.name] = spec
        self.add(bound)
        return bound

    def model_failed(self, name: str, reason: str) -> None:
        """A model did not load. Triton goes on serving a model whose reload failed."""
        if name not in self._bound:
            self._failed[name] = reason

    def add(self, bound: BoundChain) -> None:
        """Callable from now on, in place of what had its name."""
        self._bound[bound.name] = bound
        self._withdrawn.discard(bound.name)

    def withdraw(self, name: str) -> None:
        """Not callable until it is added again."""
        self._withdrawn.add(name)

    def remove(self, name: str) -> None:
        """Unknown from now on."""
        del self._bound[name]
        self._withdrawn.discard(name)

    # -- what a change would make of it -----------------------------------------------------

    def with_chains(self, chains: Sequence[Chain], *, gone: Collection[str] = ()) -> list[Chain]:
        """The chains that are served with these added, and without those `gone`, by name.

        Raises ConfigError for a chain that is called as a model is.
        """
        served = {chain.name: chain for chain in self.chains()}
        for chain in chains:
            if chain.name in self.models:
                raise ConfigError(
                    f"{chain.name!r} is a model of the repository; name the chain otherwise",
                    key="chain",
                )
            served[chain.name] = chain
        return [served[name] for name in sorted(served) if name not in gone]

    def bind(self, chains: Iterable[Chain]) -> dict[str, BoundChain]:
        """Chains bound to the models that are loaded. Raises ConfigError, ResidencyError."""
        return {chain.name: self._bind(chain) for chain in chains}

    def _bind(self, chain: Chain) -> BoundChain:
        for module in chain.modules:
            if (reason := self._failed.get(module.model)) is not None:
                raise ResidencyError(
                    f"chain {chain.name!r} needs model {module.model!r}, "
                    f"which could not be loaded: {reason}"
                )
            if module.model in self._withdrawn:
                raise ResidencyError(
                    f"chain {chain.name!r} needs model {module.model!r}, which was unloaded: "
                    "load it first"
                )
        try:
            return bind(chain, self.models)
        except ConfigError as error:
            raise ConfigError(error.message, key=error.key, where=chain.where(error.key)) from None
