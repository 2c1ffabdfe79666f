"""Loads a model's trunk and a worker's first experts, and makes the caches for its sequences."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.cluster.fit import FitReport
from elastic_moe.cluster.messages.epochs import StateRoom, WindowRoom, WorkerSpec
from elastic_moe.model.checkpoints.checkpoint import Checkpoint, open_checkpoint
from elastic_moe.model.checkpoints.loading import expert_modules, load_trunk
from elastic_moe.model.experts.store import ExpertStore
from elastic_moe.model.experts.tiered_stacks import TieredStacks
from elastic_moe.model.fitting.fit import Fit, fit
from elastic_moe.model.grammars.compiling import Compiler
from elastic_moe.model.grammars.vocabulary import Vocabulary, read_vocabulary
from elastic_moe.model.native import unavailable
from elastic_moe.model.states.store import StateStore
from elastic_moe.model.tiers.rates import ASSUMED_BYTES_PER_S, HostRates, host_rates, read_rate
from elastic_moe.model.trunk.kv_cache import KVCache
from elastic_moe.model.trunk.windows import WindowGroup
from elastic_moe.model.worker.expert_sources import CheckpointExperts
from elastic_moe.model.worker.memory import WorkerMemory
from elastic_moe.model.worker.runner import ModelRunner

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Pinned memory beside a GPU."""

    capacity: int = 0
    """How many experts of all layers fit in it."""
    rates: HostRates | None = None
    """How fast experts come from there, and are computed there; None where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """What one worker has of a model once it is loaded."""

    fit: Fit
    report: FitReport
    """Which path serves each part of the model on this worker."""
    source: CheckpointExperts
    memory: WorkerMemory
    store: ExpertStore
    """The first experts of this worker are in it."""
    runner: ModelRunner
    cache: KVCache
    states: StateStore | None
    state_room: StateRoom | None
    """None if the model keeps nothing but keys and values. The same holds for `states`."""
    windows: WindowGroup | None
    """The layers whose blocks before a window are given back; None if there are none. The same holds for `window_room`.
    """
    window_room: WindowRoom | None
    grammars: Compiler
    weight_bytes: int
    capacity: int
    """How many experts fit on this worker over all layers."""
    disk_bytes_per_s: float | None = None
    """How fast experts come from the disk; None if this worker can compute only experts that are in its device."""
    host: HostMemory

    @property
    def nbytes(self) -> int:
        """Bytes of weights and caches."""
        return self.weight_bytes + _cache_bytes(self.cache, self.states)


def load_model(spec: WorkerSpec, note: Callable[[float], None]) -> LoadedModel:
    """Read the trunk and the spec's experts, and make the KV cache. `note` is told which share of the weights' bytes is
    loaded, from 0 to 1.

    Raises CheckpointError, and UserError if the KV cache cannot hold one sequence of full length.
    """
    if spec.num_threads:
        torch.set_num_threads(spec.num_threads)
    device = torch.device(spec.model.device)
    dtype: torch.dtype = getattr(torch, spec.model.dtype)
    checkpoint = open_checkpoint(spec.model.path)
    info = checkpoint.info
    on_cpu = device.type == "cpu"
    native = info.kept is ExpertForm.PLAIN or unavailable() is None
    form = info.form(spec.model.expert_dtype, spec.model.dtype, device.type, native=native)
    trunk = load_trunk(checkpoint, dtype=dtype, device=device)
    modules = expert_modules(trunk)
    narrow = info.trunk_form(spec.model.trunk_dtype, spec.model.dtype, device.type)
    fitted = fit(trunk, modules, block_size=spec.block_size, form=form, trunk_form=narrow)
    store = ExpertStore(fitted.experts)
    if len(spec.experts) != len(modules):
        raise CheckpointError(f"{len(modules)} MoE layers were found, {len(spec.experts)} expected")
    memory = WorkerMemory(spec=spec, info=info, form=form, fit=fitted, store=store)
    source = CheckpointExperts(checkpoint=checkpoint, dtype=dtype, form=form, rounds=not on_cpu)
    first = memory.first_experts(_trunk_bytes(trunk, fitted))
    store.reserve([len(row) for row in first.rows])
    _read(source, store, first.rows, device, note)
    runner = ModelRunner(trunk, modules, fitted, device=device)
    room = memory.cache_room(first.limit)
    cache = runner.allocate(
        num_blocks=room.blocks,
        block_size=spec.block_size,
        dtype=dtype,
        windows=memory.windows,
        num_window_blocks=0 if room.windows is None else room.windows.blocks,
    )
    if device.type == "cuda" and not spec.enforce_eager:
        refusal = runner.use_graphs(
            max_num_seqs=spec.max_num_seqs,
            max_model_len=spec.model.max_model_len,
            max_tokens=spec.max_num_batched_tokens,
        )
        if refusal is not None:
            log.info("steps are not launched as CUDA graphs: %s", refusal)
    states = None
    if room.states is not None:
        states = StateStore(fitted.states, room.states, steps_in_flight=spec.steps_in_flight, device=device)
    slotted = store.slotted is not None
    return LoadedModel(
        fit=fitted,
        # now, because no step could run meanwhile
        grammars=Compiler(_vocabulary(spec, checkpoint)),
        report=fitted.report(),
        source=source,
        memory=memory,
        store=store,
        runner=runner,
        cache=cache,
        states=states,
        state_room=room.states,
        windows=memory.windows,
        window_room=room.windows,
        weight_bytes=_trunk_bytes(trunk, fitted) + store.nbytes,
        capacity=memory.expert_capacity(first.limit, cache_bytes=_cache_bytes(cache, states)),
        disk_bytes_per_s=_disk_rate(checkpoint) if slotted else None,
        host=_host_memory(memory, source, device) if slotted else HostMemory(),
    )


def _trunk_bytes(trunk: nn.Module, fitted: Fit) -> int:
    return sum(p.nbytes for p in trunk.parameters()) + fitted.packed_bytes


def _cache_bytes(cache: KVCache, states: StateStore | None) -> int:
    return cache.nbytes + (0 if states is None else states.nbytes)


def _read(
    source: CheckpointExperts,
    store: ExpertStore,
    rows: list[list[int]],
    device: torch.device,
    note: Callable[[float], None],
) -> None:
    pairs = [(layer, expert) for layer, row in enumerate(rows) for expert in row]
    for layer, expert, tensors in source.read(pairs, device, lambda done, total: note(done / max(1, total))):
        store.put(layer, expert, tensors)
    note(1.0)


def _vocabulary(spec: WorkerSpec, checkpoint: Checkpoint) -> Vocabulary | CheckpointError:
    info = checkpoint.info
    try:
        return read_vocabulary(spec.model.path, width=info.vocab_size, eos_token_ids=info.eos_token_ids)
    except CheckpointError as error:
        return error


def _disk_rate(checkpoint: Checkpoint) -> float:
    return read_rate([tensor.file for tensor in checkpoint.tensors.values()]) or ASSUMED_BYTES_PER_S


def _host_memory(memory: WorkerMemory, source: CheckpointExperts, device: torch.device) -> HostMemory:
    """How many experts fit in memory beside a GPU, and how fast they are there."""
    layer = (memory.store.slotted or [])[0]
    if not isinstance(layer, TieredStacks):
        return HostMemory()
    held = layer.held()
    tensors = layer.get(min(held)) if held else source.read_to_host(0, 0)
    capacity = memory.host_capacity(layer.layout(tensors).nbytes)
    if not capacity:
        return HostMemory()
    try:
        return HostMemory(capacity=capacity, rates=host_rates(device, layer, tensors))
    except RuntimeError as error:
        log.warning("no expert lies in the host's memory, because none can be pinned: %s", error)
        return HostMemory()
