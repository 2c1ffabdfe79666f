"""A step in flight, what workers answer to it, and what comes of the answers."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import numpy.typing as npt

from elastic_moe.actors.caches.rows import Column, Indices, Rows
from elastic_moe.actors.caches.running_requests import RunningRequest
from elastic_moe.actors.caches.worker_cache import WorkerCache
from elastic_moe.actors.scheduler.admission import Part
from elastic_moe.cluster.messages.columns import NO_TOKEN, column_of
from elastic_moe.cluster.messages.requests import FinishReason, RequestId, TokenOutput, Tokens
from elastic_moe.cluster.messages.scores import PromptScores
from elastic_moe.cluster.messages.steps import Decoding, Sample, StepResult
from elastic_moe.cluster.placement import WorkerId

_NO_TOKEN = column_of([NO_TOKEN])
UNCHANGED = Decoding()
"""What a plan says to a worker whose rows just go on."""


@dataclass(slots=True)
class Grown:
    """The new blocks of one worker that its plan names, as in Decoding."""

    blocks: array[int] = field(default_factory=lambda: array("i"))
    windows: array[int] = field(default_factory=lambda: array("i"))

    def add(self, cache: WorkerCache, request: RunningRequest) -> None:
        """Add the last block of a request."""
        seat, number = request.row - cache.base, len(request.blocks) - 1
        self.blocks.extend((seat, number, request.blocks[-1]))
        if request.window is not None:
            self.windows.extend((seat, number, request.window.blocks[-1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A step in flight."""

    step: int
    parts: Mapping[WorkerId, Part]
    rows: Indices
    """[n] rows of the requests that go on by rule, in order."""
    marks: Column
    """[n] the rows' marks. What is in flight for a row counts while its mark stays the same."""
    names: tuple[RequestId, ...]
    """[n] the rows' requests."""
    bounds: Mapping[WorkerId, tuple[int, int]]
    """Where the rows of each worker begin and end in `rows`."""

    @classmethod
    def of(
        cls,
        step: int,
        parts: Mapping[WorkerId, Part],
        rows: Indices,
        columns: Rows,
        bounds: Mapping[WorkerId, tuple[int, int]],
        last: Flight | None,
    ) -> Flight:
        """`last`: the step before, whose names are taken where its rows are the same."""
        marks = columns.mark[rows]
        if last is not None and np.array_equal(last.rows, rows) and np.array_equal(last.marks, marks):
            names = last.names
        else:
            names = tuple(map(columns.names.__getitem__, rows.tolist()))
        return cls(step=step, parts=parts, rows=rows, marks=marks, names=names, bounds=bounds)

    def requests(self) -> list[RequestId]:
        """Those that run in this step, each once."""
        work = (request.request_id for part in self.parts.values() for request, _ in part.work)
        return [*self.names, *work]

    def decoding(self, cache: WorkerCache, last: Flight | None, grown: Grown | None, known: Column) -> Decoding:
        """What to tell a worker of its rows in this step. `last`: the step before, if the worker can go on from it.
        `grown` as in Decoding. `known`: the column of that name in Rows, where the rows have been run."""
        begin, end = self.bounds[cache.worker]
        rows = self.rows[begin:end]
        blocks, windows = (b"", b"") if grown is None else (grown.blocks.tobytes(), grown.windows.tobytes())
        if last is not None:
            before, after = last.bounds[cache.worker]
            same = last.names is self.names or np.array_equal(last.rows[before:after], rows)
            if end - begin == after - before and same:
                return UNCHANGED if grown is None else Decoding(grown=blocks, grown_windows=windows)
        # the columns already have the token that this step will sample
        return Decoding(
            seats=(rows - cache.base).astype(np.int32).tobytes(),
            known=(known[rows] - 1).tobytes(),
            grown=blocks,
            grown_windows=windows,
        )

    @property
    def decodes(self) -> int:
        """Most tokens of a worker that its decodes run."""
        return max((part.decodes for part in self.parts.values()), default=0)

    @property
    def prompts(self) -> int:
        """Most tokens of a worker that are its prompts'."""
        return max((part.prompts for part in self.parts.values()), default=0)

    def worker_at(self, at: int) -> WorkerId:
        """The worker of entry `at` of `rows`."""
        return next(worker for worker, (begin, end) in self.bounds.items() if begin <= at < end)


