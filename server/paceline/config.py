"""Reading what users write: chain files (YAML), profiles and hardware (CSV).

Every error is a ConfigError that names file, line and key, raised before anything is changed.
Units are converted here: milliseconds and MiB outside, seconds and bytes inside.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from io import StringIO
from math import inf, isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paceline.core.chain import Chain, Dispatch, Module, Runs, Source
from paceline.core.errors import ConfigError
from paceline.core.profile import Hardware, ProfileRow, Profiles
from paceline.core.tensor import TensorSpec
from paceline.files import MIB, first_error, line_of, load_yaml, places_of, read_text

logger = logging.getLogger(__name__)

LARGEST_BATCH = 65536
"""A larger batch size in a profile is a mistake in its column."""

LEAST_DURATION_MS, MOST_DURATION_MS = 1e-3, 86_400_000.0
"""A batch that takes less than a microsecond, or more than a day, is a mistake in its unit."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _TensorFile(_Strict):
    dtype: str
    shape: list[int]


class _ModuleFile(_Strict):
    model: str
    inputs: Annotated[dict[str, str], Field(min_length=1)]
    for_each: str | None = None
    when: str | None = None
    fan_out: float = 1.0
    on_error: Literal["fail", "skip"] = "fail"


class _ChainFile(_Strict):
    chain: str
    slo_ms: float
    inputs: Annotated[dict[str, _TensorFile], Field(min_length=1)]
    modules: Annotated[dict[str, _ModuleFile], Field(min_length=1)]
    outputs: Annotated[dict[str, str], Field(min_length=1)]
    attainment: float = 0.99
    rate_rps: float | None = None
    arrivals: Literal["poisson", "uniform"] = "poisson"
    priority: int = 0
    keep_alive_s: float | None = None
    dispatch: Dispatch = "pooled"
    runs: Runs = "off"
    description: str = ""


def parse_chain(text: str, *, name: str = "<chain>") -> Chain:
    """A chain file's text as a validated Chain; `name` stands for the file in errors."""
    document = load_yaml(text, name, "a chain file is a mapping that starts with `chain: NAME`")
    try:
        parsed = _ChainFile.model_validate(document)
    except ValidationError as error:
        raise first_error(error, document, name, _file_model) from None
    try:
        return replace(_to_chain(parsed), places=places_of(document, name))
    except ConfigError as error:
        path = error.key.split(".") if error.key else []
        raise ConfigError(
            error.message, key=error.key, where=f"{name}:{line_of(document, path)}"
        ) from None


def chain_document(chain: Chain) -> str:
    """A chain as the text of a chain file (JSON, which is YAML): `parse_chain` gives it back."""

    def given(**keys: Any) -> dict[str, Any]:
        return {key: value for key, value in keys.items() if value is not None}

    document = given(
        chain=chain.name,
        description=chain.description or None,
        slo_ms=round(chain.slo_s * 1e3, 6),
        attainment=chain.attainment,
        rate_rps=chain.rate_rps,
        arrivals=chain.arrivals,
        priority=chain.priority,
        keep_alive_s=chain.keep_alive_s,
        dispatch=chain.dispatch,
        # Left out where it says nothing: what was kept before there was such a key is the same.
        runs=chain.runs if chain.runs != "off" else None,
        inputs={t.name: {"dtype": t.datatype, "shape": list(t.shape)} for t in chain.inputs},
        modules={
            m.name: given(
                model=m.model,
                inputs={name: str(source) for name, source in m.inputs.items()},
                for_each=None if m.for_each is None else str(m.for_each),
                when=None if m.when is None else str(m.when),
                fan_out=m.fan_out,
                on_error=m.on_error,
            )
            for m in chain.modules
        },
        outputs={name: str(source) for name, source in chain.outputs.items()},
    )
    return json.dumps(document, ensure_ascii=False)


def read_chain(path: Path) -> Chain:
    """Read one chain file."""
    return parse_chain(read_text(path), name=path.name)


def read_chains(paths: Iterable[Path]) -> tuple[Chain, ...]:
    """Read chain files; a directory stands for its *.yaml and *.yml files. Names must differ."""
    chains: dict[str, tuple[Chain, Path]] = {}
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml"))
            if not files:
                raise ConfigError("no *.yaml chain file in this directory", where=str(path))
        for file in files:
            chain = read_chain(file)
            if chain.name in chains:
                other = chains[chain.name][1].name
                raise ConfigError(
                    f"{chain.name!r} is already declared in {other}", key="chain", where=file.name
                )
            chains[chain.name] = (chain, file)
    return tuple(chain for chain, _ in chains.values())


