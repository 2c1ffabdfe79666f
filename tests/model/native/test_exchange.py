"""MoE layers of several workers in native code: PyTorch's arithmetic is the oracle, and peers may die at any time."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec
from elastic_moe.cluster.placement import Placement, contiguous
from elastic_moe.model.exchange.dispatcher import LayerShape, held_table, route_table
from elastic_moe.model.exchange.join import join_exchange, make_dispatcher
from elastic_moe.model.exchange.native_dispatch import NativeDispatcher
from elastic_moe.model.exchange.shared_memory import SharedMemoryTransport
from elastic_moe.model.native import library
from elastic_moe.model.native.exchange import NativeExchange
from elastic_moe.model.native.segments import DIRECTORY
from elastic_moe.optimizer.buffering.replicas import ReplicaChoice
from tests.model.exchange.test_dispatch import placements
from tests.model.groups import ToyExperts, run_group, toy_store, workers
from tests.model.processes import processes

LAYERS, EXPERTS, HIDDEN, WIDTH, TOP_K = 2, 6, 72, 40, 3
SHAPE = LayerShape(hidden=HIDDEN, top_k=TOP_K, dtype=torch.bfloat16)
CPU = torch.device("cpu")


MODULES = [ToyExperts(EXPERTS, HIDDEN, WIDTH, seed, torch.bfloat16) for seed in range(LAYERS)]


def choices(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, EXPERTS, generator=g).argsort(1)[:, :TOP_K]
    return torch.randn(tokens, HIDDEN, generator=g).bfloat16(), index, torch.rand(tokens, TOP_K, generator=g)


def oracle(layer: int, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    """In float32, from the same weights."""
    module, out_TH = MODULES[layer], torch.zeros(x_TH.shape)
    for token, (row, experts, weights) in enumerate(zip(x_TH.float(), index_TK, weight_TK, strict=True)):
        for expert, weight in zip(experts.tolist(), weights, strict=True):
            tensors = {name: t.float() for name, t in module.weights[expert].items()}
            hidden = module._apply_gate(tensors["gate_up_proj"] @ row)
            out_TH[token] += weight * (tensors["down_proj"] @ hidden)
    return out_TH


def join(lib: ctypes.CDLL, size: int, *, round_tokens: int = 1024, timeout_s: float = 20.0) -> list[NativeExchange]:
    group = f"emoe-test-{uuid.uuid4().hex[:8]}"
    return run_group(size, lambda rank: exchange(lib, group, rank, size, round_tokens, timeout_s))


def exchange(
    lib: ctypes.CDLL, group: str, rank: int, size: int, round_tokens: int = 1024, timeout_s: float = 20.0
) -> NativeExchange:
    return NativeExchange(
        lib,
        group=group,
        rank=rank,
        size=size,
        hidden=HIDDEN,
        top_k=TOP_K,
        max_tokens=round_tokens,
        timeout_s=timeout_s,
    )


def serve(placement: Placement, tokens: list[int], exchanges: list[NativeExchange]) -> list[list[torch.Tensor]]:
    """Outputs of every rank and layer; the tokens of each rank are different."""

    def run(rank: int) -> list[torch.Tensor]:
        dispatcher = NativeDispatcher(placement, rank, toy_store(MODULES, placement, rank), exchanges[rank])
        dispatcher.begin(tokens, None)
        if not tokens[rank]:
            dispatcher.idle([SHAPE] * LAYERS, CPU)
            return []
        return [dispatcher.forward(layer, *choices(tokens[rank], rank)) for layer in range(LAYERS)]

    return run_group(len(tokens), run)


def check(placement: Placement, tokens: list[int], exchanges: list[NativeExchange]) -> None:
    for rank, outputs in enumerate(serve(placement, tokens, exchanges)):
        for layer, output in enumerate(outputs):
            expected = oracle(layer, *choices(tokens[rank], rank))
            torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("slots", [(3, 3), (2, 2, 2), (5, 1), (3, 2, 1), (1, 1, 1, 1, 1, 1)])
def test_any_split_gives_the_same_sums(lib: ctypes.CDLL, slots: tuple[int, ...]) -> None:
    placement = contiguous(LAYERS, EXPERTS, workers(*slots))
    exchanges = join(lib, len(slots))
    # one group, one step after another
    for tokens in ([5, 0, 3, 1, 2, 4], [1, 0, 0, 0, 0, 0], [0, 33, 0, 2, 0, 1]):
        check(placement, tokens[: len(slots)], exchanges)


@pytest.mark.parametrize("tokens", [[50, 3, 0], [7, 14, 21], [0, 0, 1]])
def test_steps_larger_than_a_round_go_in_several(lib: ctypes.CDLL, tokens: list[int]) -> None:
    check(contiguous(LAYERS, EXPERTS, workers(2, 2, 2)), tokens, join(lib, 3, round_tokens=7))


def test_segments_fit_into_a_small_directory(lib: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container has a /dev/shm of 64 MB by default; rounds are smaller there."""
    tokens, ample = [300, 1, 40], join(lib, 3)
    total = 3 * ample[0]._views[0].numel()
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_frsize=4096, f_blocks=total // 4096))
    small = join(lib, 3)
    # this group's segments and those of the next have room beside each other
    assert sum(view.numel() for view in small[0]._views) <= total // 2
    check(contiguous(LAYERS, EXPERTS, workers(2, 2, 2)), tokens, small)


