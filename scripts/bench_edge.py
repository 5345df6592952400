#!/usr/bin/env python
"""Users served in rounds of edge inference, by sharing of blocks and by number of users.

Compares, on the same seeded rounds:
  paceline        the schedule that counts shared blocks once (`paceline schedule`)
  unaware order   the order that is best when nothing is shared, executed with sharing: what a
                  server gains that keeps blocks but plans without knowing of them
  no sharing      every model loads all of its blocks

A round: models in clusters of four that share a backbone of the given part of their bytes, sizes
of 50 to 500 MiB, popularity by Zipf; payloads of 0.1 to 0.2 Mbyte, spectral efficiency of 1 to 6
bit/s/Hz, 20 MHz; loads at 1 GB/s; deadlines of 0.5 to 1.5 times `--deadline-s`.

    scripts/bench_edge.py                    # both tables, about a minute
    scripts/bench_edge.py --rounds 5         # quicker
"""

from __future__ import annotations

import argparse
from random import Random
from statistics import mean
from time import process_time

from paceline.edge.round import EdgeModel, Round, User
from paceline.edge.schedule import in_order, schedule

MIB = 1 << 20
CLUSTER = 4
BANDWIDTH_HZ = 20e6
LOAD_BYTES_PER_S = 1e9


def a_round(seed: int, *, models: int, users: int, shared: float, deadline_s: float) -> Round:
    """`shared` is the part of a model's bytes that is its cluster's backbone."""
    random = Random(seed)
    made = {}
    for cluster in range(models // CLUSTER):
        size = random.uniform(50, 500) * MIB
        for index in range(CLUSTER):
            name = f"m{cluster}.{index}"
            blocks = {f"backbone{cluster}": int(size * shared), name: int(size * (1 - shared))}
            made[name] = EdgeModel(
                name, {b: n for b, n in blocks.items() if n}, 0.01, random.uniform(0.001, 0.004)
            )
    names = list(made)
    random.shuffle(names)
    weights = [1 / rank for rank in range(1, len(names) + 1)]
    return Round(
        tuple(
            User(
                f"u{index}",
                random.choices(names, weights)[0],
                random.uniform(0.8e6, 1.6e6),
                random.uniform(1, 6),
                deadline_s * random.uniform(0.5, 1.5),
            )
            for index in range(users)
        ),
        made,
        BANDWIDTH_HZ,
        LOAD_BYTES_PER_S,
    )


def served(round_: Round) -> tuple[int, int, int, float]:
    """(paceline, sharing-unaware order, no sharing, ms of CPU of the first)."""
    started = process_time()
    found = schedule(round_)
    took_ms = (process_time() - started) * 1e3
    blind = schedule(round_.without_sharing())
    order = [batch.model for batch in blind.batches]
    left = sorted({user.model for user in round_.users} - set(order))
    return found.served, in_order(round_, [*order, *left]).served, blind.served, took_ms


def table(title: str, rows: list[tuple[str, list[Round]]]) -> None:
    print(
        f"\n| {title} | paceline | unaware order | no sharing | paceline / no sharing | ms of CPU |"
    )
    print("|---|---|---|---|---|---|")
    for name, rounds in rows:
        results = [served(round_) for round_ in rounds]
        ours, unaware, none, took_ms = (mean(column) for column in zip(*results, strict=True))
        ratio = ours / none if none else float("inf")
        print(f"| {name} | {ours:.1f} | {unaware:.1f} | {none:.1f} | {ratio:.2f} | {took_ms:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="of each cell (default 20)")
    parser.add_argument("--models", type=int, default=12, help="in clusters of 4 (default 12)")
    parser.add_argument("--deadline-s", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    def rounds(users: int, shared: float) -> list[Round]:
        return [
            a_round(
                options.seed * 1000 + index,
                models=options.models,
                users=users,
                shared=shared,
                deadline_s=options.deadline_s,
            )
            for index in range(options.rounds)
        ]

    counts = f"{options.models} models, {options.rounds} rounds a cell, seed {options.seed}"
    print(f"{counts}: users served, means")
    table("users, 80 % shared", [(str(n), rounds(n, 0.8)) for n in (10, 20, 30, 40, 60)])
    table(
        "part shared, 30 users", [(f"{p:.0%}", rounds(30, p)) for p in (0.0, 0.3, 0.6, 0.8, 0.95)]
    )


if __name__ == "__main__":
    main()
