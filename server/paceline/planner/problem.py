"""What is to be planned: chains with rates and configurations, and the planner's options.

Invariant: a `PlannedChain` that exists has positive rates, an objective and a topological order.
`demand` is the one place where core's chains and profiles become the planner's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, get_args

from paceline.core.chain import Chain, Module
from paceline.core.errors import ConfigError
from paceline.core.profile import Configuration, Hardware, Profiles
from paceline.planner.worst_case import DISPATCHES, Dispatch

Billing = Literal["fractional", "machine"]
BILLINGS: tuple[str, ...] = get_args(Billing)


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """One module's demand; `rate_rps` is the chain's rate times the module's fan-out.

    `overhead_s` is what the front server and the network add to its worst case. `memory_bytes` is
    what the model needs by hardware; left out: unknown.
    """

    name: str
    model: str
    rate_rps: float
    parents: tuple[str, ...]
    configurations: tuple[Configuration, ...]
    overhead_s: float = 0.0
    memory_bytes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        key = f"modules.{self.name}"
        if not (isfinite(self.rate_rps) and self.rate_rps > 0):
            raise ConfigError(f"needs a rate above 0, got {self.rate_rps} requests/s", key=key)
        if not self.configurations:
            raise ConfigError(f"model {self.model!r} has no configuration to run in", key=key)
        if not (isfinite(self.overhead_s) and self.overhead_s >= 0):
            raise ConfigError(f"needs an overhead of 0 or more, got {self.overhead_s} s", key=key)


@dataclass(frozen=True, slots=True)
class PlannedChain:
    """One chain's demand; `modules` in topological order."""

    name: str
    slo_s: float
    rate_rps: float
    modules: tuple[PlannedModule, ...]

    def __post_init__(self) -> None:
        if not (isfinite(self.slo_s) and self.slo_s > 0):
            raise ConfigError(f"chain {self.name!r} needs slo_ms above 0", key="slo_ms")
        if not (isfinite(self.rate_rps) and self.rate_rps > 0):
            raise ConfigError(f"chain {self.name!r} needs rate_rps above 0", key="rate_rps")
        if not self.modules:
            raise ConfigError(f"chain {self.name!r} has no modules", key="modules")
        seen: set[str] = set()
        for module in self.modules:
            late = [parent for parent in module.parents if parent not in seen]
            if late or module.name in seen:
                problem = f"waits for {late[0]!r}, which is not before it" if late else "is twice"
                raise ConfigError(
                    f"{problem} in chain {self.name!r}; list each module once, after its parents",
                    key=f"modules.{module.name}",
                )
            seen.add(module.name)


@dataclass(frozen=True, slots=True)
class Options:
    """How to plan; every part of Harpagon can be switched off to measure what it contributes.

    `max_tuples` limits the configurations a module may mix (None: no limit); `dummy` tops rates
    up to whole machines; `reassign` offers unused latency to the residuals; `efficiency` splits the
    objective by latency-cost efficiency (without: in proportion to the modules' least latencies),
    with `node_merger` and `cost_direct` as its refinements. `strict` takes the published walk over
    configurations as it comes, where otherwise other walks are tried as well and the cheapest
    counts. These are Harpagon's; `optimal` has nothing to switch off.

    `billing` "machine" plans whole machines that modules share, at most `machine_limits` of each
    hardware. A machine has `memory_bytes` under either billing (left out: no limit). Without
    `bound` the plan's lower bound is left at 0: nothing else depends on it, and it takes a good
    part of the time.
    """

    policy: str = "harpagon"
    dispatch: Dispatch = "throughput-cost"
    max_tuples: int | None = None
    dummy: bool = True
    reassign: bool = True
    efficiency: bool = True
    node_merger: bool = True
    cost_direct: bool = True
    strict: bool = False
    billing: Billing = "fractional"
    machine_limits: Mapping[str, int] = field(default_factory=dict)
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    bound: bool = True

    def __post_init__(self) -> None:
        if self.billing not in BILLINGS:
            raise ConfigError(
                f"unknown billing {self.billing!r}; choose one of {', '.join(BILLINGS)}",
                key="billing",
            )
        for name, limit in self.machine_limits.items():
            if limit < 0:
                raise ConfigError(f"{name!r} needs a limit of 0 or more", key="machine_limits")
        if self.dispatch not in DISPATCHES:
            raise ConfigError(
                f"unknown dispatch {self.dispatch!r}; choose one of {', '.join(DISPATCHES)}",
                key="dispatch",
            )
        if self.max_tuples is not None and self.max_tuples < 1:
            raise ConfigError(f"must be 1 or more, got {self.max_tuples}", key="max_tuples")


def demand(
    chain: Chain,
    rate_rps: float,
    profiles: Profiles,
    hardware: Mapping[str, Hardware],
    row_limits: Mapping[str, int],
    overhead_s: float,
) -> PlannedChain:
    """What `chain` demands at `rate_rps` chain requests/s.

    `row_limits` is the largest batch each model accepts (no entry: no limit). A module's fan-out
    is per chain request, so it multiplies the chain's rate and is not nested.
    Raises ConfigError for a model without a profile, or a rate that is not above 0.
    """

    def configurations(module: Module) -> tuple[Configuration, ...]:
        limit = row_limits.get(module.model, 1 << 30)
        try:
            return profiles.configurations(module.model, hardware, limit=limit)
        except ConfigError as error:
            raise ConfigError(error.message, key=f"modules.{module.name}.model") from None

    return PlannedChain(
        name=chain.name,
        slo_s=chain.slo_s,
        rate_rps=rate_rps,
        modules=tuple(
            PlannedModule(
                name=module.name,
                model=module.model,
                rate_rps=rate_rps * module.fan_out,
                parents=module.parents,
                configurations=configurations(module),
                overhead_s=overhead_s,
                memory_bytes=memory_bytes(profiles, module.model),
            )
            for module in chain.modules
        ),
    )


def memory_bytes(profiles: Profiles, model: str) -> dict[str, int]:
    """The most that any measured batch size of `model` needs, by hardware, where known."""
    found: dict[str, int] = {}
    for row in profiles.rows:
        if row.model == model and row.memory_bytes:
            found[row.hardware] = max(found.get(row.hardware, 0), row.memory_bytes)
    return dict(sorted(found.items()))
