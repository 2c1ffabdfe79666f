"""What every dispatcher offers: the expert side of an epoch's steps on one worker, and which replicas they use.

dispatch.py has the one for any transport, and native_dispatch.py that of a native exchange.

Legend: T tokens of this worker, H hidden, K experts per token, W workers, E logical experts, L MoE layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elastic_moe.cluster.placement import EMPTY, Placement, Tier
from elastic_moe.model.exchange.counter import Notes
from elastic_moe.model.graph_pieces import GraphTerms
from elastic_moe.model.native.layers import JointExperts, JointLayers, NativeHead


def route_table(placement: Placement, rank: int) -> Tensor:
    """[L, E] the rank whose replica of each expert computes the tokens of worker `rank`.

    A worker that holds a replica uses its own. The workers that hold none take the replicas in turn. So traffic is
    least, and the load of a replicated expert is spread. Of an expert's replicas, only those in the fastest tier are
    used. The table depends on placement and rank alone, so it is made once per epoch.
    """
    held = held_table(placement)
    # how many workers before this one lack the expert too
    turn = (~held[:, :rank]).sum(1)
    copies = held.sum(1)
    nth = held.cumsum(1) == (turn % copies + 1)[:, None]
    table = (nth & held).argmax(1)
    table[held[:, rank]] = rank
    return torch.from_numpy(table.astype(np.int64))


def held_table(placement: Placement) -> npt.NDArray[np.bool_]:
    """[L, W, E] whether a worker's replica of an expert is used: it lies in the fastest tier of all replicas."""
    owners = placement.slot_to_worker
    shape = (placement.num_layers, len(placement.workers), placement.num_logical_experts)
    held = np.zeros(shape, dtype=bool)
    for layer in range(placement.num_layers):
        experts, tiers = placement.physical_to_logical_map[layer], placement.tiers[layer]
        used = experts != EMPTY
        best = np.full(placement.num_logical_experts, max(Tier), dtype=tiers.dtype)
        np.minimum.at(best, experts[used], tiers[used])
        used &= tiers == best[experts]
        held[layer, owners[used], experts[used]] = True
    return held


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """The shape of a MoE layer's input: hidden size, choices per token, dtype of the hidden state."""

    hidden: int
    top_k: int
    dtype: torch.dtype


class Dispatcher(ABC):
    """The expert side of one epoch on one worker. Every worker must call `forward` for every layer of a step."""

    def __init__(self) -> None:
        self.counter: Notes | None = None
        self.joint: JointExperts | None = None
        """What native functions that run many layers need in place of `forward`. Their caller calls `note` afterwards.
        """

    @property
    def threads(self) -> int:
        """Threads that compute a layer's experts."""
        return torch.get_num_threads()

    @property
    def deals(self) -> bool:
        """Whether this worker may have to compute any expert that the placement puts into no device."""
        return False

    def note(self, index_LTK: Tensor) -> None:
        """Note the choices of the step's next MoE layers in the counter."""
        if self.counter is not None:
            self.counter.note(index_LTK)

    def graph_terms(self, tokens_per_rank: Sequence[int]) -> GraphTerms | None:
        """What a recording of a step must keep to, in which rank r runs `tokens_per_rank[r]` tokens. None if such a
        step needs the CPU in a layer."""
        return None

    def follow(self, previous: Dispatcher) -> None:  # noqa: B027 - most dispatchers have no recordings
        """Take the place of the last epoch's dispatcher between two steps. Its recordings stay right if possible."""

    def begin(self, tokens_per_rank: Sequence[int], counter: Notes | None) -> None:
        """Begin a step. `counter` is None for a warm-up step, which must not be counted."""
        self.counter = counter

    def begin_recording(self, rows: int, notes: Notes) -> None:
        """Begin a step that is recorded, of so many rows on each worker. It needs no other worker."""
        self.begin([rows], notes)

    def forward(self, layer: int, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Compute the layer's experts, on whichever workers they are: [T, H]. Blocks on the other workers.

        Raises StepAborted if one of them is gone.
        """
        self.note(index_TK[None])
        return self._forward(layer, x_TH, index_TK, weight_TK)

    def leave_trunk(self) -> None:  # noqa: B027 - only workers of one node help one another
        """End a step's trunk, whether it went well or not: nobody has to wait for a call for help any longer."""

    def idle(
        self,
        shapes: Sequence[LayerShape],
        device: torch.device,
        trunk: JointLayers | None = None,
        head: NativeHead | None = None,
    ) -> None:
        """Take part in a step in which this worker has no tokens: only its experts run, for the others' tokens. It may
        help with the layers of `trunk`, all of which run in one native call, and with the output head."""
        if self.joint is not None:
            self.joint.idle(self.threads, trunk, head)
            return
        for layer, shape in enumerate(shapes):
            self.forward(
                layer,
                torch.empty(0, shape.hidden, dtype=shape.dtype, device=device),
                torch.empty(0, shape.top_k, dtype=torch.int64, device=device),
                torch.empty(0, shape.top_k, device=device),
            )

    @abstractmethod
    def finish(self) -> None:
        """End a step whose results have been read. Raises StepAborted if an exchange failed, so that they are wrong."""

    @abstractmethod
    def _forward(self, layer: int, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor: ...
