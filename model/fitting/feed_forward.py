"""Joins router, experts and shared expert of feed-forward halves into one native call.

A module is recognised by a trial: it must compute what the call's parts compute, up to the rounding of bfloat16, as the
call's activation may round otherwise than torch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elastic_moe.model.experts.store import attach
from elastic_moe.model.fitting.halves import matrix_of
from elastic_moe.model.native.block import Matrix
from elastic_moe.model.native.layers import FeedForwardHalf
from elastic_moe.model.native.router import Router, ScoredRouter
from elastic_moe.model.operators.trials import OTHERWISE
from elastic_moe.model.trunk.step_batch import StepBatch, current_batch

_TOLERANCE = 2**-6
"""Of a trial, as a share of the largest value."""


class FittedFeedForward:
    """The forward of a module with experts. It calls the original where experts are not native."""

    def __init__(self, original: Callable[..., Any], half: FeedForwardHalf, number: int) -> None:
        """`number`: of the MoE layer."""
        self._original = original
        self._half = half
        self._number = number

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch: Any = current_batch()
        dispatcher = batch.dispatcher if isinstance(batch, StepBatch) else None
        if args or kwargs or dispatcher is None or dispatcher.joint is None or hidden_states.dtype != torch.bfloat16:
            return self._original(hidden_states, *args, **kwargs)
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        out_TH, index_TK = self._half(x_TH, dispatcher.joint, self._number, dispatcher.threads)
        dispatcher.note(index_TK[None])
        return out_TH.view(hidden_states.shape)


def join_feed_forwards(lib: ctypes.CDLL, trunk: nn.Module, experts: Sequence[nn.Module]) -> int:
    """Join each module with experts that is recognised. Returns the number of these.

    `experts` are the trunk's expert modules. A probe replaces their forward, so call `attach` again afterwards.
    """
    attach(experts, _probe)
    numbers = {module: number for number, module in enumerate(experts)}
    count = 0
    for module in trunk.modules():
        held = [child for child in module.children() if child in numbers]
        if len(held) != 1:
            continue
        try:
            half = _half_of(lib, module, held[0])
            same = half is not None and _agrees(module, half, numbers[held[0]])
        except OTHERWISE:  # the module expects other arguments
            continue
        if half is not None and same:
            module.forward = FittedFeedForward(module.forward, half, numbers[held[0]])
            count += 1
    return count


def _probe(number: int, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    # the result differs for different layers, experts and weights
    return hidden * ((index + 1) * weight).sum(-1, keepdim=True).to(hidden.dtype) + number


def _half_of(lib: ctypes.CDLL, module: nn.Module, experts: nn.Module) -> FeedForwardHalf | None:
    """A native half of the module's parts; None if it has others."""
    router, shared, share = None, None, None
    for child in module.children():
        if child is experts:
            continue
        matrices = [matrix_of(getattr(child, f"{name}_proj", None)) for name in ("gate", "up", "down")]
        matrix = matrix_of(child)
        if isinstance(child.forward, Router | ScoredRouter) and router is None:
            router = child.forward
        elif all(isinstance(part, Matrix) for part in matrices) and shared is None:
            shared = matrices
        elif matrix is not None and matrix.packed.columns == 1 and matrix.bias is None and share is None:
            share = matrix.packed
        elif list(child.parameters()):
            return None
    if router is None:
        return None
    gate, up, down = shared or (None, None, None)
    parts = None if gate is None or up is None or down is None else (gate, up, down)
    return FeedForwardHalf(lib, router, parts, share)


@torch.inference_mode()
def _agrees(module: nn.Module, half: FeedForwardHalf, number: int) -> bool:
    router = half.router
    rows = torch.randn(16, router.packed.depth, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = module(rows[None])
    if not isinstance(got, Tensor) or got.shape != (1, *rows.shape) or got.dtype != torch.bfloat16:
        return False
    _, weight, index = router(rows)
    shared, chosen = half(rows, None, number, 1)
    expected = _probe(number, rows, index, weight) + shared
    difference = (got[0].float() - expected.float()).abs().max()
    return torch.equal(chosen, index) and bool(difference <= _TOLERANCE * expected.float().abs().max())
