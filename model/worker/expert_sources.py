"""Where an expert of a worker comes from: the checkpoint, or a copy that another worker has sent."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
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
from elastic_moe.model.record_layout import PAGE
from elastic_moe.model.staging import beside_steps, to_host
from elastic_moe.model.tiers.records import column_sums, column_sums_there

# copies of experts lie in Ray's shared memory, which is read-only and is only read here
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Sums = np.ndarray[tuple[int, ...], np.dtype[Any]]


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
    device = next(iter(tensors.values())).device
    with beside_steps(device):
        flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors.values()]
        sums = _sums_there(flat) if device.type != "cpu" else []
        here = [tensor.numpy() for tensor in to_host([*flat, *sums])]
    raw = dict(zip(tensors, here, strict=False))
    return ExpertCopy(
        layer=layer,
        expert=expert,
        tensors=raw,
        digest=digest(raw, _by_name(raw, here[len(raw) :])),
        shapes={name: tuple(t.shape) for name, t in tensors.items()},
        dtypes={name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()},
    )


def from_copy(copy: ExpertCopy, device: torch.device) -> Tensors:
    """A copy's tensors on `device`, where steps go on meanwhile. On a CPU they share the copy's memory.

    Raises PlacementError if the copy's digest does not match: on a GPU it is that of what has arrived there.
    """
    with beside_steps(device) as hand_over:
        flat = {name: hand_over(torch.from_numpy(raw)) for name, raw in copy.tensors.items()}
        sums = to_host(_sums_there(list(flat.values()))) if device.type != "cpu" else []
    if digest(copy.tensors, _by_name(flat, [tensor.numpy() for tensor in sums])) != copy.digest:
        raise PlacementError(f"expert {copy.expert} of layer {copy.layer} arrived damaged")
    return {name: t.view(getattr(torch, copy.dtypes[name])).view(copy.shapes[name]) for name, t in flat.items()}


def _sums_there(flat: Sequence[Tensor]) -> list[Tensor]:
    """[columns] `column_sums` of the whole pages of each tensor of bytes, on its device."""
    return [column_sums_there(tensor[: len(tensor) // PAGE * PAGE]) for tensor in flat]


def _by_name(names: Iterable[str], sums: Sequence[Sums]) -> Mapping[str, Sums]:
    return dict(zip(names, sums, strict=True)) if sums else {}


def digest(tensors: Mapping[str, Bytes], sums: Mapping[str, Sums] = MappingProxyType({})) -> str:
    """The digest of an expert as one unit: of its tensors' names, sizes and bytes. `sums`: those of the tensors' whole
    pages, where they are known."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        raw = np.ascontiguousarray(tensors[name])
        whole = len(raw) // PAGE * PAGE
        state.update(f"{name}:{len(raw)};".encode())
        # SHA-256 of all bytes would be most of a copy's CPU time
        state.update((sums[name] if name in sums else column_sums(raw[:whole])).tobytes())
        state.update(raw[whole:].data)
    return state.hexdigest()
