"""The command line: the only place that wires everything together.

Exit codes: 0 done; 1 something outside failed (a Triton, a server, a model); 2 bad input, one
line; 3 no plan meets the objective. Diagnostics go to stderr, results to stdout.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

# Before grpc is imported: its fork handlers are of no use to a child that execs, and talk; what
# its core writes to stderr (a busy port, say) is said again, in one line, by us.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import typer
import uvloop

from paceline.blocks.commands import blocks_app
from paceline.cli_edge import schedule
from paceline.cli_offline import one_of, plan, simulate
from paceline.config import write_profiles
from paceline.core.errors import ConfigError, PacelineError, PlanError
from paceline.core.profile import ProfileRow
from paceline.report import console, status_report, timeline_report

MIB = 1 << 20

app = typer.Typer(
    name="paceline",
    help="Serve chains of DNNs on NVIDIA Triton within a latency objective at the least cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(blocks_app)

ServerOption = Annotated[
    str, typer.Option("--server", metavar="HOST:PORT", help="The running paceline's gRPC address.")
]
DEFAULT_SERVER = "127.0.0.1:8001"


def _state_directory() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "paceline"


StateOption = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        help="Where profiles and Triton's log are kept (default: ~/.local/state/paceline).",
        show_default=False,
    ),
]


@app.command()
def serve(
    chains: Annotated[
        list[Path] | None,
        typer.Option(help="A chain file, or a directory of them; may be given again."),
    ] = None,
    model_repository: Annotated[
        list[Path] | None,
        typer.Option(help="A Triton model repository (default: ./model_repository); repeatable."),
    ] = None,
    triton: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[HARDWARE@]HOST:PORT",
            help="A running Triton (explicit model control), instead of a local one; repeatable. "
            "[HARDWARE@]dns:NAME:PORT: every address of a name; file:PATH: a machine a line; "
            "both are followed while serving.",
        ),
    ] = None,
    hardware: Annotated[
        Path | None, typer.Option(help="Prices: a CSV hardware,price_per_hour,memory_mib.")
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Batches a Triton executes at a time "
            "(default: the processor cores of a local one, 1 elsewhere).",
        ),
    ] = None,
    memory_mib: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="What the models of a Triton may take together; models are loaded and evicted "
            "as requests need them (default: memory_mib of the hardware file, or no bound).",
        ),
    ] = None,
    eviction: Annotated[
        str,
        typer.Option(
            help="What goes when memory is short: cost (what is missed least per byte) or lru."
        ),
    ] = "cost",
    pace_loads: Annotated[
        bool, typer.Option(help="Load fewer models at a time where running requests would be late.")
    ] = True,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8001,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8002,
    state_dir: StateOption = None,
    max_message_mib: Annotated[
        int, typer.Option(min=1, max=2047, help="Largest request accepted.")
    ] = 64,
    drain_s: Annotated[
        float, typer.Option(min=0, help="How long accepted requests may take after SIGTERM.")
    ] = 30.0,
    overdue_factor: Annotated[
        float,
        typer.Option(
            min=1,
            help="A batch that takes so many times the p99 of its profile is tried on another "
            "machine as well, when later it would be too late.",
        ),
    ] = 3.0,
    hang_factor: Annotated[
        float,
        typer.Option(
            min=1,
            help="A batch that takes so many times the p99 of its profile hangs: "
            "its model is loaded afresh.",
        ),
    ] = 20.0,
    hang_least_s: Annotated[
        float, typer.Option(min=0.1, help="How long any batch may take before that.")
    ] = 10.0,
    replan_window_s: Annotated[
        int,
        typer.Option(
            min=0,
            max=3600,
            help="Seconds over which traffic is measured to replan for it; 0: plan once. "
            "With several workers the plan stays.",
        ),
    ] = 60,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            max=64,
            help="Front processes on the gRPC port, each with its share of the machines; "
            "worker i serves HTTP on the HTTP port + i.",
        ),
    ] = 1,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
    worker: Annotated[str, typer.Option(hidden=True)] = "0/1",
    ready_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve chains over gRPC (KServe v2); without --triton, on a local Triton that it starts.

    Every model of the repository can also be called by its own name. SIGTERM and Ctrl-C drain:
    what was accepted is answered first.
    """
    from paceline.discovery import TritonTarget
    from paceline.dispatch import HangLimits
    from paceline.progress import ServeProgress
    from paceline.runtime.placement import Share
    from paceline.serving import ServeSettings
    from paceline.serving import serve as run
    from paceline.workers import serve_workers

    _set_up_logging(log_level)
    one_of("--eviction", eviction, ("cost", "lru"))
    targets = tuple(TritonTarget.parse(text) for text in triton or ())
    repositories = tuple(model_repository or ())
    if not repositories and not targets:
        repositories = (Path("model_repository"),)
        if not repositories[0].is_dir():
            raise ConfigError(
                "no ./model_repository here; say where the models are", key="--model-repository"
            )
    settings = ServeSettings(
        chains=tuple(chains or ()),
        model_repositories=tuple(path.resolve() for path in repositories),
        state_directory=(state_dir or _state_directory()).resolve(),
        tritons=targets,
        hardware=hardware,
        slots=slots,
        memory_bytes=memory_mib * MIB if memory_mib is not None else None,
        eviction=eviction,  # type: ignore[arg-type]
        pace_loads=pace_loads,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        max_message_bytes=max_message_mib * MIB,
        drain_s=drain_s,
        replan_window_s=replan_window_s,
        hang=HangLimits(hang_factor, hang_least_s, overdue_factor=overdue_factor),
        share=Share(*map(int, worker.split("/"))),
    )
    if memory_mib is not None and (workers > 1 or settings.share.count > 1):
        raise ConfigError(
            "is for one worker: several do not know of each other's models", key="--memory-mib"
        )
    with ServeProgress(host, ready_fd=ready_fd) as progress:
        if workers == 1:
            uvloop.run(run(settings, progress.events))
        else:
            # Not uvloop: a child that it forks runs Python code before the program, which
            # was once seen to go on for ever.
            asyncio.run(serve_workers(settings, workers, progress.events, log_level))


