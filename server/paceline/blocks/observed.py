"""Which models are used together, as observed: by a running server, or by one that ran here.

A server's status has what became of each chain's requests and their fan-outs, its statistics the
rows that each model executed, whoever asked for them. A state directory (`paceline.sqlite3`) has
the traffic that was last planned for, and its chains, also those applied over the API; it is only
read.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.config import parse_chain
from paceline.core.chain import Chain, Module
from paceline.core.errors import ConfigError
from paceline.database import FILE


@dataclass(frozen=True, slots=True)
class Observed:
    """Requests/s by chain, executions a request by (chain, module), rows/s by model in all.

    A chain without a rate was not observed. Rows that are not known are those of the chains.
    """

    rates_rps: Mapping[str, float] = field(default_factory=dict)
    fan_outs: Mapping[tuple[str, str], float] = field(default_factory=dict)
    rows_rps: Mapping[str, float] = field(default_factory=dict)

    def fan_out(self, chain: Chain, module: Module) -> float:
        return self.fan_outs.get((chain.name, module.name), module.fan_out)

    def module_rps(self, chain: Chain, module: Module) -> float:
        """Rows a second that a chain sends to one of its modules."""
        return self.rates_rps.get(chain.name, 0.0) * self.fan_out(chain, module)

    def model_rps(self, model: str, chains: Sequence[Chain]) -> float:
        """Rows a second that a model executes for all `chains`, and under its own name."""
        of_chains = sum(
            self.module_rps(chain, module)
            for chain in chains
            for module in chain.modules
            if module.model == model
        )
        return max(self.rows_rps.get(model, 0.0), of_chains)


def from_state(directory: Path) -> tuple[tuple[Chain, ...], Observed]:
    """Chains that were served from this state directory, and their traffic.

    Raises ConfigError if there is none.
    """
    path = directory / FILE
    if not path.is_file():
        raise ConfigError("no such file: `paceline serve` writes it", where=str(path))
    try:
        database = sqlite3.connect(f"file:{path.absolute()}?mode=ro", uri=True)
        try:
            rows = database.execute("SELECT name, document, rate_rps, fan_outs FROM traffic")
            found = [(parse_chain(row[1], name=row[0]), row[2], row[3]) for row in rows]
        finally:
            database.close()
    except sqlite3.Error as error:
        raise ConfigError(str(error), where=str(path)) from None
    fan_outs = {
        (chain.name, module): float(count)
        for chain, _, text in found
        for module, count in json.loads(text).items()
    }
    rates_rps = {chain.name: float(rate_rps) for chain, rate_rps, _ in found}
    return tuple(chain for chain, _, _ in found), Observed(rates_rps, fan_outs)


def from_server(address: str) -> Observed:
    """What a running server has seen since its start. Raises paceline.client's ServerError."""
    from paceline.client import statistics, statuses

    status = next(statuses(address, watch=False))
    return from_documents(status, statistics(address))


def from_documents(status: Mapping[str, Any], rows: Mapping[str, int]) -> Observed:
    """From a status (`paceline status --format json`) and the rows that each model executed."""
    uptime_s = max(float(status.get("uptime_s", 0.0)), 1.0)
    chains = {entry["chain"]: entry["met"] + entry["missed"] for entry in status["chains"]}
    traffic = status.get("replanning", {}).get("traffic", [])
    return Observed(
        {name: answered / uptime_s for name, answered in chains.items() if answered},
        {
            (entry["chain"], module): float(count)
            for entry in traffic
            for module, count in entry["fan_outs"].items()
        },
        {name: count / uptime_s for name, count in rows.items() if name not in chains},
    )
