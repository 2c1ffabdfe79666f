"""Says why the kernels do not serve a dtype or a device."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


def gpu_refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels do not compute in this dtype on this device; None if they do."""
    if device.type != "cuda":
        return "the kernels are for CUDA GPUs"
    if dtype != torch.bfloat16:
        return f"the kernels compute in bfloat16, not in {str(dtype).removeprefix('torch.')}"
    return _unavailable()


@cache
def _unavailable() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 or later"
    from elastic_moe.model.gpu.rows import GpuNorm
    from elastic_moe.model.rms_norm import RmsNorm

    try:
        x = torch.ones(1, 16, dtype=torch.bfloat16, device="cuda")
        GpuNorm(formula=RmsNorm(weight=torch.ones(16, device="cuda"), epsilon=0.0, rounds=False))(x)
    except Exception as error:  # noqa: BLE001 - without a C compiler, for example, Triton raises errors of many kinds
        return f"Triton cannot compile a kernel here: {str(error).splitlines()[0]}"
    return None
