"""Block pools: nothing half-written, nothing wrong is used, nothing outside is reached."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from scripts.make_models import wide_mlp
from tests.blocks_models import conv, written

from paceline.blocks.backend.manifest import PoolError, PoolObject, cpu_features, parse
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.compile import compile_model
from paceline.blocks.member import Options
from paceline.blocks.pool import PoolWriter
from paceline.blocks.repository import CompiledModel, find_compiled
from paceline.core.errors import ResidencyError

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


@pytest.fixture
def model(tmp_path: Path) -> CompiledModel:
    source = written(tmp_path, "conv")
    directory, pool = tmp_path / "repo" / "conv", tmp_path / "pool"
    return compile_model({"": source}, directory, pool, Options(measure=False)).model


def _check_pool(pool: Path) -> int:
    """Every name's bytes are its own; the number of objects."""
    names = [path.name for path in (pool / "objects").iterdir() if path.name != "external"]
    for name in names:
        assert sha256((pool / "objects" / name).read_bytes()).hexdigest() == name
    for path in (pool / "manifests").iterdir():
        assert sha256(path.read_bytes()).hexdigest() == path.stem
    return len(names)


def _largest(model: CompiledModel) -> tuple[str, PoolObject]:
    return max(model.manifest.objects.items(), key=lambda item: item[1].size_bytes)


def _process(code: str, *arguments: Path, **options: Any) -> subprocess.Popen[str]:
    """Python that has compile_model; a limit on anything is its own."""
    return subprocess.Popen(
        [sys.executable, "-c", _PROLOGUE + code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'server'}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


_PROLOGUE = """
import os, resource, signal, sys
from pathlib import Path
from paceline.blocks.compile import compile_model
from paceline.blocks.member import Options
from paceline.core.errors import PacelineError
source, directory, pool = map(Path, sys.argv[1:4])
options = Options(measure=False)
"""


def test_an_object_that_was_altered_is_found_before_use(model: CompiledModel) -> None:
    """Also with size and mtime as before, and by a process that had verified it."""
    name, stated = _largest(model)
    store = ObjectStore(model.pool)
    path = store.verified(name, stated)
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(stated.size_bytes // 2)
        byte = file.read(1)[0]
        file.seek(stated.size_bytes // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for again in (store, ObjectStore(model.pool)):
        with pytest.raises(PoolError, match=r"altered .*; compile the model again"):
            again.verified(name, stated)


def _replaced(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: os.truncate(path, 4096), "4096 bytes instead of"),
        (lambda path: path.unlink(), "missing; compile the model again"),
        (_replaced(Path.mkdir), "not a regular file"),
        (_replaced(os.mkfifo), "not a regular file"),
        (_replaced(lambda path: path.symlink_to("/etc/passwd")), "symbolic links"),
    ],
)
def test_an_object_that_is_not_what_it_was_is_refused(
    model: CompiledModel, damage: Callable[[Path], Any], said: str
) -> None:
    """Truncated, missing, or no file at all; a link is not followed out of the pool."""
    name, stated = _largest(model)
    path = model.pool / "objects" / name
    path.chmod(0o644)
    damage(path)
    with pytest.raises(PoolError, match=said):
        ObjectStore(model.pool).verified(name, stated)


def test_what_is_known_to_be_verified_is_not_read_again(model: CompiledModel) -> None:
    """A warm start reads nothing of an object whose marker still fits; without one it does."""
    name, stated = _largest(model)

    def read_bytes(store: ObjectStore) -> int:
        before = _read_by_this_process()
        store.verified(name, stated)
        return _read_by_this_process() - before

    assert read_bytes(ObjectStore(model.pool)) < stated.size_bytes // 2
    (model.pool / "verified" / name).unlink()
    assert read_bytes(ObjectStore(model.pool)) >= stated.size_bytes
    assert read_bytes(ObjectStore(model.pool)) < stated.size_bytes // 2


def _read_by_this_process() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


@pytest.mark.parametrize("name", ["../repo/conv/config.pbtxt", "/etc/passwd", "A" * 64, "", "a/b"])
def test_no_name_leads_out_of_the_pool(model: CompiledModel, name: str) -> None:
    """Neither asked for nor written in a manifest."""
    store = ObjectStore(model.pool)
    with pytest.raises(PoolError, match="is no name of an object"):
        store.path(name)
    with pytest.raises(PoolError, match="is no name of an object"):
        store.manifest(name)
    changes: list[Callable[[Any], None]] = [
        lambda doc: doc["objects"].update({name: {"bytes": 1, "blake3": "0" * 64}}),
        lambda doc: doc["members"][0]["blocks"][0].update(graph=name),
        lambda doc: _weight(doc).update(object=name),
    ]
    for change in changes:
        document = json.loads(json.dumps(model.manifest.document))
        change(document)
        with pytest.raises(PoolError, match="m.json: '.*' is no name of an object"):
            parse(json.dumps(document).encode(), "m.json")


def _weight(document: Any) -> Any:
    return document["members"][0]["blocks"][0]["weights"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(format="paceline-blocks/9"), "format is 'paceline-blocks/9'"),
        (lambda d: d.pop("members"), "lacks 'members'"),
        (lambda d: d.update(members=[]), "members: none"),
        (lambda d: d["members"].append(d["members"][0]), "two of one name"),
        (lambda d: _weight(d).update(offset=1 << 40), "ends outside its object"),
        (lambda d: _weight(d).update(offset=-64), "offset: -64 is no whole number"),
        (lambda d: _weight(d).update(offset=2), "offset 2 is not aligned"),
        (lambda d: _weight(d).update(shape=[1, 2]), "do not go with FP32"),
        (lambda d: _weight(d).update(dtype="FP31"), "do not go with FP31"),
        (lambda d: _weight(d).update(access="none"), "access 'none'"),
        (lambda d: d["members"][0]["blocks"][0].update(inputs=["z"]), "nothing gives 'z'"),
        (
            lambda d: d["members"][0]["outputs"][0].update(value="z"),
            "no block gives the output 'z'",
        ),
        (lambda d: d["members"][0]["blocks"][0].update(graph="0" * 64), "is not among the objects"),
        (lambda d: d["members"][0]["blocks"][0].update(execute_s=3), "not a manifest"),
    ],
)
def test_a_manifest_that_is_not_sound_is_refused(
    model: CompiledModel, change: Callable[[Any], Any], said: str
) -> None:
    """Whatever is read through it later would be out of bounds or undefined."""
    document = json.loads(json.dumps(model.manifest.document))
    change(document)
    with pytest.raises(PoolError, match=said):
        parse(json.dumps(document).encode(), "m.json")


