"""Admission control: refuse at the door what would miss its deadline, so that overload does not
spend machines on late answers.

A request's end is predicted by walking its chain: a module starts when its parents have ended, and
not before a batch for one more row could start there. Rows ahead (admitted, not yet launched, as
urgent or more) fill whole batches, which start on the slots in the order in which they are expected
to be free; the batch that the request joins grows at the planned rate until it starts.

Invariant: `ahead` counts, by module and priority, exactly the rows (expected, then actual) that
admitted requests have not yet had launched there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from paceline.core.errors import ErrorKind, Rejected
from paceline.dispatch.machines import MachinePool
from paceline.dispatch.route import ChainRoute, ModuleRoute

LEAST_RETRY_S = 0.001
_NOTHING_ROWS = 1e-6


@dataclass(slots=True)
class _Ahead:
    """Rows ahead at one module, by priority."""

    route: ModuleRoute
    rows: dict[int, float] = field(default_factory=dict)

    def up_to(self, priority: int) -> float:
        if len(self.rows) == 1 and priority in self.rows:
            return self.rows[priority]
        return sum(rows for other, rows in self.rows.items() if other <= priority)


class Ticket:
    """What one admitted request still has ahead of it, by module."""

    __slots__ = ("priority", "rows")

    def __init__(self, priority: int, rows: dict[int, float]) -> None:
        self.priority = priority
        self.rows = rows


class Admission:
    """See the module docstring."""

    def __init__(self) -> None:
        self._ahead: dict[int, _Ahead] = {}

    def admit(
        self, chain: ChainRoute, priority: int, budget_s: float, pool: MachinePool, now_s: float
    ) -> Ticket:
        """A ticket for a request with `budget_s` left.

        Raises Rejected (OVERLOADED, with `retry_after_s`) when it is predicted to end too late.
        """
        first = chain.modules[0]
        if first.rate_rps > 0:
            excess_s = self.predicted_s(chain, priority, pool, now_s) - budget_s
            if excess_s > 0:
                raise Rejected(
                    ErrorKind.OVERLOADED,
                    f"'{chain.bound.name}' is overloaded: the answer would come "
                    f"{excess_s * 1e3:.0f} ms too late",
                    shortfall_s=excess_s,
                    retry_after_s=max(LEAST_RETRY_S, excess_s),
                )
        ticket = Ticket(priority, {})
        for route in chain.modules:
            self._add(ticket, route, route.fan_out)
        return ticket

    def predicted_s(
        self, chain: ChainRoute, priority: int, pool: MachinePool, now_s: float
    ) -> float:
        """Time from now to the answer of a request that would enter now."""
        ends_s: dict[str, float] = {}
        for route in chain.modules:
            there_s = max((ends_s[parent] for parent in route.bound.module.parents), default=0.0)
            start_s, rows = self._start(route, priority, pool, now_s)
            start_s = max(there_s, start_s)
            rows = min(route.full_rows, rows + int(route.rate_rps * start_s))
            ends_s[route.name] = start_s + route.best_s(rows)
        return max(ends_s.values())

    def counted(self, ticket: Ticket, route: ModuleRoute, rows: int) -> None:
        """A module's real number of rows is known (0: it does not run)."""
        self._add(ticket, route, rows - ticket.rows.get(id(route), 0.0))

    def counted_again(self, ticket: Ticket, route: ModuleRoute, rows: int) -> None:
        """Rows that were launched have to be launched once more."""
        self._add(ticket, route, rows)

    def launched(self, ticket: Ticket, route: ModuleRoute, rows: int) -> None:
        """Some of its rows went to a machine."""
        self._add(ticket, route, -rows)

    def ended(self, ticket: Ticket) -> None:
        """Whatever was left is not ahead of anybody any more."""
        for key, rows in ticket.rows.items():
            self._drop(key, ticket.priority, rows)
        ticket.rows.clear()

    def _start(
        self, route: ModuleRoute, priority: int, pool: MachinePool, now_s: float
    ) -> tuple[float, int]:
        """When a batch with one more row could start, from now, and its rows so far.

        At once, where nobody can tell.
        """
        if route.row_s <= 0:
            return 0.0, 1
        ahead = self._ahead.get(id(route))
        rows = ahead.up_to(priority) if ahead is not None else 0.0
        batches, joined = divmod(int(rows + _NOTHING_ROWS), route.full_rows)
        if batches == 0 and len(self._ahead) <= 1 and pool.any_free(route.model, now_s):
            return 0.0, joined + 1
        free_s = pool.free_at_s(route.model, now_s)
        if not free_s:
            return 0.0, 1
        rounds, position = divmod(batches, len(free_s))
        own_s = free_s[position] - now_s + rounds * route.row_s * route.full_rows
        return own_s + self._others_s(route, priority, pool), joined + 1

    def _others_s(self, route: ModuleRoute, priority: int, pool: MachinePool) -> float:
        """Work of other modules that goes before, spread over all slots."""
        work_s = sum(
            ahead.up_to(priority) * ahead.route.row_s
            for key, ahead in self._ahead.items()
            if key != id(route) and pool.share_machine(route.model, ahead.route.model)
        )
        return work_s / max(1, pool.slots())

    def _add(self, ticket: Ticket, route: ModuleRoute, rows: float) -> None:
        key = id(route)
        left = max(0.0, ticket.rows.get(key, 0.0) + rows)
        change = left - ticket.rows.get(key, 0.0)
        ticket.rows[key] = left
        ahead = self._ahead.get(key)
        if ahead is None:
            ahead = self._ahead[key] = _Ahead(route)
        ahead.rows[ticket.priority] = ahead.rows.get(ticket.priority, 0.0) + change

    def _drop(self, key: int, priority: int, rows: float) -> None:
        ahead = self._ahead.get(key)
        if ahead is None:
            return
        left = ahead.rows.get(priority, 0.0) - rows
        if left > _NOTHING_ROWS:
            ahead.rows[priority] = left
            return
        # Sums of floats end near 0, not at it: start over, so that errors do not add up.
        ahead.rows.pop(priority, None)
        if not ahead.rows:
            del self._ahead[key]