def read_profiles(path: Path, prices: Collection[str] | None = None) -> Profiles:
    """Read `model,hardware,batch_size,duration_ms,memory_mib` (memory may be empty), and `p99_ms`
    where there is such a column (its cells may be empty).

    With `prices`, the hardware that has one: profiles on other hardware are of no use, which is
    told once a kind, and an error where there are no others. A batch that was measured faster than
    a smaller one is given that one's duration, with a warning that says so: what is planned must
    not be faster than anything that was measured.
    """
    rows: list[ProfileRow] = []
    seen: dict[tuple[str, str, int], int] = {}
    columns = ("model", "hardware", "batch_size", "duration_ms", "memory_mib")
    for line, row in _read_csv(path, columns):
        where = f"{path.name}:{line}"
        batch_size = _number(row, "batch_size", where, minimum=1, maximum=LARGEST_BATCH, whole=True)
        duration_ms = _number(
            row, "duration_ms", where, least=LEAST_DURATION_MS, maximum=MOST_DURATION_MS
        )
        memory_mib = _number(row, "memory_mib", where, empty=0.0, minimum=0)
        p99_ms = _number(row, "p99_ms", where, empty=0.0, minimum=0) if "p99_ms" in row else 0.0
        if 0 < p99_ms < duration_ms:
            raise ConfigError(
                f"{p99_ms:g} is below duration_ms, the p95 of the same runs: leave it empty "
                "where it is not known",
                key="p99_ms",
                where=where,
            )
        key = (row["model"], row["hardware"], int(batch_size))
        if key in seen:
            raise ConfigError(
                f"{key[0]} on {key[1]} at batch {key[2]} is already on line {seen[key]}; "
                "remove one of the two",
                where=where,
            )
        seen[key] = line
        rows.append(ProfileRow(*key, duration_ms / 1e3, int(memory_mib * MIB), p99_ms / 1e3))
    if not rows:
        raise ConfigError(
            "no profile in this file: below the header comes a line for every model, hardware and "
            "batch size, as `paceline profile` measures them",
            where=f"{path.name}:2",
        )
    if prices is not None:
        _tell_unpriced(rows, seen, path.name, prices)
    return Profiles(_monotone(rows, seen, path.name))


def _tell_unpriced(
    rows: Sequence[ProfileRow],
    lines: Mapping[tuple[str, str, int], int],
    name: str,
    prices: Collection[str],
) -> None:
    unpriced = sorted({row.hardware for row in rows} - set(prices))
    if not any(row.hardware in prices for row in rows):
        raise ConfigError(
            f"no hardware of this file has a price ({', '.join(unpriced)}); give it one "
            f"or write one of {', '.join(sorted(prices))}",
            key="hardware",
            where=f"{name}:{min(lines.values())}",
        )
    for hardware in unpriced:
        own = [lines[r.model, r.hardware, r.batch_size] for r in rows if r.hardware == hardware]
        logger.warning(
            "%s:%d: hardware: %r has no price, so nothing is planned on it (%d lines); give it one "
            "or write one of %s",
            name,
            min(own),
            hardware,
            len(own),
            ", ".join(sorted(prices)),
        )


def _monotone(
    rows: Sequence[ProfileRow], lines: Mapping[tuple[str, str, int], int], name: str
) -> tuple[ProfileRow, ...]:
    """The rows with durations that never fall as the batch grows, in the file's order."""
    slowest: dict[tuple[str, str], ProfileRow] = {}
    raised: dict[tuple[str, str, int], ProfileRow] = {}
    for row in sorted(rows, key=lambda row: row.batch_size):
        kept, before = row, slowest.get((row.model, row.hardware))
        if before is not None and row.duration_s < before.duration_s:
            line = lines[row.model, row.hardware, row.batch_size]
            logger.warning(
                "%s:%d: %s on %s takes %.6g ms at batch %d, less than %.6g ms at batch %d; "
                "planned with %.6g ms (measure it again to be sure)",
                name,
                line,
                row.model,
                row.hardware,
                row.duration_s * 1e3,
                row.batch_size,
                before.duration_s * 1e3,
                before.batch_size,
                before.duration_s * 1e3,
            )
            kept = replace(row, duration_s=before.duration_s)
        slowest[row.model, row.hardware] = kept
        raised[row.model, row.hardware, row.batch_size] = kept
    return tuple(raised[row.model, row.hardware, row.batch_size] for row in rows)


