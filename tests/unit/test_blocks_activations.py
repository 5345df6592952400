"""A budget is for activations, too: what a batch needs is measured, kept free, and enough."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.blocks_models import written

from paceline.blocks.backend.blockmodel import BlockModel
from paceline.blocks.backend.manifest import Manifest, PoolError, swap_rate_bytes_s
from paceline.blocks.backend.plan import choose
from paceline.blocks.backend.settings import read_settings
from paceline.blocks.compile import compile_model
from paceline.blocks.member import Options
from paceline.blocks.repository import CompiledModel, read_config
from paceline.core.errors import BudgetError, ConfigError

MIB = 1 << 20
NOISE_BYTES = MIB
"""What else in a process comes and goes: Python's own objects, a page table's slack."""


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    """8 MiB of weights in blocks of 1 to 2, and some MiB of activations."""
    root = tmp_path_factory.mktemp("activations")
    source = written(root, "bert")
    return compile_model({"": source}, root / "repo" / "bert", root / "pool", Options(4)).model


def settings(bert: CompiledModel, **parameters: str) -> Any:
    texts = {"manifest": bert.digest, "pool": str(bert.pool), **parameters}
    given = {key: {"string_value": text} for key, text in texts.items()}
    return read_settings(given, bert.directory)


@pytest.fixture
def opened(
    bert: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], BlockModel]]:
    """Within a budget of so many bytes; closed in the end."""
    monkeypatch.setenv("PACELINE_BLOCKS_LEDGER", str(tmp_path / "ledger"))
    models = []

    def opened(budget_bytes: int, key: str = "memory_budget_mib") -> BlockModel:
        models.append(BlockModel.open(settings(bert, **{key: f"{budget_bytes / MIB}"})))
        return models[-1].start()

    yield opened
    for model in models:
        model.close()


def feed_of(manifest: Manifest, rows: int) -> dict[str, Any]:
    (member,) = manifest.members
    return {tensor.name: np.ones((rows, *tensor.shape[1:]), np.int64) for tensor in member.inputs}


def run(model: BlockModel, rows: int) -> Any:
    return model.infer("", feed_of(model.manifest, rows), ["out"], rows)["out"]


def floor_of(manifest: Manifest, rows: int) -> int:
    """The least budget; a sixteenth is for rows of tables."""
    return int(manifest.largest_block_bytes * 16 / 15) + 2 + manifest.activation_bytes(rows)


@pytest.mark.parametrize("key", ["memory_budget_mib", "shared_budget_mib"])
def test_a_larger_batch_gets_its_room_before_it_runs(
    bert: CompiledModel, opened: Callable[..., BlockModel], key: str
) -> None:
    """Weights have given it up when the batch is done, and every answer is right."""
    manifest = bert.manifest
    budget_bytes = floor_of(manifest, 8) + MIB
    model = opened(budget_bytes, key)
    assert model.budget is not None
    alone = run(model, 1)
    before = model.budget.limit_bytes
    for rows in (8, 3, 8):
        np.testing.assert_array_equal(run(model, rows)[:1], alone)
        grown = manifest.activation_bytes(8) - manifest.activation_bytes(1)
        assert model.budget.activation_bytes == manifest.activation_bytes(8)
        assert before - model.budget.limit_bytes == pytest.approx(grown * 15 / 16, abs=2)
        assert model.loader.held_bytes <= model.budget.limit_bytes
        total = model.budget.limit_bytes + model.budget.table_bytes + model.budget.activation_bytes
        assert total <= budget_bytes


@pytest.mark.parametrize("key", ["memory_budget_mib", "shared_budget_mib"])
def test_a_batch_that_cannot_fit_is_refused_and_no_other(
    bert: CompiledModel, opened: Callable[..., BlockModel], key: str
) -> None:
    model = opened(floor_of(bert.manifest, 2), key)
    run(model, 2)
    with pytest.raises(PoolError, match=rf"{key} .* is below .*activations of a batch of 3 need"):
        run(model, 3)
    run(model, 2)


def test_a_budget_below_a_block_and_activations_is_refused(
    bert: CompiledModel, opened: Callable[..., BlockModel]
) -> None:
    """Before anything is loaded; so is a compile for it, and larger batches are left out."""
    with pytest.raises(PoolError, match="activations of a batch of 1 need; raise it, or compile"):
        opened(floor_of(bert.manifest, 1) - 4096)


def test_a_compile_offers_the_batches_that_fit(tmp_path: Path) -> None:
    source = written(tmp_path, "bert")

    def compiled(budget_mib: int, max_batch: int = 32) -> int:
        options = Options(budget_mib, max_batch)
        made = compile_model({"": source}, tmp_path / "bert", tmp_path / "pool", options).model
        (line,) = (
            line
            for line in (tmp_path / "bert" / "config.pbtxt").read_text().splitlines()
            if line.startswith("max_batch_size: ")
        )
        most = int(line.split()[1])
        assert floor_of(made.manifest, most) <= budget_mib * MIB
        assert most == max_batch or floor_of(made.manifest, most + 1) > budget_mib * MIB
        return most

    assert 1 < compiled(4) < compiled(64) == 32
    needs = r"its largest block and its activations need (\d) MiB; give at least --budget-mib \1"
    with pytest.raises(ConfigError, match=needs) as refused:
        compiled(1)
    found = re.search(needs, str(refused.value))
    assert found is not None
    assert compiled(int(found[1])) >= 1
    assert compiled(int(found[1]), max_batch=0) == 0


def test_a_budget_of_which_activations_take_most_has_smaller_blocks(tmp_path: Path) -> None:
    """Blocks of half the budget are refused, those of half of what is left are not.

    What was refused leaves nothing in the pool, and says which budget would do.
    """
    source = written(tmp_path, "wide")
    pool = tmp_path / "pool" / "objects"

    def compiled(budget_mib: int) -> Manifest:
        directory, options = tmp_path / "repo" / "wide", Options(budget_mib)
        return compile_model({"": source}, directory, pool.parent, options).model.manifest

    with pytest.raises(BudgetError, match="give at least --budget-mib") as refused:
        compiled(5)
    least_mib = refused.value.least_mib
    assert refused.value.activations_bytes > 4 * MIB
    assert [path.name for path in pool.iterdir()] == ["external"]
    assert not (tmp_path / "repo").exists()

    made = compiled(least_mib)
    assert made.largest_block_bytes + made.activation_bytes(1) <= least_mib * MIB
    halves = Options(least_mib).piece_bytes
    assert halves + made.activation_bytes(1) > least_mib * MIB
    assert made.document["options"]["piece_mib"] * MIB < halves
    assert {path.name for path in pool.iterdir()} == {"external", *made.objects}


def test_blocks_fit_twice_beside_the_batch_that_was_asked_for(tmp_path: Path) -> None:
    """One comes while the other computes; smaller blocks are made for that, and for that only."""
    source = written(tmp_path, "wide")

    def compiled(max_batch: int) -> Manifest:
        directory, options = tmp_path / "repo" / "wide", Options(12, max_batch)
        made = compile_model({"": source}, directory, tmp_path / "pool", options).model
        config = read_config(directory / "config.pbtxt")
        assert config is not None
        assert 1 <= config.max_batch_size < 32
        return made.manifest

    coarse = compiled(32)  # nobody asked for just as many rows as fit
    assert coarse.largest_block_bytes == Options(12).piece_bytes
    assert 2 * coarse.largest_block_bytes + coarse.activation_bytes(1) > 12 * MIB
    finer = compiled(1)
    assert 2 * finer.largest_block_bytes + finer.activation_bytes(1) <= 12 * MIB


def test_cuts_are_by_latency_and_the_first_plan_by_the_rate_that_compiling_measured(
    bert: CompiledModel, opened: Callable[..., BlockModel]
) -> None:
    """Never worse than by size, by the model; and the manifest says what it was made of."""
    (member,) = bert.manifest.members
    took_s = [block.swap_in_s or 0.0 for block in member.blocks]
    assert min(took_s) > 0
    rate = sum(block.swapped_bytes for block in member.blocks) / sum(took_s)
    assert swap_rate_bytes_s(member.blocks) == pytest.approx(rate)
    assert swap_rate_bytes_s([replace(block, swap_in_s=None) for block in member.blocks]) is None
    cuts = bert.manifest.document["measured"]["cuts"][""]
    assert cuts["rate_bytes_s"] > 0
    assert cuts["block_s"] > 0
    assert set(cuts["latency_s"]) >= set(cuts["by_size_s"])
    longer = [cuts["latency_s"][rows] / took - 1 for rows, took in cuts["by_size_s"].items()]
    assert len(cuts["latency_s"]) > len(longer) or sum(longer) <= 1e-9

    model = opened(floor_of(bert.manifest, 1) + MIB)
    assert model.budget is not None
    assert model.budget.plan is not None
    first = choose(
        [block.swapped_bytes for block in member.blocks],
        [block.execute_s[1] for block in member.blocks],
        limit_bytes=model.budget.limit_bytes,
        rate_bytes_s=rate,
    )
    assert model.budget.plan == first


MEASURE = """
import json, sys
from pathlib import Path
from tests.unit.test_blocks_activations import anonymous_bytes, run, settings
from paceline.blocks.backend.blockmodel import BlockModel
from paceline.blocks.backend.skeleton import empty_arena
from paceline.blocks.repository import compiled_model

