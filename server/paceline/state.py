"""What survives a restart: chains applied over the Control API, and the traffic planned for.

Invariant: a change is on disk before it is served, in one transaction; whatever is killed, the
next start sees all of it or nothing.

Chain files are the operator's word: what was applied over the API replaces a chain only as long as
its file says what it said then.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from threading import Lock

from paceline.config import chain_document, parse_chain
from paceline.core.chain import Chain
from paceline.core.errors import ConfigError, ResidencyError
from paceline.database import FILE, connect
from paceline.planner.replan import Traffic

logger = logging.getLogger(__name__)


class State:
    """See the module docstring. Used by any thread; what writes waits for the disk."""

    def __init__(self, directory: Path) -> None:
        """Opens or creates the database in `directory`.

        Raises ConfigError when it was written by a newer Paceline or cannot be used at all; one
        that is damaged is put aside, and said so.
        """
        self._path = directory / FILE
        self._declared: dict[str, str] = {}
        self._turn = Lock()
        try:
            self._database = connect(directory, any_thread=True)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise ConfigError(f"{self._path}: {error}", key="--state-dir") from None
            aside = self._path.with_suffix(".damaged")
            logger.error("%s is damaged (%s); kept as %s, starting anew", FILE, error, aside.name)
            self._path.replace(aside)
            for suffix in ("-wal", "-shm"):
                self._path.with_name(FILE + suffix).unlink(missing_ok=True)
            self._database = connect(directory, any_thread=True)

    def close(self) -> None:
        with self._turn:
            self._database.close()

    def chains(self, declared: Sequence[Chain]) -> tuple[Chain, ...]:
        """What is to be served: `declared` in files, with what was applied and deleted since.

        What was applied over a file that has changed since is dropped, and said so.
        """
        self._declared = {chain.name: chain_document(chain) for chain in declared}
        served = {chain.name: chain for chain in declared}
        rows = self._database.execute("SELECT name, document, declared FROM chains").fetchall()
        for name, document, base in rows:
            if self._declared.get(name, "") != base:
                logger.warning("the file of chain %s has changed: it counts, not the API", name)
                self.forget([name])
            elif document is None:
                served.pop(name, None)
            else:
                try:
                    served[name] = parse_chain(document, name=f"{FILE}:{name}")
                except ConfigError as error:
                    logger.error("chain %s is not restored: %s", name, error)
        return tuple(served[name] for name in sorted(served))

    def redeclared(self, declared: Sequence[Chain]) -> tuple[tuple[Chain, ...], tuple[str, ...]]:
        """How files differ from what they said: (new or changed chains, names that are gone)."""
        now = {chain.name: chain_document(chain) for chain in declared}
        changed = tuple(c for c in declared if self._declared.get(c.name) != now[c.name])
        return changed, tuple(sorted(self._declared.keys() - now.keys()))

    def accept(self, declared: Sequence[Chain]) -> None:
        """`declared` is what the files say from now on; they count for what they changed."""
        changed, gone = self.redeclared(declared)
        self.forget([*(chain.name for chain in changed), *gone])
        self._declared = {chain.name: chain_document(chain) for chain in declared}

    def changed(self, applied: Iterable[Chain], deleted: Collection[str]) -> None:
        """Keep a change made over the API. Raises ResidencyError when it cannot be written."""
        rows: list[tuple[str, str | None]] = [(c.name, chain_document(c)) for c in applied]
        rows += [(name, None) for name in deleted if name in self._declared]
        try:
            with self._turn, self._database:
                self._database.executemany(
                    "DELETE FROM chains WHERE name = ?", [(name,) for name in deleted]
                )
                self._database.executemany(
                    "INSERT OR REPLACE INTO chains VALUES (?, ?, ?)",
                    [(name, document, self._declared.get(name, "")) for name, document in rows],
                )
        except sqlite3.Error as error:
            raise ResidencyError(f"{self._path} cannot be written: {error}") from None

    def forget(self, names: Iterable[str]) -> None:
        """What was applied of these chains counts no more; until a restart where that cannot be
        written, and said so.
        """
        try:
            with self._turn, self._database:
                self._database.executemany(
                    "DELETE FROM chains WHERE name = ?", [(name,) for name in names]
                )
        except sqlite3.Error as error:
            logger.warning("what was applied over the API is not forgotten: %s", error)

    def keep_traffic(self, traffic: Traffic, chains: Iterable[Chain]) -> None:
        """Remember what `chains` were planned for. A disk that is full costs only that."""
        rows = [
            (
                chain.name,
                chain_document(chain),
                traffic.rates_rps[chain.name],
                json.dumps({m.name: traffic.fan_outs[chain.name, m.name] for m in chain.modules}),
            )
            for chain in chains
            if chain.name in traffic.rates_rps
        ]
        try:
            with self._turn, self._database:
                self._database.execute("DELETE FROM traffic")
                self._database.executemany("INSERT INTO traffic VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            logger.warning("the traffic planned for is not kept: %s: %s", self._path, error)

    def traffic(self, chains: Iterable[Chain]) -> Traffic:
        """What was planned for, of those `chains` that are as they were then."""
        documents = {chain.name: chain_document(chain) for chain in chains}
        rates_rps: dict[str, float] = {}
        fan_outs: dict[tuple[str, str], float] = {}
        for name, document, rate_rps, by_module in self._database.execute("SELECT * FROM traffic"):
            if documents.get(name) == document:
                rates_rps[name] = rate_rps
                for module, fan_out in json.loads(by_module).items():
                    fan_outs[name, module] = fan_out
        return Traffic(rates_rps, fan_outs)
