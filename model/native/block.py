"""Computes the attention half of a decoder layer in one call: see block.cpp and latent_block.cpp.

Legend: T tokens of the step, H hidden, D head size, P numbers of a latent's rotated part.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elastic_moe.model.native import structs
from elastic_moe.model.native.attention import NativeBatch
from elastic_moe.model.native.linear import NUMBERS, Packed, PackedHeads
from elastic_moe.model.rms_norm import GatedRmsNorm, LayerNorm, RmsNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """Computes `formula` in one call; see `norm_row` and `layer_norm_row` in trunk.h."""

    lib: ctypes.CDLL
    formula: RmsNorm | LayerNorm

    @property
    def size(self) -> int:
        return len(self.formula.weight)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.contiguous()
        out = torch.empty_like(x)
        formula, size = self.formula, self.size
        if isinstance(formula, LayerNorm):
            self.lib.emoe_layer_norm(
                x.data_ptr(),
                x.numel() // size,
                size,
                formula.weight.data_ptr(),
                None if formula.bias is None else formula.bias.data_ptr(),
                formula.epsilon,
                out.data_ptr(),
                torch.get_num_threads(),
            )
            return out
        self.lib.emoe_rms_norm(
            x.data_ptr(),
            x.numel() // size,
            size,
            formula.weight.data_ptr(),
            formula.epsilon,
            formula.rounds,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class BareNorm:
    """Computes a Norm whose weights are 1, of rows of any size."""

    lib: ctypes.CDLL
    epsilon: float
    sizes: dict[int, Norm] = field(default_factory=dict)

    def of(self, size: int) -> Norm:
        """The same for rows of one size."""
        if size not in self.sizes:
            formula = RmsNorm(weight=torch.ones(size, dtype=torch.float32), epsilon=self.epsilon, rounds=False)
            self.sizes[size] = Norm(lib=self.lib, formula=formula)
        return self.sizes[size]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return self.of(hidden_states.shape[-1])(hidden_states)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedNorm:
    """Computes `formula` of bfloat16 rows in one call; see trunk.cpp. Other rows go to `original`."""

    lib: ctypes.CDLL
    formula: GatedRmsNorm
    original: Callable[..., Tensor]

    def __call__(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        formula, size = self.formula, len(self.formula.weight)
        if gate is None or not hidden_states.dtype == gate.dtype == torch.bfloat16:
            return self.original(hidden_states, gate)
        x, beside = (_rows(tensor, size) for tensor in (hidden_states, gate))
        out = torch.empty(hidden_states.shape, dtype=torch.bfloat16)
        self.lib.emoe_gated_norm(
            x.data_ptr(),
            x.stride(0),
            beside.data_ptr(),
            beside.stride(0),
            len(x),
            size,
            formula.group,
            formula.weight.data_ptr(),
            formula.epsilon,
            formula.rounds,
            formula.gate_first,
            formula.silu,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A linear layer."""

    packed: Packed
    bias: Tensor | None


