"""Every gating policy computes what a plain loop over tokens and experts does, where it drops no token."""

from __future__ import annotations

import uuid

import pytest
import torch
from torch import Tensor

from elastic_moe.model.exchange.transports import Transport
from tests.bench.gating_policies import POLICIES, GatedExperts, Member, StaticCapacity, looped, make_policy
from tests.model.groups import make_transports, run_group

EXPERTS, HIDDEN, WIDTH, TOP_K = 4, 64, 32, 2
DROPLESS = [name for name in POLICIES if not name.startswith("GShard")]


def layer_input(tokens: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Skewed choices: the first expert is in half of them."""
    g = torch.Generator().manual_seed(seed)
    preference = torch.tensor([8.0, 1.0, 1.0, 1.0])
    index = torch.multinomial(preference.expand(tokens, EXPERTS), TOP_K, generator=g)
    return torch.randn(tokens, HIDDEN, generator=g).to(dtype), index, torch.rand(tokens, TOP_K, generator=g)


def reference(module: GatedExperts, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    out = torch.zeros(x_TH.shape)
    for t, (experts, weights) in enumerate(zip(index_TK.tolist(), weight_TK.tolist(), strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            hidden = module._apply_gate(module.gate_up[expert].float() @ x_TH[t].float())
            out[t] += weight * (module.down[expert].float() @ hidden)
    return out


def member(transport: Transport, group: str = "alone") -> Member:
    return Member(transport=transport, group=group, top_k=TOP_K, max_tokens=64)


def outputs(name: str, module: GatedExperts, workers: int, inputs: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    transports = make_transports("shm" if workers > 1 else "local", workers)
    group = f"emoe-gating-{uuid.uuid4().hex[:8]}"
    return run_group(workers, lambda rank: make_policy(name, module, member(transports[rank], group))(*inputs[rank]))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", DROPLESS)
def test_dropless_policies_equal_a_plain_loop(name: str, workers: int) -> None:
    module = GatedExperts(EXPERTS, HIDDEN, WIDTH, torch.bfloat16)
    inputs = [layer_input(40, seed) for seed in range(workers)]
    for given, got in zip(inputs, outputs(name, module, workers, inputs), strict=True):
        torch.testing.assert_close(got.float(), reference(module, *given), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_static_capacity_equals_a_plain_loop_where_nothing_overflows(workers: int, indexed: bool) -> None:
    module = GatedExperts(EXPERTS, HIDDEN, WIDTH, torch.float32)
    inputs = [layer_input(20, seed, torch.float32) for seed in range(workers)]
    transports = make_transports("shm" if workers > 1 else "local", workers)
    each = EXPERTS // workers

    def run(rank: int) -> Tensor:
        arithmetic = looped(module, range(rank * each, (rank + 1) * each))
        policy = StaticCapacity(EXPERTS, transports[rank], arithmetic, factor=EXPERTS, indexed=indexed)
        return policy(*inputs[rank])

    for given, got in zip(inputs, run_group(workers, run), strict=True):
        torch.testing.assert_close(got, reference(module, *given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("indexed", [True, False])
def test_static_capacity_drops_the_last_choices_of_a_full_expert(indexed: bool) -> None:
    module = GatedExperts(EXPERTS, HIDDEN, WIDTH, torch.float32)
    x, _, weight = layer_input(8, 0, torch.float32)
    index = torch.tensor([[0, 1]] * 8)
    policy = StaticCapacity(
        EXPERTS, make_transports("local", 1)[0], looped(module, range(4)), factor=1, indexed=indexed
    )
    # 16 choices over 4 experts: each takes 4
    full = torch.where(torch.arange(8)[:, None] < 4, weight, 0.0)
    torch.testing.assert_close(policy(x, index, weight), reference(module, x, index, full), rtol=1e-4, atol=1e-5)
    assert policy.computed_rows == 16


def test_adaptive_capacity_pads_to_the_busiest_expert() -> None:
    module = GatedExperts(EXPERTS, HIDDEN, WIDTH, torch.float32)
    x, _, weight = layer_input(8, 0, torch.float32)
    policy = make_policy("Tutel, adaptive capacity", module, member(make_transports("local", 1)[0]))
    policy(x, torch.tensor([[0, 1]] * 5 + [[2, 3]] * 3), weight)
    assert policy.computed_rows == EXPERTS * 5