@settings(max_examples=25, deadline=None)
@given(placement=placements(), data=st.data())
def test_any_placement_gives_the_same_sums(placement: Placement, data: st.DataObject) -> None:
    lib = library()
    if lib is None:
        pytest.skip("no native library")
    tokens = [data.draw(st.integers(0, 12)) for _ in placement.workers]
    check(placement, tokens, join(lib, len(tokens), round_tokens=data.draw(st.integers(4, 16))))


def test_sums_are_the_same_bits_on_every_run_and_in_any_company(lib: ctypes.CDLL) -> None:
    placement = contiguous(LAYERS, EXPERTS, workers(2, 2, 2))
    exchanges = join(lib, 3)
    first = serve(placement, [4, 9, 2], exchanges)[0]
    for company in ([4, 9, 2], [4, 0, 40]):
        for _ in range(5):
            for a, b in zip(first, serve(placement, company, exchanges)[0], strict=True):
                assert torch.equal(a, b)


REPLICATED = Placement(
    num_logical_experts=EXPERTS,
    workers=workers(4, 4, 4),
    physical_to_logical_map=np.array([[0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 0, 2]] * LAYERS, dtype=np.int32),
)


def test_replicas_are_chosen_by_the_tokens_and_sums_have_the_same_bits_in_any_company(lib: ctypes.CDLL) -> None:
    exchanges = join(lib, 3)
    first = serve(REPLICATED, [4, 9, 2], exchanges)[0]
    for company in ([4, 0, 0], [4, 30, 1], [4, 1, 40]):
        for a, b in zip(first, serve(REPLICATED, company, exchanges)[0], strict=True):
            assert torch.equal(a, b)
    check(REPLICATED, [4, 9, 2], exchanges)
    # 40 tokens take several rounds of at most 8, in which the choices differ
    for a, b in zip(first, serve(REPLICATED, [4, 1, 40], join(lib, 3, round_tokens=16))[0], strict=True):
        assert torch.equal(a, b)


@settings(max_examples=50, deadline=None)
@given(placement=placements(), seed=st.integers(0, 10**6), most=st.sampled_from([1, 4, 40]))
def test_the_library_chooses_as_its_oracle(placement: Placement, seed: int, most: int) -> None:
    lib = library()
    if lib is None:
        pytest.skip("no native library")
    size, experts = len(placement.workers), placement.num_logical_experts
    routes_WE = torch.stack([route_table(placement, r)[0] for r in range(size)]).to(torch.int16).numpy()
    rng = np.random.default_rng(seed)
    tokens_WE = rng.integers(0, most + 1, (size, experts)).astype(np.int32)
    chosen_WE = np.empty((size, experts), dtype=np.int16)
    lib.emoe_choose_replicas(size, experts, routes_WE.ctypes.data, tokens_WE.ctypes.data, chosen_WE.ctypes.data)
    expected_WE = ReplicaChoice(held_table(placement)[0]).ranks(tokens_WE.astype(np.int64))
    asked = np.broadcast_to(tokens_WE.sum(axis=0) > 0, chosen_WE.shape)
    assert (chosen_WE[asked] == expected_WE[asked]).all()


