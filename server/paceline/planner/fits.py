"""On which hardware a chain's modules may run at all: there is some, and the model fits into it.

Invariant: what is planned, by the fraction or in whole machines, runs on no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf

from paceline.core.errors import PlanError
from paceline.planner.problem import Options, PlannedChain, PlannedModule

MIB = 1 << 20


def usable(chains: Sequence[PlannedChain], options: Options) -> list[PlannedChain]:
    """The chains without hardware that there is none of, or that a module does not fit into.

    What is not known to be too little is enough. Raises PlanError where that leaves a module
    nothing.
    """
    found: list[PlannedChain] = []
    for chain in chains:
        modules = []
        for module in chain.modules:
            left = tuple(
                c
                for c in module.configurations
                if _there(c.hardware, options) and not _lacking(module, c.hardware, options)
            )
            if not left:
                raise _nothing(chain, module, options)
            modules.append(replace(module, configurations=left))
        found.append(replace(chain, modules=tuple(modules)))
    return found


def too_few(chains: Iterable[PlannedChain], options: Options) -> PlanError:
    """What to say where limits leave no plan."""
    kinds = {c.hardware for chain in chains for m in chain.modules for c in m.configurations}
    limits = ", ".join(
        f"{options.machine_limits[kind]} x {kind}"
        for kind in sorted(kinds & options.machine_limits.keys())
    )
    return PlanError(
        f"the machines do not suffice ({limits}): allow more of them, a lower rate or a longer "
        "slo_ms"
    )


def _there(hardware: str, options: Options) -> bool:
    return options.machine_limits.get(hardware, inf) >= 1


def _lacking(module: PlannedModule, hardware: str, options: Options) -> bool:
    """Whether the model is known to need more memory than there is."""
    there_bytes = options.memory_bytes.get(hardware, 0)
    return 0 < there_bytes < module.memory_bytes.get(hardware, 0)


def _nothing(chain: PlannedChain, module: PlannedModule, options: Options) -> PlanError:
    """Where there are machines the model is too large for all of them."""
    kinds = sorted({c.hardware for c in module.configurations if _there(c.hardware, options)})
    if not kinds:
        return too_few([chain], options)
    told = " and ".join(
        f"{-(-module.memory_bytes[kind] // MIB)} MiB on {kind}, which has "
        f"{options.memory_bytes[kind] // MIB} MiB"
        for kind in kinds
    )
    return PlanError(
        f"module {module.name} of chain {chain.name!r} needs {told}; give it hardware with more "
        "memory, or a smaller model",
        chain=chain.name,
        key=f"modules.{module.name}.model",
    )
