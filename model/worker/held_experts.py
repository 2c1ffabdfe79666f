"""The experts of one worker: those in its device, and the tiers of the others.

Experts are kept by (layer, logical expert), so a copy that arrives early does no harm: it is held beside the
placement's experts until an epoch begins that makes it one of them. On GPUs it lies in tensors of its own until then
(model/experts/stacked.py). An expert is dropped between two steps only, since a step may compute any that lies here.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.facts.transfers import AT_ONCE_ON_GPUS
from elastic_moe.cluster.messages.epochs import ExpertCopy, TierCounts, WorkerSpec
from elastic_moe.cluster.placement import EMPTY, Placement, Tier, WorkerId
from elastic_moe.model.exchange.dealing import loose_experts
from elastic_moe.model.experts.store import ExpertStore
from elastic_moe.model.native.experts import ExpertUnavailable
from elastic_moe.model.shared_gpu.memory import Device
from elastic_moe.model.staging import beside_steps
from elastic_moe.model.tiers.disk import default_directory
from elastic_moe.model.tiers.rates import HostRates
from elastic_moe.model.tiers.tiers import Tiers
from elastic_moe.model.worker.expert_sources import (
    CheckpointExperts,
    SharedGpu,
    from_copies,
    from_copy,
    pin_ahead,
    to_copies,
    to_copy,
)


class HeldExperts:
    """Owns what is in the store after the model is loaded. The thread that runs the steps calls `serve`, `keep_placed`,
    `settle` and `cause_of`; any thread may call the others."""

    def __init__(
        self,
        spec: WorkerSpec,
        store: ExpertStore,
        source: CheckpointExperts,
        *,
        capacity: int,
        host_capacity: int = 0,
        host_rates: HostRates | None = None,
    ) -> None:
        """`store` has the worker's first experts. `capacity` is the number of experts of all layers that may be in the
        device, and `host_capacity` that of those in pinned memory beside it."""
        self._spec = spec
        self._store = store
        self._source = source
        self._device = torch.device(spec.model.device)
        self._capacity = capacity
        self._host_capacity = host_capacity
        self._host_rates = host_rates
        self._first = self.held()
        """[L] The worker falls back to them until its first epoch begins."""
        self._placement: Placement | None = None
        """Of the epoch in force."""
        self._dealt = False
        self.tiers: Tiers | None = None
        """Made when an epoch places an expert of this worker on the disk."""
        self.stepping = threading.Lock()
        """Held by a step, and while experts are dropped."""
        self._drop_due = False
        self._shared_gpu: SharedGpu | None = None
        """Made for the first group that shares this worker's GPU, since its memory is kept."""
        self.shared: SharedGpu | None = None
        """The same while such a group is in force."""
        if self._device.type == "cuda":
            # for copies to workers of other GPUs, and to those that join
            pin_ahead(AT_ONCE_ON_GPUS)

    def held(self) -> tuple[tuple[int, ...], ...]:
        """[L] logical experts in the device beside the cache area."""
        return tuple(tuple(sorted(self._store.held(layer))) for layer in range(self._store.num_layers))

    def counts(self) -> TierCounts:
        """What became of the tiers since the last call."""
        self._store.release()
        if self.tiers is None:
            return TierCounts(resident=sum(map(len, self.held())))
        return self.tiers.counts()

    # --- Epochs -------------------------------------------------------------------------------------------------

    def prepare(self, placement: Placement) -> None:
        """Get ready for a placement while the present one serves. Raises PlacementError if an expert is not held."""
        for layer in range(placement.num_layers):
            missing = self._resident(placement, layer) - self._store.held(layer)
            if missing:
                raise PlacementError(f"{self._spec.worker} does not hold expert {min(missing)} of layer {layer}")
        layers = range(placement.num_layers)
        if self.tiers is None and any(self._resident(placement, n) != self._experts_of(placement, n) for n in layers):
            self.tiers = self._make_tiers()

    def serve(self, placement: Placement, *, dealt: bool = False) -> None:
        """A prepared epoch begins: from now on, nothing is dropped that it places on this worker. `dealt`: its steps
        may need any expert here that it puts into no device."""
        self._placement, self._dealt = placement, dealt

    def meet(self, device: Device | None) -> None:
        """A group begins whose workers all share this GPU, if `device` is not None: experts stay there on their way."""
        if self._shared_gpu is not None:
            # of workers that are gone
            self._shared_gpu.arrivals.close()
        elif device is not None:
            self._shared_gpu = SharedGpu.of(device)
        self.shared = None if device is None else self._shared_gpu

    def keep_placed(self) -> None:
        """Drop the experts that the epoch does not place on this worker."""
        with self.stepping:
            self._keep_placed()

    def drop_copies(self) -> None:
        """Drop what was copied for an epoch that will not be committed.

        Where a step runs that may compute what was copied, it is dropped as soon as that step has ended.
        """
        self._drop_due = True
        self.tidy()

    def tidy(self, *, wait: bool = False) -> None:
        """Drop what was copied for abandoned epochs, and give the cache area the size that is left to it. Where a step
        runs, its end does so; `wait`: wait for it, if something is to be dropped.
        """
        if self._untidy() and self.stepping.acquire(blocking=wait and self._drop_due):
            try:
                # another thread may have done so meanwhile
                if self._drop_due:
                    self._keep_placed()
                elif self.tiers is not None:
                    self.tiers.fit_area()
            finally:
                self.stepping.release()

    def _untidy(self) -> bool:
        return self._drop_due or (self.tiers is not None and self.tiers.held_changed)

    def _keep_placed(self) -> None:
        self._drop_due = False
        placement = self._placement
        if placement is None:
            self._store.keep_only(self._first)
            return
        layers = range(self._store.num_layers)
        self._store.keep_only([self._resident(placement, layer) for layer in layers])
        if self.tiers is not None:
            # the cache area gets the memory
            self._store.release()
            placed, hosted = ([of(placement, layer) for layer in layers] for of in (self._experts_of, self._hosted))
            loose = loose_experts(placement) if self._dealt else np.zeros((len(layers), 0), dtype=bool)
            self.tiers.place(placed, hosted, [np.flatnonzero(row).tolist() for row in loose])

    def _experts_of(self, placement: Placement, layer: int) -> set[int]:
        return set(placement.experts_of(self._spec.worker, layer)) - {EMPTY}

    def _resident(self, placement: Placement, layer: int) -> set[int]:
        return set(placement.resident(self._spec.worker, layer))

    def _hosted(self, placement: Placement, layer: int) -> set[int]:
        experts = placement.experts_of(self._spec.worker, layer)
        tiers = placement.tiers_of(self._spec.worker, layer)
        return {expert for expert, tier in zip(experts, tiers, strict=True) if expert != EMPTY and tier == Tier.HOST}

    def _make_tiers(self) -> Tiers:
        slotted = self._store.slotted
        if slotted is None:
            raise PlacementError(f"{self._spec.worker} cannot compute experts that are not in its device")
        directory = self._spec.expert_cache_dir
        return Tiers(
            self._source.checkpoint,
            slotted,
            self._source.read_to_host,
            dtype=self._spec.model.dtype,
            directory=default_directory() if directory is None else Path(directory),
            policy=self._spec.expert_cache_policy,
            capacity=self._capacity,
            device=self._device,
            host_capacity=self._host_capacity,
            rates=self._host_rates,
        )

    # --- What other workers are told (Memory in exchange/dealing.py) -------------------------------------------

    @property
    def fetch_s(self) -> float:
        return 0.0 if self.tiers is None else self.tiers.fetch_s

    def in_memory(self, layer: int) -> frozenset[int]:
        held = self._store.held(layer)
        return held if self.tiers is None else held | self.tiers.cached(layer)

    # --- Steps --------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Note which experts the step has used."""
        if self.tiers is not None:
            self.tiers.settle()

    def cause_of(self, error: BaseException) -> BaseException | None:
        """Why a step that ended with `error` could not get an expert; None if that is not why it failed."""
        if not isinstance(error, ExpertUnavailable) or self.tiers is None:
            return None
        return self.tiers.take_error() or error

    # --- Experts that come and go -------------------------------------------------------------------------------

    def export_copies(self, pairs: Sequence[tuple[int, int]], target: WorkerId | None = None) -> list[ExpertCopy]:
        """See DataPlane.export_experts."""
        shared = self.shared if self._is_member(target) else None
        copies: dict[tuple[int, int], ExpertCopy] = {}
        if self._by_device:
            reading = self._store.reading(pairs)
            copies = {(copy.layer, copy.expert): copy for copy in to_copies(reading, self._device, shared)}
        return [copies[pair] if pair in copies else self._copy_from_host(*pair) for pair in pairs]

    def _copy_from_host(self, layer: int, expert: int) -> ExpertCopy:
        try:
            tensors = self._store.get(layer, expert)
        except KeyError:
            if self.tiers is None or not self.tiers.serves(layer, expert):
                raise PlacementError(f"{self._spec.worker} does not hold expert {expert} of layer {layer}") from None
            tensors = self.tiers.read(layer, expert)
        return to_copy(layer, expert, {name: tensor.cpu() for name, tensor in tensors.items()})

    def _is_member(self, worker: WorkerId | None) -> bool:
        """Whether the worker is of the epoch in force. One that is to join has nothing of this one's memory, and may be
        on another GPU."""
        placement = self._placement
        return worker is None or (placement is not None and worker in {each.id for each in placement.workers})

    @property
    def _by_device(self) -> bool:
        """Whether copies are gathered and checked by a GPU, or by what stands for one."""
        return self._device.type == "cuda" or self.shared is not None

    def import_copies(self, copies: Sequence[ExpertCopy]) -> None:
        """Hold copies beside the placement's experts. Raises PlacementError if a digest does not match."""
        self._store.release()
        self.tidy(wait=True)
        arrived = from_copies(copies, self._device, self.shared) if self._by_device else map(from_copy, copies)
        for copy, tensors in zip(copies, arrived, strict=True):
            if self.tiers is not None and copy.expert in self._store.held(copy.layer):
                continue  # a step may compute it now
            self._store.put(copy.layer, copy.expert, tensors, borrowed=self._device.type == "cpu")
        self._note_held()

    def read(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Read experts, given as (layer, expert), from the disk and hold them beside the placement's experts."""
        self._store.release()
        self.tidy(wait=True)
        if self.tiers is None:
            reading = self._source.read(pairs, self._device)
            while True:
                with beside_steps(self._device) as hand_over:
                    found = next(reading, None)
                    if found is None:
                        return
                    layer, expert, tensors = found
                    here = {name: hand_over(tensor) for name, tensor in tensors.items()}
                self._store.put(layer, expert, here)
        for layer, expert in sorted(set(pairs)):
            if expert not in self._store.held(layer):
                self._store.put(layer, expert, self.tiers.read(layer, expert))
                self._note_held()

    def _note_held(self) -> None:
        """Another expert is held beside the area: it becomes smaller now, or when the step that runs has ended."""
        if self.tiers is not None:
            self.tiers.held_changed = True
            self.tidy()
