"""`paceline simulate`: traffic replayed against plans and live replanning, told and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paceline.cli import app
from paceline.core.errors import ConfigError
from paceline.core.plan import Allocation, ChainPlan, ModulePlan, Plan
from paceline.core.profile import Hardware
from paceline.plan_file import read_plan
from paceline.sim.rental import Fleet

EXAMPLES = Path(__file__).parents[2] / "examples"
CHAIN = EXAMPLES / "planning/traffic.yaml"
TRACE = EXAMPLES / "traces/twitter_2021-08_ipa_windows_per_second.csv"
PRICED = (
    "--profiles",
    str(EXAMPLES / "data/profiles.csv"),
    "--hardware",
    str(EXAMPLES / "data/hardware.csv"),
)
FILES = (str(CHAIN), *PRICED)


def run(command: str, *arguments: str) -> str:
    answer = CliRunner().invoke(app, [command, *FILES, "--no-verify", *arguments])
    if answer.exception is not None:
        raise answer.exception
    return answer.stdout


def simulated(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("simulate", "--format", "json", *arguments))
    return found


def step(tmp_path: Path) -> Path:
    """20 requests a second for 40 s, then 60."""
    trace = tmp_path / "step.csv"
    counts = [20] * 40 + [60] * 80
    trace.write_text("second,requests\n" + "".join(f"{s},{n}\n" for s, n in enumerate(counts)))
    return trace


QUICK = ("--rate-rps", "40", "--seconds", "10")


def test_the_same_seed_prints_the_same_bytes_and_another_one_does_not() -> None:
    first, again, other = (
        run("simulate", "--format", "json", *QUICK, "--seed", seed) for seed in ("1", "1", "2")
    )
    assert first == again != other


def test_every_request_is_counted_once_and_every_machine_paid_for_as_long_as_it_is_had() -> None:
    told = simulated(*QUICK)
    (chain,) = told["chains"]
    assert chain["requests"] == 400
    assert chain["met"] + chain["missed"] + chain["rejected"] == 400
    for name in ("requests", "met", "missed", "rejected"):
        assert sum(stretch[name] for stretch in told["timeline"]) == chain[name], name
    plan = json.loads(run("plan", "--rate-rps", "40", "--format", "json"))
    assert told["cost_per_hour"] == pytest.approx(plan["cost_per_hour"], rel=1e-4)
    assert told["cost"] == pytest.approx(
        plan["cost_per_hour"] * told["duration_s"] / 3600, rel=1e-4
    )
    spans = [stretch["span_s"] for stretch in told["timeline"]]
    assert sum(spans) == pytest.approx(told["duration_s"])
    assert all(0 < machine["utilisation"] <= 1.001 for machine in told["machines"])
    assert {module["module"] for module in told["modules"]} == {"detect", "cars", "faces"}
    assert any(module["waiting_rows_most"] > 0 for module in told["modules"])


def test_a_window_of_a_trace_is_scaled_to_the_rate_or_left_as_it_was_recorded() -> None:
    window = ("--trace", str(TRACE), "--window", "ipa_steady_high")
    scaled = simulated(*window, "--rate-rps", "4")
    (chain,) = scaled["chains"]
    assert chain["requests"] == pytest.approx(4 * 600, rel=0.01)
    assert scaled["arrivals"] == TRACE.name
    as_told = simulated(*window, "--rate-rps", "8", "--scale-to-rps", "2")
    assert as_told["chains"][0]["requests"] == pytest.approx(2 * 600, rel=0.01)


def test_live_replanning_follows_a_rate_that_rises_and_makes_before_it_breaks(
    tmp_path: Path,
) -> None:
    trace = ("--trace", str(step(tmp_path)), "--scale-to-rps", "0", "--rate-rps", "20")
    fixed = simulated(*trace)
    live = simulated(*trace, "--replan", "--load-s", "5")
    assert fixed["plans"] == [] and len(fixed["machines"]) <= len(live["machines"])
    assert live["chains"][0]["met"] > fixed["chains"][0]["met"]
    assert live["cost"] > fixed["cost"]
    grown = [plan for plan in live["plans"] if plan["machines_started"]]
    assert grown and "planned for" in grown[0]["reason"]
    for plan in grown:
        assert plan["ready_s"] == plan["at_s"] + 5
        started = [m for m in live["machines"] if m["from_s"] == plan["at_s"]]
        assert len(started) == plan["machines_started"]
    decided = {plan["at_s"] for plan in live["plans"]}
    for machine in live["machines"]:
        if machine["until_s"] < live["duration_s"]:
            assert machine["until_s"] not in decided or any(
                plan["at_s"] == plan["ready_s"] == machine["until_s"] for plan in live["plans"]
            )
    # In the last third the new plans hold what the first one cannot.
    third = [s for s in live["timeline"] if s["at_s"] >= 80]
    assert sum(s["met"] for s in third) / sum(s["requests"] for s in third) > 0.8


def test_a_plan_that_was_written_is_read_back_as_it_was(tmp_path: Path) -> None:
    prices = {
        name: Hardware(name, price)
        for name, price in (("t4", 0.526), ("v100", 3.06), ("a100-40", 4.1))
    }
    for billing in ("fractional", "machine"):
        path = tmp_path / f"{billing}.json"
        path.write_text(run("plan", "--billing", billing, "--format", "json"))
        again = read_plan(path, prices).as_json()
        before = json.loads(path.read_text())
        assert again["chains"] == before["chains"]
        assert again.get("machines") == before.get("machines")
        assert again["cost_per_hour"] == pytest.approx(before["cost_per_hour"], rel=1e-5)
        told = simulated("--plan", str(path), "--seconds", "5", "--rate-rps", "200")
        assert told["billing"] == billing and told["chains"][0]["requests"] == 1000


RUN_CHAIN = """\
chain: pair
slo_ms: 500
rate_rps: 200
runs: auto
inputs: {x: {dtype: FP32, shape: [4]}}
modules:
  first: {model: one, inputs: {x: inputs.x}}
  second: {model: two, inputs: {x: first.y}}
