"""What a restart finds: chains applied and deleted, traffic, files that changed meanwhile."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from tests.fakes import OCR

from paceline.config import chain_document, parse_chain
from paceline.core.chain import Chain, Source
from paceline.core.errors import ConfigError, ResidencyError
from paceline.database import FILE, Measurements
from paceline.planner.replan import Traffic
from paceline.state import State

FASTER = replace(OCR, slo_s=0.4)
OTHER = replace(OCR, name="other", rate_rps=None)


def restarted(directory: Path, *declared: Chain) -> tuple[Chain, ...]:
    """What a fresh process would serve."""
    state = State(directory)
    try:
        return state.chains(declared)
    finally:
        state.close()


@pytest.fixture
def state(tmp_path: Path) -> State:
    opened = State(tmp_path)
    opened.chains((OCR,))
    return opened


def test_a_chain_as_a_document_reads_back_as_the_same_chain() -> None:
    detect, recognize = OCR.modules
    rich = replace(
        OCR,
        description="a: #b 'c' é",
        keep_alive_s=12.5,
        dispatch="round-robin",
        rate_rps=None,
        modules=(
            detect,
            replace(recognize, on_error="skip", when=Source("detect", "crops"), for_each=None),
        ),
    )
    for chain in (OCR, OTHER, rich):
        assert parse_chain(chain_document(chain)) == chain
        assert parse_chain(chain_document(chain)).description == chain.description


def test_what_was_applied_is_served_again_without_closing_properly(
    state: State, tmp_path: Path
) -> None:
    state.changed((FASTER, OTHER), ())
    assert restarted(tmp_path, OCR) == (FASTER, OTHER)
    state.close()


def test_a_chain_deleted_over_the_api_stays_deleted_while_its_file_stays(
    state: State, tmp_path: Path
) -> None:
    state.changed((OTHER,), ())
    state.changed((), ("ocr", "other"))
    state.close()
    assert restarted(tmp_path, OCR) == ()


def test_a_file_that_changed_since_counts_again(
    state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state.changed((FASTER,), ())
    state.close()
    edited = replace(OCR, slo_s=1.5)
    assert restarted(tmp_path, edited) == (edited,)
    assert "file of chain ocr has changed" in caplog.text
    assert restarted(tmp_path, OCR) == (OCR,), "what was dropped does not come back"


def test_reloading_files_names_what_changed_and_drops_what_was_applied_over_it(
    state: State, tmp_path: Path
) -> None:
    state.changed((FASTER, OTHER), ())
    assert state.redeclared((OCR,)) == ((), ()), "the file is as it was: what was applied counts"
    edited = replace(OCR, slo_s=1.5)
    assert state.redeclared((edited,)) == ((edited,), ())
    assert state.redeclared(()) == ((), ("ocr",))
    state.accept((edited,))
    state.close()
    assert restarted(tmp_path, edited) == (edited, OTHER)


def test_traffic_is_remembered_of_chains_that_are_as_they_were(state: State) -> None:
    fan_outs = {("ocr", "detect"): 1.0, ("ocr", "recognize"): 7.5}
    state.keep_traffic(Traffic({"ocr": 33.0}, fan_outs), (OCR,))
    assert state.traffic((OCR, OTHER)) == Traffic({"ocr": 33.0}, fan_outs)
    assert state.traffic((FASTER,)) == Traffic()
    state.close()


def test_a_change_that_cannot_be_kept_is_refused(state: State, tmp_path: Path) -> None:
    holder = sqlite3.connect(tmp_path / FILE)
    holder.execute("BEGIN IMMEDIATE")
    state._database.execute("PRAGMA busy_timeout = 10")
    with pytest.raises(ResidencyError, match="cannot be written"):
        state.changed((OTHER,), ())
    holder.rollback()
    holder.close()
    state.close()
    assert restarted(tmp_path, OCR) == (OCR,)


def test_an_older_database_is_brought_up_to_date_and_keeps_what_it_has(
    state: State, tmp_path: Path
) -> None:
    state.changed((OTHER,), ())
    state._database.executescript("DROP TABLE profiles; DROP TABLE sizes; PRAGMA user_version = 1")
    state.close()
    assert restarted(tmp_path, OCR) == (OCR, OTHER)
    measured = Measurements(tmp_path)
    measured.keep_size("det", "content", 12345)
    assert measured.size_bytes("det", "content") == 12345
    assert measured.size_bytes("det", "edited") is None
    assert measured.size_bytes("rec", "content") is None


def test_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as newer:
        newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(ConfigError, match="newer Paceline"):
        State(tmp_path)


def test_a_damaged_file_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_bytes(b"not a database, not at all" * 100)
    assert restarted(tmp_path, OCR) == (OCR,)
    assert "damaged" in caplog.text
    assert (tmp_path / "paceline.damaged").read_bytes().startswith(b"not a database")


def test_a_directory_that_cannot_hold_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=FILE):
        State(tmp_path / "missing")
