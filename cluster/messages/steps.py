"""Engine and workers: one lock-step step after the other.

engine -> worker   StepPlan, CommitEpoch, ForgetSequences
worker -> engine   StepResult, Done or Failed, in the order of the questions
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.requests import RequestId, SamplingParams, TokenLogprobs
from elastic_moe.cluster.messages.scores import PromptScores


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSequence:
    """A request that is new to a worker, with everything that the worker must know to run it and sample."""

    request_id: RequestId
    token_ids: tuple[int, ...]
    """Prompt, then output so far."""
    num_prompt_tokens: int
    params: SamplingParams
    eos_token_ids: tuple[int, ...]
    """Tokens that must not be sampled before `min_tokens`, besides `params.stop_token_ids`."""
    seat: int = 0
    """Its number among the worker's sequences. It takes the seat of the sequence that had this number before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """A state to keep as a snapshot, from which another sequence with the same beginning may go on."""

    position: int
    """Number of tokens that the state has seen."""
    place: int
    """Number of the snapshot on this worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateUse:
    """What a chunk does with its sequence's states, in a model that has layers with a state per sequence.

    A worker keeps the state that each step leaves beside those of earlier steps, because a step may be run again.
    """

    keep_from: int
    """Number of tokens that committed steps have run. States after fewer tokens are not needed any more."""
    restore: int | None = None
    """The snapshot that holds the state after `start` tokens; None: this worker has that state, or `start` is 0."""
    save: tuple[SavedState, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowBlocks:
    """Blocks of a sequence in the layers with a sliding window. The numbers are those of its other blocks."""

    first: int
    """Number of the first of these blocks in the sequence."""
    ids: tuple[int, ...]
    """Block ids from there on. Those before are unchanged, as far as the window still reaches them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens of one sequence to run in this step: positions start .. start + length - 1.

    A worker already knows the tokens: they were sent to it, or it sampled them. Running a chunk again is harmless:
    the worker first forgets every token past `known`, and block ids are written at `block_offset`, not appended.
    """

    request_id: RequestId
    start: int
    length: int
    known: int
    """Tokens of the sequence that exist before this step (prompt and output)."""
    block_offset: int
    block_ids: tuple[int, ...]
    """KV-cache blocks number block_offset, block_offset + 1, ... of the sequence; those before are unchanged."""
    score_from: int | None = None
    """From this position on, the worker scores each prompt token that follows one of the chunk's; None: it scores
    none."""
    state: StateUse | None = None
    """None in a model without such states."""
    windows: WindowBlocks | None = None
    """None if there are no new blocks, and in a model that has no layers with a sliding window."""

    @property
    def samples(self) -> bool:
        """Whether the last token of the chunk is the last known one, so that the next is sampled."""
        return self.start + self.length == self.known


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """The sequences of a worker that go on decoding: they run their newest token. Columns of 32-bit integers.

    cluster/messages/seats.py says why this is enough.
    """

    seats: bytes | None = None
    """[n] their seats; None: those of the plan before."""
    known: bytes = b""
    """[n] tokens of each before this step; empty where `seats` is None: one more than in the plan before."""
    grown: bytes = b""
    """[3 g] seat, number of a block in its sequence, and block id, for each new block. Blocks before are unchanged."""
    grown_windows: bytes = b""
    """New blocks of the layers with a sliding window, in the form of `grown`, if the model has such layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One worker's part of a lock-step step. A plan of another epoch is refused."""

    epoch: Epoch
    step: int
    tokens_per_rank: tuple[int, ...]
    """[W] tokens that each worker runs, so that exchanges of known size need no size exchange."""
    new: tuple[NewSequence, ...] = ()
    decoding: Decoding = Decoding()
    """The sequences that go on decoding. They come before `chunks`."""
    chunks: tuple[Chunk, ...] = ()
    """All other sequences of the step: prompts, and those that go on after a cut or a failed step."""
    finished: tuple[RequestId, ...] = ()
    """Sequences to forget, before anything else is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    request_id: RequestId
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPrompt:
    request_id: RequestId
    scores: PromptScores


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """A request whose grammar cannot go on, with one line that says why."""

    request_id: RequestId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    step: int
    samples: tuple[Sample, ...]
    """Those that are not in `tokens`."""
    compute_s: float
    """Seconds of the step inside the worker, including waits for peers."""
    tokens: bytes = b""
    """[n] 32-bit tokens of the sequences that go on decoding, in the plan's order; NO_TOKEN where there is a Sample, or
    no token at all. Empty: there is a Sample for each, or none."""
    corrupted: tuple[RequestId, ...] = ()
    """Requests that have no sample or no scores, because their logits were not numbers."""
    unready: tuple[RequestId, ...] = ()
    """Requests that have no sample yet, because their grammar's next tokens were not known in time. The last token of
    the chunk has to run again."""
    stuck: tuple[Stuck, ...] = ()
    """Requests that have no sample and never will."""
    scored: tuple[ScoredPrompt, ...] = ()
    """One for each chunk with a `score_from`."""

    @property
    def without_sample(self) -> set[RequestId]:
        return {*self.corrupted, *self.unready, *(one.request_id for one in self.stuck)}

    def reason_of_end(self, request_id: RequestId) -> str | None:
        """Why a request has no sample and never will; None if it is not stuck."""
        return next((one.reason for one in self.stuck if one.request_id == request_id), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitEpoch:
    """Flip to a prepared epoch."""

    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetSequences:
    """Forget all requests, because a new engine begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What was asked for has been done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """What was asked for has not been done."""

    reason: str
    aborted: bool
    """Whether it was a StepAborted: nothing is wrong here, and it may be tried again."""
