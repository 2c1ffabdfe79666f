"""A model whose logits are NaN after one token: requests with that token end, and other requests are not affected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest
from tests.model.lockstep import Lockstep, request
from tests.model.random_checkpoint import make_random_checkpoint

TOKEN = 7
"""The token after which the model's logits are NaN."""
TEXTS = [[5, 6, 8, 9, 10], list(range(20, 45)), [11]]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_random_checkpoint(
        tmp_path_factory.mktemp("damaged"), "qwen3_moe", hidden=64, layers=2, experts=4, ff=32, vocab=300
    )
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][TOKEN] = torch.nan
    # no answer has the token
    tensors["lm_head.weight"][TOKEN] = 0.0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def run(cluster: Lockstep, requests: Sequence[GenerateRequest]) -> tuple[dict[str, list[int]], set[str]]:
    """Tokens, and who ended with an error."""
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    failed: set[str] = set()
    for r in requests:
        cluster.scheduler.add(r)
    while cluster.scheduler.num_requests:
        for output in cluster.step():
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is FinishReason.ERROR:
                failed.add(output.request_id)
    return tokens, failed


@pytest.mark.parametrize("slots", [(4,), (2, 2)], ids=str)
@pytest.mark.parametrize(("dtype", "block_size"), [("float32", 4), ("bfloat16", 16)])
def test_the_others_of_the_step_go_on(damaged: Path, dtype: str, block_size: int, slots: tuple[int, ...]) -> None:
    good = [request(f"good{n}", text, max_tokens=20, logprobs=2) for n, text in enumerate(TEXTS)]
    bad = [
        request("bad0", [5, 6, TOKEN], max_tokens=20),
        request("bad1", [*range(20, 40), TOKEN, *range(50, 90)], max_tokens=20, logprobs=3),
        request("bad2", [TOKEN] * 9, temperature=0.9, top_p=0.9, top_k=5),
    ]
    alone = {
        r.request_id: run(Lockstep(damaged, slots, dtype=dtype, block_size=block_size), [r])[0][r.request_id]
        for r in good
    }
    cluster = Lockstep(damaged, slots, dtype=dtype, block_size=block_size, kv_blocks=160 // block_size)
    for _ in range(3):
        # the later ones get blocks in which no numbers have been left
        tokens, failed = run(cluster, [bad[0], good[0], good[1], bad[1], bad[2], good[2]])
        assert failed == {"bad0", "bad1", "bad2"}
        assert not any(tokens[name] for name in failed)
        assert {name: tokens[name] for name in alone} == alone
    assert cluster.scheduler.status().corrupted_requests == 9
