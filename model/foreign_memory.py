"""Tensors over memory of a GPU that they do not own."""

from __future__ import annotations

import torch
from torch import Tensor


def bytes_at(address: int, num_bytes: int, device: torch.device) -> Tensor:
    """The memory as a tensor of bytes."""
    return torch.as_tensor(_Area(address, num_bytes), device=device)


def borrowed(tensor: Tensor) -> Tensor:
    """The same tensor, which does not keep its memory. On a CPU it is the tensor itself."""
    if tensor.device.type != "cuda" or not tensor.numel():
        return tensor
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    raw = bytes_at(tensor.data_ptr(), elements * tensor.itemsize, tensor.device)
    return raw.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


class _Area:
    """Memory as torch takes it from other libraries."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
