"""Every message that processes send one another. Values only: frozen, slotted, keyword-only.

API -> Engine           Hello, Submit, AbortRequests; back come Done or Refused, and Outputs as they are made
Engine -> ExpertHost    StepPlan, CommitEpoch, ForgetSequences; back comes a StepResult, Done or Failed
Coordinator -> all      HostSpec when a host is made, EpochSpec when an epoch begins
ExpertHost -> Coordinator  HostInfo, RoutingCounts
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NewType

import numpy as np
import numpy.typing as npt

from cluster.placement import Placement, WorkerId

RequestId = NewType("RequestId", str)
Epoch = NewType("Epoch", int)


class FinishReason(StrEnum):
    STOP = "stop"
    """An end-of-sequence or stop token, or (found by the API) a stop string."""
    LENGTH = "length"
    ABORT = "abort"
    """The client went away."""
    ERROR = "error"


# --- API and engine ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. Checked where it is made (the API); the names and meanings are vLLM's."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    seed: int = 0
    """Always set: the API draws one where the client gave none, so that a resumed request goes on alike."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """How many alternatives to report with every token; None reports nothing."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One sequence to complete. `output_token_ids` are those a client already has, when a request is resumed:
    the engine continues after them as if it had made them itself."""

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    output_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    """Requests share cached prefixes with those of the same salt only."""
    client: str = ""
    """Whose it is: clients take turns in the queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log probability of a chosen token, and of the most likely ones (best first), before temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """New tokens of one request. `offset` counts the output tokens before them, so that repeats can be told."""

    request_id: RequestId
    offset: int
    token_ids: tuple[int, ...]
    cached_tokens: int = 0
    """Prompt tokens that were in the prefix cache when the request first ran."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token of `token_ids` where the request asked for them, else empty."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The `stop_token_ids` member that ended it, if one did (an end-of-sequence token leaves None)."""
    error: str | None = None
    """For finish_reason ERROR: one line for the client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a process listens, and the secret that opens it."""

    address: str
    port: int
    token: str
    """32 characters, drawn anew by every process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first message of an API replica. What is made for it while it is away, it gets when it comes again."""

    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Requests to accept, all or none; one that is already running is left alone."""

    requests: tuple[GenerateRequest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortRequests:
    """Requests to forget. Those that have ended, or are not the client's, are passed over. Not answered."""

    request_ids: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A RequestError on its way."""

    message: str
    param: str | None
    code: str | None
    status: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What is new for one client. Not an answer to anything."""

    outputs: tuple[TokenOutput, ...]


