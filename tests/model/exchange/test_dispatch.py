"""Tokens reach their experts and come back, whatever the placement: the local dispatcher is the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.cluster.facts.routing import RoutingWindow
from elastic_moe.cluster.placement import EMPTY, Placement, contiguous
from elastic_moe.model.exchange.counter import RoutingCounter
from elastic_moe.model.exchange.dispatch import TransportDispatcher, row_bytes
from elastic_moe.model.exchange.dispatcher import LayerShape, route_table
from elastic_moe.model.exchange.transports import LocalTransport
from elastic_moe.model.experts.stacked import StackedExperts
from elastic_moe.model.experts.store import ExpertStore
from tests.model.groups import ToyExperts, make_transports, one_worker, run_group, toy_store, workers

LAYERS, EXPERTS, HIDDEN, WIDTH, TOP_K = 2, 6, 8, 12, 3
MODULES = [ToyExperts(EXPERTS, HIDDEN, WIDTH, seed) for seed in range(LAYERS)]
CPU = torch.device("cpu")


def choices(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS, generator=g)[:TOP_K] for _ in range(tokens)] or [torch.empty(0)])
    index = index.long().reshape(tokens, TOP_K)
    return torch.randn(tokens, HIDDEN, generator=g), index, torch.rand(tokens, TOP_K, generator=g)


def oracle(seed: int, tokens: int, layer: int) -> torch.Tensor:
    placement = one_worker(LAYERS, EXPERTS)
    local = TransportDispatcher(placement, 0, toy_store(MODULES, placement, 0), LocalTransport(), device=CPU)
    local.begin([tokens], None)
    return local.forward(layer, *choices(tokens, seed))


def check(placement: Placement, tokens: list[int], kind: str, dense_tokens: int = 0) -> None:
    size = len(placement.workers)
    transports = make_transports(kind, size)

    def serve(rank: int) -> list[torch.Tensor]:
        store = toy_store(MODULES, placement, rank)
        dispatcher = TransportDispatcher(placement, rank, store, transports[rank], device=CPU, most_dense=dense_tokens)
        dispatcher.begin(tokens, None)
        if not tokens[rank]:
            shape = LayerShape(hidden=HIDDEN, top_k=TOP_K, dtype=torch.float32)
            dispatcher.idle([shape] * LAYERS, CPU)
            return [torch.empty(0, HIDDEN)] * LAYERS
        return [dispatcher.forward(layer, *choices(tokens[rank], rank)) for layer in range(LAYERS)]

    for rank, outputs in enumerate(run_group(size, serve)):
        for layer, output in enumerate(outputs):
            if tokens[rank]:
                torch.testing.assert_close(output, oracle(rank, tokens[rank], layer), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["shm", "tcp", "gpu"])
@pytest.mark.parametrize("slots", [(3, 3), (2, 2, 2), (4, 2), (3, 2, 1), (1, 1, 1, 1, 1, 1)])
def test_any_split_gives_the_same_sums(kind: str, slots: tuple[int, ...]) -> None:
    tokens = [5, 0, 3, 1, 2, 4][: len(slots)]
    check(contiguous(LAYERS, EXPERTS, workers(*slots)), tokens, kind)


@pytest.mark.parametrize("kind", ["shm", "tcp", "gpu"])
def test_everything_to_everyone_gives_the_same_sums(kind: str) -> None:
    check(contiguous(LAYERS, EXPERTS, workers(2, 2, 2)), [3, 0, 2], kind, dense_tokens=100)


@pytest.mark.parametrize(("gbps", "all_go"), [(None, True), (100.0, True), (1e-6, False)])
def test_over_a_slow_link_only_those_tokens_go_that_must(gbps: float | None, all_go: bool) -> None:
    placement, tokens = contiguous(LAYERS, EXPERTS, workers(5, 1)), 12
    transports = make_transports("tcp", 2)
    sent: list[int] = []

    def serve(rank: int) -> torch.Tensor:
        transport = transports[rank]
        exchange = transport.all_to_all

        def count(send: Sequence[Sequence[torch.Tensor]], sizes: Sequence[int] | None) -> list[torch.Tensor]:
            sent.append(sum(part.nbytes for part in send[1 - rank]))
            return exchange(send, sizes)

        transport.all_to_all = count  # type: ignore[method-assign]
        store = toy_store(MODULES, placement, rank)
        dispatcher = TransportDispatcher(placement, rank, store, transport, device=CPU, slowest_gbps=gbps)
        dispatcher.begin([tokens] * 2, None)
        return dispatcher.forward(0, *choices(tokens, rank))

    for rank, output in enumerate(run_group(2, serve)):
        torch.testing.assert_close(output, oracle(rank, tokens, 0), rtol=1e-5, atol=1e-6)
    row = row_bytes(HIDDEN, TOP_K, torch.float32)
    # sums come back in float64
    most = 2 * tokens * (row + 8 * HIDDEN)
    assert (sum(sent) == most) == all_go
    assert sum(sent) <= most


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Any worker may hold any experts, with replicas and empty slots, as long as every expert is somewhere."""
    size = draw(st.integers(2, 4))
    held = [[set(draw(st.sets(st.integers(0, EXPERTS - 1)))) for _ in range(size)] for _ in range(LAYERS)]
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            if not any(expert in experts for experts in held[layer]):
                held[layer][draw(st.integers(0, size - 1))].add(expert)
    slots = [max(1, *(len(held[layer][w]) for layer in range(LAYERS))) for w in range(size)]
    table = [
        [e for w in range(size) for e in [*sorted(held[layer][w]), *[EMPTY] * (slots[w] - len(held[layer][w]))]]
        for layer in range(LAYERS)
    ]
    return Placement(num_logical_experts=EXPERTS, workers=workers(*slots), physical_to_logical_map=np.array(table))


