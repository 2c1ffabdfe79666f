"""The data plane of one worker, without Ray. The actor in actors/worker/ wraps it.

It owns weights, KV cache, sequences and the epoch in force. One thread calls `load`, `step` and `commit`, one at a
time. Other threads may call the other methods at the same time. Weights are kept by (layer, logical expert), so a copy
that arrives early does no harm: it is held beside the placement's experts until a commit makes it one of them. On GPUs
it lies in tensors of its own until then (model/experts/stacked.py).
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from elastic_moe.cluster.errors import CheckpointError, PlacementError, StepAborted, UserError
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.cluster.facts.tiering import pins_of
from elastic_moe.cluster.fit import FitReport
from elastic_moe.cluster.messages.epochs import (
    Epoch,
    EpochSpec,
    ExpertCopy,
    RoutingCounts,
    StateRoom,
    TierCounts,
    WindowRoom,
    WorkerSpec,
)
from elastic_moe.cluster.messages.requests import Endpoint, RequestId
from elastic_moe.cluster.messages.seats import LiveBlocks, Seats
from elastic_moe.cluster.messages.steps import Chunk, NewSequence, ScoredPrompt, StepPlan, StepResult
from elastic_moe.cluster.placement import EMPTY, Tier, WorkerId
from elastic_moe.model.checkpoints.checkpoint import Checkpoint, open_checkpoint
from elastic_moe.model.checkpoints.loading import expert_modules, iter_experts, load_trunk
from elastic_moe.model.exchange.counter import RoutingCounter
from elastic_moe.model.exchange.dispatch import Dispatcher
from elastic_moe.model.exchange.join import Exchange, join_exchange, make_dispatcher
from elastic_moe.model.exchange.meeting import Meeting
from elastic_moe.model.exchange.tcp import TcpTransport
from elastic_moe.model.experts.interface import Tensors
from elastic_moe.model.experts.store import ExpertStore
from elastic_moe.model.experts.tiered_stacks import TieredStacks
from elastic_moe.model.fitting.fit import Fit, fit
from elastic_moe.model.grammars.compiling import Compiler
from elastic_moe.model.grammars.masks import MaskThreads
from elastic_moe.model.grammars.vocabulary import Vocabulary, read_vocabulary
from elastic_moe.model.native import unavailable
from elastic_moe.model.native.exchange import NativeExchange
from elastic_moe.model.native.experts import ExpertUnavailable
from elastic_moe.model.sampling.next_tokens import choose
from elastic_moe.model.sampling.scoring import Scoring, score
from elastic_moe.model.sampling.state import SamplingState
from elastic_moe.model.states.packed import StateBatch
from elastic_moe.model.states.store import StateStore, slots_per_sequence
from elastic_moe.model.tiers.disk import default_directory
from elastic_moe.model.tiers.rates import ASSUMED_BYTES_PER_S, HostRates, host_rates, read_rate
from elastic_moe.model.tiers.tiers import Tiers
from elastic_moe.model.trunk.attention import SequenceSlice
from elastic_moe.model.trunk.kv_cache import KVCache
from elastic_moe.model.trunk.windows import WindowGroup, window_group
from elastic_moe.model.worker.budgets import KV_SHARE, KV_SHARE_CUDA, LATER_SHARE, kv_bytes, room_for_experts
from elastic_moe.model.worker.cache_room import CacheRoom, CacheSizes, WindowSizes, divide
from elastic_moe.model.worker.runner import ModelRunner

log = logging.getLogger(__name__)

# copies of experts lie in Ray's shared memory, which is read-only and is only read here
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

_BORROW_TOKENS = 32
"""Fewest tokens of a worker in a step for which borrowing cores pays."""
_DOORS = 4
"""Doors that are kept open: of the group that forms, and of attempts that were given up before they began."""


@dataclass(slots=True)
class _Sequence:
    state: SamplingState
    blocks: list[int]
    windows: LiveBlocks


@dataclass(slots=True)
class _EpochState:
    spec: EpochSpec
    rank: int
    exchange: Exchange
    dispatcher: Dispatcher
    node_ranks: tuple[int, ...] = ()
    """Ranks of the workers that share the node's cores, this one included. Empty if cores are not shared."""
    failed_step: int | None = None
    """The step that failed on this worker. It refuses later steps of the epoch: peers would take them for this one."""