def test_an_altered_manifest_is_refused(model: CompiledModel) -> None:
    path = model.pool / "manifests" / f"{model.digest}.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b'"batching": true', b'"batching": false'))
    with pytest.raises(PoolError, match="altered or truncated"):
        ObjectStore(model.pool).manifest(model.digest)


def test_a_compile_that_is_killed_leaves_nothing_half_written(tmp_path: Path) -> None:
    """SIGKILL at every step: no model directory, sound objects, and the next compile sweeps."""
    source = written(tmp_path, "conv")
    directory, pool = tmp_path / "repo" / "conv", tmp_path / "pool"
    code = """
steps = int(sys.argv[4])
def progress(*told):
    global steps
    steps -= 1
    if steps == 0:
        os.kill(os.getpid(), signal.SIGKILL)
compile_model({"": source}, directory, pool, options, progress)
"""
    killed = 0
    while _wait(_process(code, source, directory, pool, Path(str(killed + 1)))) == -signal.SIGKILL:
        killed += 1
        assert not directory.exists()
        if pool.exists():
            _check_pool(pool)
    assert killed >= 6  # reading, optimising, and every weight
    assert list((pool / "tmp").iterdir()) == []
    assert _check_pool(pool) == len(find_compiled([tmp_path / "repo"])[0].manifest.objects)


def test_a_killed_recompile_leaves_the_old_model(tmp_path: Path, model: CompiledModel) -> None:
    """Until the last rename the configuration is the old one, and what it names is whole."""
    conv("conv", head_seed=1).write(tmp_path)
    code = """
def progress(what, done=0, total=0):
    if done and done == total:
        os.kill(os.getpid(), signal.SIGKILL)
compile_model({"": source}, directory, pool, options, progress)
"""
    process = _process(code, tmp_path / "conv.onnx", model.directory, model.pool)
    assert _wait(process) == -signal.SIGKILL
    (found,) = find_compiled([model.directory])
    assert found.digest == model.digest


def test_compiles_at_the_same_time_share_a_pool(tmp_path: Path) -> None:
    """Four at once, two of them of the same model: every result is whole."""
    repo, pool = tmp_path / "repo", tmp_path / "pool"
    code = 'compile_model({"": source}, directory, pool, options)'
    sources = [conv(name, head_seed=seed).write(tmp_path) for name, seed in (("a", 0), ("b", 1))]
    processes = [
        _process(code, source, repo / source.stem, pool) for source in sources for _ in range(2)
    ]
    assert [_wait(process) for process in processes] == [0] * 4
    found = find_compiled([repo])
    assert [model.manifest.model for model in found] == ["a", "b"]
    assert _check_pool(pool) == len({name for model in found for name in model.manifest.objects})
    assert list((pool / "tmp").iterdir()) == []


