"""Chain, profile and hardware files: what is read, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.config import (
    chain_document,
    parse_chain,
    read_chains,
    read_hardware,
    read_profiles,
    write_profiles,
)
from paceline.core.bind import Carry, bind
from paceline.core.chain import Source
from paceline.core.errors import ConfigError
from paceline.core.model import ModelSpec
from paceline.core.profile import ProfileRow
from paceline.core.tensor import TensorSpec

OCR = """\
chain: ocr
slo_ms: 800
rate_rps: 20
inputs:
  image: {dtype: UINT8, shape: [-1, -1, 3]}
modules:
  recognize:
    model: ocr_rec
    for_each: detect.crops
    fan_out: 4.0
    inputs: {x: detect.crops}
  detect:
    model: ocr_det
    inputs: {image: inputs.image}
outputs:
  text: recognize.text
"""
MODELS = {
    "ocr_det": ModelSpec(
        "ocr_det",
        0,
        (TensorSpec("image", "UINT8", (-1, -1, 3)),),
        (TensorSpec("crops", "FP32", (-1, 3, 48, 320)),),
    ),
    "ocr_rec": ModelSpec(
        "ocr_rec",
        8,
        (TensorSpec("x", "FP32", (3, 48, -1)),),
        (TensorSpec("text", "BYTES", (1,)),),
    ),
}


def test_a_chain_file_becomes_a_chain_in_topological_order_and_seconds() -> None:
    chain = parse_chain(OCR)
    assert [m.name for m in chain.modules] == ["detect", "recognize"]
    assert (chain.slo_s, chain.rate_rps, chain.attainment) == (0.8, 20.0, 0.99)
    assert chain.module("recognize").for_each == Source("detect", "crops")


def test_a_chain_without_runs_is_written_down_as_before_there_were_any() -> None:
    chain = parse_chain(OCR)
    assert chain.runs == "off" and '"runs"' not in chain_document(chain)
    joined = parse_chain(OCR.replace("slo_ms: 800", "slo_ms: 800\nruns: auto"))
    assert joined.runs == "auto" and parse_chain(chain_document(joined)) == joined


def test_binding_slices_the_fanned_out_tensor_and_gathers_the_output() -> None:
    bound = bind(parse_chain(OCR), MODELS)
    read = bound.modules[1]
    assert (read.carry, read.inputs[0].per_item) == (Carry.ITEMS, True)
    assert bound.outputs == (TensorSpec("text", "BYTES", (-1, 1)),)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("slo_ms: 800\n", "", "ocr.yaml:1: slo_ms: is missing"),
        ("slo_ms: 800", "slo_ms: 800\nruns: on", "ocr.yaml:3: runs: "),
        ("slo_ms: 800", "slo_ms: 0", "ocr.yaml:2: slo_ms: must be above 0"),
        ("slo_ms: 800", "slo_ms: .nan", "ocr.yaml:2: slo_ms: must be above 0"),
        ("slo_ms: 800", "slo_ms: fast", "ocr.yaml:2: slo_ms: input should be a valid number"),
        ("rate_rps: 20", "rate: 20", "ocr.yaml:3: rate: unknown key; expected one of chain, slo"),
        ("rate_rps: 20", "rate_rps: -1", "ocr.yaml:3: rate_rps: must be above 0"),
        ("    fan_out: 4.0", "    fanout: 4.0", "ocr.yaml:10: modules.recognize.fanout: unknown k"),
        ("    fan_out: 4.0", "    fan_out: 0", "ocr.yaml:10: modules.recognize.fan_out: must be"),
        ("UINT8", "UNIT8", "ocr.yaml:5: inputs.image: unknown datatype 'UNIT8'; expected one of"),
        ("{x: detect.crops}", "{x: crops}", "ocr.yaml:11: modules.recognize.inputs.x: 'crops' is"),
        ("{x: detect.crops}", "{x: find.crops}", "unknown module 'find'; have recognize, detect"),
        ("inputs.image}", "inputs.img}", "ocr.yaml:14: modules.detect.inputs.image: unknown input"),
        ("inputs.image}", "recognize.text}", "modules wait for each other: "),
        ("text: recognize.text", "text: read.text", "ocr.yaml:16: outputs.text: unknown module"),
        ("slo_ms: 800", "slo_ms: [", "not valid YAML"),
        (
            "inputs:\n  image: {dtype: UINT8, shape: [-1, -1, 3]}",
            "inputs:",
            "ocr.yaml:4: inputs: is empt",
        ),
        ("slo_ms: 800", "slo_ms: 800\nslo_ms: 900", "not valid YAML: found duplicate key"),
        ("chain: ocr", "chain: o/cr", "ocr.yaml:1: chain: 'o/cr' is not a name"),
    ],
)
def test_a_mistake_in_a_chain_file_names_file_line_and_key(
    old: str, new: str, message: str
) -> None:
    assert old in OCR
    with pytest.raises(ConfigError) as caught:
        parse_chain(OCR.replace(old, new), name="ocr.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ocr_rec", "ocr_reg", "modules.recognize.model: unknown model 'ocr_reg'; the repository"),
        ("{x: detect", "{y: detect", "modules.recognize.inputs.y: model 'ocr_rec' has no input"),
        (
            "{x: detect.crops}",
            "{x: detect.boxes}",
            "detect.boxes: no such tensor; detect has crops",
        ),
        ("UINT8", "INT8", "inputs.image is INT8, but model 'ocr_det' takes UINT8"),
        ("[-1, -1, 3]", "[-1, -1, 4]", "inputs.image has shape [-1, -1, 4], but model 'ocr_det'"),
        ("    for_each: detect.crops\n", "", "has shape [-1, 3, 48, 320], but model 'ocr_rec'"),
        ("text: recognize.text", "text: recognize.txt", "outputs.text: recognize.txt: no such"),
    ],
)
def test_what_does_not_fit_the_models_is_refused_with_its_key(
    old: str, new: str, message: str
) -> None:
    assert old in OCR
    with pytest.raises(ConfigError) as caught:
        bind(parse_chain(OCR.replace(old, new)), MODELS)
    assert message in str(caught.value)


def test_a_directory_stands_for_its_chain_files_and_two_of_one_name_are_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="no \\*.yaml chain file"):
        read_chains([tmp_path])
    (tmp_path / "a.yaml").write_text(OCR)
    assert [chain.name for chain in read_chains([tmp_path])] == ["ocr"]
    (tmp_path / "b.yml").write_text(OCR)
    with pytest.raises(ConfigError, match="b.yml: chain: 'ocr' is already declared in a.yaml"):
        read_chains([tmp_path])
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_chains([tmp_path / "c.yaml"])


PROFILES = "model,hardware,batch_size,duration_ms,memory_mib\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,hardware,batch_size\n", "p.csv:1: column 'duration_ms' is missing"),
        (PROFILES, "p.csv:2: no profile in this file: below the header comes a line for every"),
        (PROFILES + "m,gpu,2,0,\n", "p.csv:2: duration_ms: must be above 0, got 0"),
        (PROFILES + "m,gpu,2,1e-300,\n", "p.csv:2: duration_ms: must be at least 0.001, got 1e-"),
        (PROFILES + "m,gpu,2,1e300,\n", "duration_ms: must be at most 86400000, got 1e300"),
        (PROFILES + "m,gpu,2.5,1,\n", "p.csv:2: batch_size: '2.5' is not a whole number"),
        (PROFILES + "m,gpu,2,nan,\n", "p.csv:2: duration_ms: must be above 0, got nan"),
        (PROFILES + "m,gpu,inf,1,\n", "p.csv:2: batch_size: must be at least 1, got inf"),
        (PROFILES + "m,gpu,nan,1,\n", "p.csv:2: batch_size: must be at least 1, got nan"),
        (PROFILES + "m,gpu,1e9,1,\n", "p.csv:2: batch_size: must be at most 65536, got 1e9"),
        (PROFILES + "m,gpu,2,,\n", "p.csv:2: duration_ms: is empty; fill it in or remove"),
        (PROFILES + "m,gpu,x,1,\n", "p.csv:2: batch_size: 'x' is not a number"),
        (PROFILES + ",gpu,2,1,\n", "p.csv:2: model: is empty"),
        (PROFILES + "m,gpu,2,1\n", "p.csv:2: 4 cells where the header has 5"),
        (
            "model,hardware,batch_size,duration_ms,memory_mib,p99_ms\nm,gpu,2,3,,2\n",
            "p.csv:2: p99_ms: 2 is below duration_ms, the p95 of the same runs",
        ),
        (
            PROFILES + "m,gpu,2,1,\nm,gpu,2,3,\n",
            "p.csv:3: m on gpu at batch 2 is already on line 2",
        ),
    ],
)
def test_a_mistake_in_a_profile_file_names_file_line_and_column(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_profiles(path)
    assert message in str(caught.value)


def test_a_batch_measured_faster_than_a_smaller_one_is_planned_with_that_ones_duration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.csv"
    path.write_text(
        "model,hardware,batch_size,duration_ms,memory_mib\n"
        "m,t4,4,4.5,\nm,t4,1,5,\nm,t4,2,4,\nm,t4,8,9,\nm,v100,4,1,\n",
        encoding="utf-8",
    )
    rows = read_profiles(path).rows
    assert [(r.batch_size, r.duration_s) for r in rows] == [
        (4, 0.005),
        (1, 0.005),
        (2, 0.005),
        (8, 0.009),
        (4, 0.001),
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "p.csv:4: m on t4 takes 4 ms at batch 2, less than 5 ms at batch 1; "
        "planned with 5 ms (measure it again to be sure)",
        "p.csv:2: m on t4 takes 4.5 ms at batch 4, less than 5 ms at batch 2; "
        "planned with 5 ms (measure it again to be sure)",
    ]


def test_profiles_survive_being_written_and_read(tmp_path: Path) -> None:
    rows = (ProfileRow("m", "gpu", 1, 0.0125, 3 << 20), ProfileRow("m", "gpu", 8, 0.05))
    write_profiles(tmp_path / "p.csv", rows)
    assert read_profiles(tmp_path / "p.csv").rows == rows
    assert "p99_ms" not in (tmp_path / "p.csv").read_text()
    rows = (ProfileRow("m", "gpu", 1, 0.0125, p99_s=0.02), ProfileRow("m", "gpu", 8, 0.05))
    write_profiles(tmp_path / "p.csv", rows)
    profiles = read_profiles(tmp_path / "p.csv")
    assert profiles.rows == rows
    known = profiles.durations("m", "gpu")
    assert known is not None and known.slow_at(1) == 0.02


def test_hardware_needs_a_price_above_zero(tmp_path: Path) -> None:
    path = tmp_path / "h.csv"
    path.write_text("hardware,price_per_hour,memory_mib\nt4,0.526,16384\n")
    assert read_hardware(path)["t4"].memory_bytes == 16384 << 20
    path.write_text("hardware,price_per_hour,memory_mib\nt4,-1,16384\n")
    with pytest.raises(ConfigError, match="h.csv:2: price_per_hour: must be above 0, got -1"):
        read_hardware(path)
    path.write_text("hardware,price_per_hour,memory_mib\nt4,1,\nv100,2,\nt4,3,\n")
    with pytest.raises(ConfigError, match=r":4: hardware: 't4' is already on line 2; remove one"):
        read_hardware(path)
