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
from typing import TYPE_CHECKING, Annotated

# Before grpc is imported: its fork handlers are of no use to a child that execs, and talk; what
# its core writes to stderr (a busy port, say) is said again, in one line, by us.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import typer
import uvloop

from paceline.blocks.commands import blocks_app
from paceline.config import write_profiles
from paceline.core.errors import ConfigError, PacelineError, PlanError
from paceline.core.profile import ProfileRow
from paceline.report import Working, console, plan_report, status_report, timeline_report

if TYPE_CHECKING:
    from paceline.sim.headroom import Verification

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

ArrivalsOption = Annotated[
    str | None,
    typer.Option(
        metavar="poisson|uniform|TRACE.csv",
        help="What the plan is verified against (default: what the chain file declares, else "
        "poisson); a trace is stretched to the chain's rate.",
    ),
]
WindowOption = Annotated[
    str, typer.Option(help="The rows of a trace whose column `window` says so.")
]
VerifyOption = Annotated[bool, typer.Option(help="Simulate the plan; raise its headroom.")]
ConfidenceOption = Annotated[
    float, typer.Option(min=0.5, max=0.9999, help="With which the attainment has to hold.")
]
RequestsOption = Annotated[
    int, typer.Option(min=0, max=1_000_000, help="To verify with (0: what the target takes).")
]
SeedOption = Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")]


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
            help="A running Triton (explicit model control), instead of a local one; repeatable.",
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
    from paceline.progress import ServeProgress
    from paceline.runtime.placement import Share
    from paceline.serving import ServeSettings
    from paceline.serving import serve as run
    from paceline.workers import serve_workers

    _set_up_logging(log_level)
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
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        max_message_bytes=max_message_mib * MIB,
        drain_s=drain_s,
        replan_window_s=replan_window_s,
        share=Share(*map(int, worker.split("/"))),
    )
    with ServeProgress(host, ready_fd=ready_fd) as progress:
        if workers == 1:
            uvloop.run(run(settings, progress.events))
        else:
            uvloop.run(serve_workers(settings, workers, progress.events, log_level))


@app.command()
def plan(
    chains: Annotated[list[Path], typer.Argument(metavar="CHAIN.yaml...", show_default=False)],
    profiles: Annotated[Path, typer.Option(help="Durations: CSV from `paceline profile`.")],
    hardware: Annotated[Path, typer.Option(help="Prices: hardware,price_per_hour,memory_mib.")],
    rate_rps: Annotated[
        float | None, typer.Option(help="Instead of the file's rate, requests/s.")
    ] = None,
    slo_ms: Annotated[float | None, typer.Option(help="Instead of the file's objective.")] = None,
    policy: Annotated[
        str, typer.Option(help="optimal, harpagon, nexus, scrooge, inferline or clipper.")
    ] = "optimal",
    billing: Annotated[
        str, typer.Option(help="fractional, or machine: whole ones that modules share.")
    ] = "fractional",
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="HARDWARE=N", help="Most machines of a kind (--billing machine)."),
    ] = None,
    overhead_ms: Annotated[
        float, typer.Option(min=0, help="Reserved per module for front server and network.")
    ] = 0.0,
    arrivals: ArrivalsOption = None,
    window: WindowOption = "",
    verify: VerifyOption = True,
    confidence: ConfidenceOption = 0.95,
    requests: RequestsOption = 0,
    seed: SeedOption = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw cost against objective and rate (.png or .svg).")
    ] = None,
    output: Annotated[str, typer.Option("--format", help="text or json.")] = "text",
    dispatch: Annotated[
        str, typer.Option(help="harpagon: throughput-cost, round-robin or pooled.")
    ] = "throughput-cost",
    max_tuples: Annotated[
        int | None, typer.Option(min=1, help="harpagon: most configurations a module may mix.")
    ] = None,
    dummy: Annotated[bool, typer.Option(help="harpagon: dummy requests.")] = True,
    reassign: Annotated[bool, typer.Option(help="harpagon: latency reassignment.")] = True,
    node_merger: Annotated[bool, typer.Option(help="harpagon: siblings as one node.")] = True,
    cost_direct: Annotated[bool, typer.Option(help="harpagon: also split by saving.")] = True,
) -> None:
    """What is the least that must be paid to serve these chains within their objectives, and how?

    The plan is executed by the real dispatcher in virtual time. Where a chain misses its
    attainment, it is given more machines, and what they cost is told. --arrivals uniform (what
    the published bounds assume) and --no-verify do without.

    Exits 3 when no plan meets an objective, naming the module that lacks how many ms.
    """
    from paceline.planner.problem import BILLINGS, Options
    from paceline.planner.solve import POLICIES
    from paceline.planner.worst_case import DISPATCHES
    from paceline.planning import cheaper_slo, limits, plan_offline
    from paceline.planning import plot as draw

    _one_of("--format", output, ("text", "json"))
    _one_of("--policy", policy, POLICIES)
    _one_of("--billing", billing, BILLINGS)
    _one_of("--dispatch", dispatch, DISPATCHES)
    options = Options(
        policy=policy,
        dispatch=dispatch,  # type: ignore[arg-type]
        max_tuples=max_tuples,
        dummy=dummy,
        reassign=reassign,
        node_merger=node_merger,
        cost_direct=cost_direct,
        billing=billing,  # type: ignore[arg-type]
        machine_limits=limits(limit or ()),
    )
    how = _verification(arrivals, window, confidence, requests, seed)
    with Working() as working:
        made = plan_offline(
            chains,
            profiles,
            hardware,
            options,
            rate_rps=rate_rps,
            slo_ms=slo_ms,
            overhead_s=overhead_ms / 1e3,
            verification=how if verify else None,
            progress=working,
        )
    if plot is not None:
        draw(made, plot)
    if output == "json":
        print(json.dumps(made.plan.as_json(), indent=2))
    else:
        cheaper = cheaper_slo(made)
        told = None if cheaper is None else cheaper.told(len(made.chains))
        console().print(plan_report(made.plan, cheaper=told))


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

    _one_of("--format", output, ("text", "json"))
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

    _one_of("--format", output, ("text", "json"))
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

    _one_of("--format", output, ("text", "json"))
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
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"must be one of {', '.join(allowed)}, got {value!r}", key=option)


def _verification(
    arrivals: str | None, window: str, confidence: float, requests: int, seed: int
) -> Verification:
    """What --arrivals and its companions ask for."""
    from paceline.core.chain import ARRIVALS
    from paceline.sim.headroom import Arrivals, Verification

    if arrivals is None or arrivals in ARRIVALS:
        if window:
            raise ConfigError("selects rows of a trace; give one as --arrivals", key="--window")
        against = Arrivals(arrivals or "")
    else:
        against = Arrivals(trace=Path(arrivals), window=window)
        if not Path(arrivals).is_file():
            raise ConfigError(
                f"must be poisson, uniform or a trace file; there is no {arrivals!r}",
                key="--arrivals",
            )
    return Verification(against, confidence, requests, seed)


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
