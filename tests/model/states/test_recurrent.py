"""Native single tokens of recurrent layers: as transformers' own functions, at odd sizes, whatever the threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.jamba import modeling_jamba
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.qwen3_next import modeling_qwen3_next

from elastic_moe.model.states.finding import StateKind
from elastic_moe.model.states.recurrent import (
    DeltaInputs,
    SelectiveInputs,
    Slots,
    channel_scan,
    channel_update,
    convolve,
    convolve_tokens,
    delta_rule,
    delta_scan,
    selective_scan,
    selective_update,
)
from elastic_moe.model.states.rules import (
    channel_scan_of,
    channel_update_of,
    convolution_of,
    convolution_scan_of,
    delta_rule_of,
    delta_scan_of,
    scans_begin_with,
    selective_scan_of,
    selective_update_of,
    slots_in_use,
)

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


@pytest.mark.parametrize(("channels", "state_size"), [(64, 16), (5, 19)])
def test_mamba(lib: ctypes.CDLL, channels: int, state_size: int) -> None:
    theirs = original(modeling_jamba.mamba_selective_state_update)
    states = draw(6, channels, state_size)
    given: dict[str, Any] = {
        "hidden_states": draw(ROWS, channels),
        "dt": draw(ROWS, channels + 1)[:, :-1],
        "A": -draw(channels, state_size).exp(),
        "B": draw(ROWS, state_size),
        "C": draw(ROWS, state_size + 1)[..., :-1],
        "D": draw(channels),
        "z": draw(ROWS, channels + 2)[:, :-2],
        "dt_bias": draw(channels),
        "dt_softplus": True,
    }
    after, before = states[SOURCES], states.clone()
    expected = theirs(after, **given)
    with slots_in_use({StateKind.RECURRENT: Slots(states=states, sources=SOURCES, targets=TARGETS)}):
        out = channel_update_of(lib)(theirs)(states[:0], **given)
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


TOKENS = 70
"""More than a chunk of transformers' own scans."""


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("by_channel", [False, True])
def test_the_gated_delta_rule_over_a_prompt(lib: ctypes.CDLL, by_channel: bool, begun: bool) -> None:
    heads, groups, key_size, value_size = 4, (4 if by_channel else 2), 24, 70
    theirs = original(
        modeling_kimi_linear.chunk_kimi_delta_attention
        if by_channel
        else modeling_qwen3_next.torch_chunk_gated_delta_rule
    )
    query, key = draw(1, TOKENS, groups, key_size), draw(1, TOKENS, groups, key_size + 1)[..., :-1]
    value, beta = draw(1, TOKENS, heads, value_size), draw(1, TOKENS, heads).sigmoid()
    decay = -draw(*((1, TOKENS, heads, key_size) if by_channel else (1, TOKENS, heads))).abs()
    given: dict[str, Any] = {"g": decay, "beta": beta, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    given["initial_state"] = draw(1, heads, key_size, value_size) if begun else None
    expected, after = theirs(query, key, value, **given)
    used: set[str] = set()
    with scans_begin_with(None, used):
        out, last = delta_scan_of(lib)(theirs)(query, key, value, **given)
    assert used == {"delta rule"}
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("begun", [False, True])
def test_mamba_2_over_a_prompt(lib: ctypes.CDLL, begun: bool) -> None:
    heads, groups, head_size, state_size = 4, 2, 5, 19
    theirs = original(modeling_granitemoehybrid.mamba2_chunk_scan)
    arguments = [
        draw(1, TOKENS, heads, head_size),
        draw(1, TOKENS, heads),
        -draw(heads).exp(),
        draw(1, TOKENS, groups, state_size),
        draw(1, TOKENS, groups, state_size + 1)[..., :-1],
    ]
    given: dict[str, Any] = {
        "chunk_size": 16,
        "D": draw(heads),
        "dt_bias": draw(heads),
        "dt_softplus": True,
        "dt_limit": (0.1, 2.0),
        "return_final_states": True,
        "initial_states": draw(1, heads, head_size, state_size) if begun else None,
    }
    expected, after = theirs(*arguments, **given)
    with scans_begin_with(None, set()):
        out, last = selective_scan_of(lib)(theirs)(*arguments, **given)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("begun", [False, True])
def test_mamba_over_a_prompt(lib: ctypes.CDLL, begun: bool) -> None:
    channels, state_size = 21, 16
    theirs = original(modeling_jamba.mamba_selective_scan)
    arguments = [
        draw(1, channels, TOKENS),
        draw(1, channels, TOKENS + 1)[..., :-1],
        -draw(channels, state_size).exp(),
        draw(1, state_size, TOKENS),
        draw(1, state_size, TOKENS + 1)[..., :-1],
    ]
    given: dict[str, Any] = {
        "D": draw(channels),
        "z": draw(1, channels, TOKENS),
        "delta_bias": draw(channels),
        "delta_softplus": True,
        "return_last_state": True,
    }
    begin = draw(1, channels, state_size) if begun else None
    rule = channel_scan_of(lib)(theirs)
    with scans_begin_with(begin):
        expected, after = rule(*arguments, **given)
    with scans_begin_with(begin, set()):
        out, last = rule(*arguments, **given)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("activation", "biased"), [("silu", False), (None, True)])
