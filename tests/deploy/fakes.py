"""A backend in process, and a tiny tokenizer, for tests of the HTTP side."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from array import array
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import (
    ConfigError,
    ConflictError,
    NotReadyError,
    PlacementError,
    RequestError,
    UserError,
)
from elastic_moe.cluster.facts.counters import ClusterCounters, RebalanceResult
from elastic_moe.cluster.facts.facts import Cause, Stage
from elastic_moe.cluster.fit import CodePath, FitReport, Part, PartFit
from elastic_moe.cluster.messages.epochs import Epoch, FetchSource, ModelInfo, PhaseCounts, StallCause, TierCounts
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, RequestId, TokenLogprobs, TokenOutput
from elastic_moe.cluster.messages.scores import PromptScores
from elastic_moe.cluster.messages.views import (
    ClusterView,
    ConfigView,
    EngineStatus,
    LoadView,
    Operation,
    OperationKind,
    Phase,
    PlacementView,
    Readiness,
    RebalancePreview,
    Revision,
    RoutingView,
    ScaleView,
    WorkerState,
    WorkerView,
)
from elastic_moe.cluster.placement import Placement, Worker, WorkerId, contiguous
from elastic_moe.cluster.redeploy import Generation

EOS = 0
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no bad roles') }}{% endif %}"
    "<|im|>{{ m.role }}\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|im|>assistant\n{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog, naïve façade 😀 日本語", "hello world, hello again and again"]

FIT = FitReport(
    rows=(
        PartFit(part=Part.EXPERTS, modules="MoE layers", count=2, path=CodePath.NATIVE),
        PartFit(part=Part.NORMS, modules="LayerNorm", count=3, path=CodePath.TRANSFORMERS, reason="it has a bias"),
    )
)


def make_tokenizer(directory: Path, *, chat_template: str | None = TEMPLATE) -> RustTokenizer:
    """A byte-level BPE of some 330 tokens, written to `directory` as transformers reads it."""
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<eos>", "<|im|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": chat_template}
    (directory / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v}))
    return tokenizer


def make_sentencepiece_tokenizer(directory: Path, *, chat_template: str = TEMPLATE, eos: str = "<|im_end|>") -> None:
    """A BPE as Mixtral's: bytes as pieces, a space before every word, the first one stripped."""
    trained = RustTokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([*CORPUS, "self myself itself A"] * 5, trainers.BpeTrainer(vocab_size=200))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"], "self"]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(pair) for pair in model["merges"]]
    made = RustTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    spaces = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(spaces)
    made.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_end|>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    directory.mkdir(parents=True, exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos, "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": chat_template}))


def fake_scores(request: GenerateRequest, chunk: int) -> Iterator[PromptScores]:
    """The log probability of the token at place n is -n, and it is n alternatives behind the most likely one."""
    prompt, alternatives = request.prompt_token_ids, request.params.prompt_logprobs
    if alternatives is None:
        return
    for start in range(request.num_scored + 1, len(prompt), chunk):
        places = range(start, min(start + chunk, len(prompt)))
        top = range(alternatives)
        yield PromptScores(
            start=start,
            width=1 + alternatives,
            ids=array("i", [i for at in places for i in (prompt[at], *(prompt[at] + n for n in top))]).tobytes(),
            logprobs=array("f", [v for at in places for v in (-at, *(-at - 0.5 * n for n in top))]).tobytes(),
            ranks=array("i", [1 + at for at in places]).tobytes(),
        )


