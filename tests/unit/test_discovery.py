"""Where machines are looked up, and what happens when a look fails."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from paceline.core.errors import ConfigError
from paceline.discovery import MAX_MACHINES, Discovery, TritonTarget


def look(*targets: TritonTarget) -> list[str]:
    return [str(machine) for machine in asyncio.run(Discovery(targets).look())]


@pytest.mark.parametrize(
    "text", ["a:1", "gpu@a:1", "t4@dns:triton.models:8001", "file:/etc/machines", "v100@[::1]:80"]
)
def test_a_target_reads_back_from_its_text(text: str) -> None:
    target = TritonTarget.parse(text)
    assert TritonTarget.parse(str(target)) == target
    assert str(target).endswith(text)


@pytest.mark.parametrize("text", ["", "a", "a:b", "@a:1", "dns:a", "dns:a:99999", "x@dns:"])
def test_what_is_no_target_says_what_one_looks_like(text: str) -> None:
    with pytest.raises(ConfigError, match=r"HOST:PORT|names no hardware"):
        TritonTarget.parse(text)


def test_a_name_stands_for_its_addresses_and_an_address_counts_once() -> None:
    found = look(TritonTarget.parse("t4@127.0.0.1:8001"), TritonTarget.parse("dns:localhost:8001"))
    assert found[0] == "t4@127.0.0.1:8001"
    assert set(found[1:]) <= {"gpu@[::1]:8001"}


def test_a_file_has_a_machine_a_line(tmp_path: Path) -> None:
    file = tmp_path / "machines"
    file.write_text("# ours\nt4@10.0.0.1:8001\n\n10.0.0.2:8001  # theirs\n", encoding="utf-8")
    assert look(TritonTarget.parse(f"file:{file}")) == ["t4@10.0.0.1:8001", "gpu@10.0.0.2:8001"]


def test_a_bad_line_is_named_and_later_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "machines"
    file.write_text("10.0.0.1:8001\n", encoding="utf-8")
    discovery = Discovery([TritonTarget.parse(f"file:{file}")])
    before = asyncio.run(discovery.look())

    file.write_text("10.0.0.1:8001\ndns:nested:1\n", encoding="utf-8")
    assert asyncio.run(discovery.look()) == asyncio.run(discovery.look()) == before
    assert caplog.text.count(f"{file}:2") == 1, "said once, not at every look"

    file.unlink()
    assert asyncio.run(discovery.look()) == before
    file.write_text("", encoding="utf-8")
    assert asyncio.run(discovery.look()) == (), "an empty file is an answer"
    with pytest.raises(ConfigError, match="No such file"):
        look(TritonTarget.parse(f"file:{tmp_path / 'none'}"))


def test_a_name_that_does_not_resolve_is_an_error_at_first() -> None:
    with pytest.raises(ConfigError, match="nowhere.invalid"):
        look(TritonTarget.parse("dns:nowhere.invalid:8001"))


def test_there_is_a_limit(tmp_path: Path) -> None:
    file = tmp_path / "machines"
    lines = [f"10.0.{i // 256}.{i % 256}:1\n" for i in range(MAX_MACHINES + 1)]
    file.write_text("".join(lines), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{MAX_MACHINES} are allowed"):
        look(TritonTarget.parse(f"file:{file}"))
