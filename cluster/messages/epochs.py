"""Coordinator and workers: what a worker loads, which epoch it takes part in, and what it reports.

coordinator -> worker   WorkerSpec when the worker is made, EpochSpec when an epoch begins
worker -> coordinator   WorkerInfo once it has loaded, RoutingCounts and TierCounts as it runs
worker -> worker        ExpertCopy
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NewType

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.expert_forms import ExpertForm, expert_form, trunk_form, weight_bytes
from elastic_moe.cluster.fit import FitReport
from elastic_moe.cluster.messages.requests import Endpoint
from elastic_moe.cluster.placement import Placement, WorkerId

Epoch = NewType("Epoch", int)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The model and the choices about it that every process must share."""

    path: str
    dtype: str
    """float32, bfloat16 or float16; 'auto' has been resolved."""
    device: str
    """cpu or cuda; 'auto' has been resolved."""
    max_model_len: int
    expert_dtype: str = "auto"
    """The setting of that name; `ModelInfo.form` says which form it means."""
    trunk_dtype: str = "auto"
    """The setting of that name; `ModelInfo.trunk_form` says which form it means."""


_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the control plane knows of a model without loading it."""

    architecture: str
    num_layers: int
    """MoE layers: L."""
    num_logical_experts: int
    top_k: int
    hidden_size: int
    vocab_size: int
    max_model_len: int
    """Longest sequence that the checkpoint allows, in tokens."""
    expert_bytes: int
    """Bytes of one expert of one layer in the stored dtype. `served_in` computes them for another dtype."""
    trunk_bytes: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    """The dtype in which the checkpoint stores the model."""
    rope_limits: tuple[int, ...] = ()
    """Prompt lengths, in tokens, beyond which the whole prompt gets other rotary embeddings (longrope)."""
    rope_growth_limit: int | None = None
    """Prompt length beyond which every length has its own rotary embeddings (dynamic NTK); None: no limit."""

    kept: ExpertForm = ExpertForm.PLAIN
    """The form in which the checkpoint has its experts, if it is one that CPUs compute."""
    packed_as: str | None = None
    """The format of the checkpoint's packed experts; None if they are not packed."""
    matrix_bytes: int = 0
    """Bytes of those of the trunk's matrices that --trunk-dtype can round; see `trunk_bytes`."""
    trunk_packed_as: str | None = None
    """The format of the checkpoint's packed linear layers beside the experts; None if they are not packed."""
    kv_layers: tuple[tuple[int, int | None], ...] = ()
    """(numbers that the KV cache holds of a token, last tokens that are attended to or None for all) of each attention
    layer. A worker that cannot compute with latents holds more."""

    def kv_bytes(self, dtype: str, tokens: int) -> int:
        """Fewest bytes of KV cache of one sequence of `tokens` tokens, served in `dtype`."""
        return _ITEM_BYTES[dtype] * sum(numbers * min(window or tokens, tokens) for numbers, window in self.kv_layers)

    def form(self, expert_dtype: str, dtype: str, device: str, *, native: bool = True) -> ExpertForm:
        """The form of the experts for a setting of --expert-dtype. See `expert_form`, also for its errors."""
        return expert_form(
            expert_dtype, kept=self.kept, packed_as=self.packed_as, dtype=dtype, device=device, native=native
        )

    def trunk_form(self, trunk_dtype: str, dtype: str, device: str) -> ExpertForm:
        """The form of the trunk's matrices for a setting of --trunk-dtype. See `trunk_form`, also for its errors."""
        return trunk_form(trunk_dtype, packed_as=self.trunk_packed_as, dtype=dtype, device=device)

    def served_in(
        self, dtype: str, form: ExpertForm = ExpertForm.PLAIN, trunk: ExpertForm = ExpertForm.PLAIN
    ) -> ModelInfo:
        """This model with the sizes that it has in the dtype `dtype`, with its experts in `form` and the trunk's
        matrices in `trunk`."""
        stored, served = _ITEM_BYTES[self.dtype], _ITEM_BYTES[dtype]
        vectors_bytes = (self.trunk_bytes - self.matrix_bytes) // stored * served
        matrix_bytes = round(self.matrix_bytes // stored * weight_bytes(trunk, served))
        return replace(
            self,
            expert_bytes=round(self.expert_bytes // stored * weight_bytes(form, served)),
            trunk_bytes=vectors_bytes + matrix_bytes,
            matrix_bytes=matrix_bytes,
        )


STEPS_IN_FLIGHT = 2
"""Most steps that the engine has sent and not committed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a worker needs to load: the model, and the experts that it begins with."""

    worker: WorkerId
    model: ModelSpec
    experts: tuple[tuple[int, ...], ...]
    """[L] logical experts to hold in the device, the most important first. A worker whose memory is too small for all
    of them holds the first ones (`WorkerInfo.held`)."""
    kv_cache_bytes: int | None
    """None: the worker decides from the free memory that it finds."""
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_threads: int
    """Threads of torch while the worker loads; 0 keeps torch's default."""
    node_threads: int = 0
    """Threads that the workers of one node share in each epoch; 0: each worker keeps `num_threads`."""
    node_workers: int = 1
    """Most workers that will share the memory of this worker's node."""
    gpu_workers: int = 1
    """Most workers that will share the memory of this worker's GPU."""
    expert_memory_bytes: int | None = None
    """Most bytes that experts may take in this worker's device; None: the free memory that the worker finds."""
    host_expert_memory_bytes: int | None = None
    """Most bytes of pinned memory that experts may take beside a GPU; None: the free memory that the worker finds."""
    expert_cache_dir: str | None = None
    """Directory of the experts' records; None: a directory of the user's cache."""
    expert_cache_policy: str = "lfru"
    """Name of the policy by which experts leave the cache area (optimizer/buffering/)."""
    interface: str | None = None
    """Network interface of the worker's listeners, by name or as a network; None: that of the node's address."""
    step_timeout_s: float = 60.0
    """Seconds that a worker waits for its peers in a step before it gives the step up."""
    enable_prefix_caching: bool = True
    """Whether to have memory for snapshots of states."""
    steps_in_flight: int = STEPS_IN_FLIGHT
    """Most steps that are sent and not committed."""
    enforce_eager: bool = False
    """Whether the CPU launches each kernel of a step, also where CUDA graphs could do so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateRoom:
    """What a worker's memory holds of the states of sequences, in a model that has layers with a state per sequence."""

    seats: int
    """Most sequences that may run at a time."""
    snapshots: int
    """Most snapshots of states, from which a sequence with the same beginning may go on."""


def window_blocks(tokens: int, *, steps_in_flight: int, block_size: int) -> int:
    """Most blocks that a sequence holds in layers with a window of `tokens`, unless a chunk of its prompt is in flight.

    They hold the window, tokens in flight on both sides of it, and a block that has just been begun.
    """
    return 1 + -(-(tokens + 2 * steps_in_flight) // block_size) + -(-steps_in_flight // block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRoom:
    """What a worker's memory holds of layers with a sliding window, whose blocks are a pool of their own."""

    tokens: int
    """Last tokens that such a layer attends to, the newest one included."""
    blocks: int
    steps_in_flight: int = STEPS_IN_FLIGHT


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """What a worker reports once it has loaded."""

    worker: WorkerId
    node: str
    """Ray's node id."""
    endpoint: Endpoint
    """Where the worker accepts steps from the engine."""
    pid: int
    device: str
    num_kv_blocks: int
    """Blocks for the layers that keep all tokens."""
    memory_bytes: int
    """Bytes of weights, KV cache and states."""
    state_room: StateRoom | None = None
    """None if the model keeps nothing but keys and values."""
    window_room: WindowRoom | None = None
    """None if every layer keeps the keys and values of all tokens."""
    expert_capacity: int | None = None
    """Number of experts that fit in this worker's device, over all layers, including those it holds and the cache area;
    None: no limit."""
    held: tuple[tuple[int, ...], ...] | None = None
    """[L] logical experts that the worker holds in its device; None: all that its spec names."""
    host_capacity: int = 0
    """Number of experts that fit in pinned memory beside a GPU, over all layers."""
    disk_bytes_per_s: float | None = None
    """Rate at which experts are read from the disk tier, as measured; None: the worker serves from its device alone."""
    host_bytes_per_s: float | None = None
    """Rate at which experts come from the host tier, as measured; None where there is none."""
    host_token_s: float | None = None
    """Seconds that the host's cores take for one token in an expert of the host tier, as measured; None where there is
    none."""
    fit: FitReport | None = None
    """Which code serves the model there."""
    gpu: str | None = None
    """UUID of its GPU; None on a CPU, and where it is not known."""


class TransportKind(StrEnum):
    """How the workers of an epoch exchange tokens."""

    LOCAL = "local"
    """One worker keeps all tokens."""
    SHM = "shm"
    """Shared memory between the workers of one node."""
    TCP = "tcp"
    """Connections between workers of several nodes, or that share GPUs in another way than IPC needs."""
    NCCL = "nccl"
    IPC = "ipc"
    """Device memory that all workers of one GPU map. Workers that cannot share it use TCP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochSpec:
    """Membership, placement and process group, under one number."""

    epoch: Epoch
    placement: Placement
    """The placement's workers, in rank order, are the members of the epoch."""
    group: str
    """Name of the process group. Consecutive epochs with the same members use the same group."""
    transport: TransportKind
    rendezvous: str
    """host:port of the store for nccl; empty otherwise."""
    doors: tuple[Endpoint, ...] = ()
    """For tcp and ipc: where each worker waits for the others, in rank order; empty otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseCounts:
    """Tokens of one phase: prefill (prompts, and what is computed again) or decode."""

    tokens: int
    load: npt.NDArray[np.int64]
    """[L, E] tokens that chose each logical expert."""
    steps_s: float = 0.0
    """Seconds of the steps in which this phase had most of the work."""
    steps_tokens: int = 0
    """Tokens of all workers in those steps."""

    def __add__(self, other: PhaseCounts) -> PhaseCounts:
        return PhaseCounts(
            tokens=self.tokens + other.tokens,
            load=self.load + other.load,
            steps_s=self.steps_s + other.steps_s,
            steps_tokens=self.steps_tokens + other.steps_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingCounts:
    """Tokens that a worker's requests ran since its previous report. Padding and warm-up are not counted."""

    prefill: PhaseCounts
    decode: PhaseCounts
    sample: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    """[S, L, K] choices of some of the tokens, in which every token is with the same probability
    (cluster/facts/sampling.py)."""

    @property
    def tokens(self) -> int:
        return self.prefill.tokens + self.decode.tokens

    @property
    def load(self) -> npt.NDArray[np.int64]:
        """[L, E] of both phases."""
        return self.prefill.load + self.decode.load


class FetchSource(StrEnum):
    """Where an expert is fetched from into a device."""

    HOST = "host"
    DISK = "disk"
    """A record in the expert cache directory."""
    CHECKPOINT = "checkpoint"


class StallCause(StrEnum):
    """Why a step waited for an expert."""

    MISS = "miss"
    """The expert was not resident, and nothing was left to compute until it came."""
    CAPACITY = "capacity"
    """The step needs more experts of a layer than the cache area holds: they are brought in one wave after the other.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class TierCounts:
    """What became of the experts' tiers on a worker since its previous report. All zeros where all is resident."""

    accesses: tuple[int, int, int] = (0, 0, 0)
    """Active experts, summed over steps and layers, by the Tier in which they lay when a step needed them. An expert in
    the cache area counts as DEVICE."""
    fetched_bytes: Mapping[FetchSource, int] = field(default_factory=dict)
    stall_s: Mapping[StallCause, float] = field(default_factory=dict)
    """Seconds that steps waited for experts."""
    resident: int = 0
    """Experts in the device now, over all layers, those of the cache area included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """What workers of one node did since their previous reports. Each adds its own to that of the one before it, so
    that a node sends as much as a worker does."""

    counts: RoutingCounts
    """Of all these workers together."""
    tiers: Mapping[WorkerId, TierCounts]
    link_gbps: Mapping[WorkerId, dict[WorkerId, float]]
    """Gigabits per second between each of these workers and others, as measured when their group formed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """Where an expert lies in memory of a GPU that a worker lends to the others there (model/shared_gpu/parcels.py)."""

    handle: bytes
    offset: int
    nbytes: int
    number: int
    word: int
    """Where the receiver writes the number when it has taken the bundle out, of which the expert is a part."""
    size: int
    """Bytes of the memory in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCopy:
    """One expert's tensors on their way between workers, as one unit with its digest."""

    layer: int
    expert: int
    tensors: dict[str, npt.NDArray[np.uint8]]
    """Raw bytes of each tensor, by parameter name."""
    digest: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    """Names of the dtypes without the prefix `torch.`."""
    parcel: Parcel | None = None
    """Set where the bytes stay on the GPU that both workers share; then `tensors` has none, but all names."""

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.tensors.values()) if self.parcel is None else self.parcel.nbytes
