"""Reading Triton's model configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.core.errors import ConfigError
from paceline.core.tensor import TensorSpec
from paceline.triton.config import (
    config_json,
    find_models,
    instances_of,
    read_config,
    spec_of,
    versions_of,
    with_instances,
)

TEXT = """
backend: "onnxruntime"
max_batch_size: 4
input [
  { name: "image" data_type: TYPE_UINT8 dims: [-1, -1, 3] },
  { name: "hint" data_type: TYPE_STRING dims: [1] optional: true },
  { name: "flat" data_type: TYPE_FP32 dims: [16] reshape: { shape: [4, 4] } }
]
output [ { name: "score" data_type: TYPE_BF16 dims: [2] } ]
"""


def model(directory: Path, name: str = "m", text: str = TEXT, version: str = "1") -> Path:
    path = directory / name
    (path / version).mkdir(parents=True)
    (path / "config.pbtxt").write_text(text, encoding="utf-8")
    return path


def test_a_configuration_becomes_what_clients_see_of_the_model(tmp_path: Path) -> None:
    path = model(tmp_path)
    (path / "10").mkdir()
    (path / "2").mkdir()
    (path / "warmup").mkdir()
    spec = spec_of(read_config(path), versions_of(path))
    assert (spec.name, spec.platform, spec.max_batch_size) == ("m", "onnxruntime", 4)
    assert spec.versions == ("1", "2", "10")
    assert spec.inputs == (
        TensorSpec("image", "UINT8", (-1, -1, 3)),
        TensorSpec("hint", "BYTES", (1,), optional=True),
        TensorSpec("flat", "FP32", (16,)),
    )
    assert spec.outputs == (TensorSpec("score", "BF16", (2,)),)


def test_a_malformed_configuration_is_named_with_file_and_line(tmp_path: Path) -> None:
    path = model(tmp_path, text="max_batch_size: 4\ninput [ { nam: 3 } ]\n")
    with pytest.raises(ConfigError, match=r'm/config\.pbtxt:2: .*no field named "nam"') as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_or_misnamed_configuration_is_an_error(tmp_path: Path) -> None:
    path = model(tmp_path, text='name: "other"')
    with pytest.raises(ConfigError, match="name 'other' differs from the directory's name 'm'"):
        read_config(path)
    (path / "config.pbtxt").unlink()
    with pytest.raises(ConfigError, match=r"m/config\.pbtxt: no such file"):
        read_config(path)


def test_a_tensor_without_datatype_is_an_error(tmp_path: Path) -> None:
    path = model(tmp_path, text='input [ { name: "x" dims: [1] } ]')
    with pytest.raises(ConfigError, match="x: unknown datatype ''"):
        spec_of(read_config(path))


def test_models_are_found_by_their_numeric_version_directory(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    model(first, "x")
    model(second, "w", version="3")
    (first / "notes").mkdir()
    (first / ".hidden" / "1").mkdir(parents=True)
    (first / "file").write_text("")
    (first / "zero" / "0").mkdir(parents=True)
    assert find_models([first, second]) == {"w": second / "w", "x": first / "x"}


def test_a_name_in_two_repositories_or_a_missing_repository_is_an_error(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    model(first, "x")
    model(second, "x")
    with pytest.raises(ConfigError, match="model 'x' is also in"):
        find_models([first, second])
    with pytest.raises(ConfigError, match="is not a directory"):
        find_models([tmp_path / "none"])


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [
        ("", {"count": 3}),
        ("instance_group [ { count: 1 kind: KIND_CPU } ]", {"count": 3, "kind": "KIND_CPU"}),
        (
            "instance_group [ { count: 2 kind: KIND_GPU gpus: [0, 1] }, { kind: KIND_CPU } ]",
            {"count": 2, "kind": "KIND_GPU", "gpus": [0, 1]},
        ),
    ],
)
def test_instances_replace_every_group_and_leave_the_rest(
    tmp_path: Path, groups: str, wanted: dict[str, object]
) -> None:
    config = read_config(model(tmp_path, text=TEXT + groups))
    before = config.SerializeToString(deterministic=True)
    changed = with_instances(config, 3)
    document = json.loads(config_json(changed))
    assert document["instance_group"] == [wanted]
    assert document["input"][0]["dims"] == ["-1", "-1", "3"]
    assert document["max_batch_size"] == 4
    assert instances_of(changed) >= 3
    assert config.SerializeToString(deterministic=True) == before
