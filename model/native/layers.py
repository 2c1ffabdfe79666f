"""Runs several decoder layers, or the feed-forward half of one, in one call: see layers.cpp. And the output head with
the help of others: see block.cpp.

Legend: L layers, T tokens of the step, H hidden, D head size, K experts per token, R rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic_moe.model.native import structs
from elastic_moe.model.native.attention import NativeBatch
from elastic_moe.model.native.block import AttentionBlock, Matrix, Norm, matrix_struct, norm_struct
from elastic_moe.model.native.experts import check_available
from elastic_moe.model.native.linear import Packed
from elastic_moe.model.native.router import NormedRouter, Router, ScoredRouter
from elastic_moe.model.native.structs import Experts, Head, Layer


class JointExperts:
    """The experts of all layers in one epoch, on whichever workers they are."""

    def __init__(
        self,
        lib: ctypes.CDLL,
        layers: Sequence[tuple[int | float | None, ...]],
        routes_LWE: Tensor | None = None,
        exchange: int | None = None,
        check: Callable[[int], None] = check_available,
    ) -> None:
        """`layers` are arguments of native functions, which must be valid for the whole epoch.

        `exchange` is the address of the native exchange with the other workers, and `routes_LWE` (int16) the rank that
        computes an expert for the tokens of a rank. `check` raises StepAborted for a bad status of a native function.
        """
        self.lib = lib
        self.exchange = exchange
        self.check = check
        self._routes_LWE = routes_LWE
        routes = [None if routes_LWE is None else routes_LWE[n].data_ptr() for n in range(len(layers))]
        self.layers = (Experts * len(layers))(*(Experts(*a, r) for a, r in zip(layers, routes, strict=True)))

    def idle(self, threads: int, trunk: JointLayers | None = None, head: NativeHead | None = None) -> None:
        """Compute the other workers' tokens in all layers of a step. If one worker alone has tokens, help with the
        attention of `trunk`'s layers and with the output head. Blocks on the others.

        Raises StepAborted if one of them is gone.
        """
        layers = None if trunk is None else trunk.rows
        address = None if head is None else head.address
        self.check(self.lib.emoe_layers_idle(layers, self.layers, len(self.layers), self.exchange, address, threads))


class NativeHead:
    """An output head, which other workers of the node may help to compute."""

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        self._kept = Matrix(packed=packed, bias=bias)
        self._head = Head(depth=packed.depth, columns=packed.columns, matrix=matrix_struct(self._kept))
        self.address = ctypes.addressof(self._head)

    def __call__(self, experts: JointExperts, x_RH: Tensor) -> Tensor:
        """Logits [R, V] of bfloat16 rows. Blocks on the workers that help; raises StepAborted if one is gone."""
        x_RH = x_RH.contiguous()
        out_RV = torch.empty(len(x_RH), self._head.columns, dtype=torch.bfloat16)
        arguments = (self.address, x_RH.data_ptr(), len(x_RH), out_RV.data_ptr(), torch.get_num_threads())
        experts.check(experts.lib.emoe_head(experts.exchange, *arguments))
        return out_RV


@dataclass(frozen=True, slots=True, kw_only=True)
class JointLayer:
    """A decoder layer that consists of attention, a router and experts, and nothing else."""

    block: AttentionBlock
    router: Router
    attention_layer: int
    """The layer's number in the KV cache."""


