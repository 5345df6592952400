"""What residency knows of models and machines."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from paceline.residency.evict import Eviction, Rate, weight
from paceline.residency.ledger import Footprint, Held, Ledger, Phase

FIRST_LOAD_S = 1.0
"""What a load is believed to take before one was seen."""

LEAST_LOAD_S = 1e-3
"""A load is believed to take at least that: what costs nothing would never be kept."""

LOAD_WEIGHT = 0.3
"""Weight of the newest load, or unload, in the learned duration."""

SERVER_FREE_BYTES = 64 << 20
"""What a server may grow by before that is a leak: buffers that it keeps."""

SERVER_LOOKS = 12
"""A server has grown by the least of its newest measurements: a peak is no leak."""

RECYCLE_EVERY_S = 600.0
"""A machine whose server grows is restarted that seldom: what comes back at once is no leak."""

FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 60.0
"""How long a model that did not load on a machine is not tried there again."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`most_loads` at a time on a machine, if `paced` fewer where what runs could not bear them;
    `held_s`: how long that may hold up a load that a request waits for; `leak_share` of a budget
    that may be leaked before the machine is recycled.
    """

    most_loads: int = 4
    held_s: float = 1.0
    leak_share: float = 0.1
    eviction: Eviction = "cost"
    paced: bool = True


@dataclass(slots=True)
class Failure:
    count: int
    until_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Worth:
    """What a chain says about a model it uses."""

    rate_rps: float
    priority: int
    keep_alive_s: float | None


@dataclass(slots=True)
class Model:
    name: str
    footprint: Footprint
    instances: Mapping[str, int]
    load_s: float = FIRST_LOAD_S
    """Of all of it, where nothing that it shares is there."""
    loads: int = 0
    whole_loads: int = 0
    rate: Rate = field(default_factory=Rate)
    used_s: float = 0.0
    chains: dict[str, Worth] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    withdrawn: bool = False
    asleep: bool = False
    """Unloaded because nobody used it: loaded again on demand only."""

    @property
    def keep_alive_s(self) -> float | None:
        """The longest that a chain wants it kept; None: nobody minds that it stays."""
        known = [worth.keep_alive_s for worth in self.chains.values()]
        if not known or None in known:
            return None
        return max(s for s in known if s is not None)

    @property
    def weight(self) -> float:
        return weight(min((w.priority for w in self.chains.values()), default=0))

    def loss(self, now_s: float, unload_s: float) -> float:
        """What its absence costs, per second, where others take `unload_s` to make room."""
        return self.rate.at(now_s) * (self.load_s + unload_s) * self.weight

    def learn_load(self, took_s: float, *, whole: bool = True) -> None:
        """A load that was not `whole` tells only that one which is takes as long at least."""
        took_s = max(took_s, LEAST_LOAD_S)
        self.loads += 1
        first = self.loads == 1 or (whole and not self.whole_loads)
        self.whole_loads += whole
        if whole or not self.whole_loads or took_s > self.load_s:
            self.load_s += (1.0 if first else LOAD_WEIGHT) * (took_s - self.load_s)

    def failed(self, machine: str, reason: str, now_s: float) -> None:
        before = self.failures.get(machine)
        count = before.count + 1 if before is not None else 1
        backoff_s = min(FIRST_BACKOFF_S * 2.0 ** (count - 1), LONGEST_BACKOFF_S)
        self.failures[machine] = Failure(min(count, 16), now_s + backoff_s, reason)

    def barred(self, machine: str, now_s: float) -> Failure | None:
        """Why it is not tried on that machine now."""
        failure = self.failures.get(machine)
        return failure if failure is not None and now_s < failure.until_s else None


@dataclass(frozen=True, slots=True)
class Change:
    """Of an instance count."""

    before: int
    after: int


@dataclass(slots=True)
class Machine:
    name: str
    ledger: Ledger
    recyclable: bool = False
    fill: list[str] = field(default_factory=list)
    interference: tuple[float, ...] = ()
    """How many times as long batches take under 1, 2, ... loads; none: not known."""
    bearable: float = inf
    recycling: str = ""
    """Why it is to be restarted; "" when it is not."""
    asked: bool = False
    """The restart is under way."""
    server_base_bytes: int | None = None
    """What its server took when it was measured first."""
    server_bytes: deque[int] = field(default_factory=lambda: deque(maxlen=SERVER_LOOKS))
    shares: Mapping[str, float] = field(default_factory=dict)
    """How its loads split their links, as said last."""
    growing: dict[str, Change] = field(default_factory=dict)
    """Instance counts that are being changed in place."""

    def copy(self, model: str) -> Held | None:
        """The model here, if leases can be granted on it."""
        held = self.ledger.get(model)
        return held if held is not None and held.open and not self.recycling else None

    def server_measured(self, size_bytes: int) -> None:
        """Its server takes that much; what has lasted counts as held."""
        if self.server_base_bytes is None:
            self.server_base_bytes = size_bytes
        self.server_bytes.append(size_bytes)
        if len(self.server_bytes) == SERVER_LOOKS:
            more = min(self.server_bytes) - self.server_base_bytes - SERVER_FREE_BYTES
            self.ledger.grown(max(0, more))

    @property
    def loading(self) -> int:
        """Loads under way."""
        return sum(held.phase is Phase.LOADING for held in self.ledger.held())

    @property
    def starting(self) -> int:
        """Loads under way, those of further instances too."""
        return self.loading + len(self.growing)

    def allowed_loads(self, most: int) -> int:
        """Loads at a time that what runs can bear."""
        if not self.interference or self.bearable == inf:
            return most
        # What loads do not slow down at all they may go on beside, however late it is.
        limit = max(self.bearable, 1.0)
        return min(most, sum(factor <= limit for factor in self.interference))


@dataclass(frozen=True, slots=True)
class Gone:
    """A model that was unloaded, and why."""

    at_s: float
    machine: str
    model: str
    size_bytes: int
    why: str


@dataclass(slots=True)
class Counts:
    """Since the start. A miss is a use of a model that was not there."""

    hits: int = 0
    misses: int = 0
    loads: int = 0
    load_failures: int = 0
    loaded_bytes: int = 0
    evictions: int = 0
    unloads: int = 0
    refused: int = 0
    leaks: int = 0
    recycles: int = 0
