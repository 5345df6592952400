"""What the blocks models of a machine tell each other: one small table, shared by their processes.

Every process has a row, with its claim on a shared budget and its places in the queues for I/O and
for the cores.
A transaction locks the table (flock, which the kernel undoes when a process is killed), forgets
the rows of processes that are gone, and replaces the file in one rename: a process that is killed
anywhere leaves the table as it was. Processes that must act are woken through sockets of the
abstract namespace, which end with their owners. The last to leave removes everything.
Files are named after `FORMAT`: another version of Paceline keeps a table of its own beside this
one, and neither reads, refuses or removes the other's. What is shared out is so per version.

Invariant of a group: the limits in force never sum to more than its budget. A limit is raised only
by what others have given up, and given up only when the pages are gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

from .held_turn import Turns
from .manifest import PoolError
from .shares import Claim, divide
from .turns import TURN_S, Load, asked, began, ended, next_loads, weight
from .window import CHUNK_BYTES

FORMAT = 2
"""Of the table: one more whenever `Row`, `Load` or `Claim`, or what they mean, change."""
_TABLE, _FRESH, _LOCK = (f"{name}-{FORMAT}" for name in ("table", "fresh", "lock"))
_ENVIRONMENT = "PACELINE_BLOCKS_LEDGER"
_MAX_BYTES = 1 << 20
_CORES = "cores"
_RETRY_S = 0.1
"""How soon a wake-up that a dying process did not send is made up for."""
_numbers = count()
Kind = Literal["load", "building"]


@dataclass(frozen=True, slots=True)
class Row:
    """One model of one process: its loading of bytes, and its building of sessions.

    `limit_bytes` is in force; `claim` is None without a budget.
    `loading_bytes` is what a model that stays whole in memory, called `model` by its server, has
    to load; `moved_bytes` what it has moved so far.
    """

    pid: int
    started: str
    bell: str
    load: Load
    building: Load
    group: str = ""
    total_bytes: int = 0
    limit_bytes: int = 0
    claim: Claim | None = None
    model: str = ""
    loading_bytes: int = 0
    moved_bytes: int = 0

    def at(self, kind: Kind) -> Load:
        return self.load if kind == "load" else self.building

    def with_(self, kind: Kind, load: Load) -> Row:
        return replace(self, load=load) if kind == "load" else replace(self, building=load)

    @property
    def left_bytes(self) -> int:
        """Still to come."""
        return max(0, self.loading_bytes - self.moved_bytes)


class Bell:
    """Wakes a thread of this or another process."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.address = f"paceline-blocks-{os.getuid()}-{os.getpid()}-{next(_numbers)}"
        self._socket.bind("\0" + self.address)

    def wait(self, timeout_s: float | None) -> None:
        """Until it rings or the time is over; rings that came meanwhile are one."""
        self._socket.settimeout(timeout_s)
        with contextlib.suppress(TimeoutError):
            self._socket.recv(16)
            self._socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._socket.recv(16)

    def close(self) -> None:
        self._socket.close()


