#!/usr/bin/env python3
"""Models as blocks against plain ONNX Runtime: swapping, cold starts, sharing.

    .venv/bin/python scripts/bench_blocks.py --work DIR swap vit_b16 bert_base
    .venv/bin/python scripts/bench_blocks.py --work DIR cold resnet50 --link-mbps 0 1000 200
    .venv/bin/python scripts/bench_blocks.py --work DIR share vit_b16
    .venv/bin/python scripts/bench_blocks.py --work DIR urgent resnet50 bert_base gpt2 vgg19
    .venv/bin/python scripts/bench_blocks.py --work DIR cgroup vit_b16 --link-mbps 1000
    .venv/bin/python scripts/bench_blocks.py --work DIR cgroup vit_b16 --at paceline
    .venv/bin/python scripts/bench_blocks.py --work DIR cgroup vit_b16 bert_base --together
    .venv/bin/python scripts/bench_blocks.py --work DIR fuse resnet50 squeezenet densenet121
    .venv/bin/python scripts/bench_blocks.py --work DIR fuse ocr    # the example's chain
    .venv/bin/python scripts/bench_blocks.py --work DIR served vit_b16    # through Paceline

Models are made by scripts/make_models.py and compiled into DIR on first use (some GB of disk). Each
prints a table for docs/benchmarks/blocks.md. Everything in one row ran interleaved in one process
(`swap`) or in a fresh process each (`cold`, `share`); figures are medians. Cold means that the
page cache holds nothing of the model: it is dropped before, and with a budget after every use.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.blocks_cgroup import idle, limited, print_cgroup
from scripts.blocks_cold import bound, cold, print_cold
from scripts.blocks_group import fused, print_fuse
from scripts.blocks_measure import CUTS, LATENCY, RATIOS, Bench
from scripts.blocks_served import print_served
from scripts.blocks_share import print_share, share
from scripts.blocks_swap import print_swap, swap
from scripts.blocks_urgent import print_urgent, urgent

PARTS: Mapping[str, Callable[[Bench, argparse.Namespace], None]] = {
    "swap": print_swap,
    "cold": print_cold,
    "share": print_share,
    "fuse": print_fuse,
    "served": print_served,
    "cgroup": print_cgroup,
    "urgent": print_urgent,
}
CHILDREN: Mapping[str, Callable[..., dict[str, Any]]] = {
    "swap": swap,
    "cold": cold,
    "bound": bound,
    "share": share,
    "limited": limited,
    "idle": idle,
    "fused": fused,
    "urgent": urgent,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="models and pools; kept")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("swap", "latency within a budget against resident"),
        ("cold", "time to first output"),
        ("share", "ten models with one backbone"),
        ("fuse", "a group of models as one, on a real Triton and through Paceline"),
        ("served", "cold starts and swapping through Paceline"),
        ("urgent", "the first model loaded urgently beside the others"),
        ("cgroup", "the budget under a memory cgroup, which counts the page cache (version 1)"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("models", nargs="+")
        command.add_argument("--repeats", type=int, default=5)
        if name == "swap":
            command.add_argument("--batches", type=int, nargs="+", default=[1, 8])
            command.add_argument("--cuts", nargs="+", choices=CUTS, default=[LATENCY])
        if name in ("swap", "cgroup", "served", "fuse"):
            some = "*" if name in ("served", "fuse") else "+"
            ratios = () if name == "fuse" else RATIOS
            command.add_argument("--ratios", type=float, nargs=some, default=ratios)
        if name in ("cold", "served", "urgent"):
            command.add_argument(
                "--link-mbps", type=float, nargs="+", default=[0, 1000, 200], help="0: local disk"
            )
        if name in ("fuse", "share", "cgroup"):
            places = (
                ("process", "triton", "paceline") if name == "fuse" else ("process", "paceline")
            )
            # A link is not for the others, and --ratios are.
            first = places[:1] if name == "cgroup" else places[-2:]
            command.add_argument("--at", nargs="+", choices=places, default=first)
        if name in ("swap", "cgroup", "fuse"):
            command.add_argument("--runs", type=int, default=1, help="processes for each row")
        if name in ("cgroup", "served"):
            command.add_argument("--batch", type=int, default=1)
        if name == "served":
            command.add_argument(
                "--page-cache",
                choices=("drop", "keep"),
                default="drop",
                help="of what a budget swaps out: dropped (cold) or kept (warm)",
            )
            command.add_argument(
                "--as-planned",
                action="store_true",
                help="replanned while serving; default: one instance each",
            )
        if name == "cgroup":
            command.add_argument("--limit-mib", type=int, help="of the cgroup")
            command.add_argument(
                "--together", action="store_true", help="all models, sharing one budget"
            )
            command.add_argument("--link-mbps", type=float, default=0, help="0: local disk")
    child = commands.add_parser("child")  # one measurement in a process of its own
    child.add_argument("job", type=json.loads)
    arguments = parser.parse_args()
    if arguments.command == "child":
        print(json.dumps(CHILDREN[arguments.job.pop("do")](**arguments.job)))
        return
    if arguments.command == "cgroup" and arguments.link_mbps and "paceline" in arguments.at:
        parser.error("--link-mbps: behind a link only --at process is measured")
    arguments.work.mkdir(parents=True, exist_ok=True)
    PARTS[arguments.command](Bench(arguments.work.resolve()), arguments)


if __name__ == "__main__":
    main()
