"""`paceline plan` on the example chain and the measured profiles."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paceline.cli import app
from paceline.core.errors import ConfigError, PlanError
from paceline.planner.problem import Options
from paceline.planner.solve import POLICIES
from paceline.planning import cheaper_slo, curves, limits, plan_offline, read_demand

EXAMPLES = Path(__file__).parents[2] / "examples"
CHAIN = EXAMPLES / "planning/traffic.yaml"
PROFILES = EXAMPLES / "data/profiles.csv"
HARDWARE = EXAMPLES / "data/hardware.csv"
FILES = [str(CHAIN), "--profiles", str(PROFILES), "--hardware", str(HARDWARE)]


def run(*arguments: str, verify: bool = False) -> str:
    verification = () if verify else ("--no-verify",)
    answer = CliRunner().invoke(
        app, ["plan", *FILES, *verification, *arguments], env={"COLUMNS": "200"}
    )
    if answer.exception is not None:
        raise answer.exception
    return answer.stdout


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_plans_the_example_and_says_how_far_it_is_from_the_bound(policy: str) -> None:
    published = json.loads(run("--policy", policy, "--format", "json"))
    assert (published["policy"], published["billing"]) == (policy, "fractional")
    assert published["cost_per_hour"] >= published["lower_bound_per_hour"] * (1 - 1e-6)
    (chain,) = published["chains"]
    assert chain["latency_worst_ms"] <= chain["slo_ms"] == 400.0
    assert "machines" not in published


def test_the_default_policy_is_the_cheapest() -> None:
    costs = {
        policy: json.loads(run("--policy", policy, "--format", "json"))["cost_per_hour"]
        for policy in POLICIES
    }
    default = json.loads(run("--format", "json"))
    assert default["policy"] == "optimal"
    assert default["cost_per_hour"] == min(costs.values())


def test_the_text_form_shows_utilisation_bound_gap_and_a_cheaper_objective() -> None:
    text = run("--slo-ms", "100")
    assert "used" in text and "100%" in text
    assert "no plan can cost less than" in text and "gap 0.0%" in text
    assert "ms this costs" in text and "% less" in text


def test_a_plan_is_verified_under_the_chains_arrivals_and_says_what_its_headroom_costs() -> None:
    text = run("--requests", "800", "--seed", "5", verify=True)
    assert "%) so that 0.99 hold under poisson arrivals" in text
    shown = re.search(r"of (\d+) simulated requests in time, at least 99\.", text)
    assert shown is not None and int(shown[1]) > 800, "a third confirmation has to be surer"
    assert "no plan can cost less than" in text


def test_evenly_spaced_arrivals_are_planned_for_without_a_simulation() -> None:
    published = json.loads(run("--arrivals", "uniform", "--format", "json", verify=True))
    bare = json.loads(run("--format", "json"))
    assert published | {"solve_ms": 0} == bare | {"solve_ms": 0}
    assert "attainment" not in published


def test_whole_machines_are_listed_with_what_shares_them_within_the_limits() -> None:
    published = json.loads(run("--billing", "machine", "--limit", "t4=6", "--format", "json"))
    kinds = [machine["hardware"] for machine in published["machines"]]
    assert kinds and kinds.count("t4") <= 6
    assert published["cost_per_hour"] >= published["lower_bound_per_hour"]
    assert any(len(machine["shares"]) > 1 for machine in published["machines"])
    assert "shared machines" in run("--billing", "machine")


def test_all_whole_machines_are_listed_and_what_they_cost_adds_up_with_what_is_idle() -> None:
    published = json.loads(run("--billing", "machine", "--format", "json"))
    text = run("--billing", "machine")
    chain, machines = text.split("own and shared machines")
    rows = [re.split(r" {2,}", line.strip()) for line in machines.splitlines()[2:]]
    rows = [row for row in rows if row[0].isdigit()]
    total = published["cost_per_hour"]
    assert sum(int(row[0]) for row in rows) == len(published["machines"])
    assert sum(float(row[3]) for row in rows) == pytest.approx(total, rel=1e-3)
    parts = re.search(r"(\d+) x t4: ([\d.]+) per hour for modules \+ ([\d.]+) idle", machines)
    assert parts is not None and int(parts[1]) == len(published["machines"])
    assert float(parts[2]) + float(parts[3]) == pytest.approx(total, rel=1e-3)
    own = [float(line.split()[-1]) for line in chain.splitlines() if " ms  t4" in line]
    assert sum(own) == pytest.approx(float(parts[2]), rel=0.02)
    # A module is as busy as the machine that it has a part of.
    shared = next(m for m in published["machines"] if len(m["shares"]) > 1)
    busy = f"{sum(share['utilisation'] for share in shared['shares']):.0%}"
    assert busy != "100%"
    assert sum(f" {busy} " in line for line in chain.splitlines()) == len(shared["shares"])


@pytest.mark.parametrize(
    "switch",
    [
        ("--dispatch", "round-robin"),
        ("--max-tuples", "1"),
        ("--no-dummy",),
        ("--no-reassign",),
        ("--no-efficiency",),
        ("--no-node-merger",),
        ("--no-cost-direct",),
    ],
)
def test_parts_of_harpagon_can_be_switched_off_at_no_lower_cost(switch: tuple[str, ...]) -> None:
    full = json.loads(run("--policy", "harpagon", "--format", "json"))["cost_per_hour"]
    less = json.loads(run("--policy", "harpagon", "--format", "json", *switch))["cost_per_hour"]
    assert less >= full * (1 - 1e-6)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_cost_against_objective_and_rate_is_drawn(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cost.{suffix}"
    run("--plot", str(path))
    start = path.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == "png" else b"<?xml" in start


def test_cost_falls_with_the_objective_and_rises_with_the_rate() -> None:
    made = plan_offline(read_demand([CHAIN], PROFILES, HARDWARE, Options(policy="optimal")))
    found = curves(made)
    slo = [cost for _, cost in found["slo"]]
    rate = [cost for _, cost in found["rate"]]
    assert slo == sorted(slo, reverse=True) and slo[0] > slo[-1]
    assert rate == sorted(rate) and rate[0] < rate[-1]
    cheaper = cheaper_slo(made)
    assert cheaper is None or cheaper.saving >= 0.01


def test_an_objective_that_nothing_keeps_says_which_module_lacks_how_many_ms() -> None:
    with pytest.raises(PlanError, match=r"needs at least 47\.5 ms, 37\.5 ms more than .* detect"):
        run("--slo-ms", "10")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "magic"), "--policy: must be one of optimal, harpagon"),
        (("--billing", "barter"), "--billing: must be one of fractional, machine"),
        (("--dispatch", "random"), "--dispatch: must be one of"),
        (("--limit", "t4"), "--limit: 't4' is not HARDWARE=NUMBER"),
        (("--limit", "abacus=3"), "--limit: no hardware 'abacus'; hardware.csv has a100-40"),
        (("--rate-rps", "0"), "chain traffic: rate_rps: must be above 0"),
        (("--rate-rps", "1e12"), "must be above 0 and at most 10000000 requests/s, got 1e+12"),
        (("--slo-ms", "-1"), "slo_ms"),
        (("--plot", "cost.txt"), "--plot: 'cost.txt' must end in .png or .svg"),
        (
            ("--arrivals", "weekly"),
            "--arrivals: must be poisson, uniform or a trace file; there is",
        ),
        (("--window", "ipa"), "--window: selects rows of a trace; give one as --arrivals"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_write(
    arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        run(*arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "old", "new", "message"),
    [
        ("t.yaml", "rate_rps: 200", "rate_rps: 1e12", "t.yaml:7: rate_rps: must be above 0 and at"),
        ("t.yaml", "rate_rps: 200\n", "", "t.yaml:1: rate_rps: chain 'traffic' declares none"),
        ("t.yaml", "ssd320", "ssd999", "t.yaml:12: modules.detect.model: no profile of model"),
        ("h.csv", "t4,0.526", "t4,-1", "h.csv:2: price_per_hour: must be above 0, got -1"),
        ("p.csv", "280,", "280,x", "p.csv:2: memory_mib: 'x' is not a number"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_its_place(
    changed: str, old: str, new: str, message: str, tmp_path: Path
) -> None:
    for name, source in (("t.yaml", CHAIN), ("p.csv", PROFILES), ("h.csv", HARDWARE)):
        text = source.read_text(encoding="utf-8")
        assert name != changed or old in text
        text = text.replace(old, new, 1) if name == changed else text
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        read_demand([tmp_path / "t.yaml"], tmp_path / "p.csv", tmp_path / "h.csv", Options())
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_profiles_on_hardware_without_a_price_are_told_once_with_their_first_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = HARDWARE.read_text(encoding="utf-8").replace("v100,", "V100,")
    (tmp_path / "h.csv").write_text(text, encoding="utf-8")
    read_demand([CHAIN], PROFILES, tmp_path / "h.csv", Options())
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith("profiles.csv:19: hardware: 'v100' has no price, so nothing is planned")
    assert told.endswith("write one of V100, a100-40, a100-80, l4, p4, t4")


def test_the_curves_go_through_the_plan() -> None:
    made = plan_offline(read_demand([CHAIN], PROFILES, HARDWARE, Options(policy="nexus")))
    for points in curves(made).values():
        assert (1.0, made.plan.cost_per_hour) in points


def test_limits_are_read_as_hardware_and_number() -> None:
    assert limits(["t4=10", "v100=0"]) == {"t4": 10, "v100": 0}


def test_nothing_but_the_plan_is_printed_where_a_solver_in_c_plans(tmp_path: Path) -> None:
    """Not series-parallel (the letter N) and packed machines: HiGHS solves both, and could talk."""
    model = "{model: resnet50-v1-5-tensorflow-mixed-fp16, inputs: "
    chain = tmp_path / "n.yaml"
    chain.write_text(
        "chain: n\nslo_ms: 300\nrate_rps: 50\ninputs: {x: {dtype: UINT8, shape: [-1]}}\nmodules:\n"
        f"  a: {model}{{x: inputs.x}}}}\n  b: {model}{{x: inputs.x}}}}\n"
        f"  c: {model}{{x: a.y}}}}\n  d: {model}{{x: a.y, z: b.y}}}}\n"
        "outputs: {y: c.y, z: d.y}\n"
    )
    files = [str(chain), "--profiles", str(PROFILES), "--hardware", str(HARDWARE)]
    json_only = ("--no-verify", "--format", "json")
    for billing in ("fractional", "machine"):
        ended = subprocess.run(
            [sys.executable, "-m", "paceline", "plan", *files, *json_only, "--billing", billing],
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        assert json.loads(ended.stdout)["billing"] == billing
        assert ended.stderr == ""