def ring(address: str) -> None:
    """A bell that is gone, or that has many rings waiting, needs none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.sendto(b"!", "\0" + address)


def default_directory() -> Path:
    """One for each user and process namespace: in another one our pids mean nothing."""
    chosen = os.environ.get(_ENVIRONMENT)
    if chosen:
        return Path(chosen)
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    return Path(f"/dev/shm/paceline-blocks-{os.getuid()}-{namespace}")


class Ledger:
    """This model's row in the machine's table. Methods may be called by any thread."""

    def __init__(self, channel: str, *, priority: int = 0, directory: Path | None = None) -> None:
        self._directory = directory or default_directory()
        self._priority = priority
        self._turn_bell, self._building_bell = Bell(), Bell()
        self.building: Turns = _Building(self)
        """At the cores, for building sessions; as many at a time as there are. For one thread."""
        self.bell = Bell()
        """Rings when a budget is divided anew."""
        self._name = self._turn_bell.address
        with self._table() as rows:
            rows[self._name] = Row(
                os.getpid(),
                _started(os.getpid()),
                self.bell.address,
                Load(channel, bell=self._turn_bell.address),
                Load(_CORES, bell=self._building_bell.address),
            )

    def expect(self, model: str, size_bytes: int) -> None:
        """So much is to be loaded, of what the server calls `model`."""
        with self._table() as rows:
            rows[self._name] = replace(rows[self._name], model=model, loading_bytes=size_bytes)

    def begin(self, urgent: Callable[[], bool]) -> bool:
        """See `held_turn.Turns`."""
        return self._begin(urgent, None)

    def renew(self, amount: float, urgent: Callable[[], bool]) -> bool:
        """See `held_turn.Turns`."""
        return self._begin(urgent, amount)

    def _begin(self, urgent: Callable[[], bool], used: float | None) -> bool:
        rows = self._take("load", urgent, self._turn_bell, turn=CHUNK_BYTES, used=used)
        mine = rows.pop(self._name)
        # Processes of one model fetch each object once: they have nothing to overtake.
        return not any(
            row.load.channel == mine.load.channel
            and (row.left_bytes or row.load.busy)
            and not (mine.model and row.model == mine.model)
            for row in rows.values()
        )

    def end(self, amount: float) -> None:
        """See `held_turn.Turns`."""
        self._give_back("load", amount)

    def _loads_alone(self) -> bool:
        """Whether nobody else loads, by a look at the table that keeps nobody from it."""
        others = (
            row for name, row in _read(self._directory / _TABLE).items() if name != self._name
        )
        return not any(row.left_bytes or row.load.busy or row.building.busy for row in others)

    def _take(
        self,
        kind: Kind,
        urgent: Callable[[], bool],
        bell: Bell,
        *,
        turn: float,
        used: float | None = None,
    ) -> dict[str, Row]:
        """Waits for a turn of this kind; everybody's rows then. `used`: of one that ends now."""
        while True:
            following: list[str] = []
            with self._table() as rows:
                if used is not None:
                    self._use(rows, kind, used)
                mine = rows[self._name]
                loads = {name: row.at(kind) for name, row in rows.items()}
                weighs = weight(urgent=urgent(), priority=self._priority, share=mine.load.share)
                load = loads[self._name] = asked(loads, self._name, weighs, turn=turn)
                now_s = time.monotonic()
                first = self._name in (coming := _next(loads, load.channel, now_s))
                if first:
                    load = began(load, now_s)
                elif used is not None:
                    following = coming
                rows[self._name] = mine.with_(kind, load)
                found = dict(rows)
            used = None
            if first:
                return found
            for name in following:
                ring(loads[name].bell)
            bell.wait(_until_next(loads, self._name, now_s))

    def _give_back(self, kind: Kind, amount: float) -> None:
        with self._table() as rows:
            self._use(rows, kind, amount)
            loads = {name: row.at(kind) for name, row in rows.items()}
            following = _next(loads, loads[self._name].channel, time.monotonic())
        for name in following:
            ring(loads[name].bell)

    def _use(self, rows: dict[str, Row], kind: Kind, amount: float) -> None:
        """This one's turn ends."""
        mine = rows[self._name]
        if kind == "load":
            mine = replace(mine, moved_bytes=mine.moved_bytes + int(amount))
        rows[self._name] = mine.with_(kind, ended(mine.at(kind), amount))

    def moved(self, size_bytes: int) -> None:
        """See `loader.LoadTurns`."""
        with self._table() as rows:
            mine = rows[self._name]
            rows[self._name] = replace(mine, moved_bytes=mine.moved_bytes + size_bytes)

    def join(self, group: str, total_bytes: int, floor_bytes: int) -> None:
        """Claims a share of the group's budget. Raises PoolError if it cannot hold one more."""
        with self._table() as rows:
            others = [
                row for name, row in rows.items() if name != self._name and row.group == group
            ]
            for row in others:
                if row.total_bytes != total_bytes:
                    raise PoolError(
                        f"shared_budget_mib of group {group!r} is {total_bytes >> 20} here and "
                        f"{row.total_bytes >> 20} in another model that is loaded: give one value"
                    )
            floors = sum(row.claim.floor_bytes for row in others if row.claim is not None)
            if floors + floor_bytes > total_bytes:
                raise PoolError(
                    f"shared_budget_mib {total_bytes >> 20} of group {group!r} cannot hold this "
                    f"model too: it needs {_mib(floor_bytes)} and the {len(others)} loaded ones "
                    f"need {_mib(floors)} at least"
                )
            claim = Claim(((floor_bytes, 0.0),), 0.0)
            rows[self._name] = replace(
                rows[self._name], group=group, total_bytes=total_bytes, claim=claim
            )
        for row in others:
            ring(row.bell)

    def exchange(self, claim: Claim, held_bytes: int) -> int:
        """Tells the claim and the most that may be held right now; the limit from here on.

        Whoever must give memory up gets a lower limit than it holds, and keeps the difference in
        the books until an `exchange` that says it is gone.
        """
        with self._table() as rows:
            mine = replace(rows[self._name], claim=claim)
            group = {name: row for name, row in rows.items() if row.group == mine.group}
            group[self._name] = mine
            claims = {name: row.claim for name, row in group.items() if row.claim is not None}
            share = divide(mine.total_bytes, claims).get(self._name, claim.floor_bytes)
            others = [row for name, row in group.items() if name != self._name]
            free = mine.total_bytes - sum(row.limit_bytes for row in others)
            booked = min(max(share, held_bytes), free)
            changed = booked != mine.limit_bytes
            rows[self._name] = replace(mine, limit_bytes=booked)
        if changed:
            for row in others:
                ring(row.bell)
        return min(share, booked)

    def rows(self) -> dict[str, Row]:
        """Everybody's, for people and tests."""
        with self._table() as rows:
            return dict(rows)

    def close(self) -> None:
        """Gives everything back; the last one removes the table."""
        with self._table() as rows:
            mine = rows.pop(self._name, None)
            others = [row for row in rows.values() if mine is not None and row.group == mine.group]
            if not rows:
                for name in (_TABLE, _FRESH, _LOCK):
                    (self._directory / name).unlink(missing_ok=True)
        for row in others:
            ring(row.bell)
        with contextlib.suppress(OSError):
            self._directory.rmdir()
        for bell in (self._turn_bell, self._building_bell, self.bell):
            bell.close()

    def _table(self) -> contextlib.AbstractContextManager[dict[str, Row]]:
        return _table(self._directory)


