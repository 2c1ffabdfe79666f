"""Sampling agrees with transformers' logits processors and with counted frequencies, and keeps its invariants."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from elastic_moe.cluster.messages.requests import RequestId, SamplingParams, TokenLogprobs
from elastic_moe.cluster.messages.steps import NewSequence
from elastic_moe.model.sampling import drawing
from elastic_moe.model.sampling.drawing import uniform
from elastic_moe.model.sampling.greedy import NO_TOKEN
from elastic_moe.model.sampling.log_probabilities import LEAST_LOGPROB
from elastic_moe.model.sampling.sampling import sample
from elastic_moe.model.sampling.state import SamplingState

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))]


def state(
    prompt: Sequence[int] = (1, 2, 3), output: Sequence[int] = (), eos: Sequence[int] = (0,), **params: Any
) -> SamplingState:
    return SamplingState(
        NewSequence(
            request_id=RequestId("r"),
            token_ids=(*prompt, *output),
            num_prompt_tokens=len(prompt),
            params=SamplingParams(**({"max_tokens": 1000} | params)),
            eos_token_ids=tuple(eos),
        )
    )


def tokens(logits_BV: torch.Tensor, states: Sequence[SamplingState]) -> list[int]:
    return [token for token, _ in sample(logits_BV, states)]


def seen_tokens(logits_V: torch.Tensor, draws: int = 400, **params: Any) -> set[int]:
    """Every token that comes up in many draws."""
    states = [state(seed=seed, **params) for seed in range(draws)]
    return set(tokens(logits_V.expand(draws, -1), states))


def random_logits(rows: int, vocabulary: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


# --- The random numbers -----------------------------------------------------------------------------------------


def test_uniform_numbers_are_spread_evenly_and_do_not_repeat() -> None:
    numbers = [uniform(seed, index) for seed in range(100) for index in range(100)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    counts = Counter(int(number * 20) for number in numbers)
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 43.8, "chi-square, 19 degrees, p = 0.001"
    pairs = Counter((int(a * 4), int(b * 4)) for a, b in itertools.pairwise(numbers))
    assert sum((count - 625) ** 2 / 625 for count in pairs.values()) < 37.7, "chi-square, 15 degrees, p = 0.001"


def test_uniform_numbers_never_change() -> None:
    """A resumed request goes on with the numbers of the version that began it."""
    assert uniform(0, 0) == 0.6524484863740322
    assert uniform(-1, 7) == uniform(2**64 - 1, 7)


# --- Each setting -----------------------------------------------------------------------------------------------


def test_greedy_takes_the_first_of_the_most_likely() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 3.0, 3.0, 1.0]])
    assert tokens(logits, [state(temperature=0.0), state(temperature=1e-6)]) == [1, 0]


def test_no_rows() -> None:
    assert sample(torch.zeros(0, 5), []) == []


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("vocabulary", [50, 1500])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 10_000},
        {"top_p": 0.7},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.6, "top_p": 0.95, "top_k": 700},
        {"temperature": 0.5, "min_p": 0.02, "top_k": 9, "top_p": 0.8},
    ],
)
def test_filters_are_those_of_transformers(seed: int, vocabulary: int, params: dict[str, float]) -> None:
    """The draw at every quantile is the one that inverting transformers' distribution gives."""
    logits = random_logits(1, vocabulary, seed)
    warpers = LogitsProcessorList()
    if "temperature" in params:
        warpers.append(TemperatureLogitsWarper(params["temperature"]))
    if "min_p" in params:
        warpers.append(MinPLogitsWarper(params["min_p"]))
    if "top_k" in params:
        warpers.append(TopKLogitsWarper(int(params["top_k"])))
    if "top_p" in params:
        warpers.append(TopPLogitsWarper(params["top_p"]))
    kept = warpers(torch.zeros(1, 1, dtype=torch.long), logits)[0].double()
    cumulative = kept.softmax(-1).cumsum(-1)
    draws = 64
    u = torch.tensor([uniform(s, 0) for s in range(draws)], dtype=torch.float64)
    expected = torch.searchsorted(cumulative / cumulative[-1], u, right=True).tolist()
    drawn = tokens(logits.expand(draws, -1), [state(seed=s, **params) for s in range(draws)])
    assert drawn == expected


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (1 - 2.0**-53, 3)])
def test_the_ends_of_the_unit_interval_draw_no_filtered_token(
    monkeypatch: pytest.MonkeyPatch, number: float, token: int
) -> None:
    monkeypatch.setattr("elastic_moe.model.sampling.drawing.uniform", lambda seed, index: number)
    logits = torch.tensor([[-torch.inf, 2.0, 1.0, 2.0, 0.0], [-3.0, 2.0, 1.0, 2.0, -9.0]])
    assert tokens(logits, [state(top_k=3), state(top_p=0.9)]) == [token, token]


