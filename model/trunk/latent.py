"""Attention over latents (MLA): the cache holds what all heads' keys and values are made of, once for each token.

A layer makes keys and values of a latent c [R] and a rotated part r [P] of each token: head n has the key (U_n c, r)
and the value V_n c. The cache holds (c, r). There are two ways to attend, and the cheaper one is taken:

    absorbed    q . (U_n c) = (U_n^T q) . c, so that all heads attend to the latents themselves, as to one key head, and
                V_n is applied to their sum. Nothing is made for a key: this is for few query rows.
    expanded    keys and values are made again, for some heads at a time, and forgotten afterwards. A row then has much
                less to do for each key: this is for many query rows.

Source: DeepSeek-V2, arXiv 2405.04434. Legend: T tokens of the step, L keys, N heads, R numbers of a latent, P of its
rotated part, U of a key that are made of the latent, V of a value.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_moe.model.native.attention import NativeBatch, Rules, attend_apart
from elastic_moe.model.native.linear import PackedHeads
from elastic_moe.model.trunk.attention import Chosen, attend, attend_rows
from elastic_moe.model.trunk.attention_path import KVShape
from elastic_moe.model.trunk.step_batch import Prefill, StepBatch

_EXPANDED_BYTES = 64 << 20
"""Bytes of keys and values that are made at a time, unless one head takes more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """How one layer makes keys and values of latents."""

    up_NXR: Tensor
    """The matrices of each head: U rows that make the key, and below them V rows that make the value."""
    key_size: int
    """U"""
    rotated_size: int
    """P"""
    packed: tuple[PackedHeads, PackedHeads] | None = None
    """The native library's form of both matrices, [R, U] and [V, R] of each head, if it computes attention."""

    @property
    def packed_bytes(self) -> int:
        return sum(heads.nbytes for heads in self.packed or ())

    def with_native(self, lib: ctypes.CDLL) -> LatentAttention:
        """The same layer with packed matrices besides: products with these give a row the same bits in any company."""
        if self.key_size % 2:
            return self
        key_NUR, value_NVR = torch.split(self.up_NXR, [self.key_size, self.value_size], 1)
        return replace(self, packed=(PackedHeads(lib, key_NUR.transpose(1, 2)), PackedHeads(lib, value_NVR)))

    @property
    def value_size(self) -> int:
        return self.up_NXR.shape[1] - self.key_size

    @property
    def latent_size(self) -> int:
        return self.up_NXR.shape[2]

    @property
    def shape(self) -> KVShape:
        """What the cache holds for each token."""
        return KVShape(
            num_heads=1, key_size=self.latent_size + self.rotated_size, value_size=self.latent_size, latent=True
        )

    @property
    def fewest_expanded(self) -> int:
        """The number of query rows of a sequence from which on it is cheaper to expand its latents.

        For each key and head, a row takes 2R + P products if absorbed, and U + P + V if expanded, and expanding takes
        (U + V) R once.
        """
        made = self.up_NXR.shape[1]
        saved = 2 * self.latent_size - made
        return 1 + made * self.latent_size // saved if saved > 0 else 1 << 62

    def attend(
        self,
        batch: StepBatch,
        layer: int,
        query_NTD: Tensor,
        latent_TR: Tensor,
        rotated_TP: Tensor,
        rules: Rules,
        chosen: Chosen,
    ) -> Tensor:
        """Write the step's latents to the cache and attend: query [N, T, U + P] -> [T, N, V]."""
        out_TNV = self._attend_all(batch, layer, query_NTD, latent_TR, rotated_TP, rules, chosen)
        if chosen:
            # the rows of sequences that are so long that keys are chosen are computed again
            for part in batch.longer(0):
                if part.first_row in chosen:
                    self._attend_chosen(batch, layer, part, query_NTD, rules, out_TNV, chosen[part.first_row])
        return out_TNV

    def _attend_all(
        self,
        batch: StepBatch,
        layer: int,
        query_NTD: Tensor,
        latent_TR: Tensor,
        rotated_TP: Tensor,
        rules: Rules,
        chosen: Chosen,
    ) -> Tensor:
        key_TD = torch.cat((latent_TR, rotated_TP), -1)
        below = self.fewest_expanded
        wide, rows = batch.split(below)
        heads, tokens = query_NTD.shape[:2]
        if rows is None:
            absorbed_NTD = self._absorb(query_NTD)
        else:
            absorbed_NTD = query_NTD.new_empty(heads, tokens, key_TD.shape[1])
            absorbed_NTD[:, rows] = self._absorb(query_NTD[:, rows])
        if isinstance(batch.fused, NativeBatch):
            keys, _ = batch.cache.stores(layer)
            sum_TNR = batch.fused.attend_latents(keys, absorbed_NTD, key_TD, self.latent_size, rules, below=below)
        else:
            key_1TD = key_TD[None]
            sum_TNR = attend(batch, layer, absorbed_NTD, key_1TD, key_1TD[..., : self.latent_size], rules, below=below)
        if rows is None:
            return self._values(sum_TNR)
        out_TNV = query_NTD.new_empty(tokens, heads, self.value_size)
        out_TNV[rows] = self._values(sum_TNR[rows])
        for part in wide:
            if part.first_row in chosen:
                continue
            self._attend_expanded(batch, layer, part, query_NTD, rules, out_TNV)
        return out_TNV

    def _absorb(self, query_NTD: Tensor) -> Tensor:
        """[N, T, U + P] -> [N, T, R + P]"""
        if self.packed is not None:
            query_NTD = query_NTD if query_NTD.stride(2) == 1 else query_NTD.contiguous()
            out_NTD = query_NTD.new_empty(*query_NTD.shape[:2], self.latent_size + self.rotated_size)
            self.packed[0].multiply(query_NTD, out_NTD)
            out_NTD[..., self.latent_size :] = query_NTD[..., self.key_size :]
            return out_NTD
        made, rotated = torch.split(query_NTD, [self.key_size, self.rotated_size], -1)
        return torch.cat((made @ self.up_NXR[:, : self.key_size], rotated), -1)

    def _values(self, sum_TNR: Tensor) -> Tensor:
        """[T, N, R] -> [T, N, V]"""
        if self.packed is not None:
            out_TNV = sum_TNR.new_empty(*sum_TNR.shape[:2], self.value_size)
            self.packed[1].multiply(sum_TNR.transpose(0, 1), out_TNV.transpose(0, 1))
            return out_TNV
        return (sum_TNR.transpose(0, 1) @ self.up_NXR[:, self.key_size :].transpose(1, 2)).transpose(0, 1)

    def _attend_chosen(
        self,
        batch: StepBatch,
        layer: int,
        part: Prefill,
        query_NTD: Tensor,
        rules: Rules,
        out_TNV: Tensor,
        chosen_QC: Tensor,
    ) -> None:
        latent_1LD = batch.cache.latents(layer, part.blocks)[None, : part.end]
        rows = slice(part.first_row, part.first_row + part.end - part.start)
        absorbed_NQD = self._absorb(query_NTD[:, rows])
        own = replace(part, first_row=0)
        sum_QNR = absorbed_NQD.new_empty(absorbed_NQD.shape[1], len(absorbed_NQD), self.latent_size)
        attend_rows(latent_1LD, latent_1LD[..., : self.latent_size], own, absorbed_NQD, rules, sum_QNR, chosen_QC)
        out_TNV[rows] = self._values(sum_QNR)

    def _attend_expanded(
        self, batch: StepBatch, layer: int, part: Prefill, query_NTD: Tensor, rules: Rules, out_TNV: Tensor
    ) -> None:
        latent_LD = batch.cache.latents(layer, part.blocks)[: part.end]
        rows = slice(part.first_row, part.first_row + part.end - part.start)
        for heads in self._heads_at_a_time(latent_LD):
            key_NLD, value_NLV = self.expand(latent_LD, heads)
            own = rules if rules.sinks is None else replace(rules, sinks=rules.sinks[heads])
            if isinstance(batch.fused, NativeBatch):
                query = query_NTD[heads, rows]
                out_TNV[rows, heads] = attend_apart(batch.fused.lib, query, key_NLD, value_NLV, own)
            else:
                attend_rows(key_NLD, value_NLV, part, query_NTD[heads], own, out_TNV[:, heads])

    def _heads_at_a_time(self, latent_LD: Tensor) -> Iterator[slice]:
        heads = len(self.up_NXR)
        head_bytes = len(latent_LD) * (self.up_NXR.shape[1] + self.rotated_size) * latent_LD.itemsize
        count = max(1, _EXPANDED_BYTES // head_bytes)
        yield from (slice(first, min(first + count, heads)) for first in range(0, heads, count))

    def expand(self, latent_LD: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        """Make the keys [n, L, U + P] and values [n, L, V] of n heads from latents [L, R + P]."""
        latent_LR, rotated_LP = torch.split(latent_LD, [self.latent_size, self.rotated_size], -1)
        up_nXR = self.up_NXR[heads]
        made_nLX = F.linear(latent_LR, up_nXR.flatten(0, 1)).view(len(latent_LD), len(up_nXR), -1).transpose(0, 1)
        key_nLU, value_nLV = torch.split(made_nLX, [self.key_size, self.value_size], -1)
        return torch.cat((key_nLU, rotated_LP.expand(len(up_nXR), -1, -1)), -1), value_nLV
