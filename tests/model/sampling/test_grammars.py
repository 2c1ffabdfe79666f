"""Grammars and the other settings together, on logits; and whole answers, which nothing that happens may change."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.cluster.messages.requests import FinishReason, RequestId, SamplingParams
from elastic_moe.cluster.messages.steps import NewSequence
from elastic_moe.model.grammars.vocabulary import read_vocabulary
from elastic_moe.model.sampling.adjusting import _unpacked
from elastic_moe.model.sampling.next_tokens import NextTokens, choose
from elastic_moe.model.sampling.state import SamplingState
from tests.model.grammars.vocabularies import EOS, WIDTH, compiled, encode, grammar
from tests.model.lockstep import Lockstep, request
from tests.model.random_checkpoint import make_random_checkpoint

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))]
DIGITS = grammar(GrammarKind.REGEX, "[0-9]{3}")
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["tree", "bush"]},
        "size": {"type": "integer", "minimum": 1, "maximum": 300},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
    },
    "required": ["kind", "size", "names"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def state(wanted: Grammar | None, output: str = "", name: str = "r", **params: Any) -> SamplingState:
    sequence = NewSequence(
        request_id=RequestId(name),
        token_ids=(1, 2, *encode(output)),
        num_prompt_tokens=2,
        params=SamplingParams(**({"max_tokens": 99, "grammar": wanted} | params)),
        eos_token_ids=(EOS,),
    )
    return SamplingState(sequence, None if wanted is None else compiled(wanted))


def one_step(states: Sequence[SamplingState], logits_BV: torch.Tensor) -> NextTokens:
    named = {RequestId(str(number)): one for number, one in enumerate(states)}
    for one in states:
        if one.progress is not None and (job := one.progress.begin_mask()) is not None:
            job.run()
    chosen = choose(logits_BV, named)
    chosen.append_to(named)
    return chosen


def token(text: str) -> int:
    (one,) = encode(text)
    return one


def logits(device: str = "cpu", **best: float) -> torch.Tensor:
    """[1, V]: some texts with these logits among others without any meaning."""
    row = torch.linspace(0, 1, WIDTH)
    for text, value in best.items():
        row[token(text)] = value
    return row[None].to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_the_grammar_allows_is_chosen_and_others_are_left_alone(device: str, temperature: float) -> None:
    rows = torch.cat([logits(device, **{"x": 30.0, "5": 20.0})] * 3)
    free, bound = state(None, temperature=temperature), state(DIGITS, temperature=temperature)
    late = state(DIGITS, "12", temperature=temperature)
    found = [sample.token_id for sample in one_step([free, bound, late], rows).samples]
    assert found == [token("x"), token("5"), token("5")]
    assert [one.token_ids[-1] for one in (free, bound, late)] == found
    ended = [sample.token_id for sample in one_step([free, bound, late], rows).samples]
    assert ended == [token("x"), token("5"), EOS]


def test_bits_are_unpacked_on_any_device_as_on_the_cpu() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 256, (3, 17), dtype=np.uint8)
    expected = np.unpackbits(bits, axis=1, bitorder="little").astype(bool)
    assert (_unpacked(torch.from_numpy(bits)).numpy() == expected).all()


def test_it_composes_with_the_other_settings() -> None:
    row = logits(**{"x": 30.0, "5": 20.0, "6": 19.0, "7": 18.0})
    five, six, seven = token("5"), token("6"), token("7")
    for params, expected in (
        ({"logit_bias": ((five, -100.0),)}, six),
        ({"logit_bias": ((token("x"), 100.0),)}, five),
        ({"bad_words": ((five,), (six,))}, seven),
        ({"allowed_token_ids": (seven, token("x"))}, seven),
        ({"presence_penalty": 2.0}, six),
        ({"min_tokens": 50}, five),
        ({"logprobs": 1}, five),
    ):
        output = "5" if "presence_penalty" in params else ""
        (sample,) = one_step([state(DIGITS, output, temperature=0.0, **params)], row).samples
        assert sample.token_id == expected, params
        if "logprobs" in params:
            # log probabilities are the model's, before the mask
            assert sample.logprobs is not None
            assert sample.logprobs.logprob == pytest.approx(-10.0, abs=0.01)
            assert sample.logprobs.top[0][0] == token("x")


def test_settings_that_leave_no_token_end_the_answer_with_the_reason() -> None:
    free, blocked = state(None, temperature=0.0), state(DIGITS, allowed_token_ids=(token("x"),))
    found = one_step([free, blocked], logits(x=9.0).expand(2, -1))
    assert [sample.request_id for sample in found.samples] == ["0"]
    assert [(one.request_id, "allowed_token_ids" in one.reason) for one in found.stuck] == [("1", True)]


def test_the_end_of_an_answer_does_not_come_before_its_grammar() -> None:
    row = logits(x=5.0)
    row[0, EOS] = 40.0
    reasoning = state(DIGITS, temperature=0.0, grammar_after=(token("x"),))
    assert [s.token_id for s in one_step([reasoning], row).samples] == [token("x")]
    assert one_step([reasoning], logits(**{"5": 20.0, "x": 30.0})).samples[0].token_id == token("5")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_checkpoint(
        tmp_path_factory.mktemp("structured"), "qwen3_moe", hidden=64, layers=2, experts=4, ff=32, vocab=400
    )


def run(cluster: Lockstep, requests: Sequence[Any], disturb: Any = None) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for one in requests:
        tokens[one.request_id] = list(one.output_token_ids)
        cluster.scheduler.add(one)
    steps = 0
    while cluster.scheduler.num_requests:
        for output in cluster.step():
            assert output.finish_reason is not FinishReason.ERROR, output.error
            tokens[output.request_id] += output.token_ids
        steps += 1
        if disturb is not None:
            disturb(steps)
    return tokens


def answers(names: Sequence[str], after: tuple[int, ...] = ()) -> list[Any]:
    bound = grammar(GrammarKind.JSON_SCHEMA, SCHEMA)
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"grammar": bound},
        "drawn": {"grammar": bound, "temperature": 1.0, "seed": 3},
        "after": {"grammar": DIGITS, "grammar_after": after, "temperature": 0.7},
        "plain": {"temperature": 0.7},
        "choice": {"grammar": grammar(GrammarKind.CHOICE, ["red", "green"]), "temperature": 1.0, "ignore_eos": True},
    }
    return [
        request(name, [40 + 7 * n for n in range(5 + len(name))], **({"ignore_eos": False, "max_tokens": 80} |
                kinds[name])) for name in names
    ]  # fmt: skip


NAMES = ["greedy", "drawn", "after", "plain", "choice"]


def test_answers_follow_their_grammar_and_nothing_that_happens_changes_them(checkpoint: Path) -> None:
    alone_in = Lockstep(checkpoint, (4,))
    eos = alone_in.info.eos_token_ids
    tokenizer = read_vocabulary(str(checkpoint), width=alone_in.info.vocab_size, eos_token_ids=eos).tokenizer
    # two tokens in a row that the model chooses after this prompt
    after = tuple(run(alone_in, answers(["plain"]))["plain"][5:7])
    alone = {name: run(alone_in, answers([name], after))[name] for name in NAMES}
    text = {name: tokenizer.decode_str([t for t in tokens if t not in eos]) for name, tokens in alone.items()}
    for name in ("greedy", "drawn"):
        jsonschema.validate(json.loads(text[name]), SCHEMA)
        assert alone[name][-1] in eos
    assert alone["after"][5:7] == list(after)
    assert len(text["after"]) > 3
    assert text["after"][-3:].isdigit()
    assert text["choice"] in ("red", "green")
    cluster = Lockstep(checkpoint, (2, 2), kv_blocks=23)
    assert run(cluster, answers(NAMES, after)) == alone
    assert cluster.scheduler.status().preemptions

    def preempt_and_fail(steps: int) -> None:
        if steps % 5 == 0 and cluster.flights:
            while cluster.flights:
                for future in cluster.flights.popleft().values():
                    future.result()
            cluster.scheduler.rollback()

    assert run(cluster, answers(NAMES, after), preempt_and_fail) == alone
    # resumed elsewhere, after any of its tokens
    for cut in (1, 7, 12):
        resumed = [
            _resumed(one, alone[one.request_id][: min(cut, len(alone[one.request_id]) - 1)])
            for one in answers(NAMES, after)
        ]
        assert run(cluster, resumed) == alone


def _resumed(one: Any, output: list[int]) -> Any:

    return dataclasses.replace(one, output_token_ids=tuple(output))
