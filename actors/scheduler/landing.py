"""Takes the answers to a step: sampled tokens are appended, ends are noticed, and outputs are made."""

from __future__ import annotations

from itertools import compress

import numpy as np

from elastic_moe.actors.caches.rows import RECENT_TOKENS, Rows
from elastic_moe.actors.caches.running_requests import RunningRequest
from elastic_moe.actors.scheduler.flights import Answers, Flight, StepOutputs, failure, output
from elastic_moe.actors.scheduler.request_book import RequestBook
from elastic_moe.cluster.messages.requests import FinishReason, TokenOutput, Tokens
from elastic_moe.cluster.messages.scores import PromptScores
from elastic_moe.cluster.messages.steps import Chunk, Sample
from elastic_moe.cluster.placement import WorkerId

CORRUPTED = (
    "the model's logits for this request are not numbers (NaN or infinity): its weights may be damaged, "
    "or --dtype too narrow for them"
)


class Landing:
    """See the module. Its totals count from the start."""

    def __init__(self, book: RequestBook, rows: Rows) -> None:
        self._book = book
        self._rows = rows
        self.prompt_tokens = 0
        """Each prompt is counted once."""
        self.generation_tokens = 0
        self.corrupted = 0
        """Requests whose logits were not numbers."""

    def land(self, flight: Flight, answers: Answers) -> StepOutputs:
        """Take the answers to the oldest step in flight."""
        outputs: list[TokenOutput] = []
        tokens = self._land_rows(flight, answers, outputs)
        for worker, part in flight.parts.items():
            for request, chunk in part.work:
                if request.in_flight(chunk):
                    self._land_one(request, chunk, answers, worker, outputs)
        return StepOutputs(outputs, tokens)

    def _land_rows(self, flight: Flight, answers: Answers, outputs: list[TokenOutput]) -> Tokens:
        """Land the step's rows. Adds the outputs that say more than one token, and returns the others."""
        columns, rows, tokens, names = self._rows, flight.rows, answers.tokens, flight.names
        if not len(rows):
            return Tokens()
        live = columns.mark[rows] == flight.marks
        plain = live & (tokens >= 0)
        if not plain.all():
            for at in np.flatnonzero(live & ~plain).tolist():
                self._land_one(columns.at(rows[at]), None, answers, flight.worker_at(at), outputs)
            rows, tokens, names = rows[plain], tokens[plain], tuple(compress(names, plain.tolist()))
        columns.land(rows, tokens)
        self.generation_tokens += len(rows)
        # the columns have room for so many of a request's newest tokens; rows take turns, as sequences that began in
        # one step would all be brought in one step
        full = rows[(columns.length[rows] + rows) % RECENT_TOKENS == 0]
        for row, length in zip(full.tolist(), columns.length[full].tolist(), strict=True):
            columns.at(row).fill(length, columns.recent[row])
        offsets = columns.length[rows] - columns.start[rows] - 1
        ends = (columns.length[rows] >= columns.limit[rows]) | self._book.stops.among(tokens)
        if ends.any():
            for at in np.flatnonzero(ends).tolist():
                request = columns.at(rows[at])
                reason = request.finish_reason()
                ends[at] = reason is not None
                if reason is not None:
                    self._book.end(request)
                    outputs.append(output(request, (int(tokens[at]),), reason))
            names = tuple(compress(names, (~ends).tolist()))
            offsets, tokens = offsets[~ends], tokens[~ends]
        return Tokens(request_ids=names, offsets=offsets.tobytes(), token_ids=tokens.tobytes())

    def _land_one(
        self,
        request: RunningRequest,
        chunk: Chunk | None,
        answers: Answers,
        worker: WorkerId,
        outputs: list[TokenOutput],
    ) -> None:
        """Land a request's chunk; None: its token that went by rule. Adds the output, if there is one."""
        cache, result, name = request.cache, answers.results[worker], request.request_id
        assert cache is not None
        if name in result.corrupted:
            outputs.append(self._give_up(request))
            return
        if reason := result.reason_of_end(name):
            self._book.end(request)
            outputs.append(failure(request, reason, refused=True))
            return
        unready = name in result.unready
        landed = True
        if unready:
            landed = cache.commit_but_last(request)
        else:
            cache.commit(request)
        wanted = landed and chunk is not None and chunk.score_from is not None
        found = answers.scores[worker].get(name) if wanted else None
        assert found is None or found.end == request.scored + 1, f"{worker} has scored other tokens"
        if (chunk is None or chunk.samples) and not unready:
            outputs.append(self._append(request, answers.samples[worker][name], found))
        elif found is not None:
            outputs.append(output(request, (), None, scores=found))

    def _append(self, request: RunningRequest, sample: Sample, scores: PromptScores | None) -> TokenOutput:
        if not request.counted:
            request.counted = True
            self.prompt_tokens += request.num_prompt_tokens
        request.append(sample.token_id)
        if not request.params.max_tokens:
            self._book.end(request)
            # nobody gets the token that has ended it
            del request.tokens[-1]
            return output(request, (), FinishReason.LENGTH, scores=scores)
        self.generation_tokens += 1
        reason = request.finish_reason()
        if reason is not None:
            self._book.end(request)
        return output(request, (sample.token_id,), reason, sample, scores)

    def _give_up(self, request: RunningRequest) -> TokenOutput:
        """End a request whose logits are not numbers, and make sure that no request shares its KV-cache blocks."""
        assert request.cache is not None
        request.cache.unshare(request)
        self.corrupted += 1
        self._book.end(request, spoilt=True)
        return failure(request, CORRUPTED)
