"""What the coordinator tells planners of a window."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from elastic_moe.actors.coordinator.planning import (
    build_problem,
    constants_for,
    deals,
    judge,
    links_of,
    memory_of_members,
    preview,
    share_disk,
)
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.facts.tiering import assign_tiers
from elastic_moe.cluster.placement import Worker, WorkerId, contiguous
from elastic_moe.optimizer.constants import Constants, calibration_file, save_constants
from elastic_moe.optimizer.core.cost import expected_fetches
from elastic_moe.optimizer.core.estimate import estimate_coactivation
from elastic_moe.optimizer.core.problem import Links
from elastic_moe.optimizer.planner import plan
from elastic_moe.optimizer.subjects.likeness import mixes
from elastic_moe.optimizer.subjects.memory import PRESENT_SHARE, Remembered
from tests.actors.fakes import MODEL
from tests.cluster.stories import facts_of, member, team

LAYERS, EXPERTS = 2, 6
TOLD = dataclasses.replace(MODEL, num_layers=LAYERS, num_logical_experts=EXPERTS, top_k=2)
PLACEMENT = contiguous(LAYERS, EXPERTS, tuple(Worker(id=WorkerId(f"w{i}"), node="n", slots=3) for i in range(2)))


def test_problems_carry_how_loads_vary_and_the_transitions() -> None:
    rng = np.random.default_rng(0)
    parts = rng.integers(1, 50, size=(5, LAYERS, EXPERTS))
    parts[:, :, 1] = parts[:, :, 0]
    transitions = rng.integers(1, 9, size=(LAYERS - 1, EXPERTS, EXPERTS))
    problem = build_problem(TOLD, PLACEMENT, parts.sum(axis=0) * 1.0, transitions, dtype="bfloat16", parts=parts)
    assert problem.load_covariance is not None
    assert problem.load_covariance[0, 0, 1] > 0
    assert problem.transitions is not None
    # workers count no co-activation: what shares successors counts as chosen together
    assert np.array_equal(problem.pairs, estimate_coactivation(problem))


def test_problems_reckon_with_a_change_of_subject() -> None:
    """Two experts rise together in short runs: they may do so between subjects, the more the fewer requests there
    were."""
    rng = np.random.default_rng(0)
    runs = rng.integers(1, 9, size=(40, LAYERS, EXPERTS)).astype(float)
    runs[:, :, 1] = runs[:, :, 0]
    nothing = np.zeros((LAYERS - 1, EXPERTS, EXPERTS))
    few, many = (
        build_problem(TOLD, PLACEMENT, runs.sum(axis=0), nothing, dtype="bfloat16", runs=runs, requests=requests)
        for requests in (1, 100)
    )
    assert few.load_covariance is not None
    assert many.load_covariance is not None
    assert 0 < many.load_covariance[0, 0, 1] < few.load_covariance[0, 0, 1]
    assert abs(many.load_covariance[0, 0, 2]) < many.load_covariance[0, 0, 1]


@pytest.mark.parametrize("parts", [None, np.ones((2, LAYERS, EXPERTS), dtype=np.int64)])
def test_too_few_parts_give_no_variation(parts: np.ndarray | None) -> None:
    nothing = np.zeros((LAYERS - 1, EXPERTS, EXPERTS), dtype=np.int64)
    problem = build_problem(TOLD, PLACEMENT, np.zeros((LAYERS, EXPERTS)), nothing, dtype="bfloat16", parts=parts)
    assert problem.load_covariance is None
    assert problem.transitions is None
    assert (problem.loads == 1).all()


def test_planners_know_the_tiers_of_workers_and_misses_are_predicted() -> None:
    """Two of each worker's three experts of a layer lie on disk; a token chooses two of a layer's six."""
    members = [member(w.id, capacity=LAYERS * 2, disk=1e6) for w in PLACEMENT.workers]
    ranks = [worker.id for worker in PLACEMENT.workers]
    facts = facts_of(members, ranks, model=TOLD, load=np.zeros((LAYERS, EXPERTS), dtype=np.int64))
    memory = memory_of_members(facts)
    assert [(m.device_experts, m.cache_slots) for m in memory] == [(4, 1), (4, 1)]
    assert memory[0].disk_fetch_s == 2 * TOLD.expert_bytes / 1e6, "both read from their node's disk"
    assert share_disk(facts)
    rooms = facts.rooms(members)
    has = {worker: np.zeros((LAYERS, EXPERTS), dtype=bool) for worker in ranks}
    tiered = assign_tiers(PLACEMENT, rooms, has, facts.load)
    nothing = np.zeros((LAYERS - 1, EXPERTS, EXPERTS), dtype=np.int64)
    even = np.ones((LAYERS, EXPERTS))
    problem = build_problem(TOLD, tiered, even, nothing, dtype="bfloat16", memory=memory, tokens_per_step=1)
    assert problem.tiering is not None
    assert 0 < expected_fetches(problem, tiered).experts <= LAYERS * 4 * 2 / EXPERTS
    fits = build_problem(TOLD, PLACEMENT, even, nothing, dtype="bfloat16")
    assert expected_fetches(fits, PLACEMENT).experts == 0.0
    without = facts_of([member(w) for w in ranks], ranks, model=TOLD)
    assert memory_of_members(without) == ()


@pytest.mark.parametrize(
    ("transport", "device", "dealt"), [("tcp", "cpu", True), ("shm", "cpu", False), ("tcp", "A10", False)]
)
def test_planners_know_whether_misses_are_dealt(transport: str, device: str, dealt: bool) -> None:
    """Workers of several nodes do so on CPUs, whose groups exchange by TCP; so may groups that share a GPU."""
    facts = team(WorkerId("w0"), WorkerId("w1"))
    assert facts.spec is not None
    records = {
        worker: dataclasses.replace(record, info=dataclasses.replace(record.info, device=device))  # type: ignore[type-var]
        for worker, record in facts.records.items()
    }
    spec = dataclasses.replace(facts.spec, transport=transport)  # type: ignore[arg-type]
    assert deals(dataclasses.replace(facts, records=records, spec=spec)) == dealt


def test_planners_reckon_with_what_was_measured_or_set() -> None:
    workers = [Worker(id=WorkerId(f"w{n}"), node=f"n{n}", slots=4) for n in range(2)]
    measured = {WorkerId("w0"): {WorkerId("w1"): 0.1}}
    usual = Links()
    assert links_of(ServeConfig(), workers, {}) == usual
    assert links_of(ServeConfig(), workers, measured) == Links(ports_gbps=(0.1, 0.1), uplinks_gbps=(0.1, 0.1))
    one = links_of(ServeConfig(worker_gbps=10), workers, measured)
    assert one == Links(worker_gbps=10.0, uplinks_gbps=(0.1, 0.1))
    both = links_of(ServeConfig(worker_gbps=10, node_gbps=25), workers, measured)
    assert both == Links(worker_gbps=10.0, node_gbps=25.0)


def test_planners_reckon_with_what_was_calibrated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    measured = Constants(workers=2, step_tokens=64, base_s=1e-3, token_expert_s=5e-6, node_cores=1.5, worker_gbps=2.0)
    path = tmp_path / "constants.json"
    save_constants(path, [measured])
    config = ServeConfig(calibration=str(path))
    assert constants_for(config, TOLD, "bfloat16", "cpu") == (measured,)
    workers = PLACEMENT.workers
    assert links_of(ServeConfig(), workers, {}, measured) == Links(worker_gbps=2.0)
    assert links_of(ServeConfig(worker_gbps=10), workers, {}, measured).worker_gbps == 10.0
    spread = dataclasses.replace(measured, nodes=2, worker_gbps=None, node_gbps=0.5)
    assert links_of(ServeConfig(), workers, {}, spread) == Links(node_gbps=0.5)
    nothing = np.zeros((LAYERS - 1, EXPERTS, EXPERTS))
    load = np.ones((LAYERS, EXPERTS))
    problem = build_problem(TOLD, PLACEMENT, load, nothing, dtype="bfloat16", constants=measured)
    assert (problem.token_expert_s, problem.node_cores) == (5e-6, 1.5)
    path.write_text("{")
    assert constants_for(config, TOLD, "bfloat16", "cpu") == ()
    assert "planners reckon with the usual constants" in caplog.text


def test_constants_of_a_model_are_found_where_they_were_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert constants_for(ServeConfig(), TOLD, "bfloat16", "cpu") == ()
    measured = Constants(workers=2, step_tokens=64, base_s=0.0, token_expert_s=5e-6, node_cores=2)
    save_constants(calibration_file(TOLD, "bfloat16", "cpu"), [measured])
    assert constants_for(ServeConfig(), TOLD, "bfloat16", "cpu") == (measured,)
    assert constants_for(ServeConfig(), TOLD, "bfloat16", "cuda") == ()


def test_placements_are_planned_for_remembered_subjects_and_the_preview_tells_each() -> None:
    """The present loads two experts of one worker; what is remembered loads two others of one worker."""
    load, before = np.ones((LAYERS, EXPERTS)), np.ones((LAYERS, EXPERTS))
    load[:, [0, 1]] = 50.0
    before[:, [3, 4]] = 50.0
    nothing = np.zeros((LAYERS - 1, EXPERTS, EXPERTS), dtype=np.int64)
    remembered = [Remembered(mix=mixes(before), weight=2.0, age_s=60.0)]
    problem = build_problem(TOLD, PLACEMENT, load, nothing, dtype="bfloat16", remembered=remembered)
    problem = dataclasses.replace(problem, expert_bytes=0)
    result = plan(problem, planner="local_search", deadline_s=1)
    decision = judge(result, load=load.astype(np.int64) * 10**6, since_change_s=None)
    assert decision.worthwhile
    assert decision.seen_gain > 0.03
    assert "with 1 remembered subject (" in decision.reason
    assert f"{decision.seen_gain:.1%} on what was seen" in decision.reason
    (subject,) = preview(problem, result, decision, remembered).subjects
    assert (subject.age_s, subject.weight) == (60.0, pytest.approx(1 - PRESENT_SHARE))
    assert subject.cost_after < subject.cost_before
    alone = plan(build_problem(TOLD, PLACEMENT, load, nothing, dtype="bfloat16"), planner="local_search", deadline_s=1)
    assert preview(problem, alone, decision).subjects == ()