@settings(max_examples=25, deadline=None)
@given(placements(), st.data())
def test_any_placement_gives_the_same_sums(placement: Placement, data: st.DataObject) -> None:
    tokens = [data.draw(st.integers(0, 4)) for _ in placement.workers]
    check(placement, tokens, "shm", dense_tokens=data.draw(st.sampled_from([0, 100])))


def test_replicas_are_chosen_by_the_steps_counts_and_no_token_changes() -> None:
    """Expert 0 is on both workers, and worker 0 has more to do: worker 1 computes it, for worker 0's tokens too."""
    table = [[0, 1, 2, 3, 0, 4, 5, EMPTY]] * LAYERS
    placement = Placement(num_logical_experts=EXPERTS, workers=workers(4, 4), physical_to_logical_map=np.array(table))
    index = torch.tensor([[0, 1, 2], [0, 1, 3], [1, 2, 3], [0, 2, 3]])
    values = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0)), torch.full((4, TOP_K), 0.3)

    def outputs(chosen: bool) -> tuple[list[torch.Tensor], list[list[int]]]:
        transports = make_transports("shm", 2)
        computed: list[list[int]] = [[], []]

        def serve(rank: int) -> torch.Tensor:
            store = toy_store(MODULES, placement, rank)
            sums = store.sums

            def note(layer: int, x: torch.Tensor, mine: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
                computed[rank] = sorted({int(expert) for expert in mine.unique() if expert < EXPERTS} - {-1})
                return sums(layer, x, mine, weight)

            store.sums = note  # type: ignore[method-assign]
            dispatcher = TransportDispatcher(placement, rank, store, transports[rank], device=CPU, most_dense=100)
            if not chosen:
                dispatcher._choices = []
            dispatcher.begin([4, 4], None)
            return dispatcher.forward(0, values[0], index, values[1])

        return run_group(2, serve), computed

    by_counts, computed = outputs(True)
    by_rank, both = outputs(False)
    assert computed == [[1, 2, 3], [0]]
    assert both == [[0, 1, 2, 3], [0]]
    for one, other in zip(by_counts, by_rank, strict=True):
        # PyTorch's products have other last bits for another number of rows on some CPUs
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(placements())
def test_routes_lead_to_holders_and_prefer_home(placement: Placement) -> None:
    tables = [route_table(placement, rank) for rank in range(len(placement.workers))]
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            holders = {placement.rank_of(w) for w in placement.holders(layer, expert)}
            chosen = [int(table[layer, expert]) for table in tables]
            assert set(chosen) <= holders
            assert all(chosen[rank] == rank for rank in holders)
            # workers without a replica take the replicas in turn
            away = [rank for rank in range(len(chosen)) if rank not in holders]
            shares = [sum(chosen[rank] == holder for rank in away) for holder in holders]
            assert max(shares) - min(shares) <= 1


class Aborted(LocalTransport):
    """On a device, an exchange that is aborted ends with any bytes, and the CPU learns of it later."""

    size = 2

    def all_to_all(
        self, send: Sequence[Sequence[torch.Tensor]], recv_bytes: Sequence[int] | None
    ) -> list[torch.Tensor]:
        row = row_bytes(HIDDEN, TOP_K, torch.float32)
        sizes = [row * 4] * 2 if recv_bytes is None else recv_bytes
        return [torch.full((int(n),), 0x7F, dtype=torch.uint8) for n in sizes]

    def check(self) -> None:
        raise StepAborted("aborted")


@pytest.mark.parametrize("most_dense", [0, 100])
def test_bytes_of_an_aborted_exchange_are_computed_without_harm(most_dense: int) -> None:
    """An index beyond a table would end a device's context."""
    placement = contiguous(LAYERS, EXPERTS, workers(3, 3))
    stacked = StackedExperts(MODULES[0])
    for expert in placement.experts_of(placement.workers[0].id, 0):
        stacked.put(expert, MODULES[0].weights[expert])
    stacked.keep_only({0, 1, 2})
    dispatcher = TransportDispatcher(placement, 0, ExpertStore([stacked]), Aborted(), device=CPU, most_dense=most_dense)
    dispatcher.begin([3, 4], None)
    assert dispatcher.forward(0, *choices(3, 0)).shape == (3, HIDDEN)
    with pytest.raises(StepAborted):
        dispatcher.finish()


def test_an_error_that_comes_from_an_aborted_exchange_is_its_abort() -> None:
    """Its bytes ask for an expert that is not here."""
    placement = contiguous(LAYERS, EXPERTS, workers(3, 3))
    dispatcher = TransportDispatcher(
        placement, 0, toy_store(MODULES, placement, 0), Aborted(), device=CPU, most_dense=0
    )
    dispatcher.begin([3, 4], None)
    with pytest.raises(StepAborted):
        dispatcher.forward(0, *choices(3, 0))


def test_counts_follow_the_choices() -> None:
    placement = one_worker(LAYERS, EXPERTS)
    dispatcher = TransportDispatcher(placement, 0, toy_store(MODULES, placement, 0), LocalTransport(), device=CPU)
    counter = RoutingCounter(LAYERS, EXPERTS)
    indices = []
    dispatcher.begin([4], counter)
    for layer in range(LAYERS):
        hidden, index, weight = choices(4, layer)
        indices.append(index)
        dispatcher.forward(layer, hidden, index, weight)
    # two sequences that decode around a prompt of two tokens
    counter.commit_step([1, 2, 1])
    counter.note_time(0.5, 9, decode=False)
    dispatcher.begin([4], counter)
    dispatcher.forward(0, *choices(4, 9))
    counter.discard_step()
    counts = counter.take()
    assert (counts.prefill.tokens, counts.decode.tokens) == (2, 2)
    assert (counts.prefill.steps_s, counts.prefill.steps_tokens, counts.decode.steps_tokens) == (0.5, 9, 0)
    for layer in range(LAYERS):
        decoding = torch.bincount(indices[layer][[0, 3]].flatten(), minlength=EXPERTS)
        assert counts.decode.load[layer].tolist() == decoding.tolist()
        assert counts.load[layer].tolist() == torch.bincount(indices[layer].flatten(), minlength=EXPERTS).tolist()
    expected = np.zeros((EXPERTS, EXPERTS), dtype=np.int64)
    for token in range(4):
        for a in indices[0][token].tolist():
            for b in indices[1][token].tolist():
                expected[a, b] += 1
    window = RoutingWindow(LAYERS, EXPERTS, window_s=60.0)
    window.add(counts, 0.0)
    assert np.array_equal(window.sample(0.0).transitions()[0], expected), "so few tokens are all in the sample"
    assert counter.take().tokens == 0


def test_decode_steps_count_as_if_each_were_counted_alone() -> None:
    """However many of them are counted together, and with other steps between them."""
    generator = torch.Generator().manual_seed(0)
    steps = [tokens for n in range(1, 80) for tokens in ([[1] * (n % 5 + 1)] if n % 7 else [[1] * 1030, [3, 1]])]
    together, alone = (RoutingCounter(LAYERS, EXPERTS, rng=np.random.default_rng(3)) for _ in range(2))
    parts = []
    for step in steps:
        index = torch.randint(EXPERTS, (LAYERS, sum(step), TOP_K), generator=generator)
        for layer in index:
            together.note(layer[None])
        together.commit_step(step)
        alone.note(index)
        alone.commit_step(step)
        parts.append(alone.take())
    whole = together.take()
    for phase in ("prefill", "decode"):
        counted, wanted = getattr(whole, phase), [getattr(part, phase) for part in parts]
        assert counted.tokens == sum(one.tokens for one in wanted)
        assert np.array_equal(counted.load, sum(one.load for one in wanted))
    samples = [part.sample for part in parts]
    assert sum(map(len, samples)) == sum(map(sum, steps))
    if len(whole.sample) == sum(map(sum, steps)):
        assert np.array_equal(whole.sample, np.concatenate(samples))
    assert together.take().tokens == 0
