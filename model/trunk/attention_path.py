"""Which code computes attention over a KV cache, and the shapes that decide it. `fit` in model/fitting/fit.py chooses.

The cache (model/trunk/kv_cache.py) is laid out for the code that computes attention: the native library
(model/native/attention.py), FlashAttention (model/trunk/flash.py) or matrix products (model/trunk/attention.py).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What the cache of one attention layer holds for each token."""

    num_heads: int
    key_size: int
    value_size: int
    softcap: bool = False
    """Whether the layer bounds its scores by a soft-cap, which not all kernels can do."""
    window: int | None = None
    """Last tokens that the layer attends to; None if it attends to all earlier ones."""
    latent: bool = False
    """Whether the key's first `value_size` numbers are the value, so that keys alone are stored (latent.py)."""

    @property
    def elements(self) -> int:
        return self.num_heads * (self.key_size + (0 if self.latent else self.value_size))


@dataclass(frozen=True, slots=True, kw_only=True)
class VarlenVariant:
    """How the installed variable-length kernels are called."""

    paged: bool
    """The kernels read blocks of the cache where they lie."""
    passes_begins: bool = True
    """The call says where each sequence's keys begin. Some kernels that read blocks refuse this argument."""
    sums_by_token: bool = False
    """The kernels return the sums of the softmax as [T, N], as torch documents it, and not as [N, T]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPath:
    """Which code computes attention. At most one of `lib` and `varlen` is set; else matrices are multiplied."""

    lib: ctypes.CDLL | None = None
    """The native library, if it computes attention."""
    varlen: VarlenVariant | None = None
    """How FlashAttention is called, if it computes attention."""
    kernels: bool = False
    """Whether a kernel of this project (model/gpu/decode.py) computes attention of single tokens, beside `varlen`."""


MATMUL = AttentionPath()
"""Attention by matrix products, which works for any device, dtype and shape."""
