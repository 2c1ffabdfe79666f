"""What the attention halves of decoder layers have in common that run as one native call."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from elastic_moe.model.native.attention import TILE, NativeBatch
from elastic_moe.model.native.block import BareNorm, Matrix, Norm
from elastic_moe.model.native.linear import Packed
from elastic_moe.model.trunk.attention import Window
from elastic_moe.model.trunk.attention_path import AttentionPath, KVShape
from elastic_moe.model.trunk.kv_cache import KVCache
from elastic_moe.model.trunk.linear import PackedLinear
from elastic_moe.model.trunk.step_batch import SequenceSlice, StepBatch, step_context

_FAR = 1 << 20
"""A position in trials, at which a layer differs from a native call if it does more with positions than to rotate."""


class Rotation(Enum):
    """What a layer makes of cosines and sines that are narrower than its heads."""

    REFUSES = "it takes none"
    PART = "it rotates the first numbers of a head"
    TWICE = "they are for both halves of a head"
    """They are half as wide as a head."""


def fed_forward(module: nn.Module, x: Tensor) -> Any:
    """The output of a feed-forward half. Some return their router's scores beside it."""
    out = module(x)
    return out[0] if isinstance(out, tuple) else out


class Tail:
    """What follows the attention half of most layers: sum + factor * behind(feed-forward half).

    The feed-forward half takes the normalised sum, or the sum where there is no norm before it.
    """

    def __init__(self, feed_forward: nn.Module, *, behind: nn.Module | None = None, factor: float = 1.0) -> None:
        self.feed_forward = feed_forward
        self._behind = behind
        self._factor = factor

    @property
    def plain(self) -> bool:
        """Whether it is the sum alone."""
        return self._behind is None and self._factor == 1.0

    def __call__(self, sum_TH: Tensor, normed_TH: Tensor) -> Tensor:
        out: Tensor = fed_forward(self.feed_forward, normed_TH[None])[0]
        out = out if self._behind is None else self._behind(out)
        return sum_TH + (out if self._factor == 1.0 else out * self._factor)


def native_input(batch: Any, hidden: Tensor, mask: Any) -> bool:
    """Whether native functions accept the arguments that a trunk passes to a layer in a step."""
    return (
        isinstance(batch, StepBatch)
        and isinstance(batch.fused, NativeBatch)
        and isinstance(mask, Window)
        and hidden.dtype == torch.bfloat16
        and hidden.is_contiguous()
    )


def native_embeddings(embeddings: Any, tokens: int, head_size: int, rotation: Rotation) -> tuple[Tensor, Tensor] | None:
    """The cosines and sines [T, D] of so many tokens that native functions take; None if a trunk's are none."""
    if not isinstance(embeddings, tuple) or len(embeddings) != 2:
        return None
    cosines, sines = embeddings
    width = cosines.shape[-1]
    if not all(t.shape == (1, tokens, width) and t.dtype == torch.bfloat16 for t in embeddings):
        return None
    if width == head_size or (width < head_size and width % 2 == 0 and rotation is Rotation.PART):
        return cosines[0].contiguous(), sines[0].contiguous()
    if 2 * width == head_size and rotation is Rotation.TWICE:
        return torch.cat((cosines[0], cosines[0]), -1), torch.cat((sines[0], sines[0]), -1)
    return None


def matrix_of(module: Any) -> Matrix | None:
    """The packed matrix of a linear layer, or None."""
    if not isinstance(module, PackedLinear) or not isinstance(module.packed, Packed):
        return None
    return Matrix(packed=module.packed, bias=module.bias)


def norm_of(module: Any, size: int | None = None) -> Norm | None:
    """The native norm of a module, or None. `size`: of the rows, for a norm without weights."""
    forward = getattr(module, "forward", None)
    if isinstance(forward, BareNorm) and size is not None:
        return forward.of(size)
    return forward if isinstance(forward, Norm) else None


def same_in_trial(
    layer: nn.Module,
    fitted: Callable[..., Any],
    path: AttentionPath,
    shape: KVShape,
    hidden_size: int,
    width: int,
    *,
    border: int | None = None,
) -> bool:
    """Whether a layer and its joined forward agree: on a prompt and the token after it, with and without a window.

    `shape` is that of the layer's cache, and `width` that of cosines and sines. `border`: a position from which on the
    layer may compute something else; tokens just before it and across it are tried too.
    """
    number = int(layer.self_attn.layer_idx)  # type: ignore[arg-type, union-attr]
    generator = torch.Generator().manual_seed(0)
    cpu = torch.device("cpu")

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).bfloat16()

    near = [] if border is None else [(None, max(0, border - 6)), (None, max(0, border - 3))]
    for size, at in ((None, 0), (3, 0), *near, (None, _FAR)):
        caches = [
            KVCache({number: shape}, num_blocks=1, block_size=TILE, dtype=torch.bfloat16, device=cpu, path=path)
            for _ in range(2)
        ]
        for first, last in itertools.pairwise((0, 5, 6)):
            piece = SequenceSlice(token_ids=[0] * (last - first), start=first, block_ids=[0], prompt_length=5)
            tokens = last - first
            hidden = random(1, tokens, hidden_size)
            embeddings = random(1, tokens, width), random(1, tokens, width)
            outputs = []
            for forward, cache in zip((layer.forward, fitted), caches, strict=True):
                with step_context(StepBatch.build([piece], cache, cpu)):
                    outputs.append(
                        forward(
                            hidden.clone(),
                            attention_mask=Window(size),
                            position_ids=torch.arange(at + first, at + last)[None],
                            position_embeddings=embeddings,
                            past_key_values=None,
                            use_cache=False,
                        )
                    )
            if not all(isinstance(out, Tensor) for out in outputs) or not torch.equal(*outputs):
                return False
    return True
