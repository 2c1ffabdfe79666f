"""Native single tokens of recurrent layers: as transformers' own functions, at odd sizes, whatever the threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.qwen3_next import modeling_qwen3_next

from elastic_moe.model.states.finding import StateKind
from elastic_moe.model.states.recurrent import Slots
from elastic_moe.model.states.rules import convolution_of, delta_rule_of, selective_update_of, slots_in_use

SOURCES, TARGETS = torch.tensor([4, 0, 2]), torch.tensor([1, 5, 3])
ROWS = 3


def original(function: Any) -> Callable[..., Any]:
    # a model that was fitted before has left its own function
    found: Callable[..., Any] = getattr(function, "emoe_original", function)
    return found


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize(("key_size", "value_size"), [(128, 128), (24, 70), (5, 3)])
def test_the_gated_delta_rule(lib: ctypes.CDLL, key_size: int, value_size: int, by_channel: bool) -> None:
    heads, groups = 4, (4 if by_channel else 2)
    theirs = original(
        modeling_kimi_linear.recurrent_kimi_delta_attention
        if by_channel
        else modeling_qwen3_next.torch_recurrent_gated_delta_rule
    )
    states = draw(6, heads, key_size, value_size)
    query, key = draw(ROWS, 1, groups, key_size), draw(ROWS, 1, groups, key_size + 1)[..., :-1]
    value, beta = draw(ROWS, 1, heads, value_size), draw(ROWS, 1, heads).sigmoid()
    decay = -draw(*((ROWS, 1, heads, key_size) if by_channel else (ROWS, 1, heads))).abs()
    given: dict[str, Any] = {"g": decay, "beta": beta, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    expected, after = theirs(query, key, value, initial_state=states[SOURCES], **given)
    before = states.clone()
    with slots_in_use({StateKind.RECURRENT: Slots(states=states, sources=SOURCES, targets=TARGETS)}):
        out, _ = delta_rule_of(lib)(theirs)(query, key, value, initial_state=states[:0], **given)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[TARGETS], after, rtol=1e-5, atol=1e-5)
    assert torch.equal(states[SOURCES], before[SOURCES]), "a state that may be needed again was overwritten"


@pytest.mark.parametrize(("head_size", "state_size"), [(64, 128), (5, 19)])
def test_mamba_2(lib: ctypes.CDLL, head_size: int, state_size: int) -> None:
    heads, groups = 4, 2
    theirs = original(modeling_granitemoehybrid.mamba2_selective_state_update)
    states = draw(6, heads, head_size, state_size)
    spread = (-1, -1, head_size)
    given: dict[str, Any] = {
        "hidden_states": draw(ROWS, heads, head_size),
        "dt": draw(ROWS, heads, 1).expand(*spread),
        "A": -draw(heads, 1, 1).exp().expand(-1, head_size, state_size),
        "B": draw(ROWS, groups, state_size),
        "C": draw(ROWS, groups, state_size + 1)[..., :-1],
        "D": draw(heads, 1).expand(-1, head_size),
        "dt_bias": draw(heads, 1).expand(-1, head_size),
        "dt_softplus": True,
    }
    after, before = states[SOURCES], states.clone()
    expected = theirs(after, **given)
    with slots_in_use({StateKind.RECURRENT: Slots(states=states, sources=SOURCES, targets=TARGETS)}):
        out = selective_update_of(lib)(theirs)(states[:0], **given)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[TARGETS], after, rtol=1e-5, atol=1e-5)
    assert torch.equal(states[SOURCES], before[SOURCES])


@pytest.mark.parametrize(("activation", "biased"), [("silu", False), (None, True)])
@pytest.mark.parametrize(("channels", "width"), [(64, 4), (21, 3)])
def test_short_convolutions(lib: ctypes.CDLL, channels: int, width: int, activation: str | None, biased: bool) -> None:
    theirs = original(modeling_qwen3_next.causal_conv1d_update)
    states, x = draw(6, channels, width).bfloat16(), draw(ROWS, channels, 1).bfloat16()
    weight, bias = draw(channels, width + 1)[:, :-1].bfloat16(), draw(channels).bfloat16() if biased else None
    after, before = states[SOURCES], states.clone()
    expected = theirs(x, after, weight, bias, activation)
    with slots_in_use({StateKind.CONVOLUTION: Slots(states=states, sources=SOURCES, targets=TARGETS)}):
        out = convolution_of(lib)(theirs)(x, states[:0], weight, bias, activation)
    # both round the sum and the activation to 8 bits; sums of other orders may round to the neighbouring value
    torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-8)
    assert torch.equal(states[TARGETS], after)
    assert torch.equal(states[SOURCES], before[SOURCES])


def test_threads_change_nothing(lib: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = original(modeling_qwen3_next.torch_recurrent_gated_delta_rule)
    outputs = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        states = draw(6, 4, 16, 16)
        with slots_in_use({StateKind.RECURRENT: Slots(states=states, sources=SOURCES, targets=TARGETS)}):
            given = {"g": draw(ROWS, 1, 4), "beta": draw(ROWS, 1, 4), "initial_state": states[:0]}
            out, _ = delta_rule_of(lib)(theirs)(*[draw(ROWS, 1, 4, 16)] * 3, **given)
        outputs.append([out, states])
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