class JointLayers:
    """Decoder layers that follow one another and run in one native call."""

    def __init__(self, layers: Sequence[JointLayer]) -> None:
        self._kept = layers
        self._hidden = layers[0].router.packed.depth
        self._top_k = layers[0].router.top_k
        self.head_size = layers[0].block.head_size
        self.rows = (Layer * len(layers))(
            *(
                Layer(
                    block=layer.block.address,
                    router=layer.router.packed.data.data_ptr(),
                    router_bias=None if layer.router.bias is None else layer.router.bias.data_ptr(),
                    num_experts=layer.router.packed.columns,
                    top_k=layer.router.top_k,
                    normalise=layer.router.normalises,
                    rounds=layer.router.dtype == torch.bfloat16,
                )
                for layer in layers
            )
        )
        self._cache: Any = None

    def __call__(
        self,
        batch: NativeBatch,
        cache: Any,
        experts: JointExperts,
        x_TH: Tensor,
        cosines_TD: Tensor,
        sines_TD: Tensor,
        window: int | None,
        expert_threads: int,
    ) -> tuple[Tensor, Tensor]:
        """Run the layers on x [T, H]. Returns (output [T, H], chosen experts [L, T, K]). Blocks on the other workers.

        `cache` is the KVCache. Raises StepAborted if a worker is gone.
        """
        if cache is not self._cache:
            for row, layer in zip(self.rows, self._kept, strict=True):
                row.keys, row.values = (store.data_ptr() for store in cache.stores(layer.attention_layer))
            self._cache = cache
        out_TH = x_TH.clone()
        index_LTK = torch.empty(len(self.rows), len(x_TH), self._top_k, dtype=torch.int64)
        status = experts.lib.emoe_layers(
            self.rows,
            experts.layers,
            len(self.rows),
            experts.exchange,
            self._hidden,
            out_TH.data_ptr(),
            len(x_TH),
            cosines_TD.data_ptr(),
            sines_TD.data_ptr(),
            cosines_TD.shape[1],
            *batch.described,
            window or 0,
            index_LTK.data_ptr(),
            torch.get_num_threads(),
            expert_threads,
        )
        experts.check(status)
        return out_TH, index_LTK


class FeedForwardHalf:
    """A router, experts, and an expert that all tokens share, or none. It keeps the tensors of its parts alive."""

    def __init__(
        self,
        lib: ctypes.CDLL,
        router: Router | ScoredRouter,
        shared: tuple[Matrix, Matrix, Matrix] | None,
        share: Packed | None = None,
        *,
        gelu: bool = False,
    ) -> None:
        """`shared`: gate, up and down, between which silu(gate) * up is made, or with `gelu` gelu(gate) * up, by tanh.
        `share` [1, H]: its logistic function scales the shared expert's output.

        Raises ValueError if sizes do not fit together.
        """
        hidden, matrices = router.packed.depth, shared or ()
        width = matrices[0].packed.columns if matrices else 0
        shapes = [(matrix.packed.columns, matrix.packed.depth) for matrix in matrices]
        if shapes not in ([], [(width, hidden), (width, hidden), (hidden, width)]):
            raise ValueError("matrices of other sizes")
        if share is not None and (not shared or (share.columns, share.depth) != (1, hidden)):
            raise ValueError("a share of another size")
        self._function = lib.emoe_feed_forward
        self.router = router
        self._kept = (shared, share)
        gate, up, down = map(matrix_struct, matrices) if matrices else (structs.Matrix(),) * 3
        self.struct = structs.FeedForward(
            hidden=hidden,
            num_experts=router.packed.columns,
            top_k=router.top_k,
            width=width,
            router=router.packed.data.data_ptr(),
            rounds=router.dtype == torch.bfloat16,
            gate=gate,
            up=up,
            down=down,
            share=None if share is None else share.data.data_ptr(),
            gelu=gelu,
            **_choice(router),
        )

    def __call__(
        self, x_TH: Tensor, experts: JointExperts | None, number: int, expert_threads: int
    ) -> tuple[Tensor, Tensor]:
        """Returns (output [T, H], chosen experts [T, K]) of the MoE layer `number`. Blocks on the other workers.

        Without `experts` the output is that of the shared expert. Raises StepAborted if a worker is gone.
        """
        out_TH = torch.empty_like(x_TH)
        index_TK = torch.empty(len(x_TH), self.router.top_k, dtype=torch.int64)
        status = self._function(
            ctypes.addressof(self.struct),
            None if experts is None else ctypes.addressof(experts.layers[number]),
            None if experts is None else experts.exchange,
            x_TH.data_ptr(),
            len(x_TH),
            index_TK.data_ptr(),
            out_TH.data_ptr(),
            torch.get_num_threads(),
            expert_threads,
        )
        if experts is not None:
            experts.check(status)
        return out_TH, index_TK


