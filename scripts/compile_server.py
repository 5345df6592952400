"""Compile what runs for every request to machine code, with mypyc.

    .venv/bin/python scripts/compile_server.py

scripts/setup does it. The extension modules go into the virtual environment, into a folder named
after the contents of the sources (`paceline.compiled`): as soon as a source changes they are not
used any more, and Paceline is interpreted until they are compiled again. PACELINE_INTERPRETED=1
keeps to the sources in any case. Needs a C compiler and Python's header files; ends with status 3
and says so where one of them is missing.

mypyc's classes differ from Python's in ways that matter here: a dataclass cannot have `__slots__`,
the attributes of a frozen one cannot be unpickled, and what `dataclass` writes itself is not
compiled. So the copy that is compiled has plain dataclasses, hashable as before; that nothing is
assigned to them is the type checker's to see, of the sources. Those that were not frozen, which are
made for every request, have their `__init__` written out (what has one cannot be unpickled).
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "server" / "paceline"
sys.path.insert(0, str(PACKAGE.parent))

from paceline import compiled  # noqa: E402

SCRATCH = ".compiling-"
"""What is left of one that was killed goes with the next, an hour later."""
KEPT = 2
"""Folders of compiled modules: this one's, and that of servers which are still running."""


def missing() -> str | None:
    """What this machine lacks to compile, and how to get it."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        return f"no C compiler ({compiler}): apt-get install gcc"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return f"no Python.h: apt-get install python{version}-dev"
    return None


def plain(source: str) -> str:
    r"""A module with dataclasses as mypyc compiles them best; lines keep their numbers.

    >>> lines = ["@dataclass(slots=True)", "class Rows:", "    first: int", "", "x = 1"]
    >>> print(plain("\n".join(lines)))
    @dataclasses.dataclass(init=False)
    class Rows:
        first: int
        def __init__(self, first: int) -> None: self.first = first
    x = 1
    """
    future = "from __future__ import annotations"
    lines = source.replace(future, f"{future}; import dataclasses", 1).splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef):
            continue
        for mark in node.decorator_list:
            name = ast.unparse(mark.func if isinstance(mark, ast.Call) else mark)
            if name not in ("dataclass", "value"):
                continue
            given = mark.keywords if isinstance(mark, ast.Call) else []
            options = {str(option.arg): ast.unparse(option.value) for option in given}
            frozen = options.pop("frozen", None) == "True"
            # One that is compared by identity is hashed by it, too.
            if name == "value" or (frozen and options.get("eq") != "False"):
                options["unsafe_hash"] = "True"
            options.pop("slots", None)
            seldom = frozen or node.bases
            if not seldom and (at := _initializer(node, lines)) is not None:
                options["init"] = "False"
                lines[at[0]] = at[1]
            stated = ", ".join(f"{option}={value}" for option, value in options.items())
            end = mark.end_lineno or mark.lineno
            lines[mark.lineno - 1 : end] = [f"@dataclasses.dataclass({stated})"]
            lines[mark.lineno : mark.lineno] = [""] * (end - mark.lineno)
    return "\n".join(lines)


def _initializer(node: ast.ClassDef, lines: list[str]) -> tuple[int, str] | None:
    """What `dataclass` would write, to be compiled: it, and the empty line behind the fields."""
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    if not fields:
        return None
    takes, sets = ["self"], []
    for one in fields:
        name, kind = ast.unparse(one.target), ast.unparse(one.annotation)
        default = ast.unparse(one.value) if one.value is not None else None
        made = None
        if isinstance(one.value, ast.Call) and ast.unparse(one.value.func) == "field":
            given = {option.arg: ast.unparse(option.value) for option in one.value.keywords}
            default = given.get("default")
            made = f"({given['default_factory']})()" if "default_factory" in given else None
            if given.get("init") == "False":
                if (made or default) is not None:
                    sets.append(f"self.{name} = {made or default}")
                continue
        if made is not None:
            takes.append(f"{name}: {kind} | None = None")
            sets.append(f"self.{name} = {made} if {name} is None else {name}")
        else:
            takes.append(f"{name}: {kind}" + (f" = {default}" if default is not None else ""))
            sets.append(f"self.{name} = {name}")
    if any(isinstance(p, ast.FunctionDef) and p.name == "__post_init__" for p in node.body):
        sets.append("self.__post_init__()")
    at = fields[-1].end_lineno or fields[-1].lineno
    while at < len(lines) and lines[at].strip():
        at += 1
    if at == len(lines):
        return None
    return at, f"    def __init__({', '.join(takes)}) -> None: {'; '.join(sets)}"


def build(place: Path, *, level: str, keep_c: Path | None = None) -> None:
    """Compile into the folder `place`, which is there afterwards whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    for left in place.parent.glob(f"{SCRATCH}*"):
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=place.parent) as scratch:
        work = Path(scratch)

        def stop(number: int, frame: object) -> NoReturn:
            # Threads wait for compilers that would go on for long.
            shutil.rmtree(work, ignore_errors=True)
            os._exit(128 + number)

        for ends in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ends, stop)
        shutil.copytree(
            PACKAGE, work / "paceline", ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
        names = [path.relative_to(PACKAGE.parent) for path in compiled.sources(PACKAGE)]
        for name in names:
            path = work / name
            path.write_text(plain(path.read_text()))
        (work / "mypy.ini").write_text(
            f"[mypy]\npython_version = {sys.version_info.major}.{sys.version_info.minor}\n"
            # Types are checked by `scripts/test`, with the stubs of all libraries.
            "ignore_missing_imports = true\ndisable_error_code = import-untyped\n"
            "explicit_package_bases = true\nplugins = pydantic.mypy\n"
        )
        os.chdir(work)
        _extensions([str(name) for name in names], work / "built", level)
        os.chdir(ROOT)
        shutil.rmtree(place, ignore_errors=True)
        if keep_c is not None:
            shutil.copytree(work / "c", keep_c)
        (work / "built").rename(place)


def _extensions(names: list[str], into: Path, level: str) -> None:
    """mypyc writes C, a file for each module; as many compilers as there are cores read it."""
    # Not needed, and with mypyc not there, where nothing is compiled.
    from mypyc.build import mypycify
    from setuptools import Distribution
    from setuptools.command.build_ext import build_ext

    class Build(build_ext):  # type: ignore[misc]
        """setuptools compiles an extension's sources one after the other."""

        def build_extension(self, ext: Any) -> None:
            def compile_one(source: str) -> str:
                objects = self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    include_dirs=ext.include_dirs,
                    macros=ext.define_macros,
                    extra_postargs=ext.extra_compile_args,
                )
                return str(objects[0])

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                ext.extra_objects = list(pool.map(compile_one, ext.sources))
            ext.sources = []
            super().build_extension(ext)

    modules = mypycify(
        ["--config-file=mypy.ini", *names],
        opt_level=level,
        debug_level="0",
        multi_file=True,
        target_dir="c",
    )
    command = Build(Distribution({"name": "paceline", "ext_modules": modules}))
    command.build_lib, command.build_temp = str(into), "objects"
    command.ensure_finalized()
    command.run()