@dataclass
class FakeBackend:
    """Engine and coordinator in one. Answers with the tokens of `script`, in chunks of `chunk`; an end-of-sequence
    token where the script ends."""

    vocab_size: int = 330
    script: Callable[[GenerateRequest], list[int]] = lambda request: list(range(65, 91))
    chunk: int = 1
    delay_s: float = 0.0
    state: Readiness = field(default_factory=lambda: Readiness(ready=True, reason="serving"))
    refuse: RequestError | None = None
    fail_after: int | None = None
    requests: list[GenerateRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    running_operation: str | None = None
    max_model_len: int = 128
    cached_tokens: int = 0
    scaled: list[tuple[int | None, tuple[WorkerId, ...]]] = field(default_factory=list)
    scale_ends: Phase = Phase.COMPLETED
    placed: tuple[Placement, bool | None] | None = None
    resumed: int = 0
    looks: int = 0
    """How often `cluster` was called."""
    looks_per_report: int = 2
    can_wait: bool = False
    running: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)

    @property
    def engine(self) -> FakeBackend:
        return self

    async def ask(self, question: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return await getattr(self, question.__name__)(*arguments, **named)

    async def ask_within(self, timeout_s: float, question: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return await self.ask(question, *arguments, **named)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        if self.refuse:
            raise self.refuse
        self.requests.append(request)
        self.running.add(request.request_id)
        done = False
        try:
            for scores in fake_scores(request, self.chunk):
                yield dataclasses.replace(self._output(request, 0, (), None), scores=scores)
            if not request.params.max_tokens:
                done = True
                yield self._output(request, 0, (), FinishReason.LENGTH)
            tokens = [*self.script(request), EOS][: request.params.max_tokens]
            for start in range(0, len(tokens), self.chunk):
                await asyncio.sleep(self.delay_s)
                part = tuple(tokens[start : start + self.chunk])
                if request.request_id in self.cancelled:
                    done = True
                    yield self._output(request, start, (), FinishReason.ABORT)
                    return
                if self.fail_after is not None and start >= self.fail_after:
                    yield self._output(request, start, (), FinishReason.ERROR, "worker w1 is lost")
                    return
                reason = None
                if start + self.chunk >= len(tokens):
                    reason = FinishReason.STOP if part[-1] == EOS else FinishReason.LENGTH
                    done = True
                yield self._output(request, start, part, reason)
        finally:
            self.running.discard(request.request_id)
            if not done:
                self.aborted.append(request.request_id)

    def cancel(self, request_id: RequestId) -> None:
        if request_id not in self.running:
            raise KeyError(request_id)
        self.cancelled.add(request_id)

    async def orphans(self, request_ids: Sequence[RequestId]) -> tuple[RequestId, ...]:
        return tuple(request_id for request_id in request_ids if request_id not in self.running)

    def forget(self, request_id: RequestId) -> None:
        pass

    def _output(
        self,
        request: GenerateRequest,
        offset: int,
        tokens: tuple[int, ...],
        reason: FinishReason | None,
        error: str | None = None,
    ) -> TokenOutput:
        count = request.params.logprobs
        logprobs = ()
        if count is not None:
            logprobs = tuple(
                TokenLogprobs(token_id=t, logprob=-0.5, top=tuple((t + n, -0.5 - n) for n in range(count)))
                for t in tokens
            )
        return TokenOutput(
            request_id=request.request_id,
            offset=offset,
            token_ids=tokens,
            cached_tokens=self.cached_tokens,
            queued_s=None if offset or not tokens else 0.125,
            logprobs=logprobs,
            finish_reason=reason,
            error=error,
        )

    num_groups = 1

    @property
    def wanted_groups(self) -> int:
        return self.num_groups

    async def resize(self, number: int) -> None:
        if number > 4:
            raise ConfigError(f"data_parallel_size: expected at most 4, got {number}")
        self.num_groups = number

    def group(self, number: int) -> FakeBackend:
        if number:
            raise RequestError(f"engine: expected 0 to 0, got {number}", param="engine")
        return self

    def group_of(self, request_id: RequestId) -> int:
        return 0

    async def readiness(self) -> Readiness:
        return self.state

    async def status(self) -> EngineStatus:
        worker = WorkerId("w0")
        return EngineStatus(
            running={worker: 2},
            waiting=1,
            kv_usage={worker: 0.25},
            steps=7,
            preemptions=3,
            corrupted_requests=5,
            prefix_queries=40,
            prefix_hits=16,
            first_tokens=4,
            first_tokens_s=0.5,
            epoch=1,
        )

    async def model_info(self) -> ModelInfo:
        return ModelInfo(
            architecture="FakeMoe",
            num_layers=2,
            num_logical_experts=4,
            top_k=2,
            hidden_size=8,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            expert_bytes=1,
            trunk_bytes=1,
            eos_token_ids=(EOS,),
            dtype="float32",
        )

    async def config(self) -> ConfigView:
        config = ServeConfig(workers=3, api_key="the cluster's")
        return ConfigView(generation=Generation("g"), model_dir="/models/tiny-moe", device="cpu", config=config)

    async def placement(self) -> PlacementView:
        workers = [Worker(id=WorkerId(f"w{n}"), node="n0", slots=2) for n in range(2)]
        return PlacementView(epoch=Epoch(1), placement=contiguous(2, 4, workers))

    async def routing(self) -> RoutingView:
        phase = PhaseCounts(tokens=5, load=np.ones((2, 4), dtype=np.int64))
        return RoutingView(
            tokens=10,
            window_s=60.0,
            load=2 * phase.load,
            load_imbalance=(1.0, 1.25),
            prefill=phase,
            decode=phase,
            decode_weight=3.0,
        )

    async def workers(self) -> list[WorkerView]:
        return [
            WorkerView(
                id=WorkerId("w0"),
                rank=0,
                state=WorkerState.SERVING,
                pid=1,
                node="n0",
                device="cpu",
                running_requests=0,
                kv_usage=0.0,
                fit=FIT,
                experts_served=8,
                experts_resident=4,
            )
        ]

    async def preview(self, planner: str) -> RebalancePreview:
        self._check_planner(planner)
        return RebalancePreview(
            planner=planner,
            worthwhile=True,
            reason="saves more than it costs",
            load_imbalance_before=1.5,
            load_imbalance_after=1.1,
            cost_before=0.02,
            cost_after=0.01,
            moves=3,
            misses_before=2.0,
            misses_after=1.5,
            fetch_bytes_before=200.0,
            fetch_bytes_after=150.0,
            bytes=300,
            solver_status="optimal",
            gap=0.0,
            seconds=0.1,
        )

    async def rebalance(self, planner: str) -> Operation:
        self._check_planner(planner)
        if self.running_operation:
            raise ConflictError(f"operation {self.running_operation} is under way")
        return await self._operation("op-1")

    def _check_planner(self, planner: str) -> None:
        if planner not in ("auto", "greedy"):
            raise UserError(f"planner: expected one of auto, greedy, got {planner!r}")

    async def scale(
        self,
        workers: int | None = None,
        retire: tuple[WorkerId, ...] = (),
        operation_id: str | None = None,
        replace: bool = False,
    ) -> Operation:
        if workers is not None and not 1 <= workers <= 4:
            raise PlacementError(f"workers: expected 1 to 4, got {workers}")
        if self.running_operation and not replace:
            raise ConflictError(f"operation {self.running_operation} is under way")
        self.scaled.append((workers, retire))
        return replaced(
            await self._operation(operation_id or "scale-1"),
            kind=OperationKind.SCALE,
            retiring=retire,
            phase=self.scale_ends,
        )

    async def place(self, placement: Placement, pinned: bool | None) -> Operation:
        self.placed = (placement, pinned)
        return await self._operation("op-1")

    async def scaling(self) -> ScaleView:
        return ScaleView(
            serving=2,
            target=2,
            min_workers=1,
            max_workers=8,
            next_worker=WorkerId("w2"),
            autoscaler="demand 60% of capacity",
        )

    async def cluster(self, known: Revision) -> ClusterView:
        """The answers to the other questions in one. Each `looks_per_report` calls see a new report of routing."""
        engine, counters, placement = await self._engine(), await self.counters(), await self.placement()
        self.looks += 1
        revision = Revision(
            placement=(
                placement.epoch,
                placement.pinned,
                placement.pinned_by,
                Epoch(len(placement.moves)) if placement.moves else None,
            ),
            load=(placement.epoch, self.looks // self.looks_per_report),
        )
        return ClusterView(
            revision=revision,
            status=engine,
            status_at_s=time.monotonic(),
            workers=await self.workers(),
            operations=await self.operations(),
            scale=await self.scaling(),
            recoveries=sum(counters.recoveries.values()),
            experts_moved=counters.experts_moved,
            bytes_moved=counters.bytes_moved,
            requests_moved=counters.requests_moved,
            placement=None if revision.placement == known.placement else placement,
            load=None if revision.load == known.load else await self._load(),
        )

    async def _engine(self) -> EngineStatus | None:
        try:
            return await self.status()
        except NotReadyError:
            return None

    async def _load(self) -> LoadView:
        routing = await self.routing()
        return LoadView(
            tokens=routing.tokens,
            window_s=routing.window_s,
            load=routing.load.astype(np.float32),
            load_imbalance=float(np.mean(routing.load_imbalance)),
        )

    async def unpin(self) -> None:
        self.placed = None

    async def operations(self) -> list[Operation]:
        return [await self._operation("op-1")]

    async def operation(self, operation_id: str) -> Operation | None:
        return await self._operation(operation_id) if operation_id == "op-1" else None

    async def _operation(self, name: str) -> Operation:
        return Operation(
            operation_id=name, kind=OperationKind.REBALANCE, phase=Phase.PREPARING, epoch=Epoch(2), reason="asked for"
        )

    async def counters(self) -> ClusterCounters:
        counters = ClusterCounters(experts_moved=5, bytes_moved=1000)
        counters.rebalances[RebalanceResult.COMPLETED] = 2
        counters.rebalance_s[Stage.PLANNING].add(0.2)
        counters.recoveries[Cause.WORKER] += 1
        counters.recovery_s.add(0.5)
        counters.add_tiers(
            TierCounts(
                accesses=(7, 0, 3), fetched_bytes={FetchSource.DISK: 300}, stall_s={StallCause.MISS: 0.25}, resident=4
            )
        )
        return counters
