"""A recorded trace is what transformers' own routers choose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic_moe.cluster.errors import CheckpointError, RequestError
from elastic_moe.model.checkpoints.quiet import quiet_transformers
from elastic_moe.model.worker.tracing import record_trace
from tests.model.families import tiny_checkpoint

REQUESTS = [[5, 6, 7, 8, 9], [300], list(range(10, 31))]


def test_the_experts_that_the_routers_choose(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path_factory)
    told: list[int] = []
    trace = record_trace(path, REQUESTS, progress=told.append)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(path).eval()
    at = 0
    for request in REQUESTS:
        with torch.no_grad():
            logits = model(torch.tensor([request]), output_router_logits=True).router_logits
        chosen = torch.stack([layer.topk(trace.top_k, dim=-1).indices for layer in logits], dim=1).numpy()
        recorded = trace.topk_ids[at : at + len(request)]
        assert (np.sort(recorded, axis=2) == np.sort(chosen, axis=2)).all()
        at += len(request)
    assert at == trace.num_tokens
    assert trace.request_lengths.tolist() == told == [len(request) for request in REQUESTS]
    assert trace.num_experts == model.config.num_experts


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen3_moe-mixed"])
def test_families_that_route_otherwise(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    trace = record_trace(tiny_checkpoint(family, tmp_path_factory), REQUESTS)
    assert trace.num_tokens == sum(map(len, REQUESTS))
    assert trace.topk_ids.min() >= 0
    assert trace.topk_ids.max() < trace.num_experts
    assert (np.diff(np.sort(trace.topk_ids, axis=2), axis=2) > 0).all()


def test_what_cannot_be_recorded(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path_factory)
    with pytest.raises(RequestError, match="request 2: 0 tokens"):
        record_trace(path, [[1], []])
    with pytest.raises(RequestError, match="no request"):
        record_trace(path, [])
    with pytest.raises(CheckpointError):
        record_trace(tmp_path, [[1]])
