"""Matrices in panels: which products get them, and that they compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from paceline.blocks.backend.manifest import Manifest
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.compile import compile_model
from paceline.blocks.measure import BlockRunner, close
from paceline.blocks.member import Options
from paceline.blocks.panels import panel_width
from paceline.blocks.source import Stored

DEPTH, COLUMNS = 192, 320
OWN_DOMAIN = "com.microsoft"

pytestmark = pytest.mark.skipif(not panel_width(), reason="no blocked convolution on this CPU")


def _compiled(
    tmp_path: Path,
    operator: str,
    rows: list[int | str],
    *,
    domain: str = "",
    options: Options | None = None,
    twice: bool = False,
    **attributes: Any,
) -> tuple[Path, Manifest, BlockRunner]:
    """A product, compiled: of `x` and a seeded matrix, plus a bias for a Gemm."""
    shape = (COLUMNS, DEPTH) if attributes.get("transB") else (DEPTH, COLUMNS)
    drawn = np.random.default_rng(1).standard_normal((COLUMNS, *shape), dtype=np.float32)
    weights = [numpy_helper.from_array(drawn[0], "w")]
    if operator == "Gemm":
        weights.append(numpy_helper.from_array(drawn[1].ravel()[:COLUMNS].copy(), "bias"))
    names = [weight.name for weight in weights]
    nodes = [helper.make_node(operator, ["x", *names], ["y"], domain=domain, **attributes)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    if twice:
        nodes.append(helper.make_node("Neg", ["w"], ["z"]))
        outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*rows, DEPTH])],
        outputs,
        weights,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(OWN_DOMAIN, 1)]
    source = tmp_path / "product.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), source)
    model = compile_model(
        {"": source}, tmp_path / "repo" / "product", tmp_path / "pool", options or Options()
    ).model
    return source, model.manifest, BlockRunner(ObjectStore(model.pool), model.manifest.objects)


def _in_panels(manifest: Manifest) -> list[tuple[int, ...]]:
    """Shapes of the matrices that became kernels of convolutions."""
    (member,) = manifest.members
    return [w.shape for block in member.blocks for w in block.weights if len(w.shape) == 4]


@pytest.mark.parametrize("budget_mib", [None, 1])
@pytest.mark.parametrize(
    ("operator", "rows", "attributes"),
    [
        ("MatMul", ["N", 24], {}),
        ("MatMul", ["N", "S"], {}),
        ("MatMul", ["N", 2, 12], {}),
        ("MatMul", [24], {}),
        ("Gemm", [24], {}),
        ("Gemm", [24], {"transB": 1}),
        ("FusedMatMul", ["N", 24], {"transB": 1, "domain": OWN_DOMAIN}),
    ],
)
def test_a_product_in_panels_is_the_product(
    tmp_path: Path,
    operator: str,
    rows: list[int | str],
    attributes: dict[str, Any],
    budget_mib: int | None,
) -> None:
    """In one block and in turn bit for bit the same, and but for rounding what it was."""
    options = Options(budget_mib=budget_mib, measure=False)
    source, manifest, runner = _compiled(tmp_path, operator, rows, options=options, **attributes)
    assert _in_panels(manifest) == [(COLUMNS, DEPTH, 1, 1)]
    (member,) = manifest.members
    plain = ort.InferenceSession(source)
    for batch in (1, 3):
        shape = [axis if isinstance(axis, int) else batch for axis in rows]
        drawn = np.random.default_rng(batch).standard_normal((*shape, DEPTH), dtype=np.float32)
        blocks, whole = (runner.run(member, {"x": drawn}, whole=which) for which in (False, True))
        assert blocks["y"].tobytes() == whole["y"].tobytes()
        assert close({"y": plain.run(["y"], {"x": drawn})[0]}, blocks)


@pytest.mark.parametrize(
    ("operator", "rows", "changes"),
    [
        ("Gemm", ["N"], {}),  # as many rows as the batch has: bound by reading the matrix
        ("Gemm", [24], {"alpha": 0.5}),
        ("MatMul", ["N", 24], {"twice": True}),  # else the matrix would be stored twice
    ],
)
def test_what_would_gain_nothing_stays_as_it_is(
    tmp_path: Path, operator: str, rows: list[int | str], changes: dict[str, Any]
) -> None:
    _, manifest, _ = _compiled(tmp_path, operator, rows, options=Options(measure=False), **changes)
    assert not _in_panels(manifest)


def test_a_tile_in_panels_is_columns_of_the_whole(tmp_path: Path) -> None:
    """Both orders of a matrix on disk, whole and tiled, give the panels that numpy gives."""
    matrix = np.random.default_rng(2).standard_normal((DEPTH, COLUMNS), dtype=np.float32)
    for axis, array in ((1, matrix), (0, np.ascontiguousarray(matrix.T))):
        path = tmp_path / f"{axis}.bin"
        path.write_bytes(b"skip" + array.tobytes())
        stored = Stored(path, 4, TensorProto.FLOAT, array.shape)
        for start, stop in ((0, COLUMNS), (64, 192)):
            tile = stored.part(axis, start, stop).in_panels(axis, 16)
            panels = matrix[:, start:stop].reshape(DEPTH, -1, 16).transpose(1, 0, 2)
            assert b"".join(tile.chunks()) == panels.tobytes()
            assert tile.shape == (stop - start, DEPTH, 1, 1)