class Answers:
    """All workers' results of a step. Raises AssertionError if they do not answer its plans."""

    def __init__(self, flight: Flight, results: Mapping[WorkerId, StepResult]) -> None:
        assert set(results) == set(flight.parts), "a worker's result is missing, or is of no member"
        assert all(result.step == flight.step for result in results.values()), "a result of another step"
        self.results = results
        self.tokens = _tokens(flight, results)
        """[n] of the flight's rows; negative where the result says something else of a row."""
        self.samples: dict[WorkerId, dict[RequestId, Sample]] = {}
        """Of the workers that say more than tokens, as `scores`."""
        self.scores: dict[WorkerId, dict[RequestId, PromptScores]] = {}
        odd = self.tokens < 0
        some_odd = bool(odd.any())
        for worker, part in flight.parts.items():
            result = results[worker]
            if not (some_odd or part.work or result.samples or result.corrupted or result.unready or result.stuck):
                continue
            begin, end = flight.bounds[worker]
            self.samples[worker] = {sample.request_id: sample for sample in result.samples}
            self.scores[worker] = {one.request_id: one.scores for one in result.scored}
            if part.work or result.samples or result.without_sample or odd[begin:end].any():
                self._check(worker, part, flight.names[begin:end], odd[begin:end])

    def _check(self, worker: WorkerId, part: Part, names: Sequence[RequestId], odd: npt.NDArray[np.bool_]) -> None:
        result = self.results[worker]
        sampled, scored = self.samples[worker].keys(), self.scores[worker].keys()
        to_sample = {chunk.request_id for _, chunk in part.work if chunk.samples}
        to_sample |= {name for name, is_odd in zip(names, odd.tolist(), strict=True) if is_odd}
        to_score = {chunk.request_id for _, chunk in part.work if chunk.score_from is not None}
        corrupted, without = set(result.corrupted), result.without_sample
        assert without <= to_sample | corrupted & to_score, f"{worker} gives up what it was not asked for"
        assert sampled | without & to_sample == to_sample, f"{worker} has not sampled what it was asked to"
        assert not sampled & without, f"{worker} has sampled what it says it could not"
        assert scored | corrupted & to_score == to_score, f"{worker} has not scored what it was asked to"
        assert not scored & corrupted, f"{worker} has scored what it says it could not"


def _tokens(flight: Flight, results: Mapping[WorkerId, StepResult]) -> Column:
    """[n] the tokens of the flight's rows. A worker whose column is empty has no token of any of its rows."""
    pieces: list[bytes] = []
    for worker, (begin, end) in sorted(flight.bounds.items(), key=_begin):
        column, size = results[worker].tokens, end - begin
        assert not column or len(column) == 4 * size, (
            f"{worker} has sampled {len(column) / 4:g} tokens by rule, {size} were asked for"
        )
        pieces.append(column or _NO_TOKEN * size)
    return np.frombuffer(b"".join(pieces), dtype=np.int32)


def _begin(bound: tuple[WorkerId, tuple[int, int]]) -> int:
    return bound[1][0]


class StepOutputs(Sequence[TokenOutput]):
    """What a step made: outputs that say something in particular, and columns of the others. As a sequence: all."""

    __slots__ = ("single", "tokens")

    def __init__(self, single: Sequence[TokenOutput], tokens: Tokens) -> None:
        self.single = single
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.single) + len(self.tokens)

    def __iter__(self) -> Iterator[TokenOutput]:
        yield from self.tokens
        yield from self.single

    @overload
    def __getitem__(self, at: int) -> TokenOutput: ...

    @overload
    def __getitem__(self, at: slice) -> list[TokenOutput]: ...

    def __getitem__(self, at: int | slice) -> TokenOutput | list[TokenOutput]:
        return list(self)[at]


def failure(request: RunningRequest, error: str, *, refused: bool = False) -> TokenOutput:
    return TokenOutput(
        request_id=request.request_id,
        offset=request.num_output,
        token_ids=(),
        finish_reason=FinishReason.ERROR,
        error=error,
        refused=refused,
    )


def output(
    request: RunningRequest,
    tokens: tuple[int, ...],
    reason: FinishReason | None,
    sample: Sample | None = None,
    scores: PromptScores | None = None,
) -> TokenOutput:
    """The output of the request's last `tokens`, with what else there is to say."""
    return TokenOutput(
        request_id=request.request_id,
        offset=request.num_output - len(tokens),
        token_ids=tokens,
        cached_tokens=request.cached_tokens or 0,
        resumptions=0 if reason is None else request.resumptions,
        logprobs=(sample.logprobs,) if sample is not None and sample.logprobs is not None else (),
        scores=scores,
        finish_reason=reason,
        stop_token_id=request.stop_token_id() if reason is FinishReason.STOP else None,
    )