def test_ties_at_the_edge_of_a_filter_all_stay() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, -50.0])
    assert seen_tokens(logits, top_k=2) == {0, 1, 2, 3}
    assert seen_tokens(logits, top_p=0.6) == {0, 1, 2, 3}
    assert seen_tokens(logits, top_p=0.4) == {0}


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = random_logits(1, 40, 1)
    prompt, output = (3, 5, 5), (7, 9)
    expected = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([[*prompt, *output]]), logits.clone())
    penalised = [state(prompt, output, repetition_penalty=1.8, seed=seed) for seed in range(200)]
    # Another prompt, and no penalty: the same numbers are drawn from the expected logits.
    plain = [state((1, 1, 1), (1, 1), seed=seed) for seed in range(200)]
    assert tokens(logits.expand(200, -1), penalised) == tokens(expected.expand(200, -1), plain)


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = torch.tensor([[4.0, 3.9, 3.5, 0.0]])
    assert tokens(logits, [state((0, 0), (), temperature=0, presence_penalty=2.0)]) == [0]
    assert tokens(logits, [state((3,), (0,), temperature=0, presence_penalty=0.3)]) == [1]
    assert tokens(logits, [state((3,), (0, 1, 1), temperature=0, presence_penalty=0.05)]) == [0]
    assert tokens(logits, [state((3,), (0, 1, 1), temperature=0, frequency_penalty=0.15)]) == [0]
    assert tokens(logits, [state((3,), (0, 0, 0, 1, 1), temperature=0, frequency_penalty=0.3)]) == [2]
    assert tokens(logits, [state((3,), (1,), temperature=0, frequency_penalty=-0.2)]) == [1]


def test_counts_of_many_distinct_tokens() -> None:
    prompt, output = [*range(0, 300, 3)], [*range(0, 300, 2), *range(250, 300)]
    one = state(prompt, output, temperature=0, frequency_penalty=1.0)
    assert one.counts is not None
    ids, in_prompt, counts = one.counts.table()
    assert sorted(ids.tolist()) == sorted({*prompt, *output})
    assert {int(i) for i, there in zip(ids, in_prompt, strict=True) if there} == set(prompt)
    assert {int(i): int(n) for i, n in zip(ids, counts, strict=True) if n} == Counter(output)


def test_logit_bias() -> None:
    logits = torch.tensor([[4.0, 3.9, 3.5, 0.0]])
    assert tokens(logits, [state(temperature=0, logit_bias=((3, 100.0),))]) == [3]
    assert tokens(logits, [state(temperature=0, logit_bias=((0, -100.0), (1, -0.5)))]) == [2]


def test_tokens_outside_the_vocabulary_change_nothing() -> None:
    logits = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    odd = state((1, 99), temperature=0, logit_bias=((7, 5.0), (-1, 5.0)), repetition_penalty=1.1, eos=(50,))
    assert tokens(logits, [odd, state(temperature=0, min_tokens=3, stop_token_ids=(77,))]) == [1, 1]


def test_min_tokens_masks_end_and_stop_tokens_until_then() -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0, 6.0]])
    limited = state(temperature=0, min_tokens=2, stop_token_ids=(1,), eos=(0,), logit_bias=((0, 50.0),))
    assert tokens(logits, [limited]) == [2]
    limited.append(2)
    assert tokens(logits, [limited]) == [2]
    limited.append(2)
    assert tokens(logits, [limited]) == [0]
    limited.truncate(4)
    assert tokens(logits, [limited]) == [2]