bert = compiled_model(Path(sys.argv[1]))
model = BlockModel.open(settings(bert, memory_budget_mib=sys.argv[2])).start()
for _ in range(8):
    run(model, 1)  # what threads allocate when they plan for the first time is no batch's
empty_arena()
before = anonymous_bytes()
grown = []
for rows in json.loads(sys.argv[3]):
    run(model, rows)
    grown.append(anonymous_bytes() - before)
model.close()
print(json.dumps(grown))
"""


def anonymous_bytes() -> int:
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        if line.startswith("RssAnon:")
    )
    return int(line.split()[1]) * 1024


def told(command: list[str], work: Path) -> str:
    """What a process of its own writes."""
    environment = {
        "PACELINE_BLOCKS_LEDGER": str(work / "ledger"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    return done.stdout


@pytest.mark.parametrize("order", [(8, 3, 5, 1, 7, 8), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_what_was_measured_is_enough_in_any_order(
    bert: CompiledModel, tmp_path: Path, order: tuple[int, ...]
) -> None:
    """A process's memory after each batch: what that batch needs, whatever ran before."""
    manifest = bert.manifest
    budget_mib = str(floor_of(manifest, 8) / MIB + 1)
    command = [sys.executable, "-c", MEASURE, str(bert.directory), budget_mib, json.dumps(order)]
    for rows, grown in zip(order, json.loads(told(command, tmp_path)), strict=True):
        reserved = manifest.activation_bytes(rows)
        assert grown <= reserved + NOISE_BYTES, (rows, grown, reserved)