class Worker:
    """See the module."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.progress = 0.0
        """Share of the weights' bytes that is loaded, from 0 to 1."""
        self._device = torch.device(spec.model.device)
        self._dtype: torch.dtype = getattr(torch, spec.model.dtype)
        self._sequences: dict[RequestId, _Sequence] = {}
        self._seats = Seats()
        self._grammars: Compiler
        self._masks = MaskThreads()
        self._share = max(1, spec.num_threads)
        """Threads of a step if this worker borrows none."""
        self._prepared: dict[Epoch, _EpochState] = {}
        self._meetings: dict[str, Meeting] = {}
        """Doors that were opened and not used yet, by their tokens, the oldest first."""
        self._joining: dict[Epoch, Meeting] = {}
        """Those of groups that are being joined now."""
        self._abandoned: deque[Epoch] = deque(maxlen=_DOORS)
        """Epochs that were abandoned lately. Calls overtake one another, so their `prepare` may come later."""
        self._epoch: _EpochState | None = None
        self._checkpoint: Checkpoint
        self._form = ExpertForm.PLAIN
        self._fit: Fit
        self.report: FitReport
        """Which path serves each part of the model on this worker. It is set when the model is loaded."""
        self._store: ExpertStore
        self._runner: ModelRunner
        self._cache: KVCache
        self._states: StateStore | None = None
        self.state_room: StateRoom | None = None
        """None if the model keeps nothing but keys and values."""
        self._windows: WindowGroup | None = None
        self.window_room: WindowRoom | None = None
        """None if every layer keeps the keys and values of all tokens."""
        self._counter: RoutingCounter
        self._tiers: Tiers | None = None
        """Made when an epoch places an expert of this worker on the disk."""
        self._capacity = 0
        self._short: int | None = None
        """Experts of all layers for which there is memory, if they are fewer than those of the spec."""
        self._loaded: tuple[tuple[int, ...], ...] = ()
        """[L] experts that were loaded first. The worker falls back to them until its first epoch begins."""
        self._stepping = threading.Lock()
        """Held by a step, and while experts are dropped, since a step may compute any expert that lies here."""
        self._drop_due = False
        self.disk_bytes_per_s: float | None = None
        """How fast experts come from the disk; None if this worker can compute only experts that are in its device."""
        self.host_capacity = 0
        """How many experts of all layers fit in pinned memory beside a GPU."""
        self.host_rates: HostRates | None = None
        """How fast experts come from there, and are computed there; None where there is none."""

    # --- Loading ------------------------------------------------------------------------------------------------

    def load(self) -> tuple[int, int]:
        """Read the trunk and the spec's experts, and make the KV cache. Returns (KV blocks, bytes held).

        Raises CheckpointError, and UserError if the KV cache cannot hold one sequence of full length.
        """
        if self.spec.num_threads:
            torch.set_num_threads(self.spec.num_threads)
        self._checkpoint = open_checkpoint(self.spec.model.path)
        info = self._checkpoint.info
        native = info.kept is ExpertForm.PLAIN or unavailable() is None
        self._form = info.form(self.spec.model.expert_dtype, self.spec.model.dtype, self._device.type, native=native)
        trunk = load_trunk(self._checkpoint, dtype=self._dtype, device=self._device)
        modules = expert_modules(trunk)
        self._fit = fit(trunk, modules, block_size=self.spec.block_size, form=self._form)
        self._windows = window_group(self._fit.shapes.kv, max_model_len=self.spec.model.max_model_len)
        self._store = ExpertStore(self._fit.experts)
        if len(self.spec.experts) != len(modules):
            raise CheckpointError(f"{len(modules)} MoE layers were found, {len(self.spec.experts)} expected")
        experts = self._affordable(sum(p.nbytes for p in trunk.parameters()) + self._fit.packed_bytes)
        self._store.reserve([len(row) for row in experts])
        self._read([(layer, e) for layer, row in enumerate(experts) for e in row])
        self._runner = ModelRunner(trunk, modules, self._fit, device=self._device)
        self._counter = RoutingCounter(info.num_layers, info.num_logical_experts)
        room = self._cache_room()
        self.window_room = room.windows
        self._cache = self._runner.allocate(
            num_blocks=room.blocks,
            block_size=self.spec.block_size,
            dtype=self._dtype,
            windows=self._windows,
            num_window_blocks=0 if room.windows is None else room.windows.blocks,
        )
        if room.states is not None:
            self.state_room = room.states
            self._states = StateStore(
                self._fit.states, room.states, steps_in_flight=self.spec.steps_in_flight, device=self._device
            )
        # now, because no step could run meanwhile
        self._grammars = Compiler(self._vocabulary())
        self.report = self._fit.report()
        self._loaded = self.held()
        self._capacity = self.expert_capacity()
        if self._store.slotted is not None:
            files = [tensor.file for tensor in self._checkpoint.tensors.values()]
            self.disk_bytes_per_s = read_rate(files) or ASSUMED_BYTES_PER_S
            self._find_host_memory()
        weights = sum(p.nbytes for p in trunk.parameters()) + self._fit.packed_bytes + self._store.nbytes
        return self._cache.num_blocks, weights + self._cache_bytes

    @property
    def _cache_bytes(self) -> int:
        return self._cache.nbytes + (0 if self._states is None else self._states.nbytes)

    def _find_host_memory(self) -> None:
        """Find how many experts fit in memory beside a GPU, and how fast they are there."""
        layer = (self._store.slotted or [])[0]
        if not isinstance(layer, TieredStacks):
            return
        held = layer.held()
        tensors = layer.get(min(held)) if held else self._load_expert(0, 0)
        nbytes, info = layer.layout(tensors).nbytes, self._checkpoint.info
        room = self.spec.host_expert_memory_bytes
        if room is None:
            room = int(psutil.virtual_memory().available * LATER_SHARE / self.spec.node_workers)
        capacity = min(room // nbytes, info.num_layers * info.num_logical_experts)
        if not capacity:
            return
        try:
            self.host_rates, self.host_capacity = host_rates(self._device, layer, tensors), capacity
        except RuntimeError as error:
            log.warning("no expert lies in the host's memory, because none can be pinned: %s", error)

    def _affordable(self, trunk_bytes: int) -> list[list[int]]:
        """[L] the spec's experts for which this worker has memory: all, or the first ones of each layer.

        Raises UserError if there is no memory for one expert of each layer.
        """
        wanted = [[e for e in experts if e != EMPTY] for experts in self.spec.experts]
        if self._store.slotted is None:
            return wanted
        capacity = self._room_for_experts(trunk_bytes) // self._expert_bytes
        if sum(map(len, wanted)) <= capacity:
            return wanted
        if capacity < len(wanted):
            least = f"{len(wanted) * self._expert_bytes} bytes, which is one expert of each of the {len(wanted)} layers"
            given = self.spec.expert_memory_bytes
            raise UserError(
                f"{self.spec.worker} has memory for {max(0, capacity)} experts beside its KV cache, and needs {least}:"
                " lower --max-model-len, --max-num-seqs or --kv-cache-memory-bytes"
                if given is None
                else f"--expert-memory-bytes: expected at least {least}, got {given}"
            )
        self._short = capacity
        return [row[: pins_of(capacity // len(wanted))] for row in wanted]

    def _room_for_experts(self, trunk_bytes: int) -> int:
        """Bytes that experts may take."""
        spec = self.spec
        if spec.expert_memory_bytes is not None:
            return spec.expert_memory_bytes
        free: float
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info()
        else:
            memory = psutil.virtual_memory()
            free = min(memory.available, memory.total / spec.node_workers - trunk_bytes)
        least_kv = self._cache_sizes().least
        return room_for_experts(free, least_kv=least_kv, given_kv=spec.kv_cache_bytes)

    @property
    def _expert_bytes(self) -> int:
        return self._checkpoint.info.served_in(self.spec.model.dtype, self._form).expert_bytes

    def _read(self, pairs: Sequence[tuple[int, int]]) -> None:
        def note(done: int, total: int) -> None:
            self.progress = done / max(1, total)

        for layer, expert, tensors in iter_experts(
            self._checkpoint, pairs, dtype=self._dtype, device=self._device, form=self._form, progress=note
        ):
            self._store.put(layer, expert, tensors)
        self.progress = 1.0

    def _cache_sizes(self) -> CacheSizes:
        spec, group = self.spec, self._windows
        state_bytes = sum(layer.nbytes for layer in self._fit.states)
        windowed = frozenset[int]() if group is None else group.layers
        block_bytes, window_bytes = (
            KVCache.block_bytes(
                {layer: shape for layer, shape in self._fit.shapes.kv.items() if (layer in windowed) is among},
                block_size=spec.block_size,
                dtype=self._dtype,
            )
            for among in (False, True)
        )
        return CacheSizes(
            block_bytes=block_bytes,
            windows=None
            if group is None
            else WindowSizes(
                tokens=group.tokens,
                block_bytes=window_bytes,
                block_size=spec.block_size,
                max_num_batched_tokens=spec.max_num_batched_tokens,
                steps_in_flight=spec.steps_in_flight,
            ),
            blocks_per_sequence=-(-spec.model.max_model_len // spec.block_size),
            max_num_seqs=spec.max_num_seqs,
            state_bytes=state_bytes,
            states_per_sequence=slots_per_sequence(spec.steps_in_flight),
            snapshots=spec.enable_prefix_caching,
        )

    def _vocabulary(self) -> Vocabulary | CheckpointError:
        info = self._checkpoint.info
        try:
            return read_vocabulary(self.spec.model.path, width=info.vocab_size, eos_token_ids=info.eos_token_ids)
        except CheckpointError as error:
            return error

    def _cache_room(self) -> CacheRoom:
        """How the memory for KV cache and states is divided. Raises UserError if no sequence of full length fits."""
        spec, sizes = self.spec, self._cache_sizes()
        room = spec.kv_cache_bytes
        if room is None:
            room = self._free_for_kv(sizes.least)
        return divide(room, sizes, max_model_len=spec.model.max_model_len)

    def _free_for_kv(self, least: int) -> int:
        """Bytes for the KV cache, beside the experts that have been loaded and those that will come into the device."""
        spec, info = self.spec, self._checkpoint.info
        if cuda := self._device.type == "cuda":
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
        else:
            free = psutil.virtual_memory().available // spec.node_workers
        budget = spec.expert_memory_bytes or (self._short or 0) * self._expert_bytes
        every = info.num_layers * info.num_logical_experts * self._expert_bytes
        return kv_bytes(
            free,
            experts_to_come=max(0, min(budget, every) - self._store.nbytes),
            least=least,
            share=KV_SHARE_CUDA if cuda else KV_SHARE,
            short=self._short is not None and spec.expert_memory_bytes is None,
        )

    @property
    def capacity(self) -> int:
        """How many experts fit on this worker over all layers, as it was found when the model was loaded."""
        return self._capacity

    def expert_capacity(self) -> int:
        """How many experts fit on this worker over all layers, those that it holds included."""
        spec = self.spec
        if spec.expert_memory_bytes is not None:
            return spec.expert_memory_bytes // self._expert_bytes
        if self._short is not None:
            return self._short
        held = sum(len(self._store.held(layer)) for layer in range(self._store.num_layers))
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info()
        else:
            # pages of KV caches take memory only when they are first used
            caches = spec.node_workers * self._cache_bytes
            free = max(0, psutil.virtual_memory().available - caches) // spec.node_workers
        return held + int(free * LATER_SHARE) // max(self._expert_bytes, self._store.nbytes // max(1, held))

    # --- Epochs -------------------------------------------------------------------------------------------------

    def open_door(self, address: str) -> Endpoint:
        """Where this worker waits for the others of a group that is to form. `address` is this node's. Raises OSError.

        `prepare` uses the door up; of those that none uses, the newest are kept open.
        """
        meeting = Meeting(address)
        self._meetings[meeting.endpoint.token] = meeting
        while len(self._meetings) > _DOORS:
            self._meetings.pop(next(iter(self._meetings))).close()
        return meeting.endpoint

    def prepare(self, spec: EpochSpec) -> None:
        """Prepare an epoch while the present one serves: check the experts and join the other workers. Blocks on peers
        until it is abandoned.

        Raises PlacementError if an expert is not held on this worker, and StepAborted if a peer does not join.
        """
        if spec.epoch in self._abandoned:
            raise StepAborted(f"epoch {spec.epoch} was abandoned")
        rank = spec.placement.rank_of(self.spec.worker)
        for layer in range(spec.placement.num_layers):
            missing = self._resident(spec, layer) - self._store.held(layer)
            if missing:
                raise PlacementError(f"{self.spec.worker} does not hold expert {min(missing)} of layer {layer}")
        self._make_tiers(spec)
        current = self._epoch
        if current is not None and current.spec.group == spec.group and current.rank == rank:
            exchange = current.exchange
        else:
            exchange = self._join(spec, rank)
        dispatcher = make_dispatcher(spec.placement, rank, self._store, exchange, self._device)
        self._prepared[spec.epoch] = _EpochState(spec=spec, rank=rank, exchange=exchange, dispatcher=dispatcher)

    def _join(self, spec: EpochSpec, rank: int) -> Exchange:
        meeting = self._meetings.pop(spec.doors[rank].token, None) if spec.doors else None
        if spec.doors and meeting is None:
            raise StepAborted(f"the door of {self.spec.worker} for epoch {spec.epoch} is closed")
        if meeting is not None:
            self._joining[spec.epoch] = meeting
        try:
            return join_exchange(
                spec,
                rank,
                self._runner.layer_shapes,
                native=self._fit.exchange_refusal() is None,
                max_tokens=self.spec.max_num_batched_tokens,
                timeout_s=self.spec.step_timeout_s,
                meeting=meeting,
            )
        finally:
            self._joining.pop(spec.epoch, None)

    def _experts_of(self, spec: EpochSpec, layer: int) -> set[int]:
        return set(spec.placement.experts_of(self.spec.worker, layer)) - {EMPTY}

    def _resident(self, spec: EpochSpec, layer: int) -> set[int]:
        return set(spec.placement.resident(self.spec.worker, layer))

    def _hosted(self, spec: EpochSpec, layer: int) -> set[int]:
        experts = spec.placement.experts_of(self.spec.worker, layer)
        tiers = spec.placement.tiers_of(self.spec.worker, layer)
        return {expert for expert, tier in zip(experts, tiers, strict=True) if expert != EMPTY and tier == Tier.HOST}

    def _make_tiers(self, spec: EpochSpec) -> None:
        """Make the tiers if an epoch is the first that needs them on this worker."""
        layers = range(spec.placement.num_layers)
        if self._tiers is not None or all(self._resident(spec, n) == self._experts_of(spec, n) for n in layers):
            return
        slotted = self._store.slotted
        if slotted is None:
            raise PlacementError(f"{self.spec.worker} cannot compute experts that are not in its device")
        directory = self.spec.expert_cache_dir
        self._tiers = Tiers(
            self._checkpoint,
            slotted,
            self._load_expert,
            dtype=self.spec.model.dtype,
            directory=default_directory() if directory is None else Path(directory),
            policy=self.spec.expert_cache_policy,
            capacity=self._capacity,
            device=self._device,
            host_capacity=self.host_capacity,
            rates=self.host_rates,
        )

    def _load_expert(self, layer: int, expert: int) -> Tensors:
        """From the checkpoint into the host's memory."""
        host = torch.device("cpu")
        [(_, _, tensors)] = iter_experts(
            self._checkpoint, [(layer, expert)], dtype=self._dtype, device=host, form=self._form
        )
        return tensors

    def commit(self, epoch: Epoch) -> None:
        """Flip to a prepared epoch at a step boundary, and drop the experts that it does not place on this worker.

        A second commit of the same epoch changes nothing. Raises StepAborted if the epoch was not prepared.
        """
        if self._epoch is not None and self._epoch.spec.epoch == epoch:
            return
        state = self._prepared.pop(epoch, None)
        if state is None:
            raise StepAborted(f"epoch {epoch} was not prepared on {self.spec.worker}")
        previous, self._epoch = self._epoch, state
        self._share_threads(state)
        self._prepared.clear()
        self._runner.dispatcher = state.dispatcher
        if previous is not None and previous.exchange is not state.exchange:
            previous.exchange.close()
        with self._stepping:
            self._keep_placed()

    def _share_threads(self, state: _EpochState) -> None:
        """Share a node's cores among its workers. The thread that runs the steps calls it."""
        if self.spec.node_threads:
            workers = state.spec.placement.workers
            node = workers[state.rank].node
            state.node_ranks = tuple(rank for rank, worker in enumerate(workers) if worker.node == node)
            self._share = max(1, self.spec.node_threads // len(state.node_ranks))
            torch.set_num_threads(self._share)
            if isinstance(state.exchange, NativeExchange):
                state.exchange.threads = self._share

    def _borrow_threads(self, plan: StepPlan, state: _EpochState) -> None:
        """Let the trunk use the cores of workers on this node that have few tokens in this step.

        Only native code does so, since the number of threads changes no bit there. PyTorch's operators may add up in
        another order.
        """
        if not isinstance(state.exchange, NativeExchange) or not state.node_ranks:
            return
        own = plan.tokens_per_rank[state.rank]
        everybody = sum(plan.tokens_per_rank[rank] for rank in state.node_ranks)
        fair = round(self.spec.node_threads * own / everybody) if own >= _BORROW_TOKENS else 0
        threads = max(self._share, fair)
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def abandon(self, epoch: Epoch) -> None:
        """Forget what was prepared and copied for an epoch that will not be committed.

        Where a step runs that may compute what was copied, it is dropped as soon as that step has ended.
        """
        self._abandoned.append(epoch)
        joining = self._joining.get(epoch)
        if joining is not None:
            joining.give_up()
        state = self._prepared.pop(epoch, None)
        if state is not None and (self._epoch is None or state.exchange is not self._epoch.exchange):
            state.exchange.close()
        self._drop_due = True
        self._drop_between_steps()

    def _drop_between_steps(self, *, wait: bool = False) -> None:
        """Drop what was copied for abandoned epochs, and give the cache area the size that is left to it. Where a step
        runs, its end does so; `wait`: wait for it, if something is to be dropped.
        """
        if self._untidy() and self._stepping.acquire(blocking=wait and self._drop_due):
            try:
                # another thread may have done so meanwhile
                if self._drop_due:
                    self._keep_placed()
                elif self._tiers is not None:
                    self._tiers.fit_area()
            finally:
                self._stepping.release()

    def _untidy(self) -> bool:
        return self._drop_due or (self._tiers is not None and self._tiers.held_changed)

    def _keep_placed(self) -> None:
        self._drop_due = False
        if self._epoch is None:
            self._store.keep_only(self._loaded)
            return
        spec, layers = self._epoch.spec, range(self._store.num_layers)
        self._store.keep_only([self._resident(spec, layer) for layer in layers])
        if self._tiers is not None:
            placed, hosted = ([of(spec, layer) for layer in layers] for of in (self._experts_of, self._hosted))
            self._tiers.place(placed, hosted)

    # --- Copies of experts --------------------------------------------------------------------------------------

    def export_expert(self, layer: int, expert: int) -> ExpertCopy:
        """Copy an expert for another worker, from wherever it lies. Raises PlacementError if it lies nowhere here."""
        try:
            tensors = self._store.get(layer, expert)
        except KeyError:
            if self._tiers is None or not self._tiers.serves(layer, expert):
                raise PlacementError(f"{self.spec.worker} does not hold expert {expert} of layer {layer}") from None
            tensors = self._tiers.read(layer, expert)
        raw = {name: t.contiguous().view(-1).view(torch.uint8).cpu().numpy() for name, t in tensors.items()}
        return ExpertCopy(
            layer=layer,
            expert=expert,
            tensors=raw,
            digest=digest(raw),
            shapes={name: tuple(t.shape) for name, t in tensors.items()},
            dtypes={name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()},
        )

    def import_expert(self, copy: ExpertCopy) -> None:
        """Hold a copy beside the placement's experts. Raises PlacementError if its digest does not match."""
        if digest(copy.tensors) != copy.digest:
            raise PlacementError(f"expert {copy.expert} of layer {copy.layer} arrived damaged")
        self._drop_between_steps(wait=True)
        tensors = {
            name: torch.from_numpy(raw).view(getattr(torch, copy.dtypes[name])).view(copy.shapes[name]).to(self._device)
            for name, raw in copy.tensors.items()
        }
        if self._tiers is not None and copy.expert in self._store.held(copy.layer):
            return  # a step may compute it now
        self._store.put(copy.layer, copy.expert, tensors, borrowed=self._device.type == "cpu")
        self._note_held()

    def _note_held(self) -> None:
        """Another expert is held beside the area: it becomes smaller now, or when the step that runs has ended."""
        if self._tiers is not None:
            self._tiers.held_changed = True
            self._drop_between_steps()

    def read_experts(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Read experts, given as (layer, expert), from the disk and hold them beside the placement's experts."""
        self._drop_between_steps(wait=True)
        if self._tiers is None:
            self._read(pairs)
            return
        for layer, expert in sorted(set(pairs)):
            if expert not in self._store.held(layer):
                self._store.put(layer, expert, self._tiers.read(layer, expert))
                self._note_held()

    # --- Steps --------------------------------------------------------------------------------------------------

    def step(self, plan: StepPlan) -> StepResult:
        """Run this worker's part of a step, in lock-step with the other workers, and sample.

        Raises StepAborted for a plan of another epoch, or if a peer is gone; then the step may be run again. After any
        error, every further step of the epoch raises StepAborted.
        """
        epoch = self._epoch
        if epoch is None or plan.epoch != epoch.spec.epoch:
            have = None if epoch is None else epoch.spec.epoch
            raise StepAborted(f"a step of epoch {plan.epoch} came to {self.spec.worker}, which is in epoch {have}")
        if epoch.failed_step is not None:
            raise StepAborted(f"step {epoch.failed_step} failed on {self.spec.worker}")
        try:
            with self._stepping:
                return self._run(plan)
        except BaseException as error:
            epoch.failed_step = plan.step
            self._counter.discard_step()
            if isinstance(error, ExpertUnavailable) and self._tiers is not None:
                raise (self._tiers.take_error() or error) from None
            raise
        finally:
            self._drop_between_steps()

    def _run(self, plan: StepPlan) -> StepResult:
        begin = time.perf_counter()
        assert self._epoch is not None
        self._borrow_threads(plan, self._epoch)
        for request_id in plan.finished:
            self._sequences.pop(request_id, None)
            self._forget_states(request_id)
        for new in plan.new:
            self._forget_states(new.request_id)
            self._sequences[new.request_id] = _Sequence(state=self._state(new), blocks=[], windows=LiveBlocks())
        chunks = self._seats.chunks(plan)
        slices = [self._slice(chunk) for chunk in chunks]
        scoring = self._scoring(chunks)
        sampling = {chunk.request_id: self._sequences[chunk.request_id].state for chunk in chunks if chunk.samples}
        constrained = [state.progress for state in sampling.values() if state.progress is not None]
        if constrained:
            self._masks.begin(constrained)
        logits = self._runner.run(
            slices, plan.tokens_per_rank, self._counter, keep=bool(scoring), states=self._move_states(chunks)
        )
        if constrained:
            self._masks.finish(constrained)
        scored = score(scoring, self._runner.logits, self._runner.vocabulary)
        with torch.inference_mode():
            chosen = choose(logits, sampling)
        assert self._epoch is not None
        self._epoch.dispatcher.finish()
        chosen.append_to(sampling)
        self._counter.commit_step([chunk.length for chunk in chunks])
        if self._tiers is not None:
            self._tiers.settle()
        compute_s = time.perf_counter() - begin
        # workers wait for one another, so a prompt on one worker makes the step a prefill step for all
        decode = max(plan.tokens_per_rank) <= self.spec.max_num_seqs
        self._counter.note_time(compute_s, sum(plan.tokens_per_rank), decode=decode)
        broken = {one for one in scored if not isinstance(one, ScoredPrompt)}
        corrupted = {*chosen.corrupted, *broken}
        tokens, samples = self._seats.packed(one for one in chosen.samples if one.request_id not in broken)
        return StepResult(
            step=plan.step,
            samples=samples,
            tokens=tokens,
            compute_s=compute_s,
            corrupted=tuple(corrupted),
            unready=tuple(request_id for request_id in chosen.unready if request_id not in broken),
            stuck=tuple(one for one in chosen.stuck if one.request_id not in broken),
            scored=tuple(s for s in scored if isinstance(s, ScoredPrompt) and s.request_id not in corrupted),
        )

    def _forget_states(self, request_id: RequestId) -> None:
        if self._states is not None:
            self._states.forget(request_id)

    def _move_states(self, chunks: Sequence[Chunk]) -> StateBatch | None:
        if self._states is None:
            return None
        moves = [(chunk.length, self._states.begin(chunk)) for chunk in chunks]
        return StateBatch.build(moves, self._states, self._device)

    def _scoring(self, chunks: Sequence[Chunk]) -> list[Scoring]:
        wanted: list[Scoring] = []
        row = 0
        for chunk in chunks:
            one = Scoring.of(chunk, row, self._sequences[chunk.request_id].state)
            if one is not None:
                wanted.append(one)
            row += chunk.length
        return wanted

    def _state(self, new: NewSequence) -> SamplingState:
        grammar = new.params.grammar
        return SamplingState(new, None if grammar is None else self._grammars.get(grammar))

    def _slice(self, chunk: Chunk) -> SequenceSlice:
        sequence = self._sequences[chunk.request_id]
        sequence.state.truncate(chunk.known)
        sequence.blocks[chunk.block_offset :] = chunk.block_ids
        if self._windows is not None:
            if chunk.windows is not None:
                sequence.windows.put(chunk.windows)
            sequence.windows.drop_before(self._windows.first_block(chunk.start, self.spec.block_size))
        end = chunk.start + chunk.length
        return SequenceSlice(
            token_ids=sequence.state.token_ids[chunk.start : end],
            start=chunk.start,
            block_ids=sequence.blocks,
            windows=None if self._windows is None else sequence.windows,
            prompt_length=sequence.state.num_prompt_tokens,
            wants_logits=chunk.samples,
        )

    def forget_sequences(self) -> None:
        """Forget all sequences when a new engine starts: it will never report those of the last engine as finished."""
        self._sequences.clear()
        self._seats = Seats()
        if self._states is not None:
            self._states.forget_all()

    def abort_step(self, epoch: Epoch) -> None:
        """Wake a step that waits for a dead peer. The exchange cannot be used afterwards; a new epoch must follow."""
        current = self._epoch
        if current is not None and current.spec.epoch == epoch:
            current.exchange.abort()

    def routing_counts(self) -> RoutingCounts:
        """The routing counts since the last call."""
        return self._counter.take()

    def link_gbps(self) -> dict[WorkerId, float]:
        """Gigabits per second between this worker and others of its epoch, as measured when their group formed."""
        current = self._epoch
        if current is None or not isinstance(current.exchange, TcpTransport):
            return {}
        workers = current.spec.placement.workers
        return {workers[rank].id: gbps for rank, gbps in current.exchange.gbps.items()}

    def held(self) -> tuple[tuple[int, ...], ...]:
        """[L] logical experts in the device beside the cache area."""
        return tuple(tuple(sorted(self._store.held(layer))) for layer in range(self._store.num_layers))

    def tier_counts(self) -> TierCounts:
        """What became of the tiers since the last call."""
        if self._tiers is None:
            return TierCounts(resident=sum(map(len, self.held())))
        return self._tiers.counts()


def digest(tensors: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]) -> str:
    """The digest of an expert as one unit: of its tensors' names, sizes and bytes."""
    # SHA-256 is most of the CPU time of a copy. CPUs have instructions for it, so it is twice as fast as BLAKE2
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(f"{name}:{tensors[name].nbytes};".encode())
        state.update(np.ascontiguousarray(tensors[name]).data)
    return state.hexdigest()
