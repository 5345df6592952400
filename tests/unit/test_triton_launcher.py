"""What a local Triton needs, and its traces on disk, without starting one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from paceline.core.errors import ResidencyError
from paceline.triton.installation import TritonInstallation, find_installation, prepare
from paceline.triton.launcher import (
    LocalTriton,
    LocalTritonSettings,
    log_tail,
    remove_stale_shared_memory,
    rotate_log,
    shm_owner_prefix,
)

STUB = "pytriton/tritonserver/python_backend_stubs/3.11/triton_python_backend_stub"
PIECES = (
    "pytriton/tritonserver/bin/tritonserver",
    STUB,
    "pytriton/tritonserver/backends/python/libtriton_python.so",
    "pytriton/tritonserver/backends/python/triton_python_backend_utils.py",
    "numpy-1.26.4.dist-info/METADATA",
    "lib/libpython3.11.so.1.0",
)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site-packages directory with everything, and libpython beside it."""
    for piece in PIECES:
        path = tmp_path / "site-packages" / piece
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (
            "Metadata-Version: 2.1\nName: numpy\nVersion: 1.26.4\n" if "numpy" in piece else piece
        )
        path.write_text(text)
    return tmp_path / "site-packages"


def find(site: Path, version: tuple[int, int] = (3, 11)) -> TritonInstallation:
    return find_installation([site], python_version=version, library_directories=[site / "lib"])


def test_a_complete_installation_is_found(site: Path) -> None:
    found = find(site)
    assert found.binary == site / PIECES[0]
    assert found.stub == site / STUB
    assert found.libpython == site / "lib/libpython3.11.so.1.0"
    assert found.wheel_libraries == site / "nvidia_pytriton.libs"


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        (PIECES[0], "nvidia-pytriton is not installed .*pip install .* or .* --triton URL"),
        (STUB, r"no Python backend stub for Python 3\.11 .*: use Python 3\.11 or 3\.12"),
        (PIECES[2], r"has no libtriton_python\.so: reinstall nvidia-pytriton"),
        (PIECES[4], r"needs numpy: pip install 'numpy<2'"),
        (PIECES[5], r"libpython3\.11\.so\.1\.0 is not installed.* apt-get install libpython3\.11"),
    ],
)
def test_each_missing_piece_is_one_line_that_says_what_to_install(
    site: Path, missing: str, line: str
) -> None:
    (site / missing).unlink()
    if "numpy" in missing:
        (site / missing).parent.rmdir()
    with pytest.raises(ResidencyError, match=line) as caught:
        find(site)
    assert "\n" not in str(caught.value)


def test_a_python_without_stub_is_told_which_ones_have_one(site: Path) -> None:
    with pytest.raises(ResidencyError, match=r"for Python 3\.14 \(it has 3\.11\)"):
        find(site, (3, 14))


def test_numpy_2_is_refused_because_the_stub_cannot_use_it(site: Path) -> None:
    metadata = site / PIECES[4]
    metadata.write_text(metadata.read_text().replace("1.26.4", "2.1.0"))
    with pytest.raises(ResidencyError, match=r"numpy 2\.1\.0: pip install 'numpy<2'"):
        find(site)


def test_a_runtime_is_laid_out_and_repeated_without_touching_what_is_there(
    site: Path, tmp_path: Path
) -> None:
    ours = tmp_path / "ours"
    (ours / "fast" / "__pycache__").mkdir(parents=True)
    (ours / "fast" / "model.py").write_text("one")
    (ours / "fast" / "__pycache__" / "model.pyc").write_text("no")
    state = tmp_path / "state"
    environment = {"LD_LIBRARY_PATH": "/x", "PYTHONPATH": "/y", "PYTHONHOME": "/z", "PATH": "/p"}
    for text in ("one", "two"):
        (ours / "fast" / "model.py").write_text(text)
        runtime = prepare(
            find(site),
            state,
            backends={"fast": ours / "fast"},
            threads=2,
            environment=environment,
        )
        assert runtime.backends == ("python", "fast")
        assert (state / "backends/fast/model.py").read_text() == text
    assert not (state / "backends/fast/__pycache__").exists()
    assert (state / "backends/python/triton_python_backend_stub").resolve() == site / STUB
    assert (state / "lib/libpython3.11.so.1.0").is_file()
    made = runtime.environment
    assert made["LD_LIBRARY_PATH"].split(":") == [
        str(state / "lib"),
        str(site / "nvidia_pytriton.libs"),
        "/x",
    ]
    assert made["PATH"] == f"{state / 'python/bin'}:/p"
    assert made["OMP_NUM_THREADS"] == "2"
    assert "PYTHONPATH" not in made and "PYTHONHOME" not in made
    assert not list(state.rglob(".*")), "no temporary files are left"


def test_the_stubs_python_finds_this_installations_packages(site: Path, tmp_path: Path) -> None:
    prepare(find(site), tmp_path / "state", backends={})
    directory = tmp_path / "state" / "python"
    base = Path((directory / "pyvenv.cfg").read_text().splitlines()[0].removeprefix("home = "))
    assert (base / "python3").exists()
    assert (directory / "bin/python3").resolve() == Path(sys.executable).resolve()
    listed = (directory / "lib/python3.11/site-packages/paceline.pth").read_text()
    assert listed == f"{site}\n"


async def test_a_missing_model_repository_is_named_before_anything_starts(tmp_path: Path) -> None:
    local = LocalTriton(
        LocalTritonSettings(
            state_directory=tmp_path / "state", model_repositories=(tmp_path / "none",)
        )
    )
    with pytest.raises(ResidencyError, match=r"model repository .*/none is not a directory"):
        await local.start()
    await local.stop()


def test_a_log_is_rotated_above_its_bound_and_its_end_can_be_quoted(tmp_path: Path) -> None:
    log = tmp_path / "triton.log"
    rotate_log(log, 10)
    log.write_text("old line\n")
    rotate_log(log, 10)
    assert not (tmp_path / "triton.log.1").exists()
    with log.open("a") as file:
        file.write("".join(f"line {number}\n\n" for number in range(9)))
    assert log_tail(log, len("old line\n"), 3) == ["line 6", "line 7", "line 8"]
    assert log_tail(log, log.stat().st_size) == []
    assert log_tail(tmp_path / "none", 0) == []
    rotate_log(log, 10)
    assert not log.exists()
    assert (tmp_path / "triton.log.1").read_text().startswith("old line")


def test_only_shared_memory_of_processes_that_are_gone_is_removed(tmp_path: Path) -> None:
    alive = tmp_path / f"{shm_owner_prefix(os.getpid())}0_python_1"
    gone = tmp_path / f"{shm_owner_prefix(2**22 + 5)}0_python_1"
    foreign = tmp_path / "paceline_1_99999999_0_python_1"
    other = tmp_path / "triton_python_backend_shm_region_1"
    for path in (alive, gone, foreign, other):
        path.write_bytes(b"")
    remove_stale_shared_memory(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted((alive, foreign, other))
