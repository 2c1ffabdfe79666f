"""Log probabilities of prompts, through the production scheduler and workers, are transformers' own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest
from elastic_moe.cluster.messages.scores import PromptScores, joined
from elastic_moe.deploy.launch.builtin import MODEL_DIR
from elastic_moe.deploy.text.tokenizer import Tokenizer
from elastic_moe.model.checkpoints.quiet import quiet_transformers
from tests.model.families import tiny_checkpoint
from tests.model.lockstep import Lockstep, request

ALTERNATIVES = 3
TEXT = 'And it came to pass, that he went down.\n\ndef main(args):\n    print("hello", file=sys.stderr)\n'


def reference(path: Path, prompt: Sequence[int]) -> torch.Tensor:
    """[tokens - 1, vocabulary] log probabilities of what may follow each token but the last."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([list(prompt)])).logits[0, :-1].log_softmax(-1)
    return found


def scored(cluster: Lockstep, requests: Sequence[GenerateRequest]) -> dict[str, PromptScores]:
    pieces: dict[str, list[PromptScores]] = {one.request_id: [] for one in requests}
    for one in requests:
        assert cluster.scheduler.add(one) is None
    while cluster.scheduler.num_requests:
        for output in cluster.step():
            assert output.finish_reason is not FinishReason.ERROR
            if output.scores is not None:
                pieces[output.request_id].append(output.scores)
    return {name: whole for name, parts in pieces.items() if (whole := joined(parts)) is not None}


def assert_scores(found: PromptScores, prompt: Sequence[int], expected: torch.Tensor) -> None:
    assert (found.start, len(found)) == (1, len(prompt) - 1)
    for token, token_id, row in zip(found.tokens(), prompt[1:], expected, strict=True):
        assert token.token_id == token_id
        assert token.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        assert [v for _, v in token.top] == pytest.approx(row.topk(ALTERNATIVES).values.tolist(), abs=1e-4)
        # tokens that are as likely as this one may come in either order
        assert abs(token.rank - int((row >= row[token_id]).sum())) <= int((row - row[token_id]).abs().lt(1e-5).sum())


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "gemma4_text", "deepseek_v3"])
def test_families_that_scale_or_cap_logits(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In chunks of a batch, next to requests that want other things, and twice: the cache must not swallow any."""
    path = tiny_checkpoint(family, tmp_path_factory)
    prompt = torch.randint(3, 60, (37,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = reference(path, prompt)
    cluster = Lockstep(path, (3, 3, 2))
    for again in range(2):
        found = scored(
            cluster,
            [
                request(f"score{again}", prompt, max_tokens=0, prompt_logprobs=ALTERNATIVES),
                request(f"plain{again}", prompt, max_tokens=3),
                request(f"both{again}", prompt[:20], max_tokens=2, prompt_logprobs=ALTERNATIVES, logprobs=1),
                request(f"one{again}", prompt[:1], max_tokens=0, prompt_logprobs=0),
            ],
        )
        assert set(found) == {f"score{again}", f"both{again}"}
        assert_scores(found[f"score{again}"], prompt, expected)
        assert_scores(found[f"both{again}"], prompt[:20], expected[:19])


def test_the_builtin_model_on_text() -> None:
    prompt = Tokenizer.load(str(MODEL_DIR)).encode(TEXT)
    cluster = Lockstep(MODEL_DIR, (8, 8))
    found = scored(cluster, [request("text", prompt, max_tokens=0, prompt_logprobs=ALTERNATIVES)])
    assert_scores(found["text"], prompt, reference(MODEL_DIR, prompt))