def test_writers_that_come_and_go_leave_each_other_alone(tmp_path: Path) -> None:
    """Each sweeps what killed ones left, and must not take what another has just begun for that."""
    code = """
from paceline.blocks.pool import PoolWriter
for step in range(100):
    with PoolWriter(source) as writer:
        writer.add_bytes(bytes([step]) * 4096)
"""
    pool = tmp_path / "pool"
    processes = [_process(code, pool, tmp_path, tmp_path) for _ in range(4)]
    assert [_wait(process) for process in processes] == [0] * 4
    assert _check_pool(pool) == 100
    assert list((pool / "tmp").iterdir()) == []


def test_what_fails_or_is_not_named_leaves_no_object(tmp_path: Path) -> None:
    """Until a writer is done only it sees what it added, and of that a manifest's objects stay."""
    with PoolWriter(tmp_path) as writer:
        kept, stated = writer.add_bytes(b"kept" * MIB)
    again = b"kept" * MIB, b"new" * MIB, b"left" * MIB
    with pytest.raises(ZeroDivisionError), PoolWriter(tmp_path) as writer:
        for data in again:
            name, added = writer.add_bytes(data)
            assert writer.store.verified(name, added).read_bytes() == data
        assert writer.written_bytes == 7 * MIB
        assert _check_pool(tmp_path) == 1
        raise ZeroDivisionError
    assert _check_pool(tmp_path) == 1
    with PoolWriter(tmp_path) as writer:
        names = [writer.add_bytes(data)[0] for data in again]
        manifest = writer.add_manifest(b"{}", names[:2])
        assert writer.written_bytes == 3 * MIB
    assert names[0] == kept
    assert _check_pool(tmp_path) == 2
    assert (tmp_path / "manifests" / f"{manifest}.json").read_bytes() == b"{}"
    ObjectStore(tmp_path).verified(kept, stated)
    assert {path.name for path in (tmp_path / "verified").iterdir()} == set(names[:2])
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_write_that_fails_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """The disk takes half of the largest object only (a limit on the size of files)."""
    source = written(tmp_path, "conv")
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    compile_model({"": source}, directory, pool, options)
except PacelineError as error:
    print(error)
"""
    process = _process(code, source, tmp_path / "repo" / "conv", tmp_path / "pool")
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert said.startswith(f"{tmp_path / 'pool'}: the optimised model could not be written")
    assert said.count("\n") == 1
    assert not (tmp_path / "repo").exists()
    _check_pool(tmp_path / "pool")
    assert list((tmp_path / "pool" / "tmp").iterdir()) == []


def test_a_full_disk_is_said_so(tmp_path: Path) -> None:
    """On a file system of 6 MiB, where a first model fits and a second does not."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", disk], check=False)
    if mounted.returncode != 0:
        pytest.skip("no permission to mount")
    try:
        with PoolWriter(disk) as writer, pytest.raises(ResidencyError, match="the disk is full"):
            for index in range(8):
                data = bytes([index]) * MIB
                writer.add_bytes(data)
        assert _check_pool(disk) < 8
        source = written(tmp_path, "conv")
        with pytest.raises(ResidencyError, match=r"MiB are needed .* MiB are free"):
            compile_model({"": source}, tmp_path / "repo" / "conv", disk, Options(measure=False))
        assert list((disk / "tmp").iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_model_with_external_data_is_not_held_in_memory(tmp_path: Path) -> None:
    """96 MiB are compiled with less than half of that more than an interpreter needs."""
    source = wide_mlp("mlp", width=2048, layers=6).write(tmp_path)
    assert source.with_suffix(".bin").stat().st_size > 96 * MIB
    code = """
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
compile_model({"": source}, directory, pool, options)
print(before, peak())
"""
    process = _process(code, source, tmp_path / "repo" / "mlp", tmp_path / "pool")
    said, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    before_mib, after_mib = map(int, said.split())
    assert after_mib - before_mib < 48


def test_the_features_that_count_are_read_from_the_first_cpu() -> None:
    text = "processor: 0\nflags\t\t: fpu avx2 avx512f sse4_2\nflags: mmx avx\n"
    assert cpu_features(text) == ("avx2", "avx512f", "sse4_2")
    assert cpu_features("") == ()


def _wait(process: subprocess.Popen[str]) -> int:
    _, errors = process.communicate(timeout=60)
    print(errors)  # why, if the code is not what was expected
    return process.returncode
