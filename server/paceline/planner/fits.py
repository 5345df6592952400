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

MOST_TOLD = 3
"""Modules that are told of one by one."""


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


def with_left_out(error: PlanError, chains: Sequence[PlannedChain], options: Options) -> PlanError:
    """The same, and on which hardware, where an objective is too short, modules would be faster
    if they fitted into its memory.
    """
    told = [
        clause
        for chain in chains
        if chain.name == error.chain and error.lacking_s > 0
        for module in chain.modules
        if (clause := _too_large(module, options))
    ]
    if not told:
        return error
    more = [f"and {len(told) - MOST_TOLD} more modules"] if len(told) > MOST_TOLD else []
    return PlanError(
        f"{error}; left out for their memory_mib: {', '.join(told[:MOST_TOLD] + more)}",
        chain=error.chain,
        module=error.module,
        lacking_s=error.lacking_s,
        key=error.key,
    )


def _too_large(module: PlannedModule, options: Options) -> str:
    """The fastest hardware that it does not fit into; empty where what is left is as fast."""
    there = [c for c in module.configurations if _there(c.hardware, options)]
    left = [c for c in there if not _lacking(module, c.hardware, options)]
    fastest = min(there, key=lambda c: (c.duration_s, c.hardware))
    if fastest.duration_s >= min(c.duration_s for c in left):
        return ""
    kind = fastest.hardware
    return (
        f"{kind} ({module.name} would take {fastest.duration_s * 1e3:.3g} ms, but needs "
        f"{-(-module.memory_bytes[kind] // MIB)} MiB of {options.memory_bytes[kind] // MIB} MiB)"
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
