"""The data plane computes what transformers' own implementation computes, on the same checkpoint, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from elastic_moe.model.checkpoints.quiet import quiet_transformers
from elastic_moe.model.trunk.step_batch import SequenceSlice
from tests.model.disturbed import answers_disturbed
from tests.model.families import FAMILIES, tiny_checkpoint
from tests.model.lockstep import Lockstep, request

LENGTHS = (1, 5, 13, 30)
NEW_TOKENS = 64
COMPARED = (5, 30)
"""Lengths of the prompts whose answers are compared: making those with transformers takes most of the time."""

SPLITS = [(8,), (4, 4), (2, 2, 2, 2)]
CASES = [(name, slots) for name in ("mixtral", "deepseek_v3", "gpt_oss") for slots in SPLITS]


@pytest.fixture(scope="module", params=list(FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory)


@cache
def reference(path: Path) -> PreTrainedModel:
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
    return model.eval()


@cache
def prompts(path: Path) -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    vocabulary = reference(path).config.vocab_size
    return [torch.randint(3, vocabulary, (n,), generator=g).tolist() for n in LENGTHS]


def greedy(
    path: Path, prompt: Sequence[int], tokens: int = NEW_TOKENS, *, claimed: Sequence[int] | None = None
) -> list[int]:
    """transformers' greedy answer. `claimed` is an answer that may be it.

    One pass over the prompt and the claimed answer gives transformers' choice behind each of its tokens. If these are
    the answer's own tokens, it is the greedy one. So only a wrong answer costs as many passes as it has tokens.
    """
    text = tuple(prompt)
    known = _answers.get((path, text, tokens))
    if known is not None:
        return known
    if claimed is not None and len(claimed) == tokens:
        with torch.no_grad():
            logits = reference(path)(torch.tensor([[*text, *claimed[:-1]]]), use_cache=False).logits[0, len(text) - 1 :]
        if logits.argmax(1).tolist() == list(claimed):
            return _answers.setdefault((path, text, tokens), list(claimed))
    return _answers.setdefault((path, text, tokens), _generated(path, text, tokens))


_answers: dict[tuple[Path, tuple[int, ...], int], list[int]] = {}
"""Of `greedy`, by checkpoint, prompt and number of tokens."""


def _generated(path: Path, prompt: tuple[int, ...], tokens: int) -> list[int]:
    model = reference(path)
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None
        )
    return list(out[0, len(prompt) :].tolist())


def test_only_the_greedy_answer_is_taken_for_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    path, tokens = tiny_checkpoint("qwen3_moe", tmp_path_factory), 8
    true = _generated(path, (7, 8, 9), tokens)
    for at in (0, tokens - 1):
        wrong = [*true[:at], true[at] - 1, *true[at + 1 :]]
        _answers.clear()
        assert greedy(path, [7, 8, 9], tokens, claimed=wrong) == true
    assert greedy(path, [7, 8, 9], tokens, claimed=true) == true


def test_logits_of_mixed_prompts_in_chunks(checkpoint: Path) -> None:
    """Prompts of different lengths in one batch, each in two chunks: every position's logits within 1e-4."""
    runner = Lockstep(checkpoint, [8]).workers_runner()
    blocks = [list(range(i * 8, i * 8 + 8)) for i in range(len(LENGTHS))]
    texts = prompts(checkpoint)
    for cut in (0, 3):
        pieces = []
        for text, table in zip(texts, blocks, strict=True):
            part = text[:3] if cut == 0 else text[3:]
            if part:
                pieces.append(
                    SequenceSlice(
                        token_ids=part, start=cut, block_ids=table, prompt_length=len(text), wants_logits=True
                    )
                )
        logits = runner.run(pieces, [sum(len(p.token_ids) for p in pieces)])
        wanted = [text for text in texts if len(text) > cut]
        for row, text in zip(logits, wanted, strict=True):
            end = min(3, len(text)) if cut == 0 else len(text)
            with torch.no_grad():
                expected = reference(checkpoint)(torch.tensor([text[:end]])).logits[0, -1]
            assert (row - expected).abs().max() < 1e-4


def test_greedy_tokens_whatever_happens(checkpoint: Path) -> None:
    """On three workers with little memory, twice each prompt: see `answers_disturbed`."""
    texts = [text for text in prompts(checkpoint) if len(text) in COMPARED] * 2
    got = answers_disturbed(Lockstep(checkpoint, (3, 3, 2), kv_blocks=28), texts, NEW_TOKENS)
    for text, answer in zip([*texts, texts[-1]], got, strict=True):
        assert answer == greedy(checkpoint, text, claimed=answer)[: len(answer)], f"prompt of {len(text)} tokens"


