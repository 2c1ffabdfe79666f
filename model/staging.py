"""Copies between the host and a device: small arrays of numbers for a step, and large ones beside the steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device(arrays: Sequence[npt.NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """Return the arrays as int64 tensors on the device."""
    flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    if device.type == "cuda":
        # torch keeps the pinned memory until the copy is done
        flat = flat.pin_memory()
    parts = torch.split(flat.to(device, non_blocking=True), [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of a device's tensors in the host's memory. Blocks once, until the device has computed all of them."""
    if all(tensor.device.type != "cuda" for tensor in tensors):
        return list(tensors)
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    recorded().synchronize()
    return copies


@contextmanager
def beside_steps(device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within the block, this thread's work on a GPU runs beside the steps, on a stream of its own. The block ends when
    it is done. Gives a function that hands a tensor over to the steps, on the device.

    On a CPU nothing changes, and the function returns the tensor itself.
    """
    if device.type != "cuda":
        yield lambda tensor: tensor
        return
    steps, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())

    def hand_over(tensor: Tensor) -> Tensor:
        there = tensor if tensor.is_cuda else tensor.pin_memory().to(device, non_blocking=True)
        # its memory is not given away while a step may still read it
        there.record_stream(steps)
        return there

    with torch.cuda.stream(side):
        yield hand_over
        side.synchronize()


def _side_stream(device: int) -> torch.cuda.Stream:
    """This thread's own, so that copies to the device and from it pass one another."""
    streams: dict[int, torch.cuda.Stream] = vars(_own).setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return streams[device]


_own = threading.local()


def recorded(stream: torch.cuda.Stream | None = None, *, timed: bool = False) -> torch.cuda.Event:
    """An event that has passed when the device has done all that was launched by now, on the stream or the present
    one."""
    event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def passed(event: torch.cuda.Event | None) -> bool:
    """Whether the device has reached the event. True for None."""
    return event is None or bool(event.query())  # type: ignore[no-untyped-call]