class AttentionBlock:
    """Computes sum = x + factor * behind(attention(before(x))), and after(sum).

    It keeps the tensors of its parts alive.
    """

    def __init__(
        self,
        lib: ctypes.CDLL,
        *,
        head_size: int,
        scale: float,
        before: Norm | None,
        after: Norm | None,
        query: Matrix,
        key: Matrix,
        value: Matrix | None,
        out: Matrix,
        query_norm: Norm | None,
        key_norm: Norm | None,
        value_norm: Norm | None = None,
        behind: Norm | None = None,
        factor: float = 1.0,
        turns_first: bool = False,
        sinks: Tensor | None = None,
        gated: bool = False,
    ) -> None:
        """`sinks` [heads] as in Rules. Norms of queries, keys and values normalise a head, or all heads of a token, by
        the length of their weights. Without a matrix for values, they are keys before their norm and rotation.
        `turns_first`: whether queries and keys are rotated before their norms. `gated`: whether `query` also makes a
        gate of each head's output, behind the head's query.

        Raises ValueError if sizes do not fit together.
        """
        made = 2 * head_size if gated else head_size
        heads, key_heads = query.packed.columns // made, key.packed.columns // head_size
        hidden = query.packed.depth
        values = key if value is None else value
        value_size = values.packed.columns // max(1, key_heads)
        whole = [query.packed.columns == heads * made, key.packed.columns == key_heads * head_size]
        fits = [
            heads % max(1, key_heads) == 0,
            values.packed.columns == key_heads * value_size,
            (out.packed.depth, out.packed.columns) == (heads * value_size, hidden),
            key.packed.depth == values.packed.depth == hidden,
            all(norm is None or norm.size == hidden for norm in (before, behind, after)),
            query_norm is None or query.packed.columns % query_norm.size == 0,
            key_norm is None or key.packed.columns % key_norm.size == 0,
            value_norm is None or values.packed.columns % value_norm.size == 0,
            sinks is None or sinks.shape == (heads,),
            not gated or (value_size == head_size and (query_norm is None or query_norm.size == head_size)),
        ]
        if not all(whole + fits):
            raise ValueError("matrices and norms of other sizes")
        self._function = lib.emoe_block
        logits = None if sinks is None else sinks.detach().float().contiguous()
        self.value_size = value_size
        self._kept = (before, behind, after, query, key, value, out, query_norm, key_norm, value_norm, logits)
        self._block = structs.Block(
            hidden=hidden,
            heads=heads,
            key_heads=key_heads,
            key_size=head_size,
            value_size=value_size,
            before=norm_struct(before),
            query_norm=norm_struct(query_norm),
            key_norm=norm_struct(key_norm),
            value_norm=norm_struct(value_norm),
            behind=norm_struct(behind),
            after=norm_struct(after),
            query=matrix_struct(query),
            key=matrix_struct(key),
            value=structs.Matrix() if value is None else matrix_struct(value),
            out=matrix_struct(out),
            sinks=None if logits is None else logits.data_ptr(),
            scale=scale,
            gated=gated,
            factor=factor,
            turns_first=turns_first,
        )
        self.address = ctypes.addressof(self._block)
        """The address of the block's structure, an argument of native functions."""
        self.head_size = head_size
        self._normalises = after is not None

    def __call__(
        self,
        batch: NativeBatch,
        caches: tuple[Tensor, Tensor],
        x_TH: Tensor,
        cosines_TD: Tensor,
        sines_TD: Tensor,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (sum [T, H], normalised sum [T, H]) for dense bfloat16 rows; the sum twice without a norm `after`.
        Writes keys and values to the caches.

        The first D numbers of each head are rotated, where D may be less than the head's size.
        """
        sum_TH, normed_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
        self._function(
            self.address,
            x_TH.data_ptr(),
            len(x_TH),
            cosines_TD.data_ptr(),
            sines_TD.data_ptr(),
            cosines_TD.shape[1],
            caches[0].data_ptr(),
            caches[1].data_ptr(),
            *batch.described,
            window or 0,
            sum_TH.data_ptr(),
            normed_TH.data_ptr(),
            torch.get_num_threads(),
        )
        return sum_TH, normed_TH if self._normalises else sum_TH


class LatentBlock:
    """As AttentionBlock, for a layer that makes keys and values of latents (model/trunk/latent.py)."""

    def __init__(
        self,
        lib: ctypes.CDLL,
        *,
        scale: float,
        pairs: bool,
        before: Norm,
        after: Norm,
        query_down: Matrix | None,
        query_norm: Norm | None,
        query: Matrix,
        latents: Matrix,
        latent_norm: Norm,
        key_up: PackedHeads,
        value_up: PackedHeads,
        out: Matrix,
    ) -> None:
        """`pairs`: whether neighbours are rotated against each other, and not halves. `query_down` makes fewer numbers
        of hidden states first, of which `query` makes queries after `query_norm`.

        Raises ValueError if sizes do not fit together.
        """
        hidden, heads, latent = latents.packed.depth, key_up.heads, latent_norm.size
        self.rotated = latents.packed.columns - latent
        rank = 0 if query_down is None else query_down.packed.columns
        fits = [
            self.rotated > 0 and self.rotated % 2 == 0,
            (key_up.columns, value_up.depth, value_up.heads) == (latent, latent, heads),
            (query.packed.columns, query.packed.depth) == (heads * (key_up.depth + self.rotated), rank or hidden),
            (query_down is None) == (query_norm is None),
            query_down is None or query_down.packed.depth == hidden,
            query_norm is None or query_norm.size == rank,
            (out.packed.depth, out.packed.columns) == (heads * value_up.columns, hidden),
            before.size == after.size == hidden,
        ]
        if not all(fits):
            raise ValueError("matrices and norms of other sizes")
        self._function = lib.emoe_latent_block
        self._kept = (before, after, query_down, query_norm, query, latents, latent_norm, key_up, value_up, out)
        self._block = structs.LatentBlock(
            hidden=hidden,
            heads=heads,
            query_rank=rank,
            made=key_up.depth,
            rotated=self.rotated,
            latent=latent,
            value_size=value_up.columns,
            before=norm_struct(before),
            query_norm=norm_struct(query_norm),
            latent_norm=norm_struct(latent_norm),
            after=norm_struct(after),
            query_down=structs.Matrix() if query_down is None else matrix_struct(query_down),
            query=matrix_struct(query),
            latents=matrix_struct(latents),
            out=matrix_struct(out),
            key_up=key_up.address,
            value_up=value_up.address,
            scale=scale,
            pairs=pairs,
        )

    def __call__(
        self, batch: NativeBatch, cache: Tensor, x_TH: Tensor, cosines_TP: Tensor, sines_TP: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """Returns (sum [T, H], normalised sum [T, H]) for dense bfloat16 rows. Writes latents to the cache."""
        sum_TH, normed_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
        self._function(
            ctypes.addressof(self._block),
            x_TH.data_ptr(),
            len(x_TH),
            cosines_TP.data_ptr(),
            sines_TP.data_ptr(),
            cache.data_ptr(),
            *batch.described,
            window or 0,
            sum_TH.data_ptr(),
            normed_TH.data_ptr(),
            torch.get_num_threads(),
        )
        return sum_TH, normed_TH


def norm_struct(norm: Norm | None) -> structs.Norm:
    """The structure of a norm, whose tensors the caller keeps alive. None: of no norm."""
    if norm is None:
        return structs.Norm(size=1)
    formula = norm.formula
    made = structs.Norm(weight=formula.weight.data_ptr(), size=norm.size, epsilon=formula.epsilon)
    if isinstance(formula, RmsNorm):
        made.rounds = formula.rounds
    else:
        made.centred, made.bias = True, None if formula.bias is None else formula.bias.data_ptr()
    return made


def matrix_struct(matrix: Matrix) -> structs.Matrix:
    """The structure of a linear layer, whose tensors the caller keeps alive."""
    packed, bias = matrix.packed, matrix.bias
    return structs.Matrix(
        packed=packed.data.data_ptr(), bias=None if bias is None else bias.data_ptr(), form=NUMBERS[packed.form]
    )


def _rows(tensor: Tensor, size: int) -> Tensor:
    """[rows, size], of which each row is dense."""
    rows = tensor.reshape(-1, size)
    return rows if rows.stride(1) == 1 else rows.contiguous()
