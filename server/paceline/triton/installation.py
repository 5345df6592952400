"""What a local Triton needs from this machine: the wheel's binary, a stub, libpython, a runtime.

The wheel `nvidia-pytriton` ships tritonserver and a python-backend stub per Python version, but
the stub looks for libpython and for its packages in the environment. `prepare` lays out a private
backend directory of symlinks and copies; the wheel itself is never changed. Invariant: a missing
piece is one ResidencyError that names what to install.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from paceline.core.errors import ResidencyError

BACKENDS: Mapping[str, Path] = {
    "onnxruntime": Path(__file__).parent / "backends" / "onnxruntime",
    "paceline_blocks": Path(__file__).parents[1] / "blocks" / "backend",
}
"""Python-based backends that Paceline ships, by the name that a config.pbtxt says."""

_STUB = "triton_python_backend_stub"
_DROPPED_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONWARNINGS", "VIRTUAL_ENV")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class TritonInstallation:
    """Where the pieces of a local Triton lie."""

    binary: Path
    python_backend: Path
    stub: Path
    libpython: Path
    wheel_libraries: Path
    site_packages: tuple[Path, ...]
    python_version: str


@dataclass(frozen=True, slots=True)
class TritonRuntime:
    """A laid-out backend directory and the environment in which tritonserver finds everything."""

    backend_directory: Path
    backends: tuple[str, ...]
    environment: Mapping[str, str]


def find_installation(
    site_packages: Sequence[Path] | None = None,
    *,
    python_version: tuple[int, int] = (sys.version_info[0], sys.version_info[1]),
    library_directories: Sequence[Path] | None = None,
) -> TritonInstallation:
    """The pieces in `site_packages` (this interpreter's own by default).

    Raises ResidencyError naming the missing piece and what installs it.
    """
    sites = tuple(site_packages if site_packages is not None else _own_site_packages())
    version = f"{python_version[0]}.{python_version[1]}"
    for site in sites:
        server = site / "pytriton" / "tritonserver"
        if (server / "bin" / "tritonserver").is_file():
            break
    else:
        raise ResidencyError(
            "no local Triton: the wheel nvidia-pytriton is not installed "
            "(pip install nvidia-pytriton==0.7.0), or give a running one with --triton URL"
        )
    stub = server / "python_backend_stubs" / version / _STUB
    if not stub.is_file():
        offered = sorted(
            (path.name for path in (server / "python_backend_stubs").glob("*")),
            key=lambda name: [int(part) for part in name.split(".") if part.isdigit()],
        )
        raise ResidencyError(
            f"nvidia-pytriton has no Python backend stub for Python {version} "
            f"(it has {', '.join(offered) or 'none'}): use Python 3.11 or 3.12"
        )
    backend = server / "backends" / "python"
    if not (backend / "libtriton_python.so").is_file():
        raise ResidencyError(
            f"{backend} has no libtriton_python.so: reinstall nvidia-pytriton "
            "(pip install --force-reinstall --no-deps nvidia-pytriton==0.7.0)"
        )
    _check_numpy(sites)
    return TritonInstallation(
        binary=server / "bin" / "tritonserver",
        python_backend=backend,
        stub=stub,
        libpython=_find_libpython(version, library_directories),
        wheel_libraries=site / "nvidia_pytriton.libs",
        site_packages=sites,
        python_version=version,
    )


def prepare(
    installation: TritonInstallation,
    state_directory: Path,
    *,
    backends: Mapping[str, Path],
    threads: int = 1,
    environment: Mapping[str, str] | None = None,
) -> TritonRuntime:
    """Lay out `state_directory` and return how to run Triton from it.

    `backends` are our own python-based backends: their names and directories. Safe to repeat,
    also beside a running Triton: every file is replaced at once or left alone.
    """
    directory = state_directory / "backends"
    python = directory / "python"
    libraries = state_directory / "lib"
    for path in (python, libraries):
        path.mkdir(parents=True, exist_ok=True)
    _link(python / installation.stub.name, installation.stub)
    # A real file each: Triton refuses a library that a link leads out of its backend directory.
    for source in sorted(installation.python_backend.iterdir()):
        if source.is_file():
            _copy_file(source, python / source.name)
    # Only libpython itself: its directory may hold libraries that the wheel must not pick up.
    _link(libraries / installation.libpython.name, installation.libpython)
    for name, source in sorted(backends.items()):
        _copy_tree(source, directory / name)
    interpreter = _write_interpreter(installation, state_directory / "python")
    base = dict(os.environ if environment is None else environment)
    return TritonRuntime(
        backend_directory=directory,
        backends=("python", *sorted(backends)),
        environment=_environment(base, installation, libraries, interpreter, threads),
    )


def _environment(
    base: dict[str, str],
    installation: TritonInstallation,
    libraries: Path,
    python: Path,
    threads: int,
) -> dict[str, str]:
    for name in _DROPPED_VARIABLES:
        base.pop(name, None)
    search = [str(libraries), str(installation.wheel_libraries), base.get("LD_LIBRARY_PATH", "")]
    base["LD_LIBRARY_PATH"] = os.pathsep.join(part for part in search if part)
    base["PATH"] = os.pathsep.join((str(python), base.get("PATH", os.defpath)))
    base["PYTHONUNBUFFERED"] = "1"
    for name in _THREAD_VARIABLES:
        base[name] = str(threads)
    return base


def _write_interpreter(installation: TritonInstallation, directory: Path) -> Path:
    """A virtual environment for the stub's embedded Python; its `bin`.

    The stub runs Python isolated: PYTHONPATH and PYTHONHOME do not reach it, so that it would take
    numpy from wherever libpython was built. But it finds itself as `python3` on PATH, and beside
    that a pyvenv.cfg, which works for any kind of installation.
    """
    base = Path(getattr(sys, "_base_executable", "") or sys.executable)
    packages = directory / "lib" / f"python{installation.python_version}" / "site-packages"
    binaries = directory / "bin"
    for path in (packages, binaries):
        path.mkdir(parents=True, exist_ok=True)
    _link(binaries / "python3", base)
    _write(
        directory / "pyvenv.cfg",
        f"home = {base.parent}\ninclude-system-site-packages = false\n",
    )
    lines = (str(site) for site in installation.site_packages)
    _write(packages / "paceline.pth", "".join(f"{line}\n" for line in lines))
    return binaries


def _own_site_packages() -> tuple[Path, ...]:
    return tuple(
        Path(entry)
        for entry in dict.fromkeys(sys.path)
        if entry.endswith(("site-packages", "dist-packages"))
    )


def _check_numpy(sites: Sequence[Path]) -> None:
    found = next(iter(distributions(name="numpy", path=[str(site) for site in sites])), None)
    if found is None:
        raise ResidencyError("Triton's Python backend needs numpy: pip install 'numpy<2'")
    if int(found.version.split(".", 1)[0]) >= 2:
        raise ResidencyError(
            f"Triton's Python backend gives empty outputs with numpy {found.version}: "
            "pip install 'numpy<2'"
        )


def _find_libpython(version: str, directories: Sequence[Path] | None) -> Path:
    name = f"libpython{version}.so.1.0"
    if directories is None:
        loaded = _mapped_library(name)
        if loaded is not None:
            return loaded
        directories = _library_directories()
    for directory in directories:
        if (directory / name).is_file():
            return directory / name
    raise ResidencyError(
        f"{name} is not installed, which Triton's Python backend needs: on Debian or Ubuntu "
        f"apt-get install libpython{version}; with pyenv build Python with "
        "PYTHON_CONFIGURE_OPTS=--enable-shared"
    )


def _mapped_library(name: str) -> Path | None:
    """The libpython this very process runs on, if it is a shared one."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in maps.splitlines():
        path = Path(line.rpartition(" ")[2])
        if path.name == name and path.is_file():
            return path
    return None


def _library_directories() -> list[Path]:
    machine = str(sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu")
    named = [
        sysconfig.get_config_var("LIBDIR"),
        f"{sys.base_prefix}/lib",
        f"{sys.base_prefix}/lib64",
        f"/usr/lib/{machine}",
        f"/lib/{machine}",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib",
    ]
    return [Path(str(entry)) for entry in dict.fromkeys(named) if entry]


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() and link.readlink() == target:
        return
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


def _write(path: Path, text: str) -> None:
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def _copy_tree(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if "__pycache__" in path.parts or not path.is_file():
            continue
        _copy_file(path, target / path.relative_to(source))


def _copy_file(source: Path, copy: Path) -> None:
    if copy.is_file() and not copy.is_symlink() and filecmp.cmp(source, copy, shallow=False):
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    fresh = copy.with_name(f".{copy.name}.{os.getpid()}")
    shutil.copyfile(source, fresh)
    fresh.replace(copy)
