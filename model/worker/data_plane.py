"""The data plane of one worker, without Ray. The actor in actors/worker/ wraps it.

It owns the epoch in force and runs the steps. Its parts own the rest: the loaded model (loaded_model.py), experts
(held_experts.py), sequences (sequences.py), groups of workers (groups.py), and cores (cores.py). One thread calls
`load`, `step`, `commit`, `forget_sequences` and `rest`, one at a time. Other threads may call the other methods at the
same time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from elastic_moe.cluster.errors import StepAborted
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
from elastic_moe.cluster.messages.steps import ScoredPrompt, StepPlan, StepResult
from elastic_moe.cluster.placement import WorkerId
from elastic_moe.model.exchange.counter import RoutingCounter
from elastic_moe.model.exchange.dispatcher import Dispatcher
from elastic_moe.model.exchange.join import Exchange, join_exchange, make_dispatcher
from elastic_moe.model.exchange.meeting import Meeting
from elastic_moe.model.exchange.tcp import TcpTransport
from elastic_moe.model.grammars.masks import MaskThreads
from elastic_moe.model.heap import return_freed_memory
from elastic_moe.model.sampling.next_tokens import NextTokens, choose
from elastic_moe.model.sampling.scoring import score
from elastic_moe.model.shared_gpu.transport import DeviceMemoryTransport
from elastic_moe.model.worker.cores import Cores
from elastic_moe.model.worker.groups import Groups
from elastic_moe.model.worker.held_experts import HeldExperts
from elastic_moe.model.worker.loaded_model import LoadedModel, load_model
from elastic_moe.model.worker.runner import ModelRunner
from elastic_moe.model.worker.sequences import Sequences


@dataclass(slots=True, kw_only=True)
class _EpochState:
    spec: EpochSpec
    rank: int
    exchange: Exchange
    dispatcher: Dispatcher
    failed_step: int | None = None
    """The step that failed on this worker. It refuses later steps of the epoch: peers would take them for this one."""


class DataPlane:
    """See the module. Before `load` has returned, only `load`, `progress` and `open_door` are of use."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.progress = 0.0
        """Share of the weights' bytes that is loaded, from 0 to 1."""
        self.loaded: LoadedModel
        self._runner: ModelRunner
        self._experts: HeldExperts
        self._sequences: Sequences
        self._counter: RoutingCounter
        self._masks = MaskThreads()
        self._cores = Cores(spec)
        self._groups = Groups(spec.worker)
        self._prepared: dict[Epoch, _EpochState] = {}
        self._epoch: _EpochState | None = None

    # --- Loading ------------------------------------------------------------------------------------------------

    def load(self) -> tuple[int, int]:
        """Read the trunk and the spec's experts, and make the KV cache. Returns (KV blocks, bytes held).

        Raises CheckpointError, and UserError if the KV cache cannot hold one sequence of full length.
        """
        self.loaded = loaded = load_model(self.spec, self._note_progress)
        self._runner = loaded.runner
        self._experts = HeldExperts(
            self.spec,
            loaded.store,
            loaded.source,
            capacity=loaded.capacity,
            host_capacity=loaded.host.capacity,
            host_rates=loaded.host.rates,
        )
        self._sequences = Sequences(
            loaded.grammars,
            loaded.states,
            torch.device(self.spec.model.device),
            windows=loaded.windows,
            block_size=self.spec.block_size,
        )
        self._counter = RoutingCounter(loaded.memory.info.num_layers, loaded.memory.info.num_logical_experts)
        return loaded.cache.num_blocks, loaded.nbytes

    def _note_progress(self, share: float) -> None:
        self.progress = share

    @property
    def report(self) -> FitReport:
        """Which path serves each part of the model on this worker."""
        return self.loaded.report

    @property
    def state_room(self) -> StateRoom | None:
        """None if the model keeps nothing but keys and values."""
        return self.loaded.state_room

    @property
    def window_room(self) -> WindowRoom | None:
        """None if every layer keeps the keys and values of all tokens."""
        return self.loaded.window_room

    @property
    def capacity(self) -> int:
        """How many experts fit on this worker over all layers, as it was found when the model was loaded."""
        return self.loaded.capacity

    # --- Epochs -------------------------------------------------------------------------------------------------

    def open_door(self, address: str) -> Endpoint:
        """Where this worker waits for the others of a group that is to form. `address` is this node's. Raises OSError.

        `prepare` uses the door up; of those that none uses, the newest are kept open.
        """
        return self._groups.open_door(address)

    def prepare(self, spec: EpochSpec) -> None:
        """Prepare an epoch while the present one serves: check the experts and join the other workers. Blocks on peers
        until it is abandoned.

        Raises PlacementError if an expert is not held on this worker, and StepAborted if a peer does not join.
        """
        self._groups.check(spec.epoch)
        rank = spec.placement.rank_of(self.spec.worker)
        self._experts.prepare(spec.placement)
        current = self._epoch
        if current is not None and current.spec.group == spec.group and current.rank == rank:
            exchange = current.exchange
        else:
            exchange = self._join(spec, rank)
        device = torch.device(self.spec.model.device)
        dispatcher = make_dispatcher(spec.placement, rank, self.loaded.store, exchange, device, self._experts)
        if self._epoch is None:
            # no step is running yet, so that this is the time for what would make the first ones longer
            self._runner.dispatcher = dispatcher
            self._runner.record_graphs(len(spec.placement.workers))
        self._prepared[spec.epoch] = _EpochState(spec=spec, rank=rank, exchange=exchange, dispatcher=dispatcher)

    def _join(self, spec: EpochSpec, rank: int) -> Exchange:
        def join(meeting: Meeting | None) -> Exchange:
            return join_exchange(
                spec,
                rank,
                self._runner.layer_shapes,
                native=self.loaded.fit.exchange_refusal() is None,
                max_tokens=self.spec.max_num_batched_tokens,
                timeout_s=self.spec.step_timeout_s,
                meeting=meeting,
            )

        return self._groups.join(spec, rank, join)

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
        self._experts.serve(state.spec.placement, dealt=state.dispatcher.deals)
        self._cores.share(state.spec.placement, state.rank, state.exchange)
        self._prepared.clear()
        if previous is not None:
            state.dispatcher.follow(previous.dispatcher)
        self._runner.dispatcher = state.dispatcher
        if previous is None or previous.exchange is not state.exchange:
            if previous is not None:
                previous.exchange.close()
            self._experts.meet(state.exchange.device if isinstance(state.exchange, DeviceMemoryTransport) else None)
        self._experts.keep_placed()

    def abandon(self, epoch: Epoch) -> None:
        """Forget what was prepared and copied for an epoch that will not be committed."""
        self._groups.abandon(epoch)
        state = self._prepared.pop(epoch, None)
        if state is not None and (self._epoch is None or state.exchange is not self._epoch.exchange):
            state.exchange.close()
        self._experts.drop_copies()

    # --- Experts ------------------------------------------------------------------------------------------------

    def held(self) -> tuple[tuple[int, ...], ...]:
        """[L] logical experts in the device beside the cache area."""
        return self._experts.held()

    def export_experts(self, pairs: Sequence[tuple[int, int]], target: WorkerId | None = None) -> list[ExpertCopy]:
        """Copy experts, given as (layer, expert), for the worker `target`, from wherever they lie; None: for any worker
        of the epoch in force.

        Raises PlacementError if one lies nowhere here.
        """
        return self._experts.export_copies(pairs, target)

    def import_experts(self, copies: Sequence[ExpertCopy]) -> None:
        """Hold copies beside the placement's experts. Raises PlacementError if a digest does not match."""
        self._experts.import_copies(copies)

    def read_experts(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Read experts, given as (layer, expert), from the disk and hold them beside the placement's experts."""
        self._experts.read(pairs)

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
            with self._experts.stepping:
                return self._run(plan, epoch)
        except BaseException as error:
            epoch.failed_step = plan.step
            self._counter.discard_step()
            cause = self._experts.cause_of(error)
            if cause is not None:
                raise cause from None
            raise
        finally:
            self._experts.tidy()

    def _run(self, plan: StepPlan, epoch: _EpochState) -> StepResult:
        begin = time.perf_counter()
        self._cores.borrow(plan)
        chunks = self._sequences.begin(plan)
        slices = self._sequences.slices(chunks)
        scoring = self._sequences.scoring(chunks)
        sampling = self._sequences.sampling(chunks)
        constrained = [state.progress for state in sampling.values() if state.progress is not None]
        if constrained:
            self._masks.begin(constrained)
        logits = self._runner.run(
            slices,
            plan.tokens_per_rank,
            self._counter,
            keep=bool(scoring),
            states=self._sequences.move_states(chunks),
        )
        if constrained:
            self._masks.finish(constrained)
        scored = score(scoring, self._runner.logits, self._runner.vocabulary)
        with torch.inference_mode():
            chosen = choose(logits, sampling)
        epoch.dispatcher.finish()
        chosen.append_to(sampling)
        self._counter.commit_step([chunk.length for chunk in chunks])
        self._experts.settle()
        compute_s = time.perf_counter() - begin
        # workers wait for one another, so a prompt on one worker makes the step a prefill step for all
        decode = max(plan.tokens_per_rank) <= self.spec.max_num_seqs
        self._counter.note_time(compute_s, sum(plan.tokens_per_rank), decode=decode)
        return self._result(plan.step, chosen, scored, compute_s)

    def _result(
        self, step: int, chosen: NextTokens, scored: Sequence[ScoredPrompt | RequestId], compute_s: float
    ) -> StepResult:
        broken = {one for one in scored if not isinstance(one, ScoredPrompt)}
        corrupted = {*chosen.corrupted, *broken}
        tokens, samples = self._sequences.seats.packed(one for one in chosen.samples if one.request_id not in broken)
        return StepResult(
            step=step,
            samples=samples,
            tokens=tokens,
            compute_s=compute_s,
            corrupted=tuple(corrupted),
            unready=tuple(request_id for request_id in chosen.unready if request_id not in broken),
            stuck=tuple(one for one in chosen.stuck if one.request_id not in broken),
            scored=tuple(s for s in scored if isinstance(s, ScoredPrompt) and s.request_id not in corrupted),
        )

    def forget_sequences(self) -> None:
        """Forget all sequences when a new engine starts: it will never report those of the last engine as finished."""
        self._sequences.forget_all()

    def rest(self) -> None:
        """Return what the steps before have freed to the operating system. Takes a few milliseconds."""
        return_freed_memory()

    def abort_step(self, epoch: Epoch) -> None:
        """Wake a step that waits for a dead peer. The exchange cannot be used afterwards; a new epoch must follow."""
        current = self._epoch
        if current is not None and current.spec.epoch == epoch:
            current.exchange.abort()

    # --- What was counted ---------------------------------------------------------------------------------------

    def routing_counts(self) -> RoutingCounts:
        """The routing counts since the last call."""
        return self._counter.take()

    def tier_counts(self) -> TierCounts:
        """What became of the tiers since the last call."""
        return self._experts.counts()

    def link_gbps(self) -> dict[WorkerId, float]:
        """Gigabits per second between this worker and others of its epoch, as measured when their group formed."""
        current = self._epoch
        if current is None or not isinstance(current.exchange, TcpTransport):
            return {}
        workers = current.spec.placement.workers
        return {workers[rank].id: gbps for rank, gbps in current.exchange.gbps.items()}