@pytest.mark.parametrize("vocabulary", [8, 900])
def test_frequencies_follow_the_probabilities(vocabulary: int) -> None:
    logits = random_logits(1, vocabulary, 3, scale=1.0)
    draws = 8000
    probabilities = (logits[0] / 0.8).softmax(-1)
    # Rare tokens are counted as one, or chi-square would not apply.
    rare = probabilities * draws < 20
    drawn = tokens(
        logits.expand(draws, -1), [state(seed=i // 40, output=[1] * (i % 40), temperature=0.8) for i in range(draws)]
    )
    counts = torch.bincount(torch.tensor(drawn), minlength=vocabulary).double()
    expected = probabilities.double() * draws
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]) if rare.any() else expected
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]) if rare.any() else counts
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert chi_square < freedom + 3.3 * math.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_cuts_change_no_token(monkeypatch: pytest.MonkeyPatch, scale: float, dtype: torch.dtype) -> None:
    """Few candidates, a guess, and bins against the whole row sorted. bfloat16 has many ties, at every edge."""
    logits_BV = random_logits(48, 3000, seed=1, scale=scale).to(dtype)
    states = [
        state(seed=row, temperature=(0.7, 1.0, 3.0)[row % 3], top_k=(0, 1, 40, 1000)[row % 4],
              top_p=(1.0, 0.3, 0.95, 0.9999)[row // 4 % 4], min_p=(0.0, 0.02)[row % 2])
        for row in range(48)
    ]  # fmt: skip
    monkeypatch.setattr(drawing, "_TOP_P_GUESS", 16)
    quick = tokens(logits_BV, states)
    monkeypatch.setattr(drawing, "_TOP_K_FEW", 0)
    monkeypatch.setattr(drawing, "_TOP_P_GUESS", 3000)
    assert quick == tokens(logits_BV, states)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocabulary", [3, 2000])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 2},
        {"top_k": 2, "top_p": 0.5, "min_p": 0.5, "logprobs": 0},
        {"top_p": 0.999},
        {"logit_bias": ((1, -100.0),), "repetition_penalty": 1.3},
        {"min_tokens": 4, "stop_token_ids": (1,), "logprobs": 1},
    ],
)
def test_logits_that_are_no_numbers_have_no_token(params: dict[str, Any], vocabulary: int, device: str) -> None:
    """The rows beside them get the same tokens as without them."""
    good = random_logits(2, vocabulary, 5, scale=0.1).to(device)
    bad = good[:1].repeat(4, 1)
    bad[0], bad[1], bad[2, 1], bad[3, 1] = -torch.inf, torch.nan, torch.nan, torch.inf
    states = [state(seed=n, **params) for n in range(2)]
    expected = sample(good, states)
    got = sample(torch.cat([bad[:2], good[:1], bad[2:], good[1:]]), [*[state(**params)] * 2, states[0],
                 *[state(**params)] * 2, states[1]])  # fmt: skip
    assert [got[row] for row in (0, 1, 3, 4)] == [(NO_TOKEN, None)] * 4
    assert [got[2], got[5]] == expected
    assert all(0 <= token < vocabulary for token, _ in expected)


def test_a_draw_needs_no_reasonable_logits() -> None:
    assert tokens(torch.tensor([[0.0, -torch.inf, -torch.inf]]), [state()]) == [0]
    assert tokens(torch.tensor([[1e30, 1e38, -1e38]]), [state(temperature=1e-4)]) == [1]


# --- Log probabilities ------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own() -> None:
    logits = random_logits(3, 30, 4)
    states = [
        state(temperature=0, logit_bias=((4, 100.0),), logprobs=2),
        state(temperature=0.3, top_k=1, presence_penalty=1.0, logprobs=0),
        state(temperature=0),
    ]
    (first, first_lp), (second, second_lp), (_, third_lp) = sample(logits, states)
    expected = logits.log_softmax(-1)
    assert first == 4
    assert isinstance(first_lp, TokenLogprobs)
    assert first_lp.token_id == 4
    assert first_lp.logprob == expected[0, 4]
    values, ids = expected[0].topk(2)
    assert first_lp.top == tuple(zip(ids.tolist(), values.tolist(), strict=True))
    assert second_lp == TokenLogprobs(token_id=second, logprob=float(expected[1, second]), top=())
    assert third_lp is None


