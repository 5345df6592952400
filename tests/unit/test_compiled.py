"""What runs for every request is compiled: from these sources, or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import paceline
from paceline import compiled
from paceline.dispatch import dispatcher

PACKAGE = Path(paceline.__file__).parent


def python(*arguments: str, root: Path, interpreted: bool = False) -> str:
    """What a Python that imports Paceline from `root` prints."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(root), str(PACKAGE.parents[1]))),
        compiled.VARIABLE: "1" if interpreted else "0",
    }
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_compiled_modules_are_the_ones_that_are_used_or_none() -> None:
    is_compiled = not str(dispatcher.__file__).endswith(".py")
    assert is_compiled == paceline.COMPILED
    if compiled.unwanted():
        assert not is_compiled


def test_every_module_that_is_named_is_there() -> None:
    for module in (*compiled.MODULES, *compiled.LEFT_OUT, *compiled.BESIDE):
        assert (PACKAGE / f"{module}.py").is_file(), module
    for package in compiled.PACKAGES:
        assert (PACKAGE / package).is_dir(), package


@pytest.mark.skipif(not paceline.COMPILED, reason="nothing is compiled")
def test_a_changed_source_is_never_ignored(tmp_path: Path) -> None:
    shutil.copytree(
        PACKAGE, tmp_path / "paceline", ignore=shutil.ignore_patterns("__pycache__", "blocks")
    )
    code = "import paceline, paceline.dispatch.queue as q; print(paceline.COMPILED, q.__file__)"
    assert python("-c", code, root=tmp_path).startswith("True ")
    queue = tmp_path / "paceline" / "dispatch" / "queue.py"
    queue.write_text(queue.read_text() + "\nCHANGED = 1\n")
    assert python("-c", code, root=tmp_path) == f"False {queue}\n"
    # The interpreted neighbours that compiled code knows count as well.
    queue.write_text((PACKAGE / "dispatch" / "queue.py").read_text())
    assert python("-c", code, root=tmp_path).startswith("True ")
    with (tmp_path / "paceline" / "core" / "errors.py").open("a") as errors:
        errors.write("\n")
    assert python("-c", code, root=tmp_path).startswith("False ")


@pytest.mark.skipif(not paceline.COMPILED, reason="nothing is compiled")
def test_compiled_and_interpreted_code_decide_the_same() -> None:
    code = """
import sys
from tests.simulation.replay import main
for seed in range(20):
    sys.argv[1:] = ["--seed", str(seed)]
    assert main() == 0
"""
    events = python("-c", code, root=PACKAGE.parent)
    assert len(events.splitlines()) > 1000
    assert events == python("-c", code, root=PACKAGE.parent, interpreted=True)
