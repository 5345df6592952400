"""Completes the example OCR models: ONNX files and warm-up samples.

What git holds of `model_repository/ocr_*` is configuration and code. The networks ship in the
wheel `rapidocr-onnxruntime` and are copied from there; the warm-up samples, which Triton runs when
it loads a model and Paceline's profiler measures with, are what each model gets when the page in
scikit-image's wheel goes through the pipeline.

Invariant: a file is either whole or not there (temporary file, then rename), and a second run
writes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent / "model_repository"

NETWORKS = {
    "ocr_detect": "ch_PP-OCRv4_det_infer.onnx",
    "ocr_classify": "ch_ppocr_mobile_v2.0_cls_infer.onnx",
    "ocr_recognize": "ch_PP-OCRv4_rec_infer.onnx",
}
MODELS = ("ocr_prepare", "ocr_detect", "ocr_extract", "ocr_classify", "ocr_recognize")

# The samples' shapes are written in the config.pbtxt files, so they must not drift.
PAGE_SHAPE = (191, 384, 3)
PAGE_INPUT_SHAPE = (3, 736, 1472)

Samples = dict[str, dict[str, bytes]]  # model -> input -> contents of its file


class PrepareError(Exception):
    """Something outside is missing or unusable; the message is one line and says what to do."""


def prepare_models(
    repository: Path = REPOSITORY,
    *,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Writes what is missing or out of date in `repository`; one `report` line per thing done.

    Raises PrepareError if a package that provides a file is not installed, or its content is not
    what the models were written for.
    """
    for model, name in NETWORKS.items():
        source = _inside("rapidocr_onnxruntime", "models", name)
        target = repository / model / "1" / "model.onnx"
        if force or _digest(source) != _digest(target):
            _write(target, source.read_bytes())
            report(f"copied {model}/1/model.onnx from {name}")
    stamp = _stamp(repository)
    stale = [model for model in MODELS if force or _stamp_of(repository / model) != stamp]
    if not stale:
        return
    samples = _samples(repository)
    for model in stale:
        folder = repository / model / "warmup"
        for name, content in samples[model].items():
            _write(folder / name, content)
        _write(folder / "STAMP", stamp.encode())
        report(f"wrote {model}/warmup ({', '.join(samples[model])})")


def load_step(repository: Path, model: str) -> ModuleType:
    """The part of a model that needs no Triton, e.g. `ocr_prepare/1/prepare.py`."""
    name = model.removeprefix("ocr_")
    file = repository / model / "1" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"paceline_example_{model}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise PrepareError(f"{file} is missing: is {repository} Paceline's model repository?")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def bytes_element(content: bytes) -> bytes:
    """One element of a BYTES tensor as Triton reads it from a file: length, then content."""
    return struct.pack("<I", len(content)) + content


def _samples(repository: Path) -> Samples:
    """Each model's inputs while page.png goes through the pipeline."""
    import numpy as np
    import onnxruntime as ort

    image = _page()
    prepare, extract = load_step(repository, "ocr_prepare"), load_step(repository, "ocr_extract")
    x, canvas, geometry = prepare.prepare(image)
    if x.shape != PAGE_INPUT_SHAPE:
        raise PrepareError(
            f"page.png became {x.shape}, ocr_detect/config.pbtxt expects "
            f"{PAGE_INPUT_SHAPE}: adapt the config or prepare.py"
        )
    file = repository / "ocr_detect" / "1" / "model.onnx"
    detector = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    heatmap = np.asarray(detector.run(None, {"x": x[np.newaxis]})[0])[0]
    boxes = extract.find_boxes(heatmap[0], canvas.shape[0], canvas.shape[1])
    crops = [extract.cut(canvas, box) for box in boxes]
    sizes = [crop.shape[:2] for crop in crops]
    middle = sorted(range(len(crops)), key=lambda index: sizes[index][1])[len(crops) // 2]
    crop = bytes_element(crops[middle].tobytes())
    crop_size = np.array(sizes[middle], dtype=np.int32).tobytes()
    line_width = extract.line_widths(sizes)[middle : middle + 1].tobytes()
    return {
        "ocr_prepare": {"image": image.tobytes()},
        "ocr_detect": {"x": x.tobytes()},
        "ocr_extract": {
            "heatmap": heatmap.tobytes(),
            "canvas": canvas.tobytes(),
            "geometry": geometry.tobytes(),
        },
        "ocr_classify": {"crop": crop, "crop_size": crop_size},
        "ocr_recognize": {
            "crop": crop,
            "crop_size": crop_size,
            "line_width": line_width,
            "upside_down": bytes(1),
        },
    }


def _page() -> Any:
    """scikit-image's page.png as RGB, without importing scikit-image."""
    import numpy as np
    from PIL import Image

    file = _inside("skimage", "data", "page.png")
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"))
    if pixels.shape != PAGE_SHAPE:
        raise PrepareError(
            f"{file} is {pixels.shape}, ocr_prepare/config.pbtxt expects {PAGE_SHAPE}: "
            f"install the locked version of scikit-image"
        )
    return pixels


def _inside(package: str, *parts: str) -> Path:
    """A file that ships in an installed package; the package is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise PrepareError(f"{package} is not installed: run scripts/run, which installs all")
    file = Path(spec.origin).parent.joinpath(*parts)
    if not file.is_file():
        raise PrepareError(f"{package} has no {'/'.join(parts)}: install the locked version")
    return file


def _stamp(repository: Path) -> str:
    """What the samples are made from: page, detector, code."""
    files = [
        _inside("skimage", "data", "page.png"),
        repository / "ocr_detect" / "1" / "model.onnx",
        repository / "ocr_prepare" / "1" / "prepare.py",
        repository / "ocr_extract" / "1" / "extract.py",
        Path(__file__),
    ]
    return hashlib.sha256("".join(_digest(file) for file in files).encode()).hexdigest()


def _stamp_of(model: Path) -> str:
    stamp = model / "warmup" / "STAMP"
    return stamp.read_text() if stamp.is_file() else ""


def _digest(file: Path) -> str:
    """SHA-256, empty for a file that isn't there."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model-repository",
        type=Path,
        default=REPOSITORY,
        metavar="DIR",
        help="where the ocr_* model directories are (default: model_repository/)",
    )
    parser.add_argument("--force", action="store_true", help="write everything again")
    options = parser.parse_args(arguments)
    try:
        prepare_models(options.model_repository, force=options.force, report=print)
    except (PrepareError, OSError) as error:
        print(f"prepare_models: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