@dataclass(frozen=True, slots=True, kw_only=True)
class BetweenNorms:
    """The norms of a feed-forward half of two parts: around each part, but the one before the shared part, and behind
    their sum.
    """

    behind_shared: Norm
    before_experts: Norm
    behind_experts: Norm
    behind: Norm


class TwoPartHalf:
    """Computes factor * (x + behind(shared part + experts' part)), each part between norms of its own: see layers.cpp.

    Its callers normalise the rows of the shared part.
    """

    def __init__(
        self,
        lib: ctypes.CDLL,
        router: NormedRouter,
        shared: tuple[Matrix, Matrix, Matrix],
        norms: BetweenNorms,
        *,
        gelu: bool,
        factor: float,
    ) -> None:
        """`shared` and `gelu` as in FeedForwardHalf. Raises ValueError if sizes do not fit together."""
        half = FeedForwardHalf(lib, router.router, shared, gelu=gelu)
        hidden = router.router.packed.depth
        named = {field: getattr(norms, field) for field in BetweenNorms.__dataclass_fields__}
        if any(norm.size != hidden for norm in (router.norm, *named.values())):
            raise ValueError("norms of other sizes")
        self._function = lib.emoe_two_parts
        self.router = router
        self._kept = (half, norms)
        self._parts = structs.TwoParts(
            half=half.struct,
            router_norm=norm_struct(router.norm),
            columns=router.columns.data_ptr(),
            scales=router.scales.data_ptr(),
            router_factor=router.factor,
            factor=factor,
            **{name: norm_struct(norm) for name, norm in named.items()},
        )

    def __call__(
        self, x_TH: Tensor, normed_TH: Tensor, experts: JointExperts, number: int, expert_threads: int
    ) -> tuple[Tensor, Tensor]:
        """Returns (output [T, H], chosen experts [T, K]) of the MoE layer `number`. Blocks on the other workers.

        `normed_TH` are the rows of the shared part. Raises StepAborted if a worker is gone.
        """
        made_TH = torch.empty_like(x_TH)
        status, out_TH, index_TK, _, _ = self._run(x_TH, normed_TH, experts, number, made_TH, expert_threads)
        experts.check(status)
        return out_TH, index_TK

    def trial(self, x_TH: Tensor, normed_TH: Tensor, made_TH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output for experts that make `made_TH`, the choices, their scores, and what the experts are given."""
        return self._run(x_TH, normed_TH, None, 0, made_TH.clone(), 1)[1:]

    def _run(
        self,
        x_TH: Tensor,
        normed_TH: Tensor,
        experts: JointExperts | None,
        number: int,
        made_TH: Tensor,
        expert_threads: int,
    ) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
        out_TH, rows_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
        index_TK = torch.empty(len(x_TH), self.router.router.top_k, dtype=torch.int64)
        scores_TK = torch.empty(index_TK.shape, dtype=torch.float32)
        status: int = self._function(
            ctypes.addressof(self._parts),
            None if experts is None else ctypes.addressof(experts.layers[number]),
            None if experts is None else experts.exchange,
            x_TH.data_ptr(),
            normed_TH.data_ptr(),
            len(x_TH),
            index_TK.data_ptr(),
            scores_TK.data_ptr(),
            rows_TH.data_ptr(),
            made_TH.data_ptr(),
            out_TH.data_ptr(),
            torch.get_num_threads(),
            expert_threads,
        )
        return status, out_TH, index_TK, scores_TK, rows_TH


def _choice(router: Router | ScoredRouter) -> dict[str, Any]:
    """How a router chooses, by the names of structs.FeedForward."""
    bias = None if router.bias is None else router.bias.data_ptr()
    if isinstance(router, Router):
        return {"router_bias": bias, "normalise": router.normalises}
    how = router.scoring
    return {
        "scored": True,
        "wide": router.wide,
        "logistic": how.logistic,
        "added": bias,
        "groups": how.groups,
        "top_groups": how.top_groups,
        "best": how.best,
        "normalise": how.normalises,
        "scale": how.scale,
    }
