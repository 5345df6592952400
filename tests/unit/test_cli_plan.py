"""`paceline plan` on the example chain and the measured profiles."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from paceline.advice import FEW_CHAINS, LONGER, Cheaper, cheaper_slo, curves
from paceline.cli import app
from paceline.core.errors import ConfigError, PlanError
from paceline.core.plan import Attainment, ChainAttainment
from paceline.core.profile import Configuration
from paceline.planner.problem import Billing, Options, PlannedChain, PlannedModule
from paceline.planner.solve import POLICIES, solve
from paceline.planning import Offline, limits, plan_offline, read_demand
from paceline.report import plan_report
from paceline.sim.headroom import Arrivals, Verification

EXAMPLES = Path(__file__).parents[2] / "examples"
CHAIN = EXAMPLES / "planning/traffic.yaml"
PROFILES = EXAMPLES / "data/profiles.csv"
HARDWARE = EXAMPLES / "data/hardware.csv"
FILES = [str(CHAIN), "--profiles", str(PROFILES), "--hardware", str(HARDWARE)]


ONE = """chain: one
slo_ms: 400
rate_rps: 20
inputs: {x: {dtype: UINT8, shape: [-1]}}
modules:
  a: {model: resnet50-v1-5-tensorflow-mixed-fp16, inputs: {x: inputs.x}}
