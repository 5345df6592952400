"""Loading and planning begin again where our own Triton died under them, whatever it broke."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from paceline.core.errors import BackendError, ErrorKind, PacelineError, PlanError, ResidencyError
from paceline.core.plan import Plan
from paceline.serving import MOST_STARTS, start_chains

LOST = BackendError("Triton is not reachable", kind=ErrorKind.UNAVAILABLE)
UNLOADED = ResidencyError("model 'slow' is not loaded")
PLANNED = Plan("optimal", "fractional", ())


class Starting:
    """Whose first starts fail."""

    def __init__(self, failures: Sequence[PacelineError]) -> None:
        self.failures = list(failures)
        self.starts = 0

    async def start(self) -> Plan:
        self.starts += 1
        if self.failures:
            raise self.failures.pop(0)
        return PLANNED


async def back() -> bool:
    return True


async def alive() -> bool:
    return False


@pytest.mark.parametrize("failure", [LOST, UNLOADED])
async def test_it_begins_again_once_triton_is_back(failure: PacelineError) -> None:
    chains = Starting([failure])
    assert await start_chains(chains.start, back) is PLANNED
    assert chains.starts == 2


@pytest.mark.parametrize("failure", [LOST, UNLOADED])
async def test_a_failure_with_triton_alive_is_said_at_once(failure: PacelineError) -> None:
    chains = Starting([failure])
    with pytest.raises(type(failure)):
        await start_chains(chains.start, alive)
    assert chains.starts == 1


async def test_no_plan_is_no_reason_to_begin_again() -> None:
    chains = Starting([PlanError("no plan")])
    with pytest.raises(PlanError):
        await start_chains(chains.start, back)
    assert chains.starts == 1


async def test_the_last_failure_is_said() -> None:
    chains = Starting([LOST, UNLOADED, LOST, UNLOADED])
    with pytest.raises(BackendError):
        await start_chains(chains.start, back)
    assert chains.starts == MOST_STARTS