def works(place: Path) -> bool:
    """Whether a Python that uses them can import them all."""
    imports = ", ".join(
        str(path.relative_to(PACKAGE.parent).with_suffix("")).replace(os.sep, ".")
        for path in compiled.sources(PACKAGE)
    )
    code = f"import paceline, {imports}; assert paceline.COMPILED"
    environment = {
        **os.environ,
        "PYTHONPATH": str(PACKAGE.parent),
        "PYTHONFAULTHANDLER": "1",
        compiled.VARIABLE: "0",
    }
    if subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0:
        return True
    shutil.rmtree(place, ignore_errors=True)
    return False


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--again", action="store_true", help="also where it has been done")
    parser.add_argument(
        "--level", choices=("0", "1", "2", "3"), default="1", help="of optimization (default: 1)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be missing: status 0, or 3"
    )
    parser.add_argument("--keep-c", type=Path, metavar="DIR", help="also keep the C, in DIR")
    options = parser.parse_args()
    lacking = missing()
    if lacking is not None:
        print(lacking)
        return 3
    if options.dry_run:
        return 0
    place = compiled.folder(PACKAGE)
    if options.again or not place.is_dir():
        build(place, level=options.level, keep_c=options.keep_c)
        if not works(place):
            print("the compiled modules cannot be imported; see above", file=sys.stderr)
            return 1
    place.touch()
    others = (path for path in place.parent.iterdir() if not path.name.startswith("."))
    for old in sorted(others, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    print(f"compiled: {place}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