def write_profiles(path: Path, rows: Sequence[ProfileRow]) -> None:
    """Write profiles as CSV, atomically; with a column `p99_ms` where any row has one."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    slow = any(row.p99_s for row in rows)
    columns = ("model", "hardware", "batch_size", "duration_ms", "memory_mib")
    writer.writerow((*columns, "p99_ms") if slow else columns)
    for row in rows:
        memory = f"{row.memory_bytes / MIB:.1f}" if row.memory_bytes else ""
        duration = f"{row.duration_s * 1e3:.3f}"
        cells = (row.model, row.hardware, row.batch_size, duration, memory)
        p99 = f"{row.p99_s * 1e3:.3f}" if row.p99_s else ""
        writer.writerow((*cells, p99) if slow else cells)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text.getvalue(), encoding="utf-8")
    temporary.replace(path)


def read_hardware(path: Path) -> dict[str, Hardware]:
    """Read `hardware,price_per_hour,memory_mib`."""
    found: dict[str, Hardware] = {}
    lines: dict[str, int] = {}
    for line, row in _read_csv(path, ("hardware", "price_per_hour", "memory_mib")):
        where = f"{path.name}:{line}"
        name = row["hardware"]
        if name in found:
            raise ConfigError(
                f"{name!r} is already on line {lines[name]}; remove one of the two",
                where=where,
                key="hardware",
            )
        lines[name] = line
        price = _number(row, "price_per_hour", where)
        memory_mib = _number(row, "memory_mib", where, empty=0.0, minimum=0)
        found[name] = Hardware(name, price, int(memory_mib * MIB))
    if not found:
        raise ConfigError(
            "no hardware in this file: below the header comes a line for every kind, with a price",
            where=f"{path.name}:2",
        )
    return found


def _to_chain(parsed: _ChainFile) -> Chain:
    inputs = []
    for name, tensor in parsed.inputs.items():
        try:
            inputs.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
        except ValueError as error:
            raise ConfigError(str(error), key=f"inputs.{name}") from None
    modules = []
    for name, module in parsed.modules.items():
        key = f"modules.{name}"
        sources = {
            tensor: Source.parse(text, key=f"{key}.inputs.{tensor}")
            for tensor, text in module.inputs.items()
        }
        modules.append(
            Module(
                name,
                module.model,
                sources,
                for_each=_source(module.for_each, f"{key}.for_each"),
                when=_source(module.when, f"{key}.when"),
                fan_out=module.fan_out,
                on_error=module.on_error,
            )
        )
    outputs = {
        name: Source.parse(text, key=f"outputs.{name}") for name, text in parsed.outputs.items()
    }
    return Chain(
        parsed.chain,
        slo_s=parsed.slo_ms / 1e3,
        inputs=tuple(inputs),
        modules=tuple(modules),
        outputs=outputs,
        attainment=parsed.attainment,
        rate_rps=parsed.rate_rps,
        arrivals=parsed.arrivals,
        priority=parsed.priority,
        keep_alive_s=parsed.keep_alive_s,
        dispatch=parsed.dispatch,
        runs=parsed.runs,
        description=parsed.description,
    )


def _source(text: str | None, key: str) -> Source | None:
    return None if text is None else Source.parse(text, key=key)


def _file_model(path: Sequence[Any]) -> type[BaseModel]:
    match list(path):
        case ["modules", _]:
            return _ModuleFile
        case ["inputs", _]:
            return _TensorFile
        case _:
            return _ChainFile


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with their line numbers; ConfigError where a column is missing, unknown or extra."""
    reader = csv.reader(StringIO(read_text(path)))
    header = [cell.strip() for cell in next(reader, [])]
    for name in columns:
        if name not in header:
            raise ConfigError(
                f"column {name!r} is missing; the first line has to name {','.join(columns)}",
                where=f"{path.name}:1",
            )
    for row in reader:
        if not row or (len(row) == 1 and not row[0].strip()):
            continue
        if len(row) != len(header):
            raise ConfigError(
                f"{len(row)} cells where the header has {len(header)}",
                where=f"{path.name}:{reader.line_num}",
            )
        cells = dict(zip(header, (cell.strip() for cell in row), strict=True))
        for name in columns[:2]:
            if not cells[name]:
                where = f"{path.name}:{reader.line_num}"
                raise ConfigError("is empty", key=name, where=where)
        yield reader.line_num, cells


def _number(
    row: Mapping[str, str],
    column: str,
    where: str,
    *,
    minimum: float | None = None,
    maximum: float = inf,
    least: float = 0.0,
    empty: float | None = None,
    whole: bool = False,
) -> float:
    text = row[column]
    if not text and empty is not None:
        return empty
    if not text:
        raise ConfigError("is empty; fill it in or remove the line", key=column, where=where)
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a number", key=column, where=where) from None
    low = value < minimum if minimum is not None else not value > 0
    if low or not isfinite(value):
        bound = f"at least {minimum:g}" if minimum is not None else "above 0"
        raise ConfigError(f"must be {bound}, got {text}", key=column, where=where)
    if value < least:
        raise ConfigError(f"must be at least {least:g}, got {text}", key=column, where=where)
    if value > maximum:
        raise ConfigError(f"must be at most {maximum:.12g}, got {text}", key=column, where=where)
    if whole and value != int(value):
        raise ConfigError(f"{text!r} is not a whole number", key=column, where=where)
    return value