def test_all_ranks_take_the_same_path(lib: ctypes.CDLL) -> None:
    placement = contiguous(LAYERS, EXPERTS, workers(3, 3))

    def joined(able: list[bool]) -> list[object]:
        spec = EpochSpec(
            epoch=Epoch(1),
            placement=placement,
            group=f"emoe-test-{uuid.uuid4().hex[:8]}",
            transport="shm",
            rendezvous="",
        )

        def go(rank: int) -> object:
            modules = MODULES if able[rank] else [ToyExperts(EXPERTS, HIDDEN, WIDTH, seed) for seed in range(LAYERS)]
            store = toy_store(modules, placement, rank)
            group = join_exchange(spec, rank, [SHAPE] * LAYERS, native=store.native, max_tokens=64, timeout_s=20)
            make_dispatcher(placement, rank, store, group, CPU).begin([0, 0], None)
            return group

        return run_group(2, go)

    assert all(isinstance(group, NativeExchange) for group in joined([True, True]))
    assert all(isinstance(group, SharedMemoryTransport) for group in joined([True, False]))


# --- Peers that are gone ----------------------------------------------------------------------------------------


def test_no_name_stays_behind_and_memory_goes_with_the_group(lib: ctypes.CDLL) -> None:
    group = f"emoe-test-{uuid.uuid4().hex[:8]}"
    exchanges = run_group(2, lambda rank: exchange(lib, group, rank, 2))
    assert not list(DIRECTORY.glob(f"{group}*"))
    assert group in Path("/proc/self/maps").read_text()
    exchanges.clear()
    gc.collect()
    assert group not in Path("/proc/self/maps").read_text()


def test_a_peer_that_does_not_come_is_given_up(lib: ctypes.CDLL) -> None:
    group = f"emoe-test-{uuid.uuid4().hex[:8]}"
    with pytest.raises(StepAborted, match="did not join"):
        exchange(lib, group, 0, 2, timeout_s=0.2)
    assert not list(DIRECTORY.glob(f"{group}*"))


def layer_of(exchange: NativeExchange, rank: int, tokens: int) -> torch.Tensor:
    placement = contiguous(LAYERS, EXPERTS, workers(*[3] * exchange.size)[: exchange.size])
    routes = torch.stack([route_table(placement, r)[0] for r in range(exchange.size)]).to(torch.int16)
    store = toy_store(MODULES, placement, rank)
    return exchange.layer(store.native_layer(0), routes, *choices(tokens, rank))


def test_ranks_that_disagree_about_a_step_raise_an_error(lib: ctypes.CDLL) -> None:
    exchanges = join(lib, 2)

    def go(rank: int) -> str:
        exchanges[rank].begin([2, 3] if rank else [2, 4])
        try:
            layer_of(exchanges[rank], rank, 3 if rank else 2)
        except (AssertionError, StepAborted) as error:
            exchanges[1 - rank].abort()
            return str(error)
        return ""

    assert "disagree" in run_group(2, go)[0]


def _peer(group: str, ready: Connection) -> None:
    """Runs rank 1 in a process of its own: it computes layer after layer without end."""
    lib = library()
    assert lib is not None
    ready.send(True)
    mine = exchange(lib, group, 1, 2)
    mine.begin([2, 3])
    run_for_ever(mine, 1, 3)


def run_for_ever(exchange: NativeExchange, rank: int, tokens: int) -> None:
    while True:
        layer_of(exchange, rank, tokens)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("aborted", [True, False], ids=["aborted", "deadline"])
def test_a_peer_that_dies_or_hangs_in_the_middle_frees_the_others(
    lib: ctypes.CDLL, number: signal.Signals, aborted: bool
) -> None:
    group = f"emoe-test-{uuid.uuid4().hex[:8]}"
    context = processes()
    ours, theirs = context.Pipe(duplex=False)
    peer = context.Process(target=_peer, args=(group, theirs))
    peer.start()
    try:
        assert ours.recv()
        mine = exchange(lib, group, 0, 2, timeout_s=60.0 if aborted else 2.0)
        mine.begin([2, 3])
        assert peer.pid is not None
        after(0.2, lambda: os.kill(peer.pid or 0, number))
        if aborted:
            after(0.4, mine.abort)
        begin = time.monotonic()
        with pytest.raises(StepAborted, match="aborted" if aborted else "not answered"):
            run_for_ever(mine, 0, 2)
        assert time.monotonic() - begin < 40
    finally:
        peer.kill()
        peer.join()
    assert not list(DIRECTORY.glob(f"{group}*"))


def after(seconds: float, call: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
