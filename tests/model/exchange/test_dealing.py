"""Experts that lie in no memory are dealt evenly, and a sum has the same bits whoever computes it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from elastic_moe.cluster.placement import Placement, contiguous
from elastic_moe.model.exchange.dealing import NOBODY, Dealer, word_bytes
from elastic_moe.model.exchange.dispatch import TransportDispatcher
from tests.model.exchange.test_dispatch import CPU, EXPERTS, LAYERS, MODULES, choices
from tests.model.groups import make_transports, one_worker, run_group, toy_store, workers
from tests.model.lockstep import with_pinned


@dataclass
class Told:
    """What a worker says of itself."""

    fetch_s: float = 1.0
    experts: Collection[int] = field(default_factory=set)

    def in_memory(self, layer: int) -> Collection[int]:
        return self.experts


def ranks(placement: Placement, told: list[Told], chosen: list[int]) -> list[int]:
    """Of each expert, as all workers find it."""
    homes = np.array([[0, 0, 1, 1, 2, 2]])
    dealers = [Dealer(placement, homes, one) for one in told]
    words = [dealer.word(0) for dealer in dealers]
    assert {len(word) for word in words} == {word_bytes(EXPERTS)}
    found = [dealer.ranks(0, words, torch.tensor([chosen])).tolist() for dealer in dealers]
    assert all(other == found[0] for other in found)
    return found[0]


def test_misses_are_even_and_what_lies_in_memory_stays() -> None:
    placement = with_pinned(contiguous(1, EXPERTS, workers(2, 2, 2)), 1)
    nothing = [Told(experts={0}), Told(experts={2}), Told(experts={4})]
    # by the placement, rank 2 would fetch one and the others nothing
    assert ranks(placement, nothing, [0, 2, 4, 5]) == [NOBODY] * 5 + [2]
    none_pinned = with_pinned(contiguous(1, EXPERTS, workers(2, 2, 2)), 0)
    assert ranks(none_pinned, [Told(), Told(), Told()], [0, 1, 2]) == [0, 1, 2, NOBODY, NOBODY, NOBODY]
    # those that some worker has are computed there: at home, if home has it
    has = [Told(experts={4, 5}), Told(), Told(experts={4})]
    assert ranks(none_pinned, has, [4, 5, 0, 1]) == [0, 1, NOBODY, NOBODY, 2, 0]


def test_a_faster_disk_gets_more() -> None:
    placement = with_pinned(contiguous(1, EXPERTS, workers(2, 2, 2)), 0)
    found = ranks(placement, [Told(fetch_s=1.0), Told(fetch_s=5.0), Told(fetch_s=0.9)], [0, 1, 2, 3, 4, 5])
    assert [found.count(rank) for rank in range(3)] == [3, 0, 3]


def test_an_unknown_disk_is_like_the_others() -> None:
    placement = with_pinned(contiguous(1, EXPERTS, workers(2, 2, 2)), 0)
    found = ranks(placement, [Told(fetch_s=0.0), Told(fetch_s=1.0), Told(fetch_s=1.0)], [0, 1, 2, 3, 4, 5])
    assert [found.count(rank) for rank in range(3)] == [2, 2, 2]


def test_a_slow_disk_is_asked_now_and_then() -> None:
    placement = with_pinned(contiguous(1, EXPERTS, workers(2, 2, 2)), 0)
    found = ranks(placement, [Told(fetch_s=1.0), Told(fetch_s=1e3), Told(fetch_s=1e3)], [0, 1, 2, 3, 4, 5])
    assert [found.count(rank) for rank in range(3)] == [4, 1, 1]


def test_a_worker_without_a_cache_area_gets_nothing() -> None:
    placement = contiguous(1, EXPERTS, workers(2, 2, 2))
    tiers = placement.tiers.copy()
    tiers[:, 2:] = 2
    placement = Placement(
        num_logical_experts=EXPERTS,
        workers=placement.workers,
        physical_to_logical_map=placement.physical_to_logical_map,
        tiers=tiers,
    )
    found = ranks(placement, [Told(experts={0, 1}), Told(), Told()], [0, 2, 3, 4, 5])
    assert sorted(found) == [NOBODY, NOBODY, 1, 1, 2, 2]


@pytest.mark.parametrize("kind", ["shm", "tcp"])
@pytest.mark.parametrize("pinned", [0, 1])
def test_sums_have_the_same_bits_whoever_computes_them(kind: str, pinned: int) -> None:
    placement, tokens = with_pinned(contiguous(LAYERS, EXPERTS, workers(2, 2, 2)), pinned), [2, 0, 3]
    everything = one_worker(LAYERS, EXPERTS)

    def outputs(dealt: bool) -> list[list[torch.Tensor]]:
        transports = make_transports(kind, len(tokens))

        def serve(rank: int) -> list[torch.Tensor]:
            # what lies on a disk can be computed everywhere
            store = toy_store(MODULES, everything, 0)
            memory = Told() if dealt else None
            dispatcher = TransportDispatcher(placement, rank, store, transports[rank], device=CPU, memory=memory)
            assert dispatcher.deals == dealt
            dispatcher.begin(tokens, None)
            return [dispatcher.forward(layer, *choices(tokens[rank], rank)) for layer in range(LAYERS)]

        return run_group(len(tokens), serve)

    for dealt, placed in zip(outputs(True), outputs(False), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(dealt, placed, strict=True))
