"""A sequence's mask follows from its tokens alone, whatever was tried and taken back on the way."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.cluster.messages.requests import SamplingParams
from elastic_moe.model.grammars import masks
from elastic_moe.model.grammars.compiling import Compiled
from elastic_moe.model.grammars.masks import MaskThreads
from elastic_moe.model.grammars.progress import Progress
from elastic_moe.model.grammars.sources import GrammarError
from tests.model.grammars.vocabularies import EOS, allowed, compiled, encode, grammar

OBJECT = grammar(
    GrammarKind.JSON_SCHEMA,
    {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 2}},
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    },
)
PROMPT = [5, 6, 7]
STOP = 9


def progress(wanted: Grammar, tokens: list[int], prompt: int = len(PROMPT), **params: Any) -> Progress:
    fields = SamplingParams(max_tokens=100, grammar=wanted, **params)
    return Progress(compiled(wanted), tokens, prompt, fields, (EOS,))


def mask_of(sequence: Progress) -> set[int]:
    job = sequence.begin_mask()
    if job is not None:
        job.run()
    assert sequence.ready
    mask = sequence.mask()
    assert mask is not None
    return allowed(mask)


def fresh(wanted: Grammar, output: Sequence[int], **params: Any) -> set[int]:
    return mask_of(progress(wanted, [*PROMPT, *output], **params))


def test_every_end_of_sequence_token_ends_the_answer() -> None:
    fields = SamplingParams(max_tokens=9, grammar=OBJECT)
    sequence = Progress(compiled(OBJECT), [*PROMPT, *encode("{}")], len(PROMPT), fields, (11, 12, 10**6))
    assert mask_of(sequence) == {11, 12}
    assert mask_of(Progress(compiled(OBJECT), list(PROMPT), len(PROMPT), fields, (11, 12))) == set(encode("{"))


def test_any_order_of_growing_and_cutting_leads_to_the_same_mask() -> None:
    rng = random.Random(1)
    tokens = list(PROMPT)
    sequence = progress(OBJECT, tokens)
    ends = 0
    for _ in range(200):
        possible = sorted(mask_of(sequence))
        assert set(possible) == fresh(OBJECT, tokens[len(PROMPT) :])
        ends += EOS in possible
        # one token too many, as when a step is in flight at the end of an answer
        tokens.append(EOS if EOS in possible else rng.choice(possible))
        sequence.grown()
        if tokens[-1] == EOS or rng.random() < 0.15:
            assert tokens[-1] != EOS or not sequence.ready
            if tokens[-1] != EOS and rng.random() < 0.5:
                mask_of(sequence)
            del tokens[rng.randint(len(PROMPT), len(tokens) - 1) :]
            sequence.cut()
    assert ends > 3


def test_a_mask_is_computed_once_for_a_step_that_runs_again() -> None:
    tokens = [*PROMPT, *encode('{"')]
    sequence = progress(OBJECT, tokens)
    before = mask_of(sequence)
    # a token that could not be sampled is followed by others in the steps in flight
    for _ in range(2):
        tokens.append(0)
        sequence.grown(spoilt=True)
        assert sequence.begin_mask() is None
        assert not sequence.ready
    del tokens[-2:]
    sequence.cut()
    assert sequence.begin_mask() is None
    assert sequence.ready
    assert mask_of(sequence) == before


def test_the_grammar_begins_after_the_given_tokens() -> None:
    after = (40, 41)
    # neither the prompt nor the place between it and the output counts
    tokens = [*after, 40]
    sequence = progress(OBJECT, tokens, grammar_after=after)
    for token in (41, 40, 40):
        tokens.append(token)
        sequence.grown()
        assert not sequence.begun
        assert sequence.ready
        assert sequence.mask() is None
    tokens.append(41)
    sequence.grown()
    assert sequence.begun
    start = mask_of(sequence)
    assert start == fresh(OBJECT, ())
    assert start == mask_of(progress(OBJECT, list(tokens), grammar_after=after))
    tokens += [*encode("{"), *after]
    sequence.grown()
    del tokens[-3:]
    sequence.cut()
    assert mask_of(sequence) == start
    del tokens[-1:]
    sequence.cut()
    assert not sequence.begun


@pytest.mark.parametrize("params", [{"min_tokens": 50}, {"ignore_eos": True}], ids=str)
def test_an_answer_ends_early_only_where_nothing_else_can_follow(params: dict[str, Any]) -> None:
    one_or_two = grammar(GrammarKind.CHOICE, ["a", "ab"])
    assert EOS in fresh(one_or_two, encode("a"))
    assert EOS not in fresh(one_or_two, encode("a"), **params)
    assert fresh(one_or_two, encode("ab"), **params) == {EOS}


def test_stop_tokens_come_only_after_min_tokens() -> None:
    anything = grammar(GrammarKind.REGEX, "(?s:.*)")
    assert STOP in fresh(anything, (), stop_token_ids=(STOP,))
    assert STOP not in fresh(anything, (), stop_token_ids=(STOP,), min_tokens=1)


def test_tokens_that_do_not_follow_the_grammar_end_it() -> None:
    sequence = progress(OBJECT, [*PROMPT, *encode("no")])
    job = sequence.begin_mask()
    assert job is not None
    job.run()
    with pytest.raises(GrammarError, match="does not follow"):
        sequence.mask()


def test_a_grammar_that_does_not_compile_ends_only_its_own_sequence() -> None:
    failed: Future[Compiled] = Future()
    failed.set_exception(GrammarError("no"))
    params = SamplingParams(max_tokens=1, grammar=OBJECT)
    bad, good = Progress(failed, list(PROMPT), 3, params, (EOS,)), progress(OBJECT, list(PROMPT))
    threads = MaskThreads()
    threads.begin([bad, good])
    settle(threads, [bad, good])
    with pytest.raises(GrammarError, match="no"):
        bad.mask()
    assert allowed(good.mask()) == fresh(OBJECT, ())  # type: ignore[arg-type]


def settle(threads: MaskThreads, sequences: Sequence[Progress]) -> None:
    deadline = time.monotonic() + 10
    while not all(sequence.ready for sequence in sequences):
        assert time.monotonic() < deadline
        threads.finish(sequences)


def test_a_late_mask_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "WAIT_S", 0.05)
    under_way: Future[Compiled] = Future()
    params = SamplingParams(max_tokens=1, grammar=OBJECT)
    late, good = Progress(under_way, list(PROMPT), 3, params, (EOS,)), progress(OBJECT, list(PROMPT))
    threads = MaskThreads()
    threads.begin([late, good])
    settle(threads, [good])
    threads.finish([late, good])
    assert (late.ready, good.ready) == (False, True)
    # the step runs again: nothing is begun twice
    threads.begin([late])
    compiling = threading.Thread(target=under_way.set_result, args=(compiled(OBJECT).result(),))
    compiling.start()
    settle(threads, [late])
    assert allowed(late.mask()) == fresh(OBJECT, ())  # type: ignore[arg-type]
