"""Joins router, experts and shared or dense part of feed-forward halves into one native call.

A module is recognised by a trial: it must compute what the call's parts compute, up to the rounding of bfloat16, as the
call's activation may round otherwise than torch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elastic_moe.model.experts.store import attach
from elastic_moe.model.fitting.halves import matrix_of, norm_of
from elastic_moe.model.native.block import Matrix
from elastic_moe.model.native.layers import BetweenNorms, FeedForwardHalf, TwoPartHalf
from elastic_moe.model.native.router import NormedRouter, Router, ScoredRouter
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


class TwoParts:
    """What follows the attention half of a layer whose feed-forward half has two parts, a dense one and experts, each
    between norms of its own, as Gemma-4's has. The router takes the sum itself.
    """

    half: TwoPartHalf | None = None
    """The native call, if there is one. It is used where experts are native."""

    def __init__(
        self, dense: nn.Module, router: nn.Module, experts: nn.Module, norms: Mapping[str, nn.Module], factor: Tensor
    ) -> None:
        """`norms` by the names of BetweenNorms. `factor` [1]: the result is multiplied by it."""
        self.dense = dense
        self.router = router
        self.experts = experts
        self.norms = norms
        self.factor = factor
        self.number = 0

    def __call__(self, sum_TH: Tensor, normed_TH: Tensor) -> Tensor:
        """`normed_TH` is the sum after the norm before the dense part."""
        batch: Any = current_batch()
        dispatcher = batch.dispatcher if isinstance(batch, StepBatch) else None
        if self.half is None or dispatcher is None or dispatcher.joint is None:
            return self.by_parts(sum_TH, normed_TH)
        out_TH, index_TK = self.half(sum_TH, normed_TH, dispatcher.joint, self.number, dispatcher.threads)
        dispatcher.note(index_TK[None])
        return out_TH

    def by_parts(self, sum_TH: Tensor, normed_TH: Tensor) -> Tensor:
        """The result, module by module."""
        dense_TH = self.norms["behind_shared"](self.dense(normed_TH))
        _, weight, index = self.router(sum_TH)
        theirs_TH = self.experts(self.norms["before_experts"](sum_TH), index, weight)
        both_TH = dense_TH + self.norms["behind_experts"](theirs_TH)
        out_TH: Tensor = sum_TH + self.norms["behind"](both_TH)
        out_TH *= self.factor
        return out_TH


def two_parts_of(layer: Any) -> TwoParts | None:
    """The two parts of a layer's feed-forward half, found by their usual names; None if it has others.

    A trial of the layer must tell whether it computes the same.
    """
    names = {
        "behind_shared": "post_feedforward_layernorm_1",
        "before_experts": "pre_feedforward_layernorm_2",
        "behind_experts": "post_feedforward_layernorm_2",
        "behind": "post_feedforward_layernorm",
    }
    found = {name: getattr(layer, own, None) for name, own in names.items()}
    dense, router, experts = parts = [getattr(layer, name, None) for name in ("mlp", "router", "experts")]
    if not all(isinstance(part, nn.Module) for part in (*found.values(), *parts)):
        return None
    factor = getattr(layer, "layer_scalar", None)
    one = torch.ones(1, dtype=torch.bfloat16)
    factor = factor if isinstance(factor, Tensor) and factor.numel() == 1 else one
    return TwoParts(dense, router, experts, found, factor)  # type: ignore[arg-type]


def join_feed_forwards(lib: ctypes.CDLL, trunk: nn.Module, experts: Sequence[nn.Module]) -> int:
    """Join each module with experts that is recognised. Returns the number of these.

    `experts` are the trunk's expert modules. A probe replaces their forward, so call `attach` again afterwards.
    """
    attach(experts, _probe)
    numbers = {module: number for number, module in enumerate(experts)}
    count = 0
    for module in trunk.modules():
        tail = getattr(module.forward, "tail", None)
        if isinstance(tail, TwoParts):
            count += _join_two_parts(lib, tail, numbers[tail.experts])
            continue
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


def _join_two_parts(lib: ctypes.CDLL, parts: TwoParts, number: int) -> bool:
    """Join a layer's two parts if a native call computes the same. `number`: of the MoE layer."""
    norms = {name: norm_of(module) for name, module in parts.norms.items()}
    matrices = [matrix_of(getattr(parts.dense, f"{name}_proj", None)) for name in ("gate", "up", "down")]
    router: Any = parts.router.forward
    gate, up, down = matrices
    if gate is None or up is None or down is None or None in norms.values() or not isinstance(router, NormedRouter):
        return False
    for gelu in (True, False):
        try:
            half = TwoPartHalf(
                lib,
                router,
                (gate, up, down),
                BetweenNorms(**norms),  # type: ignore[arg-type]
                gelu=gelu,
                factor=float(parts.factor),
            )
        except ValueError:  # sizes do not fit together
            return False
        if _two_parts_agree(parts, half):
            parts.half, parts.number = half, number
            return True
    return False


@torch.inference_mode()
def _two_parts_agree(parts: TwoParts, half: TwoPartHalf) -> bool:
    generator = torch.Generator().manual_seed(0)
    hidden = half.router.router.packed.depth
    sum_TH, normed_TH, made_TH = (torch.randn(16, hidden, generator=generator).bfloat16() for _ in range(3))
    seen: list[Tensor] = []

    def experts(_: int, rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        seen.extend((index, weight, rows))
        return made_TH

    attach([parts.experts], experts)
    expected_TH = parts.by_parts(sum_TH, normed_TH)
    out_TH, *given = half.trial(sum_TH, normed_TH, made_TH)
    index, weight, rows = seen
    difference = (out_TH.float() - expected_TH.float()).abs().max()
    return (
        torch.equal(given[0], index)
        and torch.equal(given[1], weight)
        and torch.equal(given[2], rows)
        and bool(difference <= _TOLERANCE * expected_TH.float().abs().max())
    )


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
