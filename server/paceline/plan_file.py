"""Reading back a plan that `paceline plan --format json` wrote.

Every error is a ConfigError that names the file and the key. Times are milliseconds outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paceline.core.errors import ConfigError
from paceline.core.plan import Allocation, ChainPlan, ModulePlan, PackedMachine, Plan, Share
from paceline.core.profile import Hardware
from paceline.files import MAX_FILE_BYTES, MIB

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_AtLeast0 = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    """Keys that a later version adds are passed over."""

    model_config = ConfigDict(extra="ignore")


class _AllocationFile(_Part):
    hardware: str
    batch_size: Annotated[int, Field(ge=1)]
    duration_ms: _Positive
    machines: _Positive
    price_per_hour: _Positive


class _ModuleFile(_Part):
    module: str
    model: str
    rate_rps: _Positive
    dummy_rps: _AtLeast0 = 0.0
    latency_budget_ms: _AtLeast0
    latency_worst_ms: _AtLeast0
    allocations: Annotated[list[_AllocationFile], Field(min_length=1)]


class _ChainFile(_Part):
    chain: str
    slo_ms: _Positive
    rate_rps: _Positive
    latency_worst_ms: _AtLeast0
    modules: Annotated[list[_ModuleFile], Field(min_length=1)]


class _ShareFile(_Part):
    chain: str
    module: str
    batch_size: Annotated[int, Field(ge=1)]
    utilisation: _AtLeast0
    duty_cycle_ms: _AtLeast0 = 0.0


class _MachineFile(_Part):
    hardware: str
    shares: Annotated[list[_ShareFile], Field(min_length=1)]
    memory_mib: Annotated[int, Field(ge=0)] = 0


class _PlanFile(_Part):
    policy: str
    billing: str
    lower_bound_per_hour: _AtLeast0 = 0.0
    chains: Annotated[list[_ChainFile], Field(min_length=1)]
    machines: list[_MachineFile] = []


def read_plan(path: Path, prices: Mapping[str, Hardware]) -> Plan:
    """The plan in this file; shared machines cost what `prices` says."""
    parsed = _parsed(path)
    modules = {(chain.chain, m.module) for chain in parsed.chains for m in chain.modules}
    for machine in parsed.machines:
        if machine.hardware not in prices:
            raise ConfigError(
                f"no price of hardware {machine.hardware!r}", key="machines", where=path.name
            )
        for share in machine.shares:
            if (share.chain, share.module) not in modules:
                raise ConfigError(
                    f"no module {share.module!r} of a chain {share.chain!r} in this plan",
                    key="machines",
                    where=path.name,
                )
    return Plan(
        parsed.policy,
        parsed.billing,
        tuple(_chain(chain) for chain in parsed.chains),
        parsed.lower_bound_per_hour,
        machines=tuple(
            PackedMachine(
                machine.hardware,
                prices[machine.hardware].price_per_hour,
                tuple(
                    Share(s.chain, s.module, s.batch_size, s.utilisation, s.duty_cycle_ms / 1e3)
                    for s in machine.shares
                ),
                machine.memory_mib * MIB,
            )
            for machine in parsed.machines
        ),
    )


def planned_rates(path: Path) -> dict[str, float]:
    """The rate of each chain in this file."""
    return {chain.chain: chain.rate_rps for chain in _parsed(path).chains}


def planned_modules(path: Path) -> dict[str, list[str]]:
    """The modules of each chain in this file."""
    return {chain.chain: [m.module for m in chain.modules] for chain in _parsed(path).chains}


def _parsed(path: Path) -> _PlanFile:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"larger than {MAX_FILE_BYTES // MIB} MiB", where=str(path))
        return _PlanFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except ValidationError as error:
        finding = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in finding["loc"])
        problem = finding["msg"][0].lower() + finding["msg"][1:]
        raise ConfigError(
            f"{problem}; write it with `paceline plan --format json`", key=key, where=path.name
        ) from None


def _chain(chain: _ChainFile) -> ChainPlan:
    return ChainPlan(
        chain.chain,
        chain.slo_ms / 1e3,
        chain.rate_rps,
        chain.latency_worst_ms / 1e3,
        tuple(
            ModulePlan(
                m.module,
                m.model,
                m.rate_rps,
                m.dummy_rps,
                m.latency_budget_ms / 1e3,
                m.latency_worst_ms / 1e3,
                tuple(
                    Allocation(
                        a.hardware, a.batch_size, a.duration_ms / 1e3, a.machines, a.price_per_hour
                    )
                    for a in m.allocations
                ),
            )
            for m in chain.modules
        ),
    )
