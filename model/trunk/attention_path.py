"""Who attends over a KV cache, and the shapes that decide it: values only. `fit` in model/fitting/fit.py chooses.

The cache (model/trunk/kv_cache.py) is laid out for whoever attends: the native library (model/native/attention.py),
FlashAttention (model/trunk/flash.py) or matrix products (model/trunk/attention.py).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """Of one attention layer's cache, per token."""

    num_heads: int
    key_size: int
    value_size: int
    softcap: bool = False
    """Whether the layer bounds its scores, which not all kernels do."""

    @property
    def elements(self) -> int:
        return self.num_heads * (self.key_size + self.value_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class VarlenVariant:
    """How the installed kernels are called."""

    paged: bool
    """They read blocks of the cache where they lie."""
    passes_begins: bool = True
    """They are told where a sequence's keys begin; some must not be, if they read blocks."""
    sums_by_token: bool = False
    """They return the sums of the softmax as [T, N], as torch's documentation has it, and not as [N, T]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPath:
    """At most one of both; without either, matrix products."""

    lib: ctypes.CDLL | None = None
    """The native library, where it attends."""
    varlen: VarlenVariant | None = None
    """How FlashAttention attends, where it does."""


MATMUL = AttentionPath()
"""Attention by matrix products, which serves any device, dtype and shape."""