outputs: {y: second.y}
"""


def test_consecutive_modules_are_planned_and_replayed_at_once_where_that_costs_no_more(
    tmp_path: Path,
) -> None:
    (tmp_path / "pair.yaml").write_text(RUN_CHAIN)
    (tmp_path / "profiles.csv").write_text(
        "model,hardware,batch_size,duration_ms,memory_mib\none,gpu,1,10,\none,gpu,8,20,\n"
        "two,gpu,1,20,100\ntwo,gpu,8,40,100\n"
    )
    (tmp_path / "hardware.csv").write_text("hardware,price_per_hour,memory_mib\ngpu,1.0,16000\n")
    profiles, hardware = (str(tmp_path / f"{name}.csv") for name in ("profiles", "hardware"))
    priced = ("--profiles", profiles, "--hardware", hardware)
    files = (str(tmp_path / "pair.yaml"), *priced, "--format", "json")
    written = CliRunner().invoke(app, ["plan", *files, "--no-verify"]).stdout
    (chain,) = json.loads(written)["chains"]
    assert [module["module"] for module in chain["modules"]] == ["first+second"]
    (used,) = chain["modules"][0]["allocations"]
    assert (used["batch_size"], used["duration_ms"]) == (8, 60.0)
    (tmp_path / "plan.json").write_text(written)
    options = ("--plan", str(tmp_path / "plan.json"), "--seconds", "5", "--seed", "1")
    told = json.loads(CliRunner().invoke(app, ["simulate", *files, *options]).stdout)
    assert [m["module"] for m in told["modules"]] == ["first+second"]
    assert told["modules"][0]["rows"] == told["chains"][0]["requests"] == 1000
    apart = written.replace("first+second", "first")
    (tmp_path / "plan.json").write_text(apart)
    refused = CliRunner().invoke(app, ["simulate", *files, *options]).exception
    assert isinstance(refused, ConfigError) and "other modules" in refused.message


def test_the_text_form_tells_attainment_queueing_new_plans_and_the_course(tmp_path: Path) -> None:
    text = run("simulate", "--trace", str(step(tmp_path)), "--scale-to-rps", "0", "--replan")
    for word in ("attained", "goodput/s", "queue ms", "rows waiting", "new plans", "course", "t4"):
        assert word in text


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_run_is_drawn_into_the_same_bytes_each_time(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{name}.{suffix}" for name in ("a", "b")]
    for path in paths:
        run("simulate", *QUICK, "--plot", str(path))
    first, again = (path.read_bytes() for path in paths)
    assert first == again
    assert first.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in first[:1000]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--window", "ipa_bursty"), "--window: is about a trace; give one"),
        (("--scale-to-rps", "5"), "--scale-to-rps: is about a trace; give one"),
        (("--trace", "good.csv", "--seconds", "5"), "--seconds: is about traffic without a trace"),
        (
            ("--trace", "good.csv", "--arrivals", "uniform"),
            "--arrivals: is about traffic without a",
        ),
        (("--load-s", "3"), "--load-s: is about --replan; add it"),
        (("--trace", "none.csv"), "none.csv: cannot be read: No such file"),
        (("--trace", "bad.csv"), "bad.csv:3: requests must be a number of at least 0, got 'many'"),
        (("--arrivals", "weekly"), "--arrivals: must be one of poisson, uniform, got 'weekly'"),
        (("--dispatch", "random"), "--dispatch: must be one of pooled"),
        (("--plot", "run.txt"), "--plot: 'run.txt' must end in .png or .svg"),
        (("--plot", "no/such/run.png"), "--plot: there is no folder 'no/such'; make it first"),
        (("--plan", "plan.json", "--replan"), "--plan: replanning starts from a plan that it made"),
        (("--plan", "none.json"), "none.json: cannot be read"),
        (
            ("--plan", "plan.json", "--policy", "nexus"),
            "--policy: is about a new plan; leave it or --plan out",
        ),
        (("--plan", "plan.json", "--billing", "machine"), "--billing: is about a new plan"),
        (("--plan", "plan.json"), "plan.json: chains: field required; write it with `paceline pl"),
        (
            ("--seconds", "10000000"),
            "--seconds: 2000000000 requests for chain 'traffic', more than",
        ),
        (
            ("--trace", "good.csv", "--rate-rps", "9e6"),
            "good.csv: 9000000 requests, more than 1000",
        ),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.csv").write_text("second,requests\n0,3\n1,many\n")
    (tmp_path / "good.csv").write_text("second,requests\n0,3\n")
    (tmp_path / "plan.json").write_text('{"policy": "optimal", "billing": "fractional"}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as raised:
        run("simulate", *arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "given",
    [
        ("--seconds", "inf"),
        ("--load-s", "inf"),
        ("--overhead-ms", "inf"),
        ("--scale-to-rps", "inf"),
    ],
)
def test_what_never_ends_is_refused(given: tuple[str, str]) -> None:
    answer = CliRunner().invoke(app, ["simulate", *FILES, "--no-verify", *given])
    assert answer.exit_code == 2
    assert f"Invalid value for '{given[0]}'" in answer.output


def test_a_trace_is_read_before_anything_is_planned(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("second,requests\n0,many\n")
    with pytest.raises(ConfigError, match="bad.csv:2: requests must be a number"):
        # Nothing keeps that objective, which planning would say.
        run("simulate", "--slo-ms", "1", "--trace", str(tmp_path / "bad.csv"))


def allotted(*allocations: tuple[str, str, float]) -> Plan:
    """A plan of one chain: model, hardware and machines of each module."""
    modules = tuple(
        ModulePlan(f"m{i}", model, 1.0, 0.0, 1.0, 1.0, (Allocation(hardware, 1, 0.1, n, 2.0),))
        for i, (model, hardware, n) in enumerate(allocations)
    )
    return Plan("optimal", "fractional", (ChainPlan("c", 1.0, 1.0, 1.0, modules),))


def test_machines_stay_where_the_next_plan_wants_their_models_on_their_hardware() -> None:
    fleet = Fleet.of(allotted(("a", "t4", 1.5), ("b", "v100", 1.0)))
    change = fleet.towards(allotted(("a", "t4", 2.25), ("b", "t4", 1.0)), 7.0)
    assert [r.machine.hardware for r in change.started] == ["t4", "t4"]
    assert sorted(tuple(r.machine.instances) for r in change.started) == [("a",), ("b",)]
    assert [r.machine.hardware for r in change.ended] == ["v100"]
    assert sorted(share for _, share in change.shares) == [1.0, 1.0]
    assert sum(r.cost_per_hour for r in fleet.now()) == 5.0
    fleet.begin(change)
    assert sum(r.cost_per_hour for r in fleet.now()) == 2 + 2 + 2 + 0.5 + 2, "both are paid for"
    fleet.end(change, 9.0)
    assert sum(r.cost_per_hour for r in fleet.now()) == 2 + 2 + 0.5 + 2
    assert [r.until_s for r in change.ended] == [9.0]
