"""A turn at what the loads of a machine share - a disk, a store, the cores - held for a while.

Who gets the next one is `turns`' affair, the asking `ledger`'s. Several pieces of work that follow
each other closely are one turn, because a turn costs about 0.3 ms. Whoever goes on when it is over
ends it and asks for the next one in one: in between others would be the only ones that wait, and an
urgent load would have every second turn at most.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from .manifest import PoolError
from .turns import TURN_S


class Turns(Protocol):
    """Permission to use it."""

    def begin(self, urgent: Callable[[], bool]) -> bool:
        """Blocks until it is this process's turn; `urgent` says whether a request waits.

        Returns whether nobody else has something to load.
        """

    def renew(self, amount: float, urgent: Callable[[], bool]) -> bool:
        """`end` and `begin`, but nobody comes between who would not come before."""

    def end(self, amount: float) -> None:
        """So much of it was used: bytes of a disk or a store, seconds of a core."""


class FreeTurns:
    """Nobody to share with."""

    def begin(self, urgent: Callable[[], bool]) -> bool:
        return True

    def renew(self, amount: float, urgent: Callable[[], bool]) -> bool:
        return True

    def end(self, amount: float) -> None: ...

    def moved(self, size_bytes: int) -> None: ...


class HeldTurn:
    """Of one thread."""

    def __init__(self, turns: Turns, urgent: Callable[[], bool]) -> None:
        self._turns = turns
        self._urgent = urgent
        self._since_s: float | None = None
        self._amount = 0.0
        self.alone = False
        """What the last `begin` said."""

    @property
    def held(self) -> bool:
        return self._since_s is not None

    @property
    def over(self) -> bool:
        """Whether it is not held, or was for so long that others may be next."""
        return self._since_s is None or time.perf_counter() - self._since_s >= TURN_S

    def begin(self) -> None:
        """Waits for it; of one that is held, for the next one."""
        held, amount = self.held, self._amount
        self._since_s, self._amount = None, 0.0
        if held:
            self.alone = self._turns.renew(amount, self._urgent)
        else:
            self.alone = self._turns.begin(self._urgent)
        self._since_s = time.perf_counter()

    def used(self, amount: float) -> None:
        self._amount += amount

    def end(self) -> None:
        if self._since_s is not None:
            self._since_s = None
            with contextlib.suppress(PoolError, OSError):  # its lease ends without us
                self._turns.end(self._amount)
            self._amount = 0.0

    @contextlib.contextmanager
    def without(self) -> Iterator[None]:
        """For waiting: others may have it meanwhile, and may need it for what is waited for."""
        held = self.held
        self.end()
        yield
        if held:
            self.begin()
