"""Computes a layer that keeps states for all tokens of a step in one call, or the half of a decoder layer that it makes
with the norms beside it: see model/native/states/state_block.cpp.

Legend: T tokens of the step, H hidden, C channels of the convolution, W its width, K key heads, D key size, V value
heads, E value size, S slots.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_moe.model.native import structs
from elastic_moe.model.native.block import GatedNorm, Matrix, Norm, matrix_struct, norm_struct


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """A step's rows by sequence, in order, and the slots of their states. The tensors are int64."""

    rows: Tensor
    """[segments + 1] those of segment n are rows[n] to rows[n + 1]."""
    sources: Tensor
    """[segments] -1: at the beginning of a sequence."""
    targets: Tensor
    """[segments]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateProduct:
    """A linear layer of hidden states, or of what the product `source` makes."""

    matrix: Matrix
    source: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How a layer's states change."""

    selective: bool
    """Whether it is Mamba-2, and not the gated delta rule. Then keys are groups, and values are heads."""
    sizes: tuple[int, int, int, int]
    """K, D, V, E"""
    rates_V: Tensor
    shift: Tensor
    """[V], or [V * D] if each number of a key has a decay of its own."""
    skip_V: Tensor | None = None
    limits: tuple[float, float] = (0.0, math.inf)
    """Of steps in prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolution:
    weight_CW: Tensor
    bias_C: Tensor | None
    silu: bool


class StateBlock:
    """Computes the layer, and with norms the half. It keeps the tensors of its parts alive."""

    def __init__(
        self,
        lib: ctypes.CDLL,
        *,
        products: Sequence[StateProduct],
        columns: Sequence[Sequence[tuple[int, int]]],
        convolution: Convolution,
        rule: Rule,
        norm: GatedNorm,
        out: Matrix,
    ) -> None:
        """`columns`: of what is convolved, of the gate, of what makes decays, and of what makes beta, which product and
        which of its columns each one is.

        Raises ValueError if sizes do not fit together.
        """
        key_heads, key_size, value_heads, value_size = rule.sizes
        keys, inner, decays = key_heads * key_size, value_heads * value_size, len(rule.shift)
        expected = [2 * keys + inner, inner, decays, 0 if rule.selective else value_heads]
        hidden = out.packed.columns
        depths = [hidden if p.source is None else products[p.source].matrix.packed.columns for p in products]
        size = len(norm.formula.weight)
        decay_sizes = [value_heads] if rule.selective else [value_heads, value_heads * key_size]
        fits = [
            [len(part) for part in columns] == expected,
            depths == [p.matrix.packed.depth for p in products],
            all(p.source is None or p.source < number for number, p in enumerate(products)),
            all(0 <= at < products[n].matrix.packed.columns for part in columns for n, at in part),
            convolution.weight_CW.shape[0] == expected[0],
            convolution.bias_C is None or convolution.bias_C.shape == (expected[0],),
            all(t is None or t.dtype == torch.bfloat16 for t in (convolution.weight_CW, convolution.bias_C)),
            value_heads % key_heads == 0,
            decays in decay_sizes,
            rule.rates_V.shape == (value_heads,),
            (rule.skip_V is None) != rule.selective,
            rule.skip_V is None or rule.skip_V.shape == (value_heads,),
            inner % size == 0,
            out.packed.depth == inner,
        ]
        if not all(fits):
            raise ValueError("matrices and vectors of other sizes")
        self.hidden = hidden
        self.has_feed_forward_norm = False
        self._function = lib.emoe_state_block
        floats = [t if t is None else t.detach().float().contiguous() for t in (rule.rates_V, rule.shift, rule.skip_V)]
        taps, bias = convolution.weight_CW.detach().contiguous(), convolution.bias_C
        bias = None if bias is None else bias.detach().contiguous()
        rows = (structs.StateProduct * len(products))(
            *(
                structs.StateProduct(
                    matrix=matrix_struct(p.matrix),
                    columns=p.matrix.packed.columns,
                    depth=p.matrix.packed.depth,
                    source=-1 if p.source is None else p.source,
                )
                for p in products
            )
        )
        runs = _runs(columns)
        self._kept: list[object] = [products, floats, taps, bias, norm, out, rows, runs]
        self._block = structs.StateBlock(
            hidden=hidden,
            kind=int(rule.selective),
            num_products=len(rows),
            num_columns=len(runs),
            products=ctypes.addressof(rows),
            columns=ctypes.addressof(runs),
            before=norm_struct(None),
            after=norm_struct(None),
            channels=expected[0],
            taps_width=taps.shape[1],
            taps=taps.data_ptr(),
            taps_bias=None if bias is None else bias.data_ptr(),
            key_heads=key_heads,
            value_heads=value_heads,
            key_size=key_size,
            value_size=value_size,
            by_channel=decays != value_heads,
            decays=decays,
            rates=_address(floats[0]),
            shift=_address(floats[1]),
            skip=_address(floats[2]),
            least=rule.limits[0],
            most=rule.limits[1],
            norm_size=size,
            norm_group=norm.formula.group,
            norm_weight=norm.formula.weight.data_ptr(),
            norm_epsilon=norm.formula.epsilon,
            silu=convolution.silu,
            norm_rounds=norm.formula.rounds,
            gate_first=norm.formula.gate_first,
            gate_silu=norm.formula.silu,
            out=matrix_struct(out),
        )

    def use_norms(self, before: Norm, after: Norm | None) -> None:
        """Set the norms of the half: before the layer, and before the feed-forward half, if there is one.

        Raises ValueError if they are of another size.
        """
        if any(norm is not None and norm.size != self.hidden for norm in (before, after)):
            raise ValueError("norms of another size")
        self._block.before, self._block.after = norm_struct(before), norm_struct(after)
        self.has_feed_forward_norm = after is not None
        self._kept += [before, after]

    def __call__(self, x_TH: Tensor, segments: Segments, convolutions_SCW: Tensor, states: Tensor) -> Tensor:
        """Run the layer on dense bfloat16 rows: [T, H]. `states` [S, ...] are float32; both are written."""
        out_TH = torch.empty_like(x_TH)
        self._call(x_TH, False, segments, convolutions_SCW, states, out_TH, None)
        return out_TH

    def half(self, x_TH: Tensor, segments: Segments, convolutions_SCW: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """As AttentionBlock: (x + layer(before(x)) [T, H], its norm [T, H]). The latter is for a feed-forward half."""
        sum_TH, normed_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
        self._call(x_TH, True, segments, convolutions_SCW, states, sum_TH, normed_TH)
        return sum_TH, normed_TH

    def _call(
        self,
        x_TH: Tensor,
        half: bool,
        segments: Segments,
        convolutions_SCW: Tensor,
        states: Tensor,
        sum_TH: Tensor,
        normed_TH: Tensor | None,
    ) -> None:
        self._function(
            ctypes.addressof(self._block),
            x_TH.data_ptr(),
            len(x_TH),
            half,
            len(segments.sources),
            segments.rows.data_ptr(),
            segments.sources.data_ptr(),
            segments.targets.data_ptr(),
            convolutions_SCW.data_ptr(),
            states.data_ptr(),
            sum_TH.data_ptr(),
            _address(normed_TH),
            torch.get_num_threads(),
        )


def _runs(parts: Sequence[Sequence[tuple[int, int]]]) -> ctypes.Array[structs.StateColumns]:
    """Columns of a part that follow one another in a product, and that belong to places that follow one another."""
    runs: list[list[int]] = []
    at = 0
    for part in parts:
        begin = len(runs)
        for product, column in part:
            if len(runs) > begin and runs[-1][0] == product and runs[-1][1] + runs[-1][2] == column:
                runs[-1][2] += 1
            else:
                runs.append([product, column, 1, at])
            at += 1
    return (structs.StateColumns * len(runs))(*(structs.StateColumns(*run) for run in runs))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
