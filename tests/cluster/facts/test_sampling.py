import numpy as np
import pytest

from elastic_moe.cluster.facts.routing import RoutingWindow, joined
from elastic_moe.cluster.facts.sampling import PART_BYTES, REPORT_BYTES, Choices, RoutingSample, SampledTokens
from elastic_moe.cluster.messages.epochs import NodeReport, PhaseCounts, RoutingCounts, TierCounts
from elastic_moe.cluster.placement import WorkerId

LAYERS, EXPERTS, CHOICES = 3, 8, 2


def draw(rng: np.random.Generator, tokens: int) -> Choices:
    """Choices that follow one another: a token's expert in a layer says much about the next layer's."""
    first = rng.integers(EXPERTS, size=(tokens, 1, 1))
    steps = rng.integers(2, size=(tokens, LAYERS, CHOICES)).cumsum(axis=1)
    return ((first + steps + np.arange(CHOICES)) % EXPERTS).astype(np.uint8)


def counted(choices: Choices) -> np.ndarray:
    """[L-1, E, E] transitions, counted one by one."""
    table = np.zeros((LAYERS - 1, EXPERTS, EXPERTS))
    for token in choices.tolist():
        for layer in range(LAYERS - 1):
            for before in token[layer]:
                for after in token[layer + 1]:
                    table[layer, before, after] += 1
    return table


def test_a_sample_of_all_tokens_is_exact() -> None:
    choices = draw(np.random.default_rng(0), 50)
    sample = RoutingSample(num_layers=LAYERS, num_experts=EXPERTS, parts=((choices[:20], 20), (choices[20:], 30)))
    assert np.array_equal(sample.transitions(), counted(choices))


def test_runs_are_loads_of_tokens_that_follow_one_another() -> None:
    choices = draw(np.random.default_rng(0), 25)
    sample = RoutingSample(num_layers=LAYERS, num_experts=EXPERTS, parts=((choices[:15], 30), (choices[15:], 10)))
    runs = sample.runs(7)
    assert runs.shape == (3, LAYERS, EXPERTS), "what is left of each part is too short"
    for run, begin in zip(runs, (0, 7, 15), strict=True):
        for layer in range(LAYERS):
            counted_one_by_one = np.bincount(choices[begin : begin + 7, layer].ravel(), minlength=EXPERTS)
            assert np.array_equal(run[layer], counted_one_by_one)
    assert sample.runs(16).shape == (0, LAYERS, EXPERTS)


def test_shares_are_within_the_stated_error() -> None:
    """Reports are samples of different rates, and their sum is a sample of one rate."""
    rng = np.random.default_rng(1)
    sampled = SampledTokens(EXPERTS, 2000, np.random.default_rng(2))
    everything = []
    for tokens, rate in ((8000, 0.5), (500, 1.0), (8000, 0.25), (3000, 0.9)):
        choices = draw(rng, tokens)
        everything.append(choices)
        sampled.add(choices[rng.random(tokens) < rate], tokens)
        assert sampled.size <= 2000
    kept = sampled.choices()
    assert kept is not None
    estimate = RoutingSample(num_layers=LAYERS, num_experts=EXPERTS, parts=((kept, sampled.tokens),)).transitions()
    truth = counted(np.concatenate(everything))
    tokens = sum(map(len, everything))
    assert sampled.tokens == tokens
    assert estimate.sum() == pytest.approx(truth.sum())
    share = np.minimum(truth / tokens, 1.0)
    error = np.sqrt(share * (1 - share) / len(kept))
    # a token has up to K^2 transitions of one kind
    assert (np.abs(estimate - truth) / tokens <= 5 * CHOICES * error + 1e-9).all()


def test_a_report_of_fewer_tokens_is_not_heard_more() -> None:
    sampled = SampledTokens(EXPERTS, 4000, np.random.default_rng(0))
    sampled.add(np.zeros((1000, LAYERS, 1), np.uint8), 10_000)
    sampled.add(np.ones((1000, LAYERS, 1), np.uint8), 1000)
    kept = sampled.choices()
    assert kept is not None
    assert (kept == 0).all(axis=(1, 2)).sum() == 1000
    assert 50 <= (kept == 1).all(axis=(1, 2)).sum() <= 160


def test_a_window_keeps_few_bytes_of_a_large_model() -> None:
    layers, experts, choices = 58, 256, 8
    window = RoutingWindow(layers, experts, window_s=60.0)
    nothing = PhaseCounts(tokens=0, load=np.zeros((layers, experts), np.int64))
    phase = PhaseCounts(tokens=600, load=np.ones((layers, experts), np.int64))
    rng = np.random.default_rng(0)
    for _ in range(12):
        sample = rng.integers(experts, size=(280, layers, choices)).astype(np.uint8)
        window.add(RoutingCounts(prefill=nothing, decode=phase, sample=sample), 1.0)
    ((kept, tokens),) = window.sample(1.0).parts
    assert kept.nbytes <= PART_BYTES
    assert tokens == 12 * 600


def report(name: str, choices: Choices, tokens: int) -> NodeReport:
    """Of a worker that ran so many tokens, all of them in decode steps, and sends these in its sample."""
    load = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
    load[:, 0] = tokens
    none = PhaseCounts(tokens=0, load=np.zeros_like(load))
    decode = PhaseCounts(tokens=tokens, load=load, steps_s=0.5, steps_tokens=tokens)
    counts = RoutingCounts(prefill=none, decode=decode, sample=choices)
    links = {WorkerId(name): {WorkerId("other"): 1.0}}
    return NodeReport(counts=counts, tiers={WorkerId(name): TierCounts(resident=tokens)}, link_gbps=links)


def test_reports_of_a_node_are_added_up_and_grow_no_larger() -> None:
    rng = np.random.default_rng(3)
    most = REPORT_BYTES // (LAYERS * CHOICES)
    alike, other = np.zeros((most, LAYERS, CHOICES), np.uint8), np.ones((most, LAYERS, CHOICES), np.uint8)
    together = joined(report("w0", alike, 3 * most), report("w1", other, most), rng)
    together = joined(together, report("w2", other[:0], 0), rng)
    assert together.counts.tokens == 4 * most
    assert together.counts.load[:, 0].tolist() == [4 * most] * LAYERS
    assert (together.counts.decode.steps_s, together.counts.decode.steps_tokens) == (1.5, 4 * most)
    assert {name: counts.resident for name, counts in together.tiers.items()} == {"w0": 3 * most, "w1": most, "w2": 0}
    assert set(together.link_gbps) == {"w0", "w1", "w2"}
    sample = together.counts.sample
    assert sample.nbytes <= REPORT_BYTES
    assert len(sample) > most / 4
    # three quarters of the tokens were the first worker's
    assert abs(float((sample == 0).mean()) - 0.75) < 5 * (0.75 * 0.25 / len(sample)) ** 0.5
    nothing = joined(report("w0", alike[:0], 0), report("w1", alike[:0], 0), rng)
    assert nothing.counts.tokens == 0
    assert nothing.counts.sample.shape == (0, LAYERS, CHOICES)
