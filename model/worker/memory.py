"""What a worker's memory is enough for. Asks the device, or the node, how much of it is free.

How free memory is split is a matter of numbers alone: model/worker/budgets.py and model/worker/cache_room.py.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import psutil
import torch

from elastic_moe.cluster.errors import UserError
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.cluster.facts.tiering import pins_of
from elastic_moe.cluster.facts.transfers import BUNDLE_BYTES, bundles_at_once
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.epochs import ModelInfo, WorkerSpec
from elastic_moe.cluster.placement import EMPTY
from elastic_moe.model.experts.packed_trial import packed_refusal
from elastic_moe.model.experts.store import ExpertStore
from elastic_moe.model.experts.unpacking import PIECE, WORK_BYTES
from elastic_moe.model.fitting.fit import Fit
from elastic_moe.model.states.store import slots_per_sequence
from elastic_moe.model.trunk.kv_cache import KVCache
from elastic_moe.model.trunk.windows import WindowGroup, window_group
from elastic_moe.model.worker.budgets import KV_SHARE, KV_SHARE_CUDA, LATER_SHARE, kv_bytes, room_for_experts
from elastic_moe.model.worker.cache_room import CacheRoom, CacheSizes, WindowSizes, divide


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstExperts:
    """The experts that a worker holds before its first epoch."""

    rows: list[list[int]]
    """[L] logical experts."""
    limit: int | None = None
    """Experts of all layers for which there is memory, if they are fewer than the spec names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerMemory:
    """The memory of one worker, as it is when a method is called."""

    spec: WorkerSpec
    info: ModelInfo
    form: ExpertForm
    fit: Fit
    store: ExpertStore

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return self.info.served_in(self.spec.model.dtype, self.form).expert_bytes

    @property
    def _on_gpu(self) -> bool:
        return self.spec.model.device == "cuda"

    @property
    def windows(self) -> WindowGroup | None:
        """The layers whose blocks before a window are given back; None if there are none."""
        return window_group(self.fit.shapes.kv, max_model_len=self.spec.model.max_model_len)

    def sizes(self) -> CacheSizes:
        """What sequences take."""
        spec, group = self.spec, self.windows
        short = frozenset[int]() if group is None else group.layers
        return CacheSizes(
            block_bytes=self._block_bytes(self.fit.shapes.kv.keys() - short),
            windows=None if group is None else self._window_sizes(group),
            blocks_per_sequence=-(-spec.model.max_model_len // spec.block_size),
            max_num_seqs=spec.max_num_seqs,
            state_bytes=sum(layer.nbytes for layer in self.fit.states),
            states_per_sequence=slots_per_sequence(spec.steps_in_flight),
            snapshots=spec.enable_prefix_caching,
        )

    def _window_sizes(self, group: WindowGroup) -> WindowSizes:
        return WindowSizes(
            tokens=group.tokens,
            block_bytes=self._block_bytes(group.layers),
            block_size=self.spec.block_size,
            max_num_batched_tokens=self.spec.max_num_batched_tokens,
            steps_in_flight=self.spec.steps_in_flight,
        )

    def _block_bytes(self, layers: Set[int]) -> int:
        """Bytes of a block in these layers."""
        shapes = {layer: shape for layer, shape in self.fit.shapes.kv.items() if layer in layers}
        dtype: torch.dtype = getattr(torch, self.spec.model.dtype)
        return KVCache.block_bytes(shapes, block_size=self.spec.block_size, dtype=dtype)

    # --- Before the experts are loaded --------------------------------------------------------------------------

    def first_experts(self, trunk_bytes: int) -> FirstExperts:
        """The spec's experts for which this worker has memory: all, or the first ones of each layer.

        Raises UserError if there is no memory for one expert of each layer.
        """
        wanted = [[e for e in experts if e != EMPTY] for experts in self.spec.experts]
        if self.store.slotted is None:
            return FirstExperts(rows=wanted)
        capacity = self._room_for_experts(trunk_bytes) // self.expert_bytes
        if sum(map(len, wanted)) <= capacity:
            return FirstExperts(rows=wanted)
        if capacity < len(wanted):
            least = f"{len(wanted) * self.expert_bytes} bytes, which is one expert of each of the {len(wanted)} layers"
            given = self.spec.expert_memory_bytes
            raise UserError(
                f"{self.spec.worker} has memory for {counted(max(0, capacity), 'expert')} beside its KV cache, and "
                f"needs {least}: lower --max-model-len, --max-num-seqs or --kv-cache-memory-bytes"
                if given is None
                else f"--expert-memory-bytes: expected at least {least}, got {given}"
            )
        return FirstExperts(rows=[row[: pins_of(capacity // len(wanted))] for row in wanted], limit=capacity)

    def _room_for_experts(self, trunk_bytes: int) -> int:
        """Bytes that experts may take."""
        spec = self.spec
        if spec.expert_memory_bytes is not None:
            return spec.expert_memory_bytes
        free: float
        if self._on_gpu:
            free = self._free_on_gpu()
        else:
            memory = psutil.virtual_memory()
            free = min(memory.available, memory.total / spec.node_workers - trunk_bytes)
        return room_for_experts(free, least_kv=self.sizes().least, given_kv=spec.kv_cache_bytes)

    def _free_on_gpu(self) -> int:
        """Bytes that this worker may still take of its GPU, of which workers that share it take equal parts."""
        # what trials and loading have freed is torch's until then, and free to nobody
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        own = min(free, total // self.spec.gpu_workers - torch.cuda.memory_reserved())
        return own - self._unpacking_bytes() - self._bundle_bytes()

    def _bundle_bytes(self) -> int:
        """Bytes of a GPU in which experts on their way to and from other workers are gathered and added up."""
        expert_bytes = self.expert_bytes
        return 2 * bundles_at_once(expert_bytes) * max(BUNDLE_BYTES, expert_bytes)

    def _unpacking_bytes(self) -> int:
        """Bytes of a step in which a layer's packed experts are unpacked on a GPU."""
        if self.form is ExpertForm.PLAIN:
            return 0
        dtype = self.spec.model.dtype
        plain = self.info.served_in(dtype).expert_bytes
        held = max(sum(e != EMPTY for e in experts) for experts in self.spec.experts)
        here = torch.device(self.spec.model.device, torch.cuda.current_device())
        by_kernels = packed_refusal(self.form, getattr(torch, dtype), here) is None
        return held * plain + (0 if by_kernels else PIECE * WORK_BYTES)

    # --- When the experts are loaded ----------------------------------------------------------------------------

    def cache_room(self, limit: int | None) -> CacheRoom:
        """How the memory for KV cache and states is divided. `limit` as in FirstExperts.

        Raises UserError if no sequence of full length fits.
        """
        spec, sizes = self.spec, self.sizes()
        room = spec.kv_cache_bytes
        if room is None:
            room = self._free_for_kv(sizes.least, limit)
        return divide(room, sizes, max_model_len=spec.model.max_model_len)

    def _free_for_kv(self, least: int, limit: int | None) -> int:
        """Bytes for the KV cache, beside the experts that have been loaded and those that will come into the device."""
        spec, info = self.spec, self.info
        if self._on_gpu:
            free = self._free_on_gpu()
        else:
            free = psutil.virtual_memory().available // spec.node_workers
        budget = spec.expert_memory_bytes or (limit or 0) * self.expert_bytes
        every = info.num_layers * info.num_logical_experts * self.expert_bytes
        return kv_bytes(
            free,
            experts_to_come=max(0, min(budget, every) - self.store.nbytes),
            least=least,
            share=KV_SHARE_CUDA if self._on_gpu else KV_SHARE,
            short=limit is not None and spec.expert_memory_bytes is None,
        )

    # --- When the caches are made -------------------------------------------------------------------------------

    def expert_capacity(self, limit: int | None, *, cache_bytes: int) -> int:
        """How many experts fit over all layers, those that are held included. `limit` as in FirstExperts."""
        spec = self.spec
        if spec.expert_memory_bytes is not None:
            return spec.expert_memory_bytes // self.expert_bytes
        if limit is not None:
            return limit
        held = sum(len(self.store.held(layer)) for layer in range(self.store.num_layers))
        if self._on_gpu:
            free = self._free_on_gpu()
        else:
            # pages of KV caches take memory only when they are first used
            caches = spec.node_workers * cache_bytes
            free = max(0, psutil.virtual_memory().available - caches) // spec.node_workers
        return held + int(free * LATER_SHARE) // max(self.expert_bytes, self.store.nbytes // max(1, held))

    def host_capacity(self, expert_bytes: int) -> int:
        """How many experts of `expert_bytes` fit in pinned memory beside a GPU."""
        room = self.spec.host_expert_memory_bytes
        if room is None:
            room = int(psutil.virtual_memory().available * LATER_SHARE / self.spec.node_workers)
        return min(room // expert_bytes, self.info.num_layers * self.info.num_logical_experts)
