"""Tables, ratios and floors of benchmarks, on figures that were worked out by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from tests.bench.client import Measured
from tests.bench.gating import OURS, ROWS, Result, chosen_policies, merge, not_ahead, table
from tests.bench.machine import Floor, Machine, floor_of
from tests.bench.processes import MODEL, cpu_between, purpose, share_beside_model
from tests.bench.report import Run, at, better_peer, floor_table, load, report, save, serving_table
from tests.bench.servers import SLOTS, ours
from tests.model.families import tiny_checkpoint
from tests.model.random_checkpoint import make_random_checkpoint

MACHINE = Machine(read_gb_per_s=10.0, gemm_gflop_per_s=100.0)
FLOOR = Floor(
    layers=2, experts=4, top_k=2, expert_parameters=15_000, trunk_parameters=160_800, kv_numbers_per_token=200
)


def run(server: str, rate: float, *, peer: bool = False, cpu_s: dict[str, float] | None = None) -> Run:
    measured = Measured(concurrency=8, output_tokens_per_s=rate, ttft_ms=10.0, itl_ms=2.0, itl_p99_ms=5.0)
    return Run(
        server=server,
        peer=peer,
        started="now",
        machine=MACHINE,
        measured=[measured],
        prefill_tokens_per_s=rate * 10,
        lone_ttft_ms=20.0,
        engine_ttft_ms=None if peer else 16.0,
        memory_bytes=1_500_000_000,
        cpu_s=cpu_s or {},
    )


RUNS = [
    *(run("ours", 100.0, cpu_s={MODEL: 9.0, "API": 1.0}), run("ours", 140.0), run("ours", 130.0)),
    *(run("slow", 50.0, peer=True), run("fast", 90.0, peer=True), run("fast", 110.0, peer=True)),
]


def test_ratios_are_of_medians_over_the_better_peer() -> None:
    assert better_peer(RUNS, at(8, "output_tokens_per_s")) == 100.0
    assert "| ours | 8 | 130 (100-140) | 10 | 2.0 | 5 | 1.30 |" in serving_table(RUNS)
    assert "| slow | 8 | 50 | 10 | 2.0 | 5 |  |" in serving_table(RUNS)


def test_without_peers_there_are_no_ratios() -> None:
    assert "| ours | 8 | 100 | 10 | 2.0 | 5 |  |" in serving_table(RUNS[:1])


def test_floor_counts_each_weight_once_a_step() -> None:
    floor = FLOOR
    # one token chooses 2 of 4 experts in each layer
    assert floor.step_bytes(1, 10) == pytest.approx(2 * (160_800 + 2 * 2 * 15_000 + 10 * 200))
    assert floor.flop_per_token == 2 * (160_800 + 2 * 2 * 15_000)
    # many tokens hit all experts, and multiplying takes longer than reading
    assert floor.decode_step_ms(1000, 1, MACHINE) == pytest.approx(1000 * floor.flop_per_token / 100e9 * 1e3)


def test_shares_of_the_floor() -> None:
    floor = FLOOR
    share = 100 * floor.decode_step_ms(8, 160, MACHINE) / 2.0
    assert f"| slow | {share:.0f} |" in floor_table(RUNS, floor)


@pytest.mark.parametrize(
    ("family", "trunk", "expert", "kv"),
    [
        # q and o 64 x 64 each, k and v 64 x 32 each, the router 64 x 8, in each of 3 layers; the head 64 x 512
        ("qwen3_moe", 3 * (2 * 64 * 64 + 2 * 64 * 32 + 64 * 8) + 64 * 512, 3 * 64 * 32, 3 * 2 * 32),
        # its configuration has no head_dim, and other words for its experts
        ("mixtral", 3 * (2 * 64 * 64 + 2 * 64 * 32 + 64 * 8) + 64 * 512, 3 * 64 * 32, 3 * 2 * 32),
        # 4 layers, of which one is dense (three matrices of 64 x 128); the embedding is the head
        (
            "qwen3_moe-mixed",
            4 * (2 * 64 * 64 + 2 * 64 * 32) + 3 * 64 * 8 + 3 * 64 * 128 + 64 * 512,
            3 * 64 * 32,
            4 * 2 * 32,
        ),
    ],
)
def test_floor_of_a_model(
    family: str, trunk: int, expert: int, kv: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Counted in the model, not read from one spelling of its configuration."""
    assert floor_of(tiny_checkpoint(family, tmp_path_factory)) == Floor(
        layers=3, experts=8, top_k=2, expert_parameters=expert, trunk_parameters=trunk, kv_numbers_per_token=kv
    )


