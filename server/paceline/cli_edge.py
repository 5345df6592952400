"""`paceline schedule`: a round of edge inference, decided and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.core.errors import ConfigError

if TYPE_CHECKING:
    from paceline.edge.round import Round, Schedule


def schedule(
    round_file: Annotated[Path, typer.Argument(metavar="ROUND.yaml", show_default=False)],
    method: Annotated[
        str, typer.Option(help="auto, or by force exact, clusters or greedy.")
    ] = "auto",
    output: Annotated[str, typer.Option("--format", help="text or json.")] = "text",
) -> None:
    """Who is served in a round of edge inference, in which order of models, at what bandwidth.

    A round (see examples/edge/round.yaml) has users, each with a model, a payload and a deadline;
    models with the blocks they share; and one uplink. Models are loaded one after the other, a
    block that the one before has is not loaded again; a payload has to be there when its model's
    batch starts. As many users as possible are served, with the least bandwidth for that many; what
    is left of the uplink is shared out in proportion.
    """
    from paceline.edge import schedule as deciding
    from paceline.round_file import read_round

    methods = {
        "auto": deciding.schedule,
        "exact": deciding.exact,
        "clusters": deciding.by_clusters,
        "greedy": deciding.greedy,
    }
    if method not in methods:
        raise ConfigError(f"{method!r} is none of {', '.join(methods)}", key="--method")
    if output not in ("text", "json"):
        raise ConfigError(f"{output!r} is neither text nor json", key="--format")
    round_ = read_round(round_file)
    if method == "clusters" and deciding.backbones(round_) is None:
        raise ConfigError(
            "these models share more than one backbone a cluster; use greedy or exact",
            key="--method",
        )
    found = methods[method](round_)
    if output == "json":
        print(json.dumps(_as_json(round_, found), indent=2))
    else:
        _print(round_, found)


def _as_json(round_: Round, found: Schedule) -> dict[str, Any]:
    return {
        "served": found.served,
        "users": len(round_.users),
        "method": found.method,
        "exact": found.exact,
        "needed_hz": round(found.needed_hz, 3),
        "bandwidth_hz": round_.bandwidth_hz,
        "batches": [
            {
                "model": batch.model,
                "users": list(batch.users),
                "load_ms": round(batch.loads_s * 1e3, 3),
                "start_ms": round(batch.starts_s * 1e3, 3),
                "end_ms": round(batch.ends_s * 1e3, 3),
            }
            for batch in found.batches
        ],
        "grants": [
            {
                "user": grant.user,
                "needed_hz": round(grant.needed_hz, 3),
                "bandwidth_hz": round(grant.bandwidth_hz, 3),
                "bits_per_s": round(grant.bits_per_s, 3),
            }
            for grant in found.grants
        ],
        "not_served": _not_served(round_, found),
    }


def _print(round_: Round, found: Schedule) -> None:
    from rich.table import Table

    from paceline.report import console

    out = console()
    how = "nobody can serve more" if found.exact else f"by {found.method}, not proven"
    out.print(f"{found.served} of {len(round_.users)} users are served ({how})")
    table = Table(box=None, pad_edge=False)
    for name in ("model", "load ms", "starts ms", "ends ms", "user", "needs kHz", "gets kHz"):
        table.add_column(name, justify="left" if name in ("model", "user") else "right")
    grants = {grant.user: grant for grant in found.grants}
    for batch in found.batches:
        times = (batch.loads_s, batch.starts_s, batch.ends_s)
        cells = [batch.model, *(f"{time_s * 1e3:.0f}" for time_s in times)]
        for user in batch.users:
            shares = (grants[user].needed_hz, grants[user].bandwidth_hz)
            table.add_row(*cells, user, *(f"{hertz / 1e3:.1f}" for hertz in shares))
            cells = ["", "", "", ""]
    out.print(table)
    needed, there = found.needed_hz / 1e3, round_.bandwidth_hz / 1e3
    out.print(f"bandwidth needed: {needed:.1f} kHz of {there:.1f} ({needed / there:.0%})")
    if missed := _not_served(round_, found):
        out.print(f"not served: {', '.join(missed)}")


def _not_served(round_: Round, found: Schedule) -> list[str]:
    served = {grant.user for grant in found.grants}
    return [user.name for user in round_.users if user.name not in served]