def test_short_convolutions_over_a_prompt(lib: ctypes.CDLL, activation: str | None, biased: bool) -> None:
    theirs = original(modeling_qwen3_next.causal_conv1d_fn)
    x, weight = draw(1, 21, TOKENS).bfloat16(), draw(21, 4).bfloat16()
    bias = draw(21).bfloat16() if biased else None
    with scans_begin_with(None, set()):
        out = convolution_scan_of(lib)(theirs)(x, weight, bias, activation=activation)
    torch.testing.assert_close(out, theirs(x, weight, bias, activation=activation), rtol=2**-6, atol=2**-8)


def test_a_scan_gives_the_bits_of_single_tokens(lib: ctypes.CDLL) -> None:
    """So that a prompt is the same in whatever chunks it is run, and a state that is made again is the same too."""
    query, key, value = draw(9, 2, 24), draw(9, 2, 25)[..., :-1], draw(9, 4, 70)
    gates, beta, begin = -draw(9, 4).abs(), draw(9, 5)[:, :-1].sigmoid(), draw(4, 24, 70)
    x, weight = draw(21, 12).bfloat16(), draw(21, 4).bfloat16()
    rates, steps, turned = -draw(21, 16).exp(), draw(9, 21).sigmoid(), begin.transpose(1, 2).contiguous()

    def alone(rule: Callable[[slice, Slots], Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and state of a rule that is called for each token."""
        states = torch.stack([state, torch.zeros_like(state)])
        outputs = []
        for token in range(9):
            here, there = torch.tensor([token % 2]), torch.tensor([(token + 1) % 2])
            outputs.append(rule(slice(token, token + 1), Slots(states=states, sources=here, targets=there)))
        return torch.cat(outputs), states[9 % 2]

    def delta(at: slice) -> DeltaInputs:
        own = [tensor[at] for tensor in (query, key, value, gates, beta)]
        return DeltaInputs(query=own[0], key=own[1], value=own[2], gates=own[3], beta=own[4], unit=True)

    def selective(at: slice) -> SelectiveInputs:
        own = [tensor[at].bfloat16() for tensor in (value, gates, query, key)]
        vectors = {"rates": -draw(4).exp(), "shift": draw(4), "skip": draw(4)}
        return SelectiveInputs(x=own[0], steps=own[1], read=own[2], written=own[3], softplus=True, **vectors)

    def channels(at: slice) -> list[Tensor]:
        return [steps[at], steps[at] + 1, rates, draw(9, 16)[at], draw(9, 17)[at, :-1]]

    whole = slice(None)
    pairs = [
        (delta_scan(lib, delta(whole), begin), alone(lambda at, slots: delta_rule(lib, delta(at), slots), begin)),
        (
            selective_scan(lib, selective(whole), turned),
            alone(lambda at, slots: selective_update(lib, selective(at), slots), turned),
        ),
        (
            channel_scan(lib, *channels(whole), begin=None),
            alone(lambda at, slots: channel_update(lib, *channels(at), slots=slots), torch.zeros(21, 16)),
        ),
    ]
    for scan, tokens in pairs:
        assert all(torch.equal(*pair) for pair in zip(scan, tokens, strict=True))
    convolved = convolve_tokens(lib, x, weight, None, silu=True)
    # a state of a convolution has its last inputs, of which the first falls out
    state = torch.cat([torch.zeros(21, 1), x[:, :3].float()], dim=1).bfloat16()
    outputs, _ = alone(lambda at, slots: convolve(lib, x.T[3:][at], weight, None, slots, silu=True), state)
    assert torch.equal(outputs.T, convolved[:, 3:])