class _Building:
    """A ledger's turns at the cores. Who loads alone is not held up by taking any: others that come
    see that it loads, and it looks again when the turn would be over.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._taken = False

    def begin(self, urgent: Callable[[], bool]) -> bool:
        self._taken = not self._ledger._loads_alone()
        if self._taken:
            self._take(urgent, None)
        return not self._taken

    def renew(self, amount: float, urgent: Callable[[], bool]) -> bool:
        if not self._taken or self._ledger._loads_alone():
            self.end(amount)
            return self.begin(urgent)
        self._take(urgent, amount)
        return False

    def _take(self, urgent: Callable[[], bool], used: float | None) -> None:
        bell = self._ledger._building_bell
        self._ledger._take("building", urgent, bell, turn=TURN_S, used=used)

    def end(self, amount: float) -> None:
        if self._taken:
            self._ledger._give_back("building", amount)


def _next(loads: Mapping[str, Load], channel: str, now_s: float) -> list[str]:
    """A disk or store is for one at a time, and who begins while it ends."""
    if channel == _CORES:
        return next_loads(loads, channel, now_s, places=len(os.sched_getaffinity(0)))
    return next_loads(loads, channel, now_s, piece=CHUNK_BYTES)


def _until_next(loads: Mapping[str, Load], name: str, now_s: float) -> float:
    """Seconds until it may be this one's turn though nobody rings."""
    channel = loads[name].channel
    for load in loads.values():
        if load.channel == channel and load.holding_since_s is not None:
            over_s = load.holding_since_s + TURN_S
            if now_s < over_s and name in _next(loads, channel, over_s):
                return min(over_s - now_s, _RETRY_S)
    return _RETRY_S


def read_rows(directory: Path) -> dict[str, Row]:
    """Everybody's as of now, to look at: no lock is taken. Raises PoolError."""
    return _living(_read(directory / _TABLE))


def share_out(directory: Path, shares: Mapping[str, float]) -> None:
    """What these rows get of their channels from their next turns on. Raises PoolError."""
    with _table(directory) as rows:
        for name, share in shares.items():
            if name in rows:
                rows[name] = replace(rows[name], load=replace(rows[name].load, share=share))


@contextlib.contextmanager
def _table(directory: Path) -> Iterator[dict[str, Row]]:
    """The rows of processes that live, written back unless an error is raised."""
    handle = _locked(directory)
    try:
        path = directory / _TABLE
        rows = _living(_read(path))
        yield rows
        if rows:
            text = json.dumps({name: asdict(row) for name, row in rows.items()})
            fresh = directory / _FRESH
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(path)
    finally:
        os.close(handle)


def _living(rows: Mapping[str, Row]) -> dict[str, Row]:
    return {name: row for name, row in rows.items() if _started(row.pid) == row.started}


def _locked(directory: Path) -> int:
    """The table's lock, held; a directory that was removed meanwhile is made again."""
    while True:
        try:
            with contextlib.suppress(FileExistsError):
                directory.mkdir(mode=0o700)
            status = directory.lstat()
            if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
                raise PoolError(f"{directory} is not a directory of this user: remove it")
            handle = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            if directory.parent.is_dir():
                continue  # the last one that left has just removed it
            raise PoolError(f"{directory.parent}: no such directory; see {_ENVIRONMENT}") from None
        except OSError as error:
            raise PoolError(f"{directory}: {error.strerror}; see {_ENVIRONMENT}") from None
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)


def _read(path: Path) -> dict[str, Row]:
    try:
        with path.open("rb") as file:
            # As long as it is: a buffer for the longest there may be is a thread's for good.
            size_bytes = min(os.fstat(file.fileno()).st_size, _MAX_BYTES)
            document: dict[str, Any] = json.loads(file.read(size_bytes))
        return {name: _row(entry) for name, entry in document.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise PoolError(f"{path}: not a table of this version ({error!r}): remove it") from None


def _row(entry: dict[str, Any]) -> Row:
    claim = entry["claim"]
    if claim is not None:
        curve = tuple((int(size), float(seconds)) for size, seconds in claim["curve"])
        claim = Claim(curve, claim["rate_rps"], claim["weight"])
    loads = {kind: Load(**entry[kind]) for kind in ("load", "building")}
    return Row(**{**entry, **loads, "claim": claim})


def _started(pid: int) -> str:
    """When the process started, in ticks since boot: a number that pids are not reused with."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def _mib(count_bytes: int) -> str:
    return f"{count_bytes / 2**20:.1f} MiB"
