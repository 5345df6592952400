"""Text and YAML files as users write them: read with a limit, errors with file, line and key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from paceline.core.errors import ConfigError

MAX_FILE_BYTES = 4 << 20
"""A chain, profile, hardware or round file larger than this is a mistake."""

MIB = 1 << 20


def read_text(path: Path) -> str:
    """A small UTF-8 file. Raises ConfigError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"larger than {MAX_FILE_BYTES // MIB} MiB", where=str(path))
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text", where=str(path)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None


def load_yaml(text: str, name: str, expected: str) -> Mapping[str, Any]:
    """A YAML mapping with its marks; ConfigError says what was `expected` of anything else."""
    try:
        document = YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        problem = (error.problem or error.context or "not YAML").splitlines()[0]
        raise ConfigError(f"not valid YAML: {problem}", where=where) from None
    except YAMLError as error:
        raise ConfigError(f"not valid YAML: {str(error).splitlines()[0]}", where=name) from None
    if not isinstance(document, Mapping):
        raise ConfigError(expected, where=name)
    return document


def first_error(
    error: ValidationError,
    document: Mapping[str, Any],
    name: str,
    model_at: Callable[[Sequence[Any]], type[BaseModel]],
) -> ConfigError:
    """The first of pydantic's findings in our words: file, line, key, and what to write.

    `model_at` tells which keys are known at a path.
    """
    finding = error.errors(include_url=False)[0]
    path = [part for part in finding["loc"] if part != "[key]"]
    key = ".".join(str(part) for part in path)
    where = f"{name}:{line_of(document, path)}"
    match finding["type"]:
        case "missing":
            message = "is missing"
        case "extra_forbidden":
            known = ", ".join(model_at(path[:-1]).model_fields)
            message = f"unknown key; expected one of {known}"
        case "too_short":
            message = "needs at least one entry"
        case "dict_type" if finding["input"] is None:
            message = "is empty; needs at least one entry"
        case _:
            text = finding["msg"]
            message = f"{text[0].lower()}{text[1:]}, got {_short(finding['input'])}"
    return ConfigError(message, key=key, where=where)


def line_of(document: Any, path: Sequence[Any]) -> int:
    """The line (from 1) of the deepest part of `path` that the document has."""
    line = 1
    at = document
    for part in path:
        try:
            marks: Any = at.lc
            line = (marks.key(part) if isinstance(at, Mapping) else marks.item(part))[0] + 1
            at = at[part]
        except (KeyError, IndexError, TypeError, AttributeError):
            break
    return line


def places_of(document: Mapping[str, Any], name: str) -> dict[str, str]:
    """`file:line` of every key in a document, by dotted path."""
    places = {"": f"{name}:1"}

    def walk(at: Any, path: tuple[Any, ...]) -> None:
        if isinstance(at, Mapping):
            for key, value in at.items():
                here = (*path, key)
                places[".".join(map(str, here))] = f"{name}:{line_of(document, here)}"
                walk(value, here)

    walk(document, ())
    return places


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool)) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