@pytest.mark.parametrize(("family", "slots"), CASES, ids=str)
def test_greedy_tokens_for_any_number_of_workers(
    family: str, slots: tuple[int, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny_checkpoint(family, tmp_path_factory)
    cluster = Lockstep(path, slots)
    texts = prompts(path)
    got = cluster.run([request(f"r{len(text)}", text, max_tokens=NEW_TOKENS) for text in texts])
    for text in texts:
        if len(text) in COMPARED:
            answer = got[f"r{len(text)}"]
            assert answer == greedy(path, text, claimed=answer), f"prompt of {len(text)} tokens"


@pytest.mark.parametrize("family", ["qwen3_moe-mixed", "gpt_oss", "granitemoe"])
def test_greedy_tokens_across_replacements(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The placement changes twice while four requests run; the tokens do not."""
    path = tiny_checkpoint(family, tmp_path_factory)
    cluster = Lockstep(path, [4, 4])
    texts = prompts(path)
    tokens: dict[str, list[int]] = {f"r{len(text)}": [] for text in texts}
    for name, text in zip(tokens, texts, strict=True):
        cluster.scheduler.add(request(name, text, max_tokens=NEW_TOKENS))
    moved = 0
    for step in range(100):
        if step in (10, 30):
            moved += cluster.replace(cluster.shuffled(step), [4, 4])
        for output in cluster.step():
            tokens[output.request_id] += output.token_ids
    assert moved > 0
    for text in texts:
        if len(text) in COMPARED:
            answer = tokens[f"r{len(text)}"]
            assert answer == greedy(path, text, claimed=answer)


def test_greedy_tokens_when_the_cache_is_too_small(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Requests are preempted and computed again; the tokens stay."""
    path = tiny_checkpoint("mixtral", tmp_path_factory)
    cluster = Lockstep(path, [4, 4], kv_blocks=30)
    texts = [text for text in prompts(path) if len(text) in COMPARED] * 6
    got = cluster.run([request(f"r{i}", text, max_tokens=NEW_TOKENS) for i, text in enumerate(texts)])
    assert cluster.scheduler.status().preemptions > 0
    for i, text in enumerate(texts):
        assert got[f"r{i}"] == greedy(path, text, claimed=got[f"r{i}"])


def test_a_seed_gives_the_same_tokens_in_any_company(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path_factory)
    sampled = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 7, "max_tokens": 32}
    text = prompts(path)[2]
    alone = Lockstep(path, [8]).run([request("one", text, **sampled)])["one"]
    company = [request(f"r{i}", t, temperature=1.2, seed=i) for i, t in enumerate(prompts(path))]
    for slots in ([8], [3, 3, 2]):
        crowd = Lockstep(path, slots)
        assert crowd.run([*company, request("one", text, **sampled)])["one"] == alone


def test_an_idle_worker_takes_part(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One request, two workers: the other has no token of its own and still computes its experts."""
    path = tiny_checkpoint("olmoe", tmp_path_factory)
    text = prompts(path)[1]
    cluster = Lockstep(path, [4, 4])
    answer = cluster.run([request("one", text)])["one"]
    assert answer == greedy(path, text, claimed=answer)
    counted = [worker.routing_counts().tokens for worker in cluster.workers.values()]
    assert sorted(counted) == [0, len(text) + NEW_TOKENS - 1]


def test_steps_ahead_change_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Penalties and `min_tokens` count tokens that the scheduler does not have yet; it notices the end of a request a
    step late.
    """
    path = tiny_checkpoint("qwen3_moe", tmp_path_factory)
    texts = prompts(path)[:3]
    sampled = {"temperature": 0.8, "presence_penalty": 0.9, "frequency_penalty": 0.4, "repetition_penalty": 1.2}
    first = Lockstep(path, [8], depth=1).run([request(f"r{i}", t, seed=i, **sampled) for i, t in enumerate(texts)])
    stops = {f"r{i}": tokens[10] for i, tokens in enumerate(first.values())}
    company = [
        request(f"r{i}", t, seed=i, min_tokens=4, logprobs=1, stop_token_ids=(stops[f"r{i}"],), **sampled)
        for i, t in enumerate(texts)
    ]
    alone = [Lockstep(path, [8], depth=1).run([r])[r.request_id] for r in company]
    assert [len(tokens) for tokens in alone] != [64] * 3
    for depth in (1, 2, 3):
        assert list(Lockstep(path, [4, 4], depth=depth).run(company).values()) == alone
