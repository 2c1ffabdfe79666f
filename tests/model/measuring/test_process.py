"""Members of a measured group, as threads: they take on placements and run steps of the same prompts."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from elastic_moe.cluster.facts.membership import needs
from elastic_moe.cluster.placement import Placement, contiguous
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.measuring.process import Job, Member
from elastic_moe.model.measuring.prompts import PROMPT, Prompts
from elastic_moe.optimizer.study.scenario import make_workers
from tests.model.families import tiny_checkpoint


@pytest.mark.parametrize("nodes", [1, 2])
def test_members_take_on_placements_and_choose_the_same_experts_under_each(nodes: int, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("qwen3_moe", tmp_path)
    info = open_checkpoint(checkpoint).info
    workers = make_workers(2, nodes=nodes, num_experts=info.num_logical_experts)
    first = contiguous(info.num_layers, info.num_logical_experts, workers)
    turned = Placement(
        num_logical_experts=info.num_logical_experts,
        workers=workers,
        physical_to_logical_map=first.physical_to_logical_map[:, ::-1],
    )
    job = Job(
        path=str(checkpoint),
        dtype="float32",
        expert_dtype="auto",
        trunk_dtype="auto",
        first=first,
        group=f"emoe-test-{uuid.uuid4().hex[:8]}",
        tokens=41,
    )
    with ThreadPoolExecutor(2) as pool:
        members = list(pool.map(lambda rank: Member(job, rank), range(2)))
        loads = []
        # two nodes here are two names: their workers meet at doors
        doors = tuple(member.open_door("127.0.0.1") for member in members) if nodes > 1 else ()
        for number, placement in enumerate((first, turned, first)):
            met = doors if number == 0 else ()
            list(pool.map(lambda member, placement=placement, met=met: member.place(placement, met), members))
            seen = list(pool.map(lambda member: member.run(2), members))
            assert all(len(one.step_s) == 2 and min(one.step_s) > 0 for one in seen)
            loads.append(sum(one.load for one in seen))
            for member, worker in zip(members, workers, strict=True):
                held = np.zeros((info.num_layers, info.num_logical_experts), dtype=bool)
                for layer, experts in enumerate(member._plane.held()):
                    held[layer, list(experts)] = True
                assert np.array_equal(held, needs(placement, worker.id)), "it holds what the placement says"
    assert loads[0].sum() == 2 * 41 * info.num_layers * info.top_k
    assert np.array_equal(loads[0], loads[1])
    assert np.array_equal(loads[0], loads[2])


@pytest.mark.parametrize("tokens", [3, PROMPT * 2, PROMPT * 2 + 5])
def test_prompts_share_a_steps_tokens_among_the_workers(tokens: int) -> None:
    plans = [Prompts(tokens, rank, 2, 50).next(1) for rank in range(2)]  # type: ignore[arg-type]
    assert sum(plans[0].tokens_per_rank) == tokens
    for rank, plan in enumerate(plans):
        assert (
            sum(chunk.length for chunk in plan.chunks) == plan.tokens_per_rank[rank] == plans[0].tokens_per_rank[rank]
        )
        blocks = [block for chunk in plan.chunks for block in chunk.block_ids]
        assert len(blocks) == len(set(blocks))