def test_more_logprobs_than_tokens() -> None:
    ((_, entry),) = sample(torch.tensor([[0.0, 1.0]]), [state(logprobs=20)])
    assert entry is not None
    assert [token for token, _ in entry.top] == [1, 0]


def test_logprobs_are_finite() -> None:
    """A token that cannot come is reported like one, with a number that JSON has."""
    ((_, entry),) = sample(torch.tensor([[0.0, -torch.inf]]), [state(logprobs=2)])
    assert entry is not None
    assert entry.top == ((0, 0.0), (1, LEAST_LOGPROB))


def test_logits_are_left_alone() -> None:
    logits = random_logits(2, 20)
    before = logits.clone()
    sample(logits, [state(logit_bias=((1, 5.0),), repetition_penalty=2.0, top_p=0.5, top_k=3, min_p=0.1), state()])
    assert torch.equal(logits, before)


# --- Invariants -------------------------------------------------------------------------------------------------

all_params = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_p": st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0]),
        "top_k": st.sampled_from([0, 1, 3, 600, 5000]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        "seed": st.integers(0, 2**63),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "logit_bias": st.sampled_from([(), ((1, 3.0), (4, -100.0))]),
        "min_tokens": st.sampled_from([0, 2]),
        "stop_token_ids": st.sampled_from([(), (3,)]),
        "logprobs": st.sampled_from([None, 0, 3]),
    },
)
histories = st.lists(st.integers(0, 6), max_size=6)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(all_params, histories), min_size=2, max_size=7),
    vocabulary=st.sampled_from([7, 64, 1021]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    data=st.data(),
)
def test_a_row_does_not_depend_on_the_batch(
    device: str,
    rows: list[tuple[dict[str, Any], list[int]]],
    vocabulary: int,
    seed: int,
    dtype: torch.dtype,
    scale: float,
    data: st.DataObject,
) -> None:
    """Bit for bit, log probabilities included: alone, in another order, and among others."""
    logits = random_logits(len(rows), vocabulary, seed, scale).to(device, dtype)
    states = [state(output=output, **params) for params, output in rows]
    together = sample(logits, states)
    for row, one in enumerate(states):
        assert sample(logits[row : row + 1].clone(), [one]) == [together[row]]
    order = data.draw(st.permutations(range(len(rows))))
    chosen = order[: data.draw(st.integers(1, len(rows)))]
    assert sample(logits[chosen], [states[row] for row in chosen]) == [together[row] for row in chosen]


@settings(max_examples=60, deadline=None)
@given(params=all_params, output=histories, seed=st.integers(0, 1000))
def test_top_k_of_one_is_greedy(params: dict[str, Any], output: list[int], seed: int) -> None:
    logits = random_logits(1, 64, seed)
    one = state(output=output, **(params | {"top_k": 1, "temperature": 0.9}))
    greedy = state(output=output, **(params | {"temperature": 0.0}))
    assert tokens(logits, [one]) == tokens(logits, [greedy])


@settings(max_examples=100, deadline=None)
@example(params={"temperature": 0.3, "top_k": 3}, logits=[0.0, 1.0, 0.0])
@given(
    params=all_params,
    logits=st.lists(st.sampled_from([-torch.inf, -3e38, -1.0, 0.0, 1e-30, 1.0, 3e38]), min_size=2, max_size=9),
)
def test_filters_always_leave_a_possible_token(params: dict[str, Any], logits: list[float]) -> None:
    plain = {k: v for k, v in params.items() if k in {"temperature", "top_p", "top_k", "min_p", "seed"}}
    (token,) = tokens(torch.tensor([logits]), [state(**plain)])
    assert token == NO_TOKEN if max(logits) == -torch.inf else logits[token] > -torch.inf


