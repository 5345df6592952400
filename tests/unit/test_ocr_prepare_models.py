"""What scripts/prepare_models.py writes, and that it writes it once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from google.protobuf import text_format
from scripts import prepare_models
from scripts.prepare_models import MODELS, NETWORKS, REPOSITORY, PrepareError, main
from tritonclient.grpc import model_config_pb2

ITEM_BYTES = {"TYPE_UINT8": 1, "TYPE_BOOL": 1, "TYPE_INT32": 4, "TYPE_FP32": 4}
GENERATED = ("model.onnx", "warmup", "__pycache__")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The models as git has them."""
    target = tmp_path / "models"
    shutil.copytree(REPOSITORY, target, ignore=shutil.ignore_patterns(*GENERATED))
    return target


def contents(repository: Path) -> dict[Path, tuple[bytes, int]]:
    files = (file for file in repository.rglob("*") if file.is_file())
    return {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in files if f.suffix != ".pyc"}


def test_a_second_run_writes_nothing(repository: Path) -> None:
    first: list[str] = []
    prepare_models.prepare_models(repository, report=first.append)
    assert len(first) == len(NETWORKS) + len(MODELS)
    before = contents(repository)
    second: list[str] = []
    prepare_models.prepare_models(repository, report=second.append)
    assert second == []
    assert contents(repository) == before


def test_damaged_files_are_written_again_and_force_writes_all(repository: Path) -> None:
    prepare_models.prepare_models(repository)
    network = repository / "ocr_classify" / "1" / "model.onnx"
    whole = network.read_bytes()
    network.write_bytes(whole[:1000])
    shutil.rmtree(repository / "ocr_detect" / "warmup")
    lines: list[str] = []
    prepare_models.prepare_models(repository, report=lines.append)
    assert [line.split()[1] for line in lines] == [
        "ocr_classify/1/model.onnx",
        "ocr_detect/warmup",
    ]
    assert network.read_bytes() == whole
    prepare_models.prepare_models(repository, force=True, report=lines.append)
    assert len(lines) == 2 + len(NETWORKS) + len(MODELS)


def test_warm_up_samples_have_the_size_that_the_configs_declare(repository: Path) -> None:
    prepare_models.prepare_models(repository)
    for model in MODELS:
        config = model_config_pb2.ModelConfig()
        text_format.Parse((repository / model / "config.pbtxt").read_text(), config)
        (sample,) = config.model_warmup
        assert sample.batch_size == 1  # Triton skips 0
        assert set(sample.inputs) == {tensor.name for tensor in config.input}
        for tensor in sample.inputs.values():
            content = (repository / model / "warmup" / tensor.input_data_file).read_bytes()
            items = 1
            for axis in tensor.dims:
                items *= axis
            kind = model_config_pb2.DataType.Name(tensor.data_type)
            if kind == "TYPE_STRING":
                assert int.from_bytes(content[:4], "little") == len(content) - 4
            else:
                assert len(content) == items * ITEM_BYTES[kind]


def test_no_temporary_file_is_left_behind(repository: Path) -> None:
    prepare_models.prepare_models(repository)
    assert [f.name for f in repository.rglob(".*") if f.name != ".gitkeep"] == []


def test_a_directory_that_is_no_model_repository_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model-repository", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("prepare_models: ")
    assert "is missing" in errors[0]


def test_an_unknown_step_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"prepare\.py is missing"):
        prepare_models.load_step(tmp_path, "ocr_prepare")
