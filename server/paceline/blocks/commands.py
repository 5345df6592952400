"""`paceline blocks`: the command line of compiling and looking at blocks."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

from paceline.core.chain import NAME
from paceline.core.errors import ConfigError
from paceline.report import console

if TYPE_CHECKING:
    from paceline.blocks.compile import Outcome
    from paceline.blocks.group import Group

blocks_app = typer.Typer(
    name="blocks",
    help="Models as blocks: larger than their memory budget, quick to start, sharing parameters.",
    no_args_is_help=True,
)

RepositoryOption = Annotated[
    list[Path] | None,
    typer.Option("--model-repository", help="Where NAMEs are (default: ./model_repository)."),
]
FormatOption = Annotated[str, typer.Option("--format", help="text or json.")]


@blocks_app.command("compile")
def compile_command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]MODEL.onnx...",
            show_default=False,
            help="ONNX files; NAME is the model's, by default the file's (of NAME/1/model.onnx, "
            "the directory's). With --chain: modules of the chain.",
        ),
    ],
    fuse: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Make one model NAME of all files: one process, one load, shared parameters once; "
            "tensors are called MEMBER/TENSOR, and only what a request asks for is computed.",
        ),
    ] = None,
    chain: Annotated[
        Path | None,
        typer.Option(
            help="Fuse modules of this chain file, wired as they are there, Python models too: "
            "tensors between them never leave the process.",
        ),
    ] = None,
    output: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE.TENSOR",
            help="With --chain: an output to have besides those that are used outside; repeatable.",
        ),
    ] = None,
    model_repository: Annotated[
        list[Path] | None,
        typer.Option(help="With --chain: where the modules' models are (default: that of --out)."),
    ] = None,
    budget_mib: Annotated[
        int | None,
        typer.Option(min=1, help="Most memory for weights: blocks are cut to run within it."),
    ] = None,
    pool: Annotated[
        Path | None,
        typer.Option(help="Where blocks are kept (default: `blocks` beside the model repository)."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The model repository to write to.")] = Path(
        "model_repository"
    ),
    max_batch: Annotated[
        int, typer.Option(min=0, help="max_batch_size where the batch axis is dynamic; 0: none.")
    ] = 32,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT=D,D,...",
            help="An input's shape to measure with, if its dynamic axes cannot be guessed.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(help="cpu; or cuda: graphs for a GPU, which nobody has run on one yet."),
    ] = "cpu",
    measure: Annotated[
        bool,
        typer.Option(help="Run the blocks: compare with the whole model, time each."),
    ] = True,
) -> None:
    """Compile ONNX models for the Triton backend `paceline_blocks`.

    The graph is optimised for this machine's CPU and ONNX Runtime, oversized matrices are tiled,
    the graph is cut where few tensors cross. Blocks go into the pool under their hash - what two
    models have in common is there once - and a model directory into the repository:

        paceline blocks compile bert.onnx --budget-mib 150

        paceline blocks compile det=a/det.onnx rec=b/rec.onnx --fuse ocr

        paceline blocks compile --chain ocr.yaml prepare detect extract --fuse ocr_front

    Compiling again does nothing unless the file, an option, the CPU or ONNX Runtime changed. It
    can be stopped at any time. Models larger than memory need external data (ONNX's own limit for
    one file is 2 GiB).
    """
    from paceline.blocks.compile import compile_model
    from paceline.blocks.member import Options

    shapes = dict(_shape(text) for text in shape or ())
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"must be cpu or cuda, got {device!r}", key="--device")
    options = Options(budget_mib, max_batch, measure, shapes, device=device)
    if fuse is not None and not NAME.fullmatch(fuse):
        raise ConfigError(
            f"{fuse!r} is no name of a model: use letters, digits, _ . -", key="--fuse"
        )
    group = None
    if chain is not None:
        if fuse is None:
            raise ConfigError("give --fuse NAME with it", key="--chain")
        group = _group(chain, models, output or [], fuse, model_repository or [out])
        jobs = {fuse: group.sources}
    elif output or model_repository:
        raise ConfigError("is for --chain", key="--output" if output else "--model-repository")
    else:
        named = _named(models)
        jobs = {name: {"": path} for name, path in named.items()} if fuse is None else {fuse: named}
    place = pool or out.absolute().parent / "blocks"
    _check_is_no_file(out, "--out")
    _check_is_no_file(place, "--pool")
    _check_shapes(shapes, jobs)
    for name, sources in jobs.items():
        with _Progress() as progress:
            outcome = compile_model(sources, out / name, place, options, progress.told, group=group)
        _tell(outcome, out / name, place)


def _group(
    chain: Path, modules: list[str], outputs: list[str], fuse: str, repositories: list[Path]
) -> Group:
    from paceline.blocks.group import group_of, read_group
    from paceline.config import read_chain

    return read_group(group_of(read_chain(chain), modules, outputs, fuse), repositories)


def _tell(outcome: Outcome, directory: Path, place: Path) -> None:
    """What a compile did, on stderr."""
    name, manifest = directory.name, outcome.model.manifest
    count = sum(len(member.blocks) for member in manifest.members)
    what = (
        f"{count} blocks, {manifest.weights_bytes / (1 << 20):.1f} MiB, of which "
        f"{outcome.written_bytes / (1 << 20):.1f} MiB new to {place}"
        if outcome.fresh
        else "unchanged"
    )
    print(f"paceline: {directory}: {what}", file=sys.stderr)
    for member_name, taken in outcome.taken.items():
        print(
            f"paceline: {name}: another model is called {taken!r}: call this member "
            f"as {name} with tensors {member_name}/...",
            file=sys.stderr,
        )
    for member in manifest.members:
        for note in member.notes:
            told = "/".join(filter(None, (name, member.name)))
            print(f"paceline: {told}: {note}", file=sys.stderr)


@blocks_app.command("show")
def show_command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME|DIR]...",
            show_default=False,
            help="Models, model directories or whole repositories (default: ./model_repository).",
        ),
    ] = None,
    model_repository: RepositoryOption = None,
    output: FormatOption = "text",
) -> None:
    """Print the blocks of compiled models, their sizes, and who shares what with whom."""
    from paceline.blocks import show
    from paceline.blocks.repository import find_compiled

    _check_format(output)
    repositories = model_repository or [Path("model_repository")]
    places = [_place(text, repositories) for text in models or ()] or repositories
    shown = show.sharing(find_compiled(places))
    if output == "json":
        print(json.dumps(show.as_json(shown), indent=2))
    else:
        for table in show.tables(shown):
            console().print(table)


@blocks_app.command("suggest")
def suggest_command(
    chains: Annotated[
        list[Path] | None,
        typer.Option(help="A chain file, or a directory of them; may be given again."),
    ] = None,
    model_repository: RepositoryOption = None,
    profiles: Annotated[
        Path | None,
        typer.Option(help="Durations (CSV of `paceline profile`): warns of unlike batch sizes."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="A running server: what it observed of --chains."),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(help="Of a server that ran: its chains and what it observed of them."),
    ] = None,
    output: FormatOption = "text",
) -> None:
    """Propose which models to fuse: those that the same requests always need together.

    Chains say which those are; observed traffic (--server, --state-dir) adds what is nearly always
    needed together, ranks by the calls saved, and warns of models that others use more. What it
    prints can be done with `paceline blocks compile`.
    """
    from paceline.blocks.observed import Observed, from_server, from_state
    from paceline.blocks.suggest import suggest, weights_of
    from paceline.config import read_chains, read_profiles

    _check_format(output)
    if not chains and state_dir is None:
        raise ConfigError("give --chains, or the --state-dir of a server", key="--chains")
    if server is not None and state_dir is not None:
        raise ConfigError("one of --server and --state-dir is enough", key="--server")
    read = read_chains(chains or ())
    observed: Observed | None = None
    if state_dir is not None:
        kept, observed = from_state(state_dir)
        read = read or kept
    elif server is not None:
        observed = from_server(server)
    measured = read_profiles(profiles) if profiles is not None else None
    names = dict.fromkeys(module.model for chain in read for module in chain.modules)
    repositories = model_repository or [Path("model_repository")]
    weights = {name: weights_of(name, repositories) for name in names}
    suggestions = suggest(read, weights, measured, observed)
    if output == "json":
        print(json.dumps([suggestion.as_json() for suggestion in suggestions], indent=2))
        return
    for suggestion in suggestions:
        print(suggestion)
    if not suggestions:
        print("paceline: no two models are always needed together", file=sys.stderr)


def _named(models: list[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for text in models:
        name, equals, file = text.partition("=")
        path = Path(file if equals else text)
        if not equals:
            versioned = path.name == "model.onnx" and path.parent.name.isdecimal()
            name = path.resolve().parent.parent.name if versioned else path.stem
        _check_name(name)
        if name in named:
            raise ConfigError(f"two models are called {name!r}; give NAME=MODEL.onnx", key=text)
        if not path.is_file():
            wrong = "a directory; name the ONNX file in it" if path.is_dir() else "no such file"
            raise ConfigError(wrong, where=str(path))
        named[name] = path
    return named


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name of a model: use letters, digits, _ . -")


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.rpartition("=")
    if not name or not all(size.isdecimal() for size in sizes.split(",")):
        raise ConfigError(
            f"must be INPUT=D,D,..., for example ids=1,128; got {text!r}", key="--shape"
        )
    return name, tuple(int(size) for size in sizes.split(","))


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]], jobs: Mapping[str, Mapping[str, Path]]
) -> None:
    """Each must be of an input of one of the files, maybe of several."""
    if not shapes:
        return
    from paceline.blocks.source import input_axes

    known: dict[str, set[int | None]] = {}
    for sources in jobs.values():
        for member, path in sources.items():
            for name, axes in input_axes(path).items():
                known.setdefault(f"{member}/{name}" if member else name, set()).add(axes)
    for name, shape in shapes.items():
        if name not in known:
            raise ConfigError(f"no input {name!r}; there are {', '.join(known)}", key="--shape")
        if known[name].isdisjoint({None, len(shape)}):
            axes_told = " or ".join(map(str, known[name]))
            raise ConfigError(
                f"input {name!r} has {axes_told} axes, got {len(shape)} sizes", key="--shape"
            )


def _check_is_no_file(directory: Path, key: str) -> None:
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; name a directory", key=key)


def _place(text: str, repositories: list[Path]) -> Path:
    if Path(text).is_file():
        (name,) = _named([text])
        raise ConfigError(
            f"a file, not a compiled model: run `paceline blocks compile {text}`, "
            f"then `paceline blocks show {name}`",
            where=text,
        )
    if "/" in text or Path(text).is_dir():
        return Path(text)
    for repository in repositories:
        if (repository / text).is_dir():
            return repository / text
    searched = ", ".join(map(str, repositories))
    raise ConfigError(f"no model {text!r} in {searched}; give --model-repository or a directory")


def _check_format(output: str) -> None:
    if output not in ("text", "json"):
        raise ConfigError(f"must be text or json, got {output!r}", key="--format")


class _Progress:
    """Bars on a terminal, one line a step elsewhere; on stderr."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            console=console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task: TaskID | None = None
        self._what = ""

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def told(self, what: str, done_bytes: int = 0, total_bytes: int = 0) -> None:
        if self._bar.disable:
            if what != self._what:
                print(f"paceline: {what}", file=sys.stderr, flush=True)
        elif what != self._what:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total_bytes or None)
        if self._task is not None and total_bytes:
            self._bar.update(self._task, completed=done_bytes, total=total_bytes)
        self._what = what
