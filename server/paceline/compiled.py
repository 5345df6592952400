"""What runs for every request, compiled to machine code where that has been done.

`scripts/compile_server.py` has mypyc make extension modules of `PACKAGES` and `MODULES`, in a
folder named after the contents of all of them. `use` lets Python import those instead of the
sources: all or, if a single source has changed since, none, as compiled modules know each other's
classes. `PACELINE_INTERPRETED=1` keeps to the sources.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

PACKAGES = ("core", "dispatch", "http2")
"""Compiled but for their `__init__`."""
MODULES = (
    *("rpc/call", "rpc/convert", "rpc/head", "rpc/infer", "rpc/listener", "rpc/parameters"),
    *("rpc/status", "rpc/stream", "rpc/task", "rpc/validate", "rpc/wire"),
    *("runtime/engine", "runtime/statistics", "runtime/suspicions"),
    *("triton/contents", "triton/execution", "triton/http2", "triton/messages"),
    "triton/shared_memory",
)
LEFT_OUT = ("core/errors", "core/values")
"""Interpreted: exceptions that others inherit from, and `value`, which the compiler cannot read."""
BESIDE = ("rpc/context", "triton/transport")
"""Interpreted, and known to compiled modules."""
FORM = 2
"""Of what is made of them: counts up when `scripts/compile_server.py` makes something else."""
VARIABLE = "PACELINE_INTERPRETED"
_SUFFIX = EXTENSION_SUFFIXES[0]


def sources(root: Path) -> list[Path]:
    """The modules to compile of the package at `root`, in a fixed order."""
    found = [path for package in PACKAGES for path in (root / package).glob("*.py")]
    found += [root / f"{module}.py" for module in MODULES]
    left_out = {root / f"{module}.py" for module in LEFT_OUT}
    return sorted(path for path in found if path.name != "__init__.py" and path not in left_out)


def folder(root: Path) -> Path:
    """Where the modules compiled from what is at `root` belong, for this Python."""
    digest = hashlib.sha256(f"{FORM} {_SUFFIX}".encode())
    beside = [root / f"{module}.py" for module in (*LEFT_OUT, *BESIDE)]
    for path in [*sources(root), *beside]:
        digest.update(f"\0{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return Path(sys.prefix) / "lib" / "paceline-compiled" / digest.hexdigest()[:16]


class _Finder:
    """Finds compiled modules by their full names."""

    def __init__(self, modules: dict[str, str]) -> None:
        self._modules = modules

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        file = self._modules.get(name)
        if file is None:
            return None
        return spec_from_file_location(name, file, loader=ExtensionFileLoader(name, file))


def unwanted() -> bool:
    """Whether the environment keeps to the sources."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def use(root: Path) -> bool:
    """Import the compiled modules from now on, if there are any of just these sources."""
    if unwanted():
        return False
    try:
        place = folder(root)
    except OSError:
        # A part of the package on its own.
        return False
    modules = {
        str(path.relative_to(place)).removesuffix(_SUFFIX).replace(os.sep, "."): str(path)
        for path in place.rglob(f"*{_SUFFIX}")
    }
    if modules:
        sys.meta_path.insert(0, _Finder(modules))
    return bool(modules)