outputs: {y: a.y}
"""


OPTIMAL = Options(policy="optimal")


def offline(chains: list[Path], options: Options = OPTIMAL, slo_ms: float | None = None) -> Offline:
    return plan_offline(read_demand(chains, PROFILES, HARDWARE, options, slo_ms=slo_ms))


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
    assert text.rstrip().endswith("(the shortest objective found that saves 10%)")


def test_what_a_longer_objective_saves_is_found_in_few_plans_as_if_all_were_tried() -> None:
    for slo_ms in (60.0, 100.0, 300.0, 2000.0):
        made = offline([CHAIN], slo_ms=slo_ms)
        tried: list[str] = []

        def note(subject: str, detail: str, tried: list[str] = tried) -> None:
            tried.append(detail)

        found = cheaper_slo(made, note)
        assert len(tried) == len(set(tried)) <= 13
        (chain,), bare = made.chains, replace(made.options, bound=False)
        longer = [replace(chain, slo_s=chain.slo_s * factor) for factor in LONGER]
        costs = [solve([each], bare).cost_per_hour for each in longer]
        savings = [round(1 - cost / made.plan.cost_per_hour, 2) for cost in costs]
        wanted = min(0.1, savings[-1])
        if savings[-1] >= 0.01:
            at = next(at for at, saving in enumerate(savings) if saving >= wanted)
            assert found.factor == LONGER[at]
            assert found.saving == savings[at]


def test_what_is_told_of_longer_objectives_says_what_was_looked_for() -> None:
    one, two = offline([CHAIN]), replace(offline([CHAIN]), chains=offline([CHAIN]).chains * 2)
    assert Cheaper(1.25, 0.14).told(one) == (
        "at 500 ms this costs 14% less (the shortest objective found that saves 10%)"
    )
    assert Cheaper(1.25, 0.04).told(one) == (
        "at 500 ms this costs 4% less; no objective up to 1200 ms was found to save 10%"
    )
    assert Cheaper(3.0, 0.004).told(two) == "no objective up to 3x the slo was found to save 1%"
    assert Cheaper(1.5, -0.2, guessed=True).told(two).startswith("with 1.5x the slo this costs no ")


def test_many_chains_in_whole_machines_are_planned_once_more_for_advice_and_seldom_for_a_plot(
    tmp_path: Path,
) -> None:
    files = [tmp_path / f"c{number}.yaml" for number in range(FEW_CHAINS + 1)]
    for number, file in enumerate(files):
        file.write_text(ONE.replace("chain: one", f"chain: one{number}"), encoding="utf-8")
    made = offline(files, Options(policy="nexus", billing="machine"))
    tried: list[str] = []
    found = cheaper_slo(made, lambda subject, detail: tried.append(detail))
    assert found.guessed and sum("whole machines" in detail for detail in tried) == 1
    assert "the only longer objective planned for, as 6 chains in" in found.told(made)
    tried.clear()
    assert {len(points) for points in curves(made, lambda s, d: tried.append(d)).values()} == {5}
    assert len(tried) == 10


def test_ctrl_c_while_more_is_told_leaves_the_plan_and_no_traceback(tmp_path: Path) -> None:
    """The figure goes into a pipe that nobody reads, so that drawing it does not end by itself."""
    pipe = tmp_path / "cost.svg"
    os.mkfifo(pipe)
    # What runs in the background of a script ignores interrupts, and so would its children.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [sys.executable, "-m", "paceline", "plan", *FILES, "--no-verify", "--plot", str(pipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        signal.signal(signal.SIGINT, ours)
        assert running.stdout is not None and running.stderr is not None
        lines: list[str] = []
        while not lines or not lines[-1].startswith("cost "):
            lines.append(running.stdout.readline())
            assert lines[-1], "it ended without a plan"
        told = _interrupted(running)
    assert running.returncode == 130
    assert lines[0].startswith("traffic: 200 requests/s within 400 ms")
    assert told.endswith("paceline: stopped before all that was asked for was told\n")
    assert "Traceback" not in told


def _interrupted(running: subprocess.Popen[str]) -> str:
    """What it says on stderr until it has ended. An interrupt that comes while Python collects
    garbage is lost; people press Ctrl-C again.
    """
    try:
        for _ in range(3):
            running.send_signal(signal.SIGINT)
            try:
                return running.communicate(timeout=20)[1]
            except subprocess.TimeoutExpired:
                continue
        raise AssertionError("it does not end")
    finally:
        running.kill()


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
    assert cheaper.saving >= 0.01 or cheaper.factor == LONGER[-1]


def test_what_saves_nearly_a_tenth_is_told_as_a_tenth() -> None:
    """1.1 times the objective saves 9.99...% of 1/9 per hour: not "10% less; none saves 10%"."""
    c = (Configuration("g", 1, 0.01, 1.0), Configuration("g", 2, 0.01, 1.0))
    chain = PlannedChain("c", 0.1, 20.0, (PlannedModule("a", "m", 20.0, (), c),))
    found = cheaper_slo(Offline(solve([chain], OPTIMAL), (chain,), OPTIMAL))
    assert found == Cheaper(1.1, 0.1)


def test_an_objective_that_nothing_keeps_says_which_module_lacks_how_many_ms() -> None:
    with pytest.raises(PlanError, match=r"needs at least 47\.5 ms, 37\.5 ms more than .* detect"):
        run("--slo-ms", "10")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "magic"), "--policy: must be one of optimal, harpagon"),
        (("--billing", "barter"), "--billing: must be one of fractional, machine"),
        (("--dispatch", "random"), "--dispatch: must be one of"),
        (("--no-dummy",), "--no-dummy: is about --policy harpagon; it changes nothing in optimal"),
        (("--policy", "nexus", "--strict"), "--strict: is about --policy harpagon; it changes no"),
        (("--limit", "t4"), "--limit: 't4' is not HARDWARE=NUMBER"),
        (("--limit", "abacus=3"), "--limit: no hardware 'abacus'; hardware.csv has a100-40"),
        (("--rate-rps", "0"), "chain traffic: rate_rps: must be above 0"),
        (
            ("--rate-rps", "1e-300"),
            "must be at least 1e-05 requests/s (about one a day), got 1e-30",
        ),
        (("--rate-rps", "1e12"), "must be above 0 and at most 10000000 requests/s, got 1e+12"),
        (("--slo-ms", "-1"), "slo_ms"),
        (("--slo-ms", "0"), "--slo-ms: slo_ms must be above 0 and at most 86400000 (a day), got 0"),
        (("--slo-ms", "1e300"), "--slo-ms: slo_ms must be above 0 and at most 86400000 (a day)"),
        (("--limit", "t4=3"), "--limit: whole machines can be limited, parts of them not: add --"),
        (("--limit", "t4=1", "--limit", "t4=2"), "--limit: 't4' is given twice (1, 2); give one"),
        (("--plot", "cost.txt"), "--plot: 'cost.txt' must end in .png or .svg"),
        (("--plot", "no/such/cost.png"), "--plot: there is no folder 'no/such'; make it first"),
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
        ("t.yaml", "rate_rps: 200", "rate_rps: 1e-9", "t.yaml:7: rate_rps: must be at least 1e-05"),
        ("t.yaml", "slo_ms: 400", "slo_ms: 1e300", "t.yaml:5: slo_ms must be above 0 and at most"),
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


@pytest.mark.parametrize("policy", ["optimal", "clipper"])
def test_an_objective_that_is_too_short_is_told_with_its_place_and_what_to_do(
    policy: str, tmp_path: Path
) -> None:
    (tmp_path / "one.yaml").write_text(ONE.replace("400", "0.5"), encoding="utf-8")
    with pytest.raises(
        PlanError, match=r"^one\.yaml:2: chain 'one'.* more than.*; raise slo_ms, or "
    ):
        offline([tmp_path / "one.yaml"], Options(policy=policy))
    with pytest.raises(PlanError, match=r"^--slo-ms: chain 'one'.*; raise slo_ms, or "):
        offline([tmp_path / "one.yaml"], Options(policy=policy), slo_ms=0.25)


@pytest.mark.parametrize("billing", ["fractional", "machine"])
@pytest.mark.parametrize("policy", ["optimal", "nexus"])
def test_a_model_that_fits_into_no_machine_is_named_with_what_it_needs(
    policy: str, billing: Billing, tmp_path: Path
) -> None:
    (tmp_path / "one.yaml").write_text(ONE, encoding="utf-8")
    columns = "model,hardware,batch_size,duration_ms,memory_mib\n"
    model = "resnet50-v1-5-tensorflow-mixed-fp16"
    (tmp_path / "p.csv").write_text(f"{columns}{model},gpu,1,10,100.5\n", encoding="utf-8")
    (tmp_path / "h.csv").write_text(
        "hardware,price_per_hour,memory_mib\ngpu,1,50\n", encoding="utf-8"
    )
    files = (tmp_path / "p.csv", tmp_path / "h.csv")
    options = Options(policy=policy, billing=billing)
    with pytest.raises(PlanError) as raised:
        plan_offline(read_demand([tmp_path / "one.yaml"], *files, options))
    assert str(raised.value) == (
        "one.yaml:6: module a of chain 'one' needs 101 MiB on gpu, which has 50 MiB; give it "
        "hardware with more memory, or a smaller model"
    )


@pytest.mark.parametrize("billing", ["fractional", "machine"])
def test_no_policy_runs_a_model_where_it_does_not_fit_however_cheap_that_is(
    billing: Billing, tmp_path: Path
) -> None:
    (tmp_path / "one.yaml").write_text(ONE, encoding="utf-8")
    model = "resnet50-v1-5-tensorflow-mixed-fp16"
    rows = [f"{model},{name},{b},{10 * b},100.5" for name in ("gpu", "toy") for b in (1, 2)]
    columns = "model,hardware,batch_size,duration_ms,memory_mib\n"
    (tmp_path / "p.csv").write_text(columns + "\n".join(rows), encoding="utf-8")
    (tmp_path / "h.csv").write_text(
        "hardware,price_per_hour,memory_mib\ngpu,1,101\ntoy,0.1,100\n", encoding="utf-8"
    )
    files = (tmp_path / "p.csv", tmp_path / "h.csv")
    verified = Verification(Arrivals("poisson"), requests=600)
    for policy in POLICIES:
        options = Options(policy=policy, billing=billing)
        wanted = read_demand([tmp_path / "one.yaml"], *files, options)
        for how in (None, verified) if policy == "nexus" else (None,):
            plan = plan_offline(wanted, verification=how).plan
            used = {a.hardware for c in plan.chains for m in c.modules for a in m.allocations}
            assert used == {"gpu"}, (policy, how)


@pytest.mark.parametrize("billing", ["fractional", "machine"])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_objective_too_short_tells_of_faster_hardware_that_the_model_does_not_fit_into(
    policy: str, billing: Billing, tmp_path: Path
) -> None:
    (tmp_path / "one.yaml").write_text(ONE, encoding="utf-8")
    model = "resnet50-v1-5-tensorflow-mixed-fp16"
    rows = [f"{model},slow,1,500,100.5", f"{model},fast,1,10,100.5", f"{model},old,1,900,100.5"]
    columns = "model,hardware,batch_size,duration_ms,memory_mib\n"
    (tmp_path / "p.csv").write_text(columns + "\n".join(rows), encoding="utf-8")
    prices = "hardware,price_per_hour,memory_mib\nslow,1,200\nold,1,{0}\nfast,1,{0}\n"
    files = (tmp_path / "p.csv", tmp_path / "h.csv")
    options = Options(policy=policy, billing=billing)
    (tmp_path / "h.csv").write_text(prices.format(100), encoding="utf-8")
    with pytest.raises(PlanError, match="^one.yaml:2: chain 'one'.* 100 ms more ") as raised:
        plan_offline(read_demand([tmp_path / "one.yaml"], *files, options))
    assert str(raised.value).endswith(
        "; left out for their memory_mib: fast (a would take 10 ms, but needs 101 MiB of 100 MiB)"
    )
    (tmp_path / "h.csv").write_text(prices.format(101), encoding="utf-8")
    assert plan_offline(read_demand([tmp_path / "one.yaml"], *files, options)).plan.chains
    with pytest.raises(PlanError, match=r"1 ms") as raised:
        plan_offline(read_demand([tmp_path / "one.yaml"], *files, options, slo_ms=9))
    assert "memory_mib" not in str(raised.value), "nothing was left out"


def test_profiles_on_hardware_without_any_price_are_one_error_and_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = "model,hardware,batch_size,duration_ms,memory_mib\n"
    (tmp_path / "p.csv").write_text(f"{columns}m,abacus,1,10,\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"^p\.csv:2: hardware: no hardware of this file has a pri"
    ):
        read_demand([CHAIN], tmp_path / "p.csv", HARDWARE, Options())
    assert not caplog.records


def test_a_plan_tells_which_policy_made_it_and_no_gap_below_nothing() -> None:
    made = offline([CHAIN]).plan
    bound = made.cost_per_hour * (1 + 1e-12)
    attained = ChainAttainment("traffic", "poisson", 0.99, 0.995, 0.991, 10_000, policy="nexus")
    shown = replace(
        made,
        lower_bound_per_hour=bound,
        attainment=Attainment((attained,), 0.95, made.cost_per_hour),
    )
    out = StringIO()
    Console(file=out, width=200).print(plan_report(shown))
    text = out.getvalue()
    assert "gap 0.0%" in text
    assert "policy optimal (once verified the cheapest: nexus), fractional billing" in text


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


def test_what_a_library_prints_past_python_is_not_in_the_plan() -> None:
    """As HiGHS does where many machines are chosen at once."""
    code = (
        "import ctypes, sys\n"
        "import paceline.planning as planning\n"
        "from paceline.cli import main\n"
        "plan = planning.plan_offline\n"
        "def printing(*arguments, **named):\n"
        "    ctypes.CDLL(None).puts(b'past Python')\n"
        "    return plan(*arguments, **named)\n"
        "planning.plan_offline = printing\n"
        "main()\n"
    )
    told = subprocess.run(
        [
            *(sys.executable, "-c", code, "plan", str(CHAIN), "--profiles", str(PROFILES)),
            *("--hardware", str(HARDWARE), "--rate-rps", "40", "--no-verify", "--format", "json"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(told.stdout)["policy"] == "optimal"