app.command()(plan)
app.command()(simulate)
app.command()(schedule)


@app.command()
def profile(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", show_default=False)],
    triton: Annotated[str, typer.Option(metavar="[HARDWARE@]HOST:PORT", help="Where to measure.")],
    out: Annotated[Path, typer.Option(help="The CSV to write.")],
    model_repository: Annotated[
        list[Path] | None,
        typer.Option(help="Where the models' files are, for their sample inputs (model_warmup)."),
    ] = None,
) -> None:
    """Measure models on a running Triton: p95 duration by batch size, as CSV."""
    from paceline.discovery import TritonTarget
    from paceline.serving import measure

    target = TritonTarget.parse(triton)
    repositories = tuple(path.resolve() for path in model_repository or ())

    def progress(model: str, done: int, total: int) -> None:
        print(f"{model}: {done} of {total} batch sizes", file=sys.stderr)

    rows: tuple[ProfileRow, ...] = uvloop.run(measure(target, models, repositories, progress))
    write_profiles(out, rows)
    print(f"wrote {len(rows)} rows to {out}", file=sys.stderr)


@app.command()
def infer(
    chain: Annotated[str, typer.Argument(help="A chain or model.")],
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            metavar="NAME=FILE",
            help="An input tensor: .npy, an image (as RGB), .json, or any file for BYTES.",
        ),
    ],
    server: ServerOption = DEFAULT_SERVER,
    slo_ms: Annotated[float | None, typer.Option(help="A tighter objective.")] = None,
    timeout_s: Annotated[float, typer.Option(min=0.001, help="Give up after this.")] = 60.0,
    output: Annotated[str, typer.Option("--format", help="text or json.")] = "text",
) -> None:
    """Send one request and print the outputs and where the time went."""
    from paceline import client

    one_of("--format", output, ("text", "json"))
    answer = client.infer(server, chain, inputs, slo_ms=slo_ms, timeout_s=timeout_s)
    if output == "json":
        print(json.dumps(answer.as_json(), ensure_ascii=False))
        return
    for name, value in answer.outputs.items():
        print(f"{name}: {value}")
    print(f"request {answer.request_id}, {answer.latency_ms:.0f} ms", file=sys.stderr)


@app.command()
def status(
    server: ServerOption = DEFAULT_SERVER,
    watch: Annotated[bool, typer.Option(help="Print again whenever something changed.")] = False,
    output: Annotated[str, typer.Option("--format", help="text or json.")] = "text",
) -> None:
    """What runs where, what waits, what was served."""
    from paceline import client

    one_of("--format", output, ("text", "json"))
    for document in client.statuses(server, watch=watch):
        if output == "json":
            print(json.dumps(document), flush=True)
        else:
            console().print(status_report(document))


@app.command()
def explain(
    request_id: Annotated[str, typer.Argument(help="The client's id, or the answer's number.")],
    server: ServerOption = DEFAULT_SERVER,
    output: Annotated[str, typer.Option("--format", help="text or json.")] = "text",
) -> None:
    """Where one recent request's time went, module by module."""
    from paceline import client

    one_of("--format", output, ("text", "json"))
    told = client.explain(server, request_id)
    if output == "json":
        print(json.dumps(told))
    else:
        console().print(
            timeline_report(told["chain"], told["latency_ms"], told["spans"], told["error"])
        )


def main() -> None:
    """Run the command line; expected failures are one line on stderr and an exit code."""
    try:
        sys.exit(app(standalone_mode=False))
    except typer.TyperException as error:
        # Wrong arguments; without any, the help has been printed and there is no message.
        if message := " ".join(error.format_message().split()).removesuffix("."):
            print(f"paceline: {message}; see --help", file=sys.stderr)
        sys.exit(2)
    except PacelineError as error:
        print(f"paceline: {error}", file=sys.stderr)
        code = 2 if isinstance(error, ConfigError) else 3 if isinstance(error, PlanError) else 1
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort, asyncio.CancelledError):
        sys.exit(130)


def _set_up_logging(level: str) -> None:
    names = logging.getLevelNamesMapping()
    if level.upper() not in names:
        raise ConfigError(
            f"unknown level {level!r}; use debug, info, warning or error", key="--log-level"
        )
    logging.basicConfig(
        level=names[level.upper()],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
