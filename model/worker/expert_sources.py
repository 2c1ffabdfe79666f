"""Where an expert of a worker comes from: the checkpoint, or a copy that another worker has sent."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.cluster.messages.epochs import ExpertCopy
from elastic_moe.model.checkpoints.checkpoint import Checkpoint
from elastic_moe.model.checkpoints.loading import iter_experts
from elastic_moe.model.experts.interface import Tensors
from elastic_moe.model.experts.rounding import rounded
from elastic_moe.model.record_layout import PAGE
from elastic_moe.model.shared_gpu.driver import DeviceError
from elastic_moe.model.shared_gpu.memory import Device
from elastic_moe.model.shared_gpu.parcels import Arrivals, Outbox
from elastic_moe.model.staging import beside_steps, to_host
from elastic_moe.model.tiers.records import column_sums, column_sums_there

# copies of experts lie in Ray's shared memory, which is read-only and is only read here
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

Ends = np.ndarray[tuple[int, ...], np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointExperts:
    """The experts of a checkpoint, in the type and form in which a worker computes them."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    form: ExpertForm
    rounds: bool = False
    """Whether experts come rounded; otherwise that is left to what holds them, as a CPU's native library does."""

    def read(
        self,
        pairs: Sequence[tuple[int, int]],
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[int, int, Tensors]]:
        """Experts, given as (layer, expert), on `device`. `progress` is called with bytes that are read, and all."""
        checkpoint, form = self.checkpoint, self.form
        if not self.rounds or form in (ExpertForm.PLAIN, checkpoint.info.kept):
            yield from iter_experts(checkpoint, pairs, dtype=self.dtype, device=device, form=form, progress=progress)
            return
        host = torch.device("cpu")
        for layer, expert, tensors in iter_experts(checkpoint, pairs, dtype=self.dtype, device=host, progress=progress):
            module: Any = checkpoint.skeleton.get_submodule(checkpoint.shape.expert_modules[layer])
            made = rounded(tensors, form, transposed=bool(module.is_transposed))
            yield layer, expert, {name: tensor.to(device) for name, tensor in made.items()}

    def read_to_host(self, layer: int, expert: int) -> Tensors:
        """One expert, in the host's memory."""
        [(_, _, tensors)] = self.read([(layer, expert)], torch.device("cpu"))
        return tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedGpu:
    """How experts go to workers of the same GPU, and come from them."""

    outbox: Outbox
    arrivals: Arrivals

    @classmethod
    def of(cls, device: Device) -> SharedGpu:
        return cls(outbox=Outbox(device), arrivals=Arrivals(device))


def to_copy(layer: int, expert: int, tensors: Tensors, shared: SharedGpu | None = None) -> ExpertCopy:
    """An expert as it is sent to another worker, which is on the same GPU if that is `shared`. On a GPU, steps go on
    meanwhile."""
    device = next(iter(tensors.values())).device
    with beside_steps(device):
        flat = {name: tensor.contiguous().view(-1).view(torch.uint8) for name, tensor in tensors.items()}
        parcel = None if shared is None else shared.outbox.pack(list(flat.values()))
        ends, here = _ends(flat), [] if parcel is not None else list(flat.values())
        found = [tensor.numpy() for tensor in to_host([*ends, *here])]
    raw = found[len(ends) :] if parcel is None else [np.empty(0, np.uint8)] * len(flat)
    return ExpertCopy(
        layer=layer,
        expert=expert,
        tensors=dict(zip(flat, raw, strict=True)),
        digest=_digest(flat, found[: len(ends)]),
        shapes={name: tuple(t.shape) for name, t in tensors.items()},
        dtypes={name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()},
        parcel=parcel,
    )


def from_copy(copy: ExpertCopy, device: torch.device, shared: SharedGpu | None = None) -> Tensors:
    """A copy's tensors on `device`, where steps go on meanwhile. On a CPU they share the copy's memory.

    Raises PlacementError if the copy's digest does not match, which on a GPU is that of what has arrived there, or if
    the bytes are on a GPU that is not this one.
    """
    dtypes = {name: getattr(torch, dtype) for name, dtype in copy.dtypes.items()}
    sizes = [math.prod(copy.shapes[name]) * dtypes[name].itemsize for name in copy.tensors]
    with beside_steps(device) as hand_over, _bytes_of(copy, sizes, shared) as arrived:
        flat = {name: hand_over(tensor) for name, tensor in zip(copy.tensors, arrived, strict=True)}
        found = [tensor.numpy() for tensor in to_host(_ends(flat))]
    if _digest(flat, found) != copy.digest:
        raise PlacementError(f"expert {copy.expert} of layer {copy.layer} arrived damaged")
    return {name: tensor.view(dtypes[name]).view(copy.shapes[name]) for name, tensor in flat.items()}


@contextmanager
def _bytes_of(copy: ExpertCopy, sizes: Sequence[int], shared: SharedGpu | None) -> Iterator[list[Tensor]]:
    """The bytes of a copy's tensors, in the host's memory or on the GPU that both workers share."""
    if copy.parcel is None:
        yield [torch.from_numpy(raw) for raw in copy.tensors.values()]
        return
    where = f"expert {copy.expert} of layer {copy.layer} lies on a GPU that cannot be read here"
    if shared is None:
        raise PlacementError(f"{where}: this worker shares none")
    try:
        with shared.arrivals.taken(copy.parcel, sizes) as found:
            yield found
    except DeviceError as error:
        raise PlacementError(f"{where}: {error}") from error


def _ends(flat: Mapping[str, Tensor]) -> list[Tensor]:
    """Of each tensor of bytes, `column_sums` of its whole pages, and what is left behind them."""
    found = []
    for tensor in flat.values():
        whole = len(tensor) // PAGE * PAGE
        if tensor.device.type == "cpu":
            found.append(torch.from_numpy(column_sums(tensor[:whole].numpy()).view(np.int64)))
        else:
            found.append(column_sums_there(tensor[:whole]))
        found.append(tensor[whole:])
    return found


def _digest(flat: Mapping[str, Tensor], ends: Sequence[Ends]) -> str:
    """The digest of an expert as one unit: of its tensors' names, sizes and bytes. `ends` as `_ends` has them."""
    state = hashlib.sha256()
    for (name, tensor), sums, left in sorted(
        zip(flat.items(), ends[::2], ends[1::2], strict=True), key=lambda part: part[0][0]
    ):
        state.update(f"{name}:{len(tensor)};".encode())
        # SHA-256 of all bytes would be most of a copy's CPU time
        state.update(sums.tobytes())
        state.update(left.tobytes())
    return state.hexdigest()