@settings(max_examples=60, deadline=None)
@given(
    params=all_params,
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    output=st.lists(st.integers(0, 9), max_size=70),
    cuts=st.lists(st.integers(0, 70), max_size=4),
    seed=st.integers(0, 1000),
)
def test_truncating_and_appending_again_changes_nothing(
    params: dict[str, Any], prompt: list[int], output: list[int], cuts: list[int], seed: int
) -> None:
    logits = random_logits(1, 12, seed)
    replayed = state(prompt, **params)
    for cut in [*cuts, len(output)]:
        replayed.truncate(len(prompt) + cut)
        for token in [9, 8, 9]:
            replayed.append(token)
        replayed.truncate(len(prompt) + min(cut, replayed.num_output - 3))
        for token in output[replayed.num_output : cut]:
            replayed.append(token)
    fresh = state(prompt, output, **params)
    assert replayed.token_ids == fresh.token_ids
    assert replayed.num_output == len(output)
    assert sample(logits, [replayed]) == sample(logits, [fresh])


def test_a_generation_does_not_depend_on_where_it_was_resumed() -> None:
    """A toy model whose logits depend on the history: a fresh state from the tokens so far goes on alike."""

    def logits_of(one: SamplingState) -> torch.Tensor:
        return random_logits(1, 50, sum(t * 7**i for i, t in enumerate(one.token_ids[-4:])), scale=1.0)

    params = {"seed": 11, "top_p": 0.95, "presence_penalty": 0.5, "repetition_penalty": 1.2, "min_tokens": 5}
    whole = state(**params)
    for _ in range(20):
        whole.append(tokens(logits_of(whole), [whole])[0])
    output = whole.token_ids[3:]
    assert len(set(output)) > 5
    for begin in range(20):
        resumed = state(output=output[:begin], **params)
        while resumed.num_output < 20:
            resumed.append(tokens(logits_of(resumed), [resumed])[0])
        assert resumed.token_ids == whole.token_ids


@pytest.mark.parametrize("threads", [1, 2])
def test_large_vocabularies_in_parts(threads: int) -> None:
    """More elements than are handled at a time, flat and peaked rows mixed, on any number of threads."""
    logits = random_logits(12, 150_001, 7)
    logits[3] *= 0.01
    logits[5] *= 4
    params = [{}, {"top_p": 0.9}, {"top_p": 0.999, "min_p": 1e-4}, {"top_k": 40}, {"temperature": 0.0}, {"logprobs": 3}]
    states = [state(seed=row, **params[row % len(params)]) for row in range(12)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = sample(logits, states)
        assert [sample(logits[row : row + 1], [states[row]])[0] for row in range(12)] == together
    finally:
        torch.set_num_threads(before)


# --- Tokens that may not come -----------------------------------------------------------------------------------


def test_only_allowed_tokens_come() -> None:
    """Whatever bias, penalties and filters say; the other rows of the step do not notice."""
    logits_V = random_logits(1, 16)[0]
    assert seen_tokens(logits_V, allowed_token_ids=(3, 9, 9)) == {3, 9}
    assert seen_tokens(logits_V, allowed_token_ids=(3, 9), top_k=1, logit_bias=((5, 100.0), (9, 50.0))) == {9}
    free, limited = state(temperature=0), state(temperature=0, allowed_token_ids=(3, 99), repetition_penalty=2.0)
    (best, _), (only, logprobs) = sample(
        logits_V.expand(2, -1), [free, state(temperature=0, allowed_token_ids=(3,), logprobs=1)]
    )
    assert (best, only) == (int(logits_V.argmax()), 3)
    assert logprobs is not None
    assert logprobs.top[0][0] == best, "log probabilities are the model's own"
    assert tokens(logits_V.expand(2, -1), [limited, free]) == [3, best]


def test_a_bad_word_is_never_finished() -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0, 4.0]])
    word = state(temperature=0, bad_words=((3, 2), (2, 2, 2), (1,)))
    made = []
    for _ in range(6):
        made += (token := tokens(logits, [word]))
        word.append(token[0])
    assert made == [2, 2, 3, 3, 3, 3]
    prompt = state(prompt=(1, 3), temperature=0, bad_words=((3, 2),))
    assert tokens(logits, [prompt]) == [2], "a bad word that begins in the prompt is none of the output"
    word.truncate(3 + 2)
    assert tokens(logits, [word]) == [3], "a step that runs again is as the first time"
    # also together with min_tokens, of which it is no part
    early = state(temperature=0, min_tokens=2, eos=(2,), bad_words=((3,),))
    assert tokens(logits, [early]) == [1]