def test_a_floor_counts_packed_bytes(tmp_path: Path) -> None:
    path = make_random_checkpoint(tmp_path, "qwen3_moe", hidden=256, layers=2, experts=8, ff=64, top_k=2, vocab=512)
    plain, packed = floor_of(path), floor_of(path, "int4", "int8")
    # all but routers is rounded
    routers = 2 * 8 * 256
    rounded = plain.trunk_parameters - routers
    assert packed.step_bytes(1, 0) == pytest.approx(
        2 * routers + rounded * (1 + 4 / 128) + 2 * 2 * 3 * 64 * 256 * (0.5 + 2.5 / 32)
    )
    assert packed.flop_per_token == plain.flop_per_token


def test_a_report_is_saved_and_read_again(tmp_path: Path) -> None:
    assert load(tmp_path) == []
    save(RUNS, {"commit": "abc"}, FLOOR, tmp_path)
    assert load(tmp_path) == RUNS
    assert (tmp_path / "results.md").read_text() == report(RUNS, {"commit": "abc"}, FLOOR)
    assert (tmp_path / "results.csv").read_text().count("\n") == 1 + len(RUNS)
    assert (tmp_path / "results.png").stat().st_size > 0


def test_cpu_time_by_purpose() -> None:
    before = {(1, 0): ("API", 5.0), (2, 7): (MODEL, 1.0)}
    after = {(1, 0): ("API", 6.0), (2, 7): (MODEL, 9.0), (3, 0): ("Ray", 1.0)}
    spent = cpu_between(before, after)
    assert spent == {MODEL: 8.0, "API": 1.0, "Ray": 1.0}
    assert share_beside_model(spent) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "command", "expected"),
    [
        ("ray::Engine.poll", "ray::Engine.poll", "engine"),
        ("ray::ServeReplica:emoe:api", "ray::ServeReplica:emoe:api", "API"),
        ("haproxy", "/x/haproxy -f y", "HAProxy"),
        ("raylet", "/x/raylet --y", "Ray"),
        ("emoe", "/x/python /x/emoe serve", "control plane"),
        ("emoe-forkserver", "python -c from elastic_moe.actors.forkserver.server import main", "control plane"),
    ],
)
def test_purpose_of_processes(name: str, command: str, expected: str) -> None:
    assert purpose(name, command) == expected


def result(policy: str, tokens: int, call_ms: float, peak: int = 0) -> Result:
    return Result(policy=policy, workers=1, tokens=tokens, call_ms=call_ms, padding=0.5, dropped=0.25, peak_bytes=peak)


def test_cases_in_which_dynamic_gating_is_slower_are_reported() -> None:
    results = [result("rival", 8, 1.0), result("rival", 32, 3.0), result(OURS, 8, 2.0), result(OURS, 32, 2.0)]
    assert not_ahead(results) == ["rival at 8 tokens: 2.00 times ours"]
    assert "| rival | 8000 | 10667 | 0 | 50 | 25.0 |" in table(results)


def test_memory_of_all_workers_is_added_up() -> None:
    assert merge([result(OURS, 8, 1.0, 5), result(OURS, 8, 3.0, 6)]) == result(OURS, 8, 1.0, 11)


def test_policies_are_chosen_by_parts_of_their_names() -> None:
    assert chosen_policies("Adaptive,fastmoe") == ["Tutel, adaptive capacity", "FastMoE, exact rows", OURS]
    assert chosen_policies("") == list(ROWS)
    with pytest.raises(argparse.ArgumentTypeError, match="no policy's name holds 'tutle'; there are: GShard"):
        chosen_policies("tutle")


def test_equal_room_for_keys_and_values_is_shared_by_the_workers(tmp_path: Path) -> None:
    model = make_random_checkpoint(tmp_path, "qwen3_moe", hidden=64, layers=3, heads=4, dtype="bfloat16")
    text = json.loads((model / "config.json").read_text())
    numbers = text["num_hidden_layers"] * text["num_key_value_heads"] * 2 * (text["hidden_size"] // 4)
    command = ours(model, 2, ["--no-standby"], kv_tokens=SLOTS * 100).command
    # 2 bytes for a number, and half of them for each worker
    assert command[-3:] == ["--no-standby", "--kv-cache-memory-bytes", str(SLOTS * 100 * numbers)]
    assert "--kv-cache-memory-bytes" not in ours(model, 2).command
