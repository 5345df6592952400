"""Run seeds, explain a failing one: `python -m tests.simulation.replay --seed 7` (`make sim`)."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from tests.simulation.book import Violation
from tests.simulation.shrink import ddmin
from tests.simulation.swarm import Case, draw, run

from paceline.sim.stimuli import Arrive, Install, Stimulus
from paceline.sim.world import EventLog


def violation(case: Case, stimuli: Sequence[Stimulus] | None = None) -> Violation | None:
    """What goes wrong when these stimuli are played."""
    try:
        run(case, stimuli)
    except Violation as found:
        return found
    return None


def explain(case: Case, found: Violation) -> str:
    """The seed, how to replay it, and the shortest list of stimuli that shows it."""

    def same(stimuli: Sequence[Stimulus]) -> bool:
        other = violation(case, stimuli)
        return other is not None and other.check == found.check

    short = ddmin(case.stimuli, same)
    log = EventLog()
    try:
        run(case, short, log)
    except Violation as shorter:
        found = shorter
    shown = "\n".join(f"  {describe(stimulus)}" for stimulus in short)
    tail = "\n".join(f"  {line}" for line in log.lines[-60:])
    machines = "\n".join(f"  {machine}" for machine in case.machines)
    return (
        f"seed {case.seed}: {found}\n"
        f"replay with: make sim SEED={case.seed}\n"
        f"machines:\n{machines}\n"
        f"shortest list of stimuli that shows it ({len(short)} of {len(case.stimuli)}):\n{shown}\n"
        f"the end of its event log:\n{tail}\n"
    )


def describe(stimulus: Stimulus) -> str:
    """One line."""
    match stimulus:
        case Arrive():
            shapes = " ".join(f"{t.name}{list(t.shape)}" for t in stimulus.inputs.values())
            rest = f" outputs={stimulus.outputs}" if stimulus.outputs else ""
            rest += f" priority={stimulus.priority}" if stimulus.priority is not None else ""
            return (
                f"Arrive({stimulus.at_s:.6f}, {stimulus.request}, {stimulus.chain}, {shapes}, "
                f"budget_s={stimulus.budget_s:g}{rest})"
            )
        case Install():
            sizes = {m.bound.name: dict(m.batch_sizes) for m in stimulus.route.modules}
            return f"Install({stimulus.at_s:.6f}, {stimulus.route.bound.name}, {sizes})"
        case _:
            return repr(stimulus)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this one and print its event log")
    parser.add_argument("--seeds", type=int, default=2000, help="run this many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    if given.seed is not None:
        case = draw(given.seed)
        log = EventLog()
        try:
            run(case, log=log)
        except Violation as broken:
            sys.stdout.write(log.text() + "\n" + explain(case, broken))
            return 1
        sys.stdout.write(log.text() + f"\nseed {given.seed}: all checks hold\n")
        return 0
    started_s = time.monotonic()
    for seed in range(given.first, given.first + given.seeds):
        case = draw(seed)
        if (found := violation(case)) is not None:
            sys.stdout.write(explain(case, found))
            return 1
    took_s = time.monotonic() - started_s
    sys.stdout.write(f"{given.seeds} seeds from {given.first}: all checks hold ({took_s:.1f} s)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
