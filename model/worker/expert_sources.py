"""Where an expert of a worker comes from: the checkpoint, or a copy that another worker has sent."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.cluster.messages.epochs import ExpertCopy
from elastic_moe.model.checkpoints.checkpoint import Checkpoint
from elastic_moe.model.checkpoints.loading import iter_experts
from elastic_moe.model.experts.interface import Tensors
from elastic_moe.model.record_layout import PAGE
from elastic_moe.model.staging import beside_steps, to_host
from elastic_moe.model.tiers.records import column_sums

# copies of experts lie in Ray's shared memory, which is read-only and is only read here
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointExperts:
    """The experts of a checkpoint, in the type and form in which a worker computes them."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    form: ExpertForm

    def read(
        self,
        pairs: Sequence[tuple[int, int]],
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[int, int, Tensors]]:
        """Experts, given as (layer, expert), on `device`. `progress` is called with bytes that are read, and all."""
        return iter_experts(self.checkpoint, pairs, dtype=self.dtype, device=device, form=self.form, progress=progress)

    def read_to_host(self, layer: int, expert: int) -> Tensors:
        """One expert, in the host's memory."""
        [(_, _, tensors)] = self.read([(layer, expert)], torch.device("cpu"))
        return tensors


def to_copy(layer: int, expert: int, tensors: Tensors) -> ExpertCopy:
    """An expert as it is sent to another worker. On a GPU, steps go on meanwhile."""
    with beside_steps(next(iter(tensors.values())).device):
        here = to_host([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors.values()])
    raw = {name: tensor.numpy() for name, tensor in zip(tensors, here, strict=True)}
    return ExpertCopy(
        layer=layer,
        expert=expert,
        tensors=raw,
        digest=digest(raw),
        shapes={name: tuple(t.shape) for name, t in tensors.items()},
        dtypes={name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()},
    )


def check_copy(copy: ExpertCopy) -> None:
    """Raises PlacementError if a copy's digest does not match."""
    if digest(copy.tensors) != copy.digest:
        raise PlacementError(f"expert {copy.expert} of layer {copy.layer} arrived damaged")


def from_copy(copy: ExpertCopy, device: torch.device) -> Tensors:
    """A copy's tensors on `device`, where steps go on meanwhile. On a CPU they share the copy's memory."""
    with beside_steps(device) as hand_over:
        return {
            name: hand_over(torch.from_numpy(raw)).view(getattr(torch, copy.dtypes[name])).view(copy.shapes[name])
            for name, raw in copy.tensors.items()
        }


def digest(tensors: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]) -> str:
    """The digest of an expert as one unit: of its tensors' names, sizes and bytes."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        raw = np.ascontiguousarray(tensors[name])
        whole = len(raw) // PAGE * PAGE
        state.update(f"{name}:{len(raw)};".encode())
        # SHA-256 of all bytes would be most of a copy's CPU time
        state.update(column_sums(raw[:whole]).tobytes())
        state.update(raw[whole:].data)
    return state.hexdigest()