FREE = """
import ctypes, sys, threading
from pathlib import Path
from tests.unit.test_blocks_activations import MIB, anonymous_bytes, settings
from paceline.blocks.backend.blockmodel import BlockModel
from paceline.blocks.repository import compiled_model

parameters = {"memory_budget_mib": sys.argv[2]} if len(sys.argv) > 2 else {}
model = BlockModel.open(settings(compiled_model(Path(sys.argv[1])), **parameters))
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
used, over = threading.Barrier(9), threading.Barrier(9)

def use():
    for _ in range(2):  # of the first one malloc learns that there are some as large
        held = libc.malloc(MIB)
        libc.memset(held, 1, MIB)
        libc.free(held)
    used.wait()
    over.wait()

before = anonymous_bytes()
for _ in range(8):
    threading.Thread(target=use).start()
used.wait()
print(anonymous_bytes() - before)
over.wait()
model.close()
"""


def test_within_a_budget_what_threads_have_freed_is_given_back(
    bert: CompiledModel, tmp_path: Path
) -> None:
    """No thread's heap keeps what it used once; nobody would have counted it."""

    def kept(*budget_mib: str) -> int:
        command = [sys.executable, "-c", FREE, str(bert.directory), *budget_mib]
        return int(told(command, tmp_path))

    assert kept("64") < 2 * MIB
    assert kept() > 4 * MIB, "else there is nothing to give back"
