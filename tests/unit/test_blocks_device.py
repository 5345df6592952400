"""The GPU path, as far as a machine without one can show: layout, staging, clear refusals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.blocks_models import conv, written

from paceline.blocks.backend import device
from paceline.blocks.backend.blockmodel import BlockModel
from paceline.blocks.backend.manifest import PoolError
from paceline.blocks.backend.mapping import MappedObject
from paceline.blocks.backend.settings import SettingsError, read_settings
from paceline.blocks.compile import compile_model
from paceline.blocks.member import Options


class Memory:
    """Stands for a device: copies happen when their event is waited for, in order."""

    def __init__(self) -> None:
        self.bytes = np.zeros(0, np.uint8)
        self._under_way: list[tuple[int, Any]] = []
        self._done = 0

    def allocate(self, size_bytes: int) -> int:
        self.bytes = np.zeros(size_bytes, np.uint8)
        return 0

    def pinned(self, size_bytes: int) -> Any:
        return np.zeros(size_bytes, np.uint8)

    def copy(self, address: int, source: Any) -> int:
        self._under_way.append((address, source))
        return len(self._under_way)

    def wait(self, event: int) -> None:
        for address, source in self._under_way[self._done : event]:
            self.bytes[address : address + len(source)] = source
        self._done = max(self._done, event)

    def close(self) -> None: ...


def _objects(directory: Path, sizes: Mapping[str, int]) -> dict[str, MappedObject]:
    for name, size in sizes.items():
        data = np.random.default_rng(len(name) + size).integers(0, 256, size, np.uint8)
        (directory / name).write_bytes(data.tobytes())
    return {name: MappedObject(directory / name, size) for name, size in sizes.items()}


def test_every_block_finds_its_own_bytes_in_a_pool_smaller_than_all(tmp_path: Path) -> None:
    """Also those larger than a pinned buffer, and what two blocks share is copied once."""
    chunk = device.STAGE_BYTES
    sizes = {"a": 2 * chunk + 5, "b": 1000, "c": 2 * chunk, "d": chunk, "shared": 700}
    needs = [["a", "shared"], ["b"], ["c"], ["d", "shared"]]
    memory, objects = Memory(), _objects(tmp_path, sizes)
    pool = device.DevicePool(memory, needs, objects, 4 * chunk)
    for run in range(2):
        for block, names in enumerate(needs):
            pool.ready(block)
            if block + 1 < len(needs):
                pool.fetch(block + 1)  # while this one computes
            for name in names:
                at = pool.address(name)
                got = memory.bytes[at : at + sizes[name]]
                assert np.array_equal(got, objects[name].bytes), (run, name)
    assert pool.copied_bytes < 2 * sum(sizes.values())


def test_an_object_that_changed_in_host_memory_is_copied_again(tmp_path: Path) -> None:
    """Once, and nothing else is."""
    sizes = {"a": 1000, "b": 2000}
    memory, objects = Memory(), _objects(tmp_path, sizes)
    pool = device.DevicePool(memory, [["a"], ["b"]], objects, None)
    for block in (0, 1):
        pool.ready(block)
    before = pool.copied_bytes
    with objects["a"].path.open("r+b") as file:
        file.write(b"another")
    objects["a"].found_changed()
    for block in (0, 1, 0, 1):
        pool.ready(block)
    assert pool.copied_bytes == before + sizes["a"]
    at = pool.address("a")
    assert memory.bytes[at : at + 7].tobytes() == b"another"


@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3), min_size=1, max_size=6),
    st.integers(1, 20),
)
def test_blocks_in_a_row_never_overlap(needs: Sequence[Sequence[str]], pool_kib: int) -> None:
    sizes = {name: 300 * (1 + index) for index, name in enumerate("abcdefgh")}
    try:
        offsets, size = device.layout(needs, sizes, pool_kib << 10)
    except PoolError:
        return
    assert size == pool_kib << 10
    for one, other in zip(needs, [*needs[1:], []], strict=True):
        places = sorted((offsets[name], offsets[name] + sizes[name]) for name in {*one, *other})
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(places))
        assert places[-1][1] <= size


def test_a_pool_that_holds_no_two_blocks_is_refused() -> None:
    with pytest.raises(PoolError, match="device_pool_mib is too small: two blocks in a row"):
        device.layout([["a"], ["b"]], {"a": 600, "b": 600}, 1024)


def test_a_value_refers_to_memory_that_somebody_else_allocated() -> None:
    """On the CPU, where that can be shown: nothing is copied."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    value = device._device_value(array.ctypes.data, "FP32", (2, 3), 0, device_type=1)
    assert value.data_ptr() == array.ctypes.data and value.shape() == [2, 3]
    array[1, 2] = 42
    assert value.numpy()[1, 2] == 42


def test_a_gpu_that_is_not_there_is_a_clear_load_error(tmp_path: Path) -> None:
    source = conv("conv").write(tmp_path)
    parameters: dict[str, dict[str, str]] = {}
    for kind in ("cpu", "cuda"):
        directory = tmp_path / "repo" / kind
        made = compile_model(
            {"": source}, directory, tmp_path / "blocks", Options(measure=False, device=kind)
        )
        texts = {"manifest": made.model.digest, "pool": str(made.model.pool), "device": "cuda:1"}
        parameters = {key: {"string_value": text} for key, text in texts.items()}
        if kind == "cpu":
            said = "was compiled for a CPU: compile it with --device cuda"
        else:
            said = "device cuda:1: ONNX Runtime here runs on .*CPUExecutionProvider alone"
        with pytest.raises(PoolError, match=said):
            BlockModel.open(read_settings(parameters, directory))
    assert "CUDAExecutionProvider" not in ort.get_available_providers()
    # Its graphs are for any device: they compute here, too.
    model = BlockModel.open(
        read_settings(parameters | {"device": {"string_value": "cpu"}}, tmp_path)
    )
    image = np.ones((1, 3, 32, 32), np.float32)
    got = model.start().infer("", {"image": image}, ["head.y"])["head.y"]
    wanted = ort.InferenceSession(source).run(None, {"image": image})[0]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    model.close()
    with pytest.raises(SettingsError, match="parameter device is 'gpu': give cpu, cuda or cuda:N"):
        read_settings({**parameters, "device": {"string_value": "gpu"}}, tmp_path)


def test_graphs_for_a_gpu_have_no_layout_of_the_cpu(tmp_path: Path) -> None:
    """Matrices in panels are what a kernel of the CPU reads (four axes); on a GPU they stay two."""
    source = written(tmp_path, "bert")
    axes = {}
    for kind in ("cpu", "cuda"):
        options = Options(measure=False, device=kind)
        made = compile_model({"": source}, tmp_path / kind, tmp_path / "blocks", options)
        (member,) = made.model.manifest.members
        axes[kind] = {len(weight.shape) for block in member.blocks for weight in block.weights}
    assert 4 in axes["cpu"] and 4 not in axes["cuda"]
