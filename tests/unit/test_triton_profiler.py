"""Batch sizes, samples, statistics and the cache of the profiler, without a Triton."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import pytest

from paceline.core.errors import ConfigError
from paceline.core.model import ModelSpec
from paceline.core.profile import ProfileRow
from paceline.core.quantities import percentile
from paceline.core.tensor import DATATYPES, Tensor, TensorSpec, byte_size_error, encode_bytes
from paceline.database import Measurements
from paceline.triton.config import ModelConfig, read_config, spec_of
from paceline.triton.profile_cache import ProfileCache, content_hash, machine_identity
from paceline.triton.profiler import Effort, _enough, batch_sizes, monotone, sampled
from paceline.triton.samples import rows_of, sample_of


def config_of(directory: Path, text: str) -> tuple[ModelSpec, ModelConfig, Path]:
    path = directory / "m"
    (path / "1").mkdir(parents=True, exist_ok=True)
    (path / "config.pbtxt").write_text(text, encoding="utf-8")
    config = read_config(path)
    return spec_of(config), config, path


INPUTS = """
max_batch_size: 8
input [ { name: "x" data_type: TYPE_INT16 dims: [-1] } ]
input [ { name: "s" data_type: TYPE_STRING dims: [2] } ]
"""


@pytest.mark.parametrize(
    ("limit", "sizes"), [(0, (1,)), (1, (1,)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))]
)
def test_batch_sizes_double_up_to_the_limit(limit: int, sizes: tuple[int, ...]) -> None:
    assert batch_sizes(ModelSpec("m", limit, (), ())) == sizes


def test_durations_never_fall_and_percentiles_are_measured_values() -> None:
    assert monotone([3.0, 1.0, 4.0, 2.0]) == (3.0, 3.0, 4.0, 4.0)
    assert percentile([float(n) for n in range(1, 21)], 0.95) == 19.0
    assert percentile([1.0], 0.95) == 1.0


def test_measuring_ends_when_calls_agree_or_time_or_calls_are_spent() -> None:
    effort = Effort()
    assert not _enough([5.0] * 2, effort), "never fewer than three calls"
    assert _enough([5.0] * 3, effort), "two seconds are spent"
    assert not _enough([0.01] * 9, effort)
    assert _enough([0.01] * 10, effort), "ten that agree are enough"
    restless = [0.01, 0.02] * 25
    assert not _enough(restless[:49], effort)
    assert _enough(restless, effort)


@pytest.mark.parametrize(
    ("calls_s", "kept"),
    [
        ([0.7, 0.7, 0.7], slice(0, 3)),
        ([0.7, 1.4, 0.7, 0.7, 0.7, 0.7], slice(3, 6)),
        ([0.7, 0.7, 1.4, 0.7, 2.8, 0.7], slice(0, 3)),
    ],
    ids=["calls that agree", "a stall in the first round", "a model that varies by itself"],
)
async def test_calls_that_do_not_agree_are_made_again_and_the_calmer_round_counts(
    calls_s: list[float], kept: slice
) -> None:
    left = iter(calls_s)

    async def timed() -> float:
        return next(left)

    assert await sampled(timed, Effort()) == calls_s[kept]
    assert list(left) == []


def test_a_random_sample_fills_every_datatype_and_is_the_same_each_time() -> None:
    inputs = tuple(TensorSpec(f"x{n}", d, (2, 3)) for n, d in enumerate(sorted(DATATYPES)))
    spec = ModelSpec("m", 8, inputs, ())
    config = type("Config", (), {"model_warmup": ()})()
    sample = sample_of(spec, config, None)
    assert sample == sample_of(spec, config, None)
    assert sample.advice == ""
    for tensor in sample.tensors:
        assert byte_size_error(tensor) is None, tensor
    for batch in rows_of(sample, 3, batches=True):
        joined = Tensor(batch.name, batch.datatype, batch.shape, b"".join(batch.parts))
        assert batch.shape == (3, 2, 3)
        assert byte_size_error(joined) is None


def test_axes_of_any_length_become_one_with_advice_and_optional_inputs_are_left_out() -> None:
    inputs = (TensorSpec("x", "FP32", (-1, 4)), TensorSpec("o", "FP32", (-1,), optional=True))
    config = type("Config", (), {"model_warmup": ()})()
    sample = sample_of(ModelSpec("m", 0, inputs, ()), config, None)
    assert [(tensor.name, tensor.shape) for tensor in sample.tensors] == [("x", (1, 4))]
    assert "declare a `model_warmup` sample" in sample.advice
    (x,) = rows_of(sample, 1, batches=False)
    assert x.shape == (1, 4)


def test_a_model_of_which_every_input_is_optional_is_measured_with_all_of_them() -> None:
    """As fused models are, whose members can be asked one by one: no input is no request."""
    inputs = tuple(TensorSpec(name, "FP32", (4,), optional=True) for name in ("a/x", "b/x"))
    config = type("Config", (), {"model_warmup": ()})()
    sample = sample_of(ModelSpec("m", 8, inputs, ()), config, None)
    assert [tensor.name for tensor in sample.tensors] == ["a/x", "b/x"]


def test_a_declared_sample_is_read_from_its_file_and_zeroes_are_zeroes(tmp_path: Path) -> None:
    text = (
        INPUTS
        + """
    model_warmup [ { name: "w" batch_size: 1
      inputs [ { key: "x" value: { data_type: TYPE_INT16 dims: [3] input_data_file: "x" } },
               { key: "s" value: { data_type: TYPE_STRING dims: [2] zero_data: true } } ] } ]
    """
    )
    spec, config, path = config_of(tmp_path, text)
    (path / "warmup").mkdir()
    (path / "warmup" / "x").write_bytes(struct.pack("<3h", 1, 2, 3))
    s, x = sample_of(spec, config, path).tensors
    assert x == Tensor("x", "INT16", (3,), struct.pack("<3h", 1, 2, 3))
    assert s == Tensor("s", "BYTES", (2,), encode_bytes([b"", b""]))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ('{ key: "y" value: { data_type: TYPE_INT16 dims: [3] zero_data: true } }', "no input 'y'"),
        ('{ key: "x" value: { data_type: TYPE_INT32 dims: [3] zero_data: true } }', "is INT32"),
        ('{ key: "x" value: { data_type: TYPE_INT16 dims: [3] input_data_file: "n" } }', "No such"),
        ('{ key: "x" value: { data_type: TYPE_INT16 dims: [3] zero_data: true } }', "input s"),
    ],
)
def test_an_unusable_sample_says_what_is_wrong_with_it(
    tmp_path: Path, inputs: str, words: str
) -> None:
    text = INPUTS + f'model_warmup [ {{ name: "w" inputs [ {inputs} ] }} ]'
    spec, config, path = config_of(tmp_path, text)
    with pytest.raises(ConfigError, match=words) as caught:
        sample_of(spec, config, path)
    assert "model_warmup 'w'" in str(caught.value)


def test_a_cached_profile_reads_back_equal_and_only_for_its_key(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path)
    rows = (
        ProfileRow("a/b", "cpu", 1, 0.001234567, p99_s=0.001234568),
        ProfileRow("a/b", "cpu", 2, 0.1),
    )
    assert cache.read("a/b", "cpu", "key") is None
    cache.write("a/b", "key", rows)
    assert cache.read("a/b", "cpu", "key") == rows
    assert cache.read("a/b", "cpu", "other") is None
    edited = (ProfileRow("a/b", "cpu", 1, 0.5),)
    cache.write("a/b", "key", edited)
    assert ProfileCache(tmp_path).read("a/b", "cpu", "key") == edited


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 2, "rows": []}',
        '{"format": 2, "rows": [{"batch_size": 1, "duration_ms": -1}]}',
        '{"format": 2, "rows": [{"batch_size": 1, "duration_ms": NaN}]}',
        '{"format": 2, "rows": [{"batch_size": 1, "duration_ms": 2, "p99_ms": 1}]}',
        '{"format": 2, "rows": [[1, 2, 3]]}',
    ],
)
def test_a_corrupt_cache_is_a_warning_and_no_profile(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ProfileCache(tmp_path)
    Measurements(tmp_path).keep_profile("m", "key", text)
    with caplog.at_level(logging.WARNING):
        assert cache.read("m", "cpu", "key") is None
    assert "is unusable" in caplog.text


def test_a_profile_without_a_p99_is_used_and_one_of_a_later_format_is_not(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path)
    text = '{"format": %d, "rows": [{"batch_size": 1, "duration_ms": 2}]}'
    Measurements(tmp_path).keep_profile("m", "key", text % 2)
    assert cache.read("m", "cpu", "key") == (ProfileRow("m", "cpu", 1, 0.002),)
    Measurements(tmp_path).keep_profile("m", "key", text % 3)
    assert cache.read("m", "cpu", "key") is None


def test_a_cache_that_cannot_be_written_costs_only_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        ProfileCache(tmp_path / "file").write("m", "key", (ProfileRow("m", "cpu", 1, 0.1),))
    assert "could not be cached" in caplog.text


def test_the_content_hash_follows_every_file_that_counts(tmp_path: Path) -> None:
    _, config, path = config_of(tmp_path, INPUTS)
    seen = {content_hash(path, config)}
    for name in ("1/model.py", "1/deep/weights.bin", "warmup/x", "2/model.py"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("text")
        seen.add(content_hash(path, config))
    assert len(seen) == 5
    (path / "README").write_text("not part of the model")
    (path / "1" / "__pycache__").mkdir()
    (path / "1" / "__pycache__" / "model.pyc").write_text("derived")
    seen.add(content_hash(path, config))
    assert len(seen) == 5
    assert content_hash(None, config) not in seen


def test_without_a_directory_only_the_instance_count_does_not_count(tmp_path: Path) -> None:
    _, one, _ = config_of(tmp_path, INPUTS + "instance_group [ { count: 1 } ]")
    _, four, _ = config_of(tmp_path, INPUTS + "instance_group [ { count: 4 } ]")
    _, other, _ = config_of(tmp_path, INPUTS.replace("8", "16") + "instance_group [ { count: 1 } ]")
    assert content_hash(None, one) == content_hash(None, four) != content_hash(None, other)


def test_a_remote_machine_is_named_by_its_url_and_this_one_by_its_processor() -> None:
    assert machine_identity("gpu", "2.51.0", "h:8001") == "gpu | h:8001 | triton 2.51.0"
    assert "triton 2.51.0" in machine_identity("cpu", "2.51.0", "")
    assert machine_identity("cpu", "2.51.0", "") != machine_identity("gpu", "2.51.0", "")
