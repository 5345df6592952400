"""Plans: which machines run what, for how much. Produced by the planner, followed by dispatch.

Times in seconds, money per hour; `as_json` converts at the edge into the published format.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import floor
from typing import Any


@dataclass(frozen=True, slots=True)
class Allocation:
    """`machines` (fractional allowed) of `hardware` running batches of `batch_size`."""

    hardware: str
    batch_size: int
    duration_s: float
    machines: float
    price_per_hour: float

    @property
    def rate_rps(self) -> float:
        """What it serves at full use."""
        return self.machines * self.batch_size / self.duration_s

    @property
    def cost_per_hour(self) -> float:
        return self.machines * self.price_per_hour


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One module's share of the objective and the machines that keep it.

    `rate_rps` is what is asked of it, `dummy_rps` what its allocations can serve beyond: requests
    that fill batches, and headroom.
    """

    module: str
    model: str
    rate_rps: float
    dummy_rps: float
    latency_budget_s: float
    latency_worst_s: float
    allocations: tuple[Allocation, ...]

    @property
    def cost_per_hour(self) -> float:
        return sum(a.cost_per_hour for a in self.allocations)

    @property
    def machines(self) -> float:
        return sum(a.machines for a in self.allocations)

    @property
    def batch_size(self) -> int:
        """The largest batch it runs."""
        return max(a.batch_size for a in self.allocations)


@dataclass(frozen=True, slots=True)
class ChainPlan:
    """One chain's modules; `latency_worst_s` is that of its slowest path.

    `wanted`: the plan for its whole rate, where machines do not suffice for that one.
    """

    chain: str
    slo_s: float
    rate_rps: float
    latency_worst_s: float
    modules: tuple[ModulePlan, ...]
    wanted: ChainPlan | None = None

    def module(self, name: str) -> ModulePlan:
        return next(m for m in self.modules if m.module == name)

    @property
    def cost_per_hour(self) -> float:
        return sum(m.cost_per_hour for m in self.modules)


@dataclass(frozen=True, slots=True)
class Share:
    """What one module has of a machine; `cycle_s` is the machine's duty cycle.

    0: it has none, the batch that is due first runs first. `utilisation` is the share of time that
    it works for requests at the module's `rate_rps`, headroom and dummies not counted.
    """

    chain: str
    module: str
    batch_size: int
    utilisation: float
    cycle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PackedMachine:
    """One whole machine and the modules that share it."""

    hardware: str
    price_per_hour: float
    shares: tuple[Share, ...]
    memory_bytes: int = 0

    @property
    def utilisation(self) -> float:
        """The share of time that it works."""
        return sum(share.utilisation for share in self.shares)


@dataclass(frozen=True, slots=True)
class ChainAttainment:
    """What one chain attained under `arrivals` when its plan was executed in virtual time.

    `at_least` is the lower end of the confidence interval. It was planned for `rate_factor` times
    its rate within `slo_factor` times its objective; by `policy` where that is not the plan's.
    """

    chain: str
    arrivals: str
    target: float
    simulated: float
    at_least: float
    requests: int
    rate_factor: float = 1.0
    slo_factor: float = 1.0
    policy: str = ""


@dataclass(frozen=True, slots=True)
class Attainment:
    """What a plan attains; `without_per_hour` is what it would cost without the headroom."""

    chains: tuple[ChainAttainment, ...]
    confidence: float
    without_per_hour: float

    @property
    def tightest(self) -> ChainAttainment:
        """The chain that is the nearest to its target."""
        return min(self.chains, key=lambda c: c.simulated - c.target)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything planned together; `machines` is the packing where whole machines are paid for."""

    policy: str
    billing: str
    chains: tuple[ChainPlan, ...]
    lower_bound_per_hour: float = 0.0
    solve_s: float = field(default=0.0, compare=False)
    machines: tuple[PackedMachine, ...] = ()
    attainment: Attainment | None = None

    @property
    def cost_per_hour(self) -> float:
        if self.billing == "machine":
            return sum(m.price_per_hour for m in self.machines)
        return sum(c.cost_per_hour for c in self.chains)

    @property
    def gap(self) -> float:
        """By how much, relatively, the cost is above the lower bound."""
        bound = self.lower_bound_per_hour
        return self.cost_per_hour / bound - 1 if bound > 0 else 0.0

    def chain(self, name: str) -> ChainPlan | None:
        return next((c for c in self.chains if c.chain == name), None)

    def as_json(self) -> dict[str, Any]:
        """The published plan format (milliseconds, prices per hour)."""
        return {
            "policy": self.policy,
            "billing": self.billing,
            "cost_per_hour": _round(self.cost_per_hour),
            "lower_bound_per_hour": _round_down(self.lower_bound_per_hour),
            "solve_ms": _ms(self.solve_s),
            **({} if self.attainment is None else {"attainment": self._attainment_json()}),
            "chains": [_chain_json(c) for c in self.chains],
            **({"machines": packing} if (packing := self._packing_json()) else {}),
        }

    def _attainment_json(self) -> dict[str, Any]:
        """Of the chain that is the nearest to its target; then of each."""
        assert self.attainment is not None
        found = self.attainment
        return {
            **_attained_json(found.tightest),
            "confidence": found.confidence,
            "headroom_per_hour": _round(self.cost_per_hour - found.without_per_hour),
            "chains": [{"chain": c.chain, **_attained_json(c)} for c in found.chains],
        }

    def _packing_json(self) -> list[dict[str, Any]]:
        return [
            {
                "hardware": machine.hardware,
                "shares": [
                    {
                        "chain": share.chain,
                        "module": share.module,
                        "batch_size": share.batch_size,
                        "utilisation": _round(share.utilisation),
                        "duty_cycle_ms": _ms(share.cycle_s),
                    }
                    for share in machine.shares
                ],
                "memory_mib": machine.memory_bytes // (1 << 20),
            }
            for machine in self.machines
        ]


def _attained_json(chain: ChainAttainment) -> dict[str, Any]:
    return {
        "arrivals": chain.arrivals,
        "target": chain.target,
        "simulated": _round(chain.simulated),
        "requests": chain.requests,
        "at_least": _round_down(chain.at_least),
        "rate_factor": _round(chain.rate_factor),
        "slo_factor": _round(chain.slo_factor),
        **({"policy": chain.policy} if chain.policy else {}),
    }


def _chain_json(chain: ChainPlan) -> dict[str, Any]:
    return {
        "chain": chain.chain,
        "slo_ms": _ms(chain.slo_s),
        "rate_rps": _round(chain.rate_rps),
        "latency_worst_ms": _ms(chain.latency_worst_s),
        "modules": [
            {
                "module": m.module,
                "model": m.model,
                "rate_rps": _round(m.rate_rps),
                "dummy_rps": _round(m.dummy_rps),
                "latency_budget_ms": _ms(m.latency_budget_s),
                "latency_worst_ms": _ms(m.latency_worst_s),
                "allocations": [
                    {
                        "hardware": a.hardware,
                        "batch_size": a.batch_size,
                        "duration_ms": _ms(a.duration_s),
                        "machines": _round(a.machines),
                        "price_per_hour": a.price_per_hour,
                    }
                    for a in m.allocations
                ],
            }
            for m in chain.modules
        ],
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _round(value: float) -> float:
    return round(value, 6)


def _round_down(value: float) -> float:
    """A bound that is printed must still be one."""
    return floor(value * 1e6) / 1e6
