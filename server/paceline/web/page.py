"""The status page: `Control.status()` as one self-contained HTML page that reloads itself.

Invariant: a pure function of the status; every text in it is escaped; a key that is missing shows
as a dash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

REFRESH_S = 2

Row = Mapping[str, Any]
Cell = Callable[[Row], str]

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--good:#1a7f37;--bad:#c62828;--weak:#777}
body{font:14px/1.45 system-ui,sans-serif;margin:1.5rem auto;max-width:72rem;padding:0 1rem}
h1{font-size:1.3rem;margin:0 0 .2rem}h2{font-size:1rem;margin:1.6rem 0 .4rem}
p{margin:.2rem 0;color:var(--weak)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{font-weight:600;color:var(--weak)}
th.l,td.l{text-align:left}
.good{color:var(--good)}.bad{color:var(--bad);font-weight:600}
"""


def render(status: Row) -> str:
    """The page."""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<meta http-equiv=refresh content={REFRESH_S}>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>Paceline</title><style>{_STYLE}</style>"
        f"<h1>Paceline {_state(status)}</h1><p>{_summary(status)}</p>"
        + "".join(_shortages(status))
        + _table("Chains", status.get("chains", ()), _CHAIN_COLUMNS)
        + _table("Modules", status.get("modules", ()), _MODULE_COLUMNS)
        + _table("Machines", status.get("machines", ()), _MACHINE_COLUMNS)
        + _table("Models", status.get("models", ()), _MODEL_COLUMNS)
        + "</html>"
    )


def _state(status: Row) -> str:
    if status.get("draining"):
        return "<span class=bad>draining</span>"
    if status.get("ready"):
        return "<span class=good>ready</span>"
    return "<span class=bad>not ready</span>"


def _summary(status: Row) -> str:
    parts = [f"up {_duration(float(status.get('uptime_s') or 0.0))}"]
    if status.get("version"):
        parts.insert(0, f"version {escape(str(status['version']))}")
    if status.get("cost_per_hour") is not None:
        parts.append(f"planned cost {_significant(status['cost_per_hour'])} per hour")
    return " &middot; ".join(parts)


def _shortages(status: Row) -> Iterable[str]:
    for lack in status.get("shortage", ()):
        yield (
            f"<p class=bad>{escape(str(lack.get('hardware', '')))}: the plan needs "
            f"{_significant(lack.get('needed'))} machines, as many as "
            f"{_significant(lack.get('present'))} are there</p>"
        )


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    if hours:
        return f"{hour} h {minute} min"
    return f"{minute} min {second} s" if minutes else f"{second} s"


def _table(title: str, rows: Iterable[Row], columns: tuple[tuple[str, bool, Cell], ...]) -> str:
    """`columns`: heading, whether it is text (left-aligned), cell."""
    rows = list(rows)
    if not rows:
        return f"<h2>{title}</h2><p>none</p>"
    head = "".join(f"<th{_left(text)}>{name}" for name, text, _ in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{_left(text)}>{cell(row)}" for _, text, cell in columns)
        for row in rows
    )
    return f"<h2>{title}</h2><div class=scroll><table><tr>{head}{body}</table></div>"


def _left(text: bool) -> str:
    return " class=l" if text else ""


def _text(key: str) -> Cell:
    return lambda row: escape(str(row.get(key) or "")) or "&ndash;"


def _names(key: str) -> Cell:
    return lambda row: escape(", ".join(map(str, row.get(key) or ()))) or "&ndash;"


def _number(key: str) -> Cell:
    return lambda row: _significant(row.get(key))


def _alarming(key: str) -> Cell:
    """A count that should be zero."""
    return lambda row: f"<span class=bad>{row[key]:g}</span>" if row.get(key) else "0"


def _significant(value: Any) -> str:
    if value is None:
        return "&ndash;"
    number = float(value)
    return f"{number:,.0f}" if number == round(number) or abs(number) >= 1000 else f"{number:.4g}"


def _attainment(row: Row) -> str:
    value = row.get("attainment")
    return "&ndash;" if value is None else f"{100 * float(value):.2f} %"


def _good(key: str, good: str) -> Cell:
    """A state, green when it is the good one."""

    def cell(row: Row) -> str:
        state = str(row.get(key) or "")
        return f"<span class={'good' if state == good else 'bad'}>{escape(state)}</span>"

    return cell


_CHAIN_COLUMNS: tuple[tuple[str, bool, Cell], ...] = (
    ("chain", True, _text("chain")),
    ("SLO ms", False, _number("slo_ms")),
    ("planned worst ms", False, _number("latency_worst_ms")),
    ("planned requests/s", False, _number("rate_rps")),
    ("cost per hour", False, _number("cost_per_hour")),
    ("in flight", False, _number("in_flight")),
    ("met", False, _number("met")),
    ("missed", False, _alarming("missed")),
    ("failed", False, _alarming("failed")),
    ("rejected", False, _alarming("rejected")),
    ("attainment", False, _attainment),
)
_MODULE_COLUMNS: tuple[tuple[str, bool, Cell], ...] = (
    ("chain", True, _text("chain")),
    ("module", True, _text("module")),
    ("model", True, _text("model")),
    ("queued", False, _number("queued")),
    ("oldest ms", False, _number("oldest_ms")),
    ("executing", False, _number("executing")),
    ("batch size", False, _number("batch_size")),
    ("machines", True, _names("machines")),
)
_MACHINE_COLUMNS: tuple[tuple[str, bool, Cell], ...] = (
    ("machine", True, _text("machine")),
    ("hardware", True, _text("hardware")),
    ("state", True, _good("state", "up")),
    ("executing", False, _number("executing")),
    ("models", True, _names("models")),
)
_MODEL_COLUMNS: tuple[tuple[str, bool, Cell], ...] = (
    ("model", True, _text("model")),
    ("version", False, _text("version")),
    ("state", True, _good("state", "READY")),
    ("reason", True, _text("reason")),
    ("machines", True, _names("machines")),
)