# --- Engine and hosts -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSequence:
    """A request that a host has not seen, or has forgotten: everything it must know to run and sample it."""

    request_id: RequestId
    token_ids: tuple[int, ...]
    """Prompt, then output so far."""
    num_prompt_tokens: int
    params: SamplingParams
    eos_token_ids: tuple[int, ...]
    """Tokens that must not be sampled before `min_tokens`, besides `params.stop_token_ids`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens of one sequence to run in this step: positions start .. start + length - 1.

    A host already knows the tokens (it was told them, or sampled them). Running a chunk again is harmless:
    the host first forgets every token past `known`, and block ids are written at `block_offset`, not appended.
    """

    request_id: RequestId
    start: int
    length: int
    known: int
    """Tokens of the sequence that exist before this step (prompt and output)."""
    block_offset: int
    block_ids: tuple[int, ...]
    """KV-cache blocks number block_offset, block_offset + 1, ... of the sequence; those before are unchanged."""

    @property
    def samples(self) -> bool:
        """Whether the last token of the chunk is the last known one, so that the next is sampled."""
        return self.start + self.length == self.known


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One worker's part of a lock-step step. A plan of another epoch is refused."""

    epoch: Epoch
    step: int
    tokens_per_rank: tuple[int, ...]
    """[W] tokens that each worker runs, so that exchanges of known size need no size exchange."""
    new: tuple[NewSequence, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    finished: tuple[RequestId, ...] = ()
    """Sequences to forget, before anything else is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    request_id: RequestId
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    step: int
    samples: tuple[Sample, ...]
    compute_s: float
    """Time of the step inside the host, waits for peers included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitEpoch:
    """Flip to a prepared epoch."""

    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetSequences:
    """A new engine begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What was asked for has been done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """What was asked for has not been done."""

    reason: str
    aborted: bool
    """Whether it was a StepAborted: nothing is wrong here, and it may be tried again."""


# --- Hosts and coordinator --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What is served, as every process must see it."""

    path: str
    dtype: str
    """float32, bfloat16 or float16: resolved, never 'auto'."""
    device: str
    """cpu or cuda: resolved, never 'auto'."""
    max_model_len: int
    expert_dtype: str = "auto"
    """int8, or auto: as `dtype`."""


_INT8_BYTES = 1 + 4 / 128
"""Of a weight in 8 bits, with its share of a scale for every 128 (model/int8.py)."""
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
    """The longest the checkpoint allows."""
    expert_bytes: int
    """Of one expert of one layer, in the dtype it is stored in; `served_in` tells of another."""
    trunk_bytes: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    """The dtype it is stored in."""
    rope_limits: tuple[int, ...] = ()
    """Prompt lengths beyond which rotary embeddings of the whole prompt are others (longrope)."""

    def served_in(self, dtype: str, *, int8: bool = False) -> ModelInfo:
        """With the sizes that it has in another dtype than the one it is stored in, its experts perhaps in 8 bits."""
        stored, served = _ITEM_BYTES[self.dtype], _ITEM_BYTES[dtype]
        return replace(
            self,
            expert_bytes=round(self.expert_bytes // stored * (_INT8_BYTES if int8 else served)),
            trunk_bytes=self.trunk_bytes // stored * served,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSpec:
    """What a host needs to load: the model, and the experts it begins with."""

    worker: WorkerId
    model: ModelSpec
    experts: tuple[tuple[int, ...], ...]
    """[L] logical experts to hold in each layer."""
    kv_cache_bytes: int | None
    """None: the host decides from the memory it finds."""
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_threads: int
    """Of torch, while it loads; 0 leaves its default."""
    node_threads: int = 0
    """Threads that the workers of its node share in each epoch; 0: it keeps `num_threads`."""
    node_workers: int = 1
    """Workers that may come to share its node's memory."""
    expert_memory_bytes: int | None = None
    """Most that experts may take here; None: what is found free."""
    step_timeout_s: float = 60.0
    """How long a peer may keep the others waiting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostInfo:
    """What a host reports once it has loaded."""

    worker: WorkerId
    node: str
    """Ray's node id."""
    endpoint: Endpoint
    """Where it takes steps from the engine."""
    pid: int
    device: str
    num_kv_blocks: int
    memory_bytes: int
    """Of weights and KV cache."""
    expert_capacity: int | None = None
    """Experts that fit here, over all layers, held ones included; None: not limited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochSpec:
    """Membership, placement and process group, under one number."""

    epoch: Epoch
    placement: Placement
    """Its workers, in rank order, are the membership."""
    group: str
    """Name of the process group. Epochs of the same membership share it, and then no new one is formed."""
    transport: str
    """local, shm, gloo or nccl."""
    rendezvous: str
    """host:port of the store for gloo and nccl; empty otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseCounts:
    """Tokens of one phase: prefill (prompts, and what is computed again) or decode."""

    tokens: int
    load: npt.NDArray[np.int64]
    """[L, E] tokens that chose each logical expert."""
    steps_s: float = 0.0
    """Time of the steps in which this phase had most of the work."""
    steps_tokens: int = 0
    """All workers' tokens in those steps."""

    def __add__(self, other: PhaseCounts) -> PhaseCounts:
        return PhaseCounts(
            tokens=self.tokens + other.tokens,
            load=self.load + other.load,
            steps_s=self.steps_s + other.steps_s,
            steps_tokens=self.steps_tokens + other.steps_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingCounts:
    """Tokens run by a host's requests since its previous report. Padding and warm-up are not in it."""

    prefill: PhaseCounts
    decode: PhaseCounts
    transitions: npt.NDArray[np.int64]
    """[L-1, E, E] (expert in layer l, expert in layer l+1) pairs of one token, of both phases."""

    @property
    def tokens(self) -> int:
        return self.prefill.tokens + self.decode.tokens

    @property
    def load(self) -> npt.NDArray[np.int64]:
        """[L, E] of both phases."""
        return self.prefill.load + self.decode.load


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCopy:
    """One expert's tensors on their way between hosts, as one unit with its digest."""

    layer: int
    expert: int
    tensors: dict[str, npt.NDArray[np.uint8]]
    """Raw bytes of each tensor, by parameter name."""
    digest: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    """As torch names them, without its own name."""

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.tensors.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """A snapshot for metrics, the admin API and the autoscaler."""

    running: dict[WorkerId, int] = field(default_factory=dict)
    waiting: int = 0
    kv_usage: dict[WorkerId, float] = field(default_factory=dict)
    """Share of KV-cache blocks in use, 0..1."""
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    """Tokens looked up in prefix caches, and (below) found there."""
    prefix_hits: int = 0
    first_tokens: int = 0
    """Requests that got their first token, and (below) the sum of their waits for it in the engine."""
    first_tokens_s: float = 0.0
    epoch: int = 0


# --- Admin: what the coordinator tells --------------------------------------------------------------------------


class Phase(StrEnum):
    PREPARING = "preparing"
    COMMITTING = "committing"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One change of the cluster, from request to end."""

    operation_id: str
    kind: str
    """start, rebalance, scale, recover."""
    phase: Phase
    epoch: Epoch
    """The epoch that it makes, or would have made."""
    reason: str
    """Why it was begun; once ended, what came of it."""
    error: str | None = None
    asked: str = ""
    """What was asked for, in words: the same id with other words is another wish."""
    retiring: tuple[WorkerId, ...] = ()
    """Workers that leave by it."""
    progress: float = 0.0
    """0..1, coarse; it steps back where an attempt has to be made again."""
    safe_to_terminate: bool = False
    """Whether every worker in `retiring` holds nothing and serves nobody: its machine may go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    ready: bool
    reason: str
    """One line: what is being waited for, with progress; "serving" when ready."""
    error: str | None = None
    """Set where waiting is in vain, such as a checkpoint that cannot be served: one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementView:
    epoch: Epoch
    placement: Placement
    pinned: bool = False
    """Periodic re-placement leaves it alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingView:
    """The statistics window."""

    tokens: int
    window_s: float
    load: npt.NDArray[np.int64]
    """[L, E] tokens per logical expert."""
    load_imbalance: tuple[float, ...]
    """[L] busiest worker's load over the mean, under the current placement; 1.0 where nothing was counted."""
    prefill: PhaseCounts
    decode: PhaseCounts
    decode_weight: float
    """Time of a token in decode over that of one in prefill, as planners weigh them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    id: WorkerId
    rank: int
    """-1 while it is not a member of the current epoch."""
    state: str
    """starting, serving, draining, dead; standby: not asked for, but ready to be told what to load."""
    pid: int
    node: str
    device: str
    running_requests: int
    kv_usage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleView:
    """How many workers there are and should be."""

    serving: int
    target: int
    min_workers: int
    max_workers: int
    """By the autoscaler's limits, memory and the number of experts."""
    autoscaler: str | None
    """What it saw last, and why it does nothing where it does nothing; None where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalancePreview:
    """What a re-placement would do; the answer to a dry run."""

    planner: str
    worthwhile: bool
    reason: str
    load_imbalance_before: float
    """Mean over layers of the busiest worker's load over the mean."""
    load_imbalance_after: float
    cost_before: float
    cost_after: float
    """Predicted seconds per step under the cost model."""
    moves: int
    bytes: int
    solver_status: str
    gap: float | None
    seconds: float
