"""Says why the native library does not serve a dtype or a device."""

from __future__ import annotations

import torch

from elastic_moe.model.native.library import unavailable


def native_refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the native library does not compute in this dtype on this device; None if it does."""
    if device.type != "cpu":
        return "the native library is for CPUs"
    if dtype != torch.bfloat16:
        return f"the native library computes in bfloat16, not in {str(dtype).removeprefix('torch.')}"
    return unavailable()
