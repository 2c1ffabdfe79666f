"""The verbs: files in and out, one JSON object, tables and figures, and one line for every mistake."""

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from elastic_moe.cluster.errors import UserError
from elastic_moe.cluster.placement import Placement
from elastic_moe.deploy.cli.plan import add_parsers
from elastic_moe.deploy.launch.builtin import trace_path
from elastic_moe.optimizer.study.generate import generate_trace
from elastic_moe.optimizer.study.traces import save_trace


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def emoe(*words: object) -> int:
    parser = Parser()
    add_parsers(parser.add_subparsers(required=True))
    args = parser.parse_args([str(word) for word in words])
    return int(args.run(args))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.npz"
    save_trace(path, generate_trace(num_layers=3, num_experts=8, top_k=2, num_tokens=800, num_themes=6))
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other.npz"
    made = generate_trace(num_layers=3, num_experts=8, top_k=2, num_tokens=800, num_themes=6, task_seed=3)
    save_trace(path, made)
    return path


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out))


KEYS = ("load_imbalance", "fan_out", "same_worker_transitions", "cross_node_fraction", "step_cost", "moves", "bytes")


def test_plan_then_evaluate_then_plan_from_it(
    trace: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made.json"
    words = ("--workers", 4, "--nodes", 2, "--redundant", 4, "--deadline", 0.4, "--json")
    assert emoe("plan", trace, *words, "--out", made) == 0
    report = printed(capsys)
    assert all(key in report for key in KEYS)
    placement = Placement.load(made)
    assert placement.num_slots == 12
    assert len({worker.node for worker in placement.workers}) == 2

    assert emoe("evaluate", trace, made, "--json") == 0
    again = printed(capsys)
    assert all(again[key] == pytest.approx(report[key]) for key in KEYS)

    new = tmp_path / "new.json"
    assert emoe("plan", other, "--from", made, "--out", new, "--deadline", 0.4, "--json", "--expert-bytes", 100) == 0
    report = printed(capsys)
    assert report["bytes"] == 100 * report["moves"]
    assert report["moves"] <= 0.18 * 24
    assert Placement.load(new).workers == placement.workers
    assert emoe("evaluate", other, new, "--from", made) == 0
    assert "same_worker_transitions" in capsys.readouterr().out


def test_a_plan_for_two_subjects_serves_both(
    trace: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The subject that weighs more has the cheaper steps, and the report tells the cost on each."""
    costs = {}
    for weights in ("50,1", "1,1", "1,50"):
        words = ("--workers", 4, "--deadline", 0.3, "--planner", "local_search", "--json", "--weights", weights)
        assert emoe("plan", trace, other, *words, "--out", tmp_path / "made.json") == 0
        costs[weights] = {each["trace"]: each["step_cost"] for each in printed(capsys)["scenarios"]}
    assert costs["50,1"]["trace"] < costs["1,50"]["trace"]
    assert costs["1,50"]["other"] < costs["50,1"]["other"]
    assert emoe("evaluate", other, tmp_path / "made.json", "--json") == 0
    assert printed(capsys)["step_cost"] == pytest.approx(costs["1,50"]["other"])
    assert emoe("plan", trace, other, "--planner", "greedy", "--workers", 2) == 0
    assert "on other" in capsys.readouterr().out


def test_compare_shows_the_cost_on_each_trace(
    trace: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # figures take longer than all the rest
    third = tmp_path / "third.npz"
    save_trace(third, generate_trace(num_layers=3, num_experts=8, top_k=2, num_tokens=300, num_themes=6, task_seed=5))
    words = ("--workers", 2, "--planners", "greedy", "--out", tmp_path)
    assert emoe("compare", trace, other, third, *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)["subject_costs"]
    assert list(found) == ["trace", "other", "third"]
    assert emoe("compare", trace, third, "--scenarios", other, "--weights", "1,3", *words) == 0
    assert "| step, other (us) |" in capsys.readouterr().out
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert float(row["step_cost on other"]) < found["other"], "this time the planner has seen it"


def test_plan_prints_what_it_did(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emoe("plan", trace, "--workers", 2, "--planner", "greedy", "--semantics", "follow") == 0
    said = capsys.readouterr()
    assert "greedy" in said.out
    assert "lower bound" in said.out
    assert "--out" in said.err


@pytest.mark.slow
def test_compare_writes_a_table_and_figures(trace: Path, other: Path, tmp_path: Path, capsys: Any) -> None:
    old, out = tmp_path / "old.json", tmp_path / "out"
    assert emoe("plan", trace, "--workers", 4, "--planner", "greedy", "--out", old) == 0
    capsys.readouterr()
    words = ("--deadline", 0.2, "--planners", "contiguous,greedy,auto", "--from", old, "--out", out)
    assert emoe("compare", other, *words) == 0
    assert "| auto |" in capsys.readouterr().out
    with (out / "table.csv").open(encoding="utf-8") as file:
        assert [row["planner"] for row in csv.DictReader(file)] == ["contiguous", "greedy", "auto"]
    table = (out / "table.md").read_text(encoding="utf-8")
    explained = [
        line for line in table.splitlines() if "what a step costs by the cost model, in us (microseconds)" in line
    ]
    assert len(explained) == 1
    assert table.count("\n|") == 4
    assert "`auto` moves at most 4 experts" in table
    for name in ("load.png", "pareto.png", "seconds.png", "gain.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_compare_goes_without_figures_where_matplotlib_is_missing(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    assert emoe("compare", trace, trace, "--workers", 2, "--planners", "greedy", "--out", out, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["planner"] == "greedy"
    assert "elastic-moe[plots]" in said.err
    assert (out / "table.md").exists()


@pytest.mark.slow
def test_simulate_prints_and_draws(
    trace: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--workers", 4, "--deadline", 0.1, "--interval", 10, "--rate", 40, "--out", tmp_path / "sim")
    assert emoe("simulate", trace, other, *words, "--json") == 0
    summary = printed(capsys)
    assert summary["intervals"] == 4
    assert [each["trace"] for each in summary["traces"]] == ["trace", "other"]
    assert all(each["step_cost"] > 0 for each in summary["traces"])
    assert len(json.loads((tmp_path / "sim" / "looks.json").read_text())) == 4
    assert (tmp_path / "sim" / "imbalance.png").read_bytes().startswith(b"\x89PNG")
    assert emoe("simulate", trace, "--workers", 4, "--deadline", 0.1, "--interval", 20, "--rate", 40) == 0
    assert "on trace: a step costs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("plan", "absent.npz"), "absent.npz"),
        (("plan", "TRACE", "--workers", 0), "workers"),
        (("plan", "TRACE", "--nodes", 9), "nodes"),
        # a worker without an expert was planned for, and the planner took minutes
        (
            ("plan", "TRACE", "--workers", 9),
            "--workers: expected at most 8, the experts of a layer, since every worker",
        ),
        (("plan", "TRACE", "--workers", 11, "--redundant", 2), "--workers: expected at most 8, .* and --redundant"),
        (("plan", "TRACE", "--deadline", 1e30), "--deadline: expected 0.001 to 86400, got '1e[+]30'"),
        (("plan", "TRACE", "--horizon", "inf"), "--horizon: expected 0.001 to"),
        # Path takes it for the working directory
        (("plan", "TRACE", "--out", ""), "--out: expected a path, got an empty text"),
        (("plan", ""), "TRACE.npz: expected a path, got an empty text"),
        (("plan", "TRACE", "--redundant", -1), "redundant"),
        (("plan", "TRACE", "--redundant", 100_000), "redundant: expected 0 to"),
        (("plan", "TRACE", "--experts", 3), "the model has 3"),
        (("plan", "TRACE", "--deadline", 0), "deadline"),
        (("plan", "TRACE", "--seed", -1), "seed"),
        (("plan", "TRACE", "--move-share", 0.1), "--from"),
        (("simulate", "TRACE", "--move-share", 7), "move-share"),
        (("plan", "TRACE", "--speeds", "1,x"), "speeds"),
        (("plan", "TRACE", "TRACE", "--weights", "1,x"), "--weights: expected numbers"),
        (("plan", "TRACE", "TRACE", "--weights", "1,2,3"), "weights: expected 2, one for each subject, got 3"),
        (("plan", "TRACE", "TRACE", "--weights", "1,0"), "weights: expected positive"),
        (("plan", "TRACE", "--weights", "1,2"), "weights: expected 1"),
        (("plan", "TRACE", "--speeds", "1,2"), "speeds"),
        (("plan", "TRACE", "--from", "absent.json"), "^absent.json: No such file or directory$"),
        (("plan", "TRACE", "--from", "TRACE"), "trace.npz: not JSON"),
        (("plan", "TRACE", "--out", "absent/x.json"), "^--out: there is no directory absent$"),
        (("plan", "TRACE", "--worker-gbps", "nan"), "worker-gbps"),
        (("evaluate", "TRACE", "TRACE"), "trace.npz"),
        (("compare", "TRACE", "--planners", "best", "--out", "x"), "planners"),
        (("simulate", "TRACE", "--rate", "-1"), "rate: expected 0.001 to"),
        (
            ("simulate", "TRACE", "--interval", "1e9"),
            r"interval: an interval of 1e\+09 s takes 20000000000 tokens at 20 tokens/s, and",
        ),
    ],
)
def test_mistakes_are_one_line(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        emoe(*(trace if word == "TRACE" else word for word in words))
    assert "\n" not in str(caught.value)


def test_a_simulation_says_what_it_wrote_and_in_which_units(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("simulate", trace, "--workers", 2, "--interval", 1, "--rate", 20, "--planner", "greedy")
    assert emoe(*words, "--out", tmp_path / "sim") == 0
    told = capsys.readouterr()
    assert re.search(r"looks\.json (and imbalance\.png are|is) in .*sim\n$", told.err)
    assert " max/mean (" in told.out
    assert re.search(r"intervals? of 1 s, \d+ changes?, \d+ moves? \(\d+(\.\d)? (B|kB|MB|GB)\); load", told.out)
    assert emoe(*words) == 0
    assert "nothing is written to a file; --out DIR keeps" in capsys.readouterr().err


def test_a_placement_of_another_model_is_refused(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "wide.npz"
    save_trace(path, generate_trace(num_layers=2, num_experts=8, top_k=2, num_tokens=50))
    made = tmp_path / "made.json"
    assert emoe("plan", path, "--workers", 2, "--planner", "greedy", "--out", made) == 0
    for words in (("evaluate", trace, made), ("plan", trace, "--from", made, "--planner", "greedy")):
        with pytest.raises(UserError, match="2 layers"):
            emoe(*words)


def test_help_does_not_wait_for_solvers() -> None:
    code = "import sys, elastic_moe.deploy.cli.main; assert not {'pyomo', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_tiers_of_a_plan(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "tiers.json"
    words = ("--workers", 2, "--device-experts", 2, "--step-tokens", 2, "--expert-bytes", 10**6, "--json")
    assert emoe("plan", trace, *words, "--planner", "pinning", "--out", made) == 0
    report = printed(capsys)
    placement = Placement.load(made)
    assert [len(placement.resident(w.id, layer)) for w in placement.workers for layer in range(3)] == [1] * 6
    assert report["resident_share"] == 0.25
    assert report["cost"]["stall_s"] > 0
    assert report["fetch_bytes"] == pytest.approx(report["fetches"] * 10**6)
    assert 0 < report["replayed_miss_rate"] < 1

    with pytest.raises(UserError, match=f"--workers: {made} is a placement on 2, got 5"):
        emoe("evaluate", trace, made, "--workers", 5)
    assert emoe("evaluate", trace, made, *words[2:]) == 0
    again = printed(capsys)
    assert all(again[key] == pytest.approx(report[key]) for key in (*KEYS, "fetches", "replayed_waits"))
    assert emoe("evaluate", trace, made, "--device-experts", "12MB", "--expert-bytes", 10**6, "--json") == 0
    assert "resident_share" not in printed(capsys), "everything fits, so there is nothing to say"

    # one expert more in fast memory would cost more sequences than waiting for it does
    shared = ("--device-experts", "12MB", "--expert-bytes", 10**6, "--step-tokens", 2, "--kv-sequence-bytes", 1000)
    assert emoe("plan", trace, "--workers", 2, *shared, "--planner", "greedy", "--json") == 0
    report = printed(capsys)
    assert report["resident_share"] == 0.0
    assert report["cost"]["kv_s"] > 0

    monkeypatch.setitem(sys.modules, "matplotlib", None)  # figures take longer than all the rest
    assert emoe("compare", trace, *words[:-1], "--planners", "pinning,greedy", "--out", tmp_path) == 0
    assert "fetches waited for" in capsys.readouterr().out


def test_traces_through_caches(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emoe("simulate", trace, "--cache", "--workers", 1, "--step-tokens", 3, "--out", tmp_path) == 0
    assert "miss rate" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"caches.csv", "miss_rates.png", "latency.png"}
    with (tmp_path / "caches.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["policy"] for row in rows} == {"lfru", "lfu", "lru", "lifo", "static", "min"}
    for share in {row["share"] for row in rows}:
        rates = {row["policy"]: float(row["miss_rate"]) for row in rows if row["share"] == share}
        assert min(rates, key=rates.__getitem__) == "min"
    for policy in ("lfu", "min"):
        by_size = [float(row["miss_rate"]) for row in rows if row["policy"] == policy]
        assert by_size == sorted(by_size, reverse=True)
    assert all(float(row["worst_miss_rate"]) >= float(row["miss_rate"]) for row in rows)


def test_caches_of_a_few_experts_are_measured_once_and_named_by_their_true_share(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker serves two experts of a layer, so that its cache has one or both."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert emoe("simulate", trace, "--cache", "--workers", 4, "--step-tokens", 3, "--out", tmp_path) == 0
    with (tmp_path / "caches.csv").open() as file:
        rows = [(row["placement"], row["policy"], float(row["share"])) for row in csv.DictReader(file)]
    assert len(set(rows)) == len(rows)
    assert {share for *_, share in rows} == {0.5, 1.0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device-experts", "many"), "--device-experts: expected a number of experts, or bytes with a unit such as"),
        (("--device-experts", "1KB"), "--device-experts: expected room for at least one expert in each of 3 layers"),
        (("--host-experts", 2), "--host-experts: it adds to --device-experts, which is not given"),
        (("--device-experts", 2, "--disk-gbps", 0), "--disk-gbps: expected 0.001 to 1000000, got '0'"),
        (
            ("--kv-sequence-bytes", 9),
            "--kv-sequence-bytes: it shares the memory of --device-experts, which is not given",
        ),
        (
            ("--device-experts", 2, "--kv-sequence-bytes", 0),
            "--kv-sequence-bytes: expected 1 to 1125899906842624, got '0'",
        ),
        (("--step-tokens", 0), "--step-tokens: expected 1 to 1000000, got '0'"),
    ],
)
def test_wrong_tiers_are_refused(trace: Path, words: tuple[object, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        emoe("plan", trace, "--workers", 2, *words)


def test_builtin_traces_are_priced_with_their_models_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ("--workers", 2, "--deadline", 0.2, "--planner", "greedy", "--device-experts", 2, "--json")
    sizes = []
    for trace in ("builtin:bible", trace_path("builtin:bible"), shutil.copy(trace_path("builtin:bible"), tmp_path)):
        assert emoe("plan", trace, *shared) == 0
        sizes.append(json.loads(capsys.readouterr().out)["fetch_bytes"])
    assert sizes[0] == sizes[1]
    assert sizes[2] == pytest.approx(sizes[0] * 17_301_504 / 73_728)
