"""Decides which running requests go on in a step, and gets them KV blocks.

Those that decode by rule go on as rows of columns (actors/caches/rows.py), the others one by one. Where a worker has
no free block left, its newest request makes way.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from elastic_moe.actors.caches.rows import Indices, Rows
from elastic_moe.actors.caches.running_requests import RunningRequest
from elastic_moe.actors.caches.worker_caches import WorkerCaches
from elastic_moe.actors.scheduler.admission import Part
from elastic_moe.actors.scheduler.flights import Grown
from elastic_moe.actors.scheduler.request_book import RequestBook
from elastic_moe.cluster.placement import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The running requests that could go on in the next step."""

    rows: Indices
    """The rows of those that go on by rule, in order."""
    others: Mapping[WorkerId, Sequence[RunningRequest]]
    """The others of each worker, in order of arrival. Workers that have none are left out."""

    def decoding_others(self) -> Iterator[RunningRequest]:
        """Those of the others that run at a worker and have only their newest token to run."""
        for requests in self.others.values():
            for request in requests:
                if request.cache is not None and _decodes(request):
                    yield request

    def only(self, request: RunningRequest) -> Candidates:
        """This one alone, if it is among them."""
        rows = self.rows[self.rows == request.row] if request.steady else self.rows[:0]
        others = {worker: [one for one in requests if one is request] for worker, requests in self.others.items()}
        return Candidates(rows=rows, others={worker: found for worker, found in others.items() if found})

    def any_decodes(self) -> bool:
        return len(self.rows) > 0 or any(True for _ in self.decoding_others())


class Continuing:
    """See the module."""

    def __init__(
        self, book: RequestBook, caches: WorkerCaches, rows: Rows, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self._book = book
        self._caches = caches
        self._rows = rows
        self._block_size = rows.block_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens

    def candidates(self) -> Candidates:
        caches = self._caches.by_worker
        others = {worker: cache.unsteady_in_order() for worker, cache in caches.items() if cache.unsteady}
        return Candidates(rows=self._rows.ready(), others=others)

    def run(self, candidates: Candidates, parts: Mapping[WorkerId, Part]) -> tuple[Indices, Mapping[WorkerId, Grown]]:
        """Put what goes on into `parts`. Returns the rows that run, and the blocks that their plans name, as in
        Decoding."""
        rows, grown = self._run_rows(candidates, parts)
        for worker, requests in candidates.others.items():
            _run_others(parts[worker], requests)
        return rows, grown

    def _run_rows(
        self, candidates: Candidates, parts: Mapping[WorkerId, Part]
    ) -> tuple[Indices, dict[WorkerId, Grown]]:
        """Run the next token of the rows, as far as there is room."""
        columns = self._rows
        rows = self._within_budget(candidates)
        preemptions = self._book.preemptions
        needy = rows[columns.known[rows] > columns.room[rows]]
        given = self._grow_at_once(needy)
        grown = self._grow_rows(needy) if given is None else []
        # the others take their blocks now too, so that nothing is preempted that runs in this step
        for request in candidates.decoding_others():
            self._grow(request)
        if self._book.preemptions != preemptions:
            rows = rows[columns.steady[rows]]
            # a preempted request needs nothing, and another may have got its block
            given = None if given is None else given[columns.steady[given[:, 0]]]
            grown = [request for request in grown if request.cache is not None]
        columns.run(rows)
        blocks = {} if given is None else self._told(given)
        for request in grown:
            if (cache := request.cache) is not None:
                blocks.setdefault(cache.worker, Grown()).add(cache, request)
        for worker, (begin, end) in self._caches.bounds(rows).items():
            parts[worker].decode_rows(end - begin)
        return rows, blocks

    def _within_budget(self, candidates: Candidates) -> Indices:
        """Those rows that may run: the oldest of each worker where there are too many."""
        rows, budget = candidates.rows, self._max_num_batched_tokens
        if self._max_num_seqs <= budget:
            return rows
        kept: list[Indices] = []
        for worker, (begin, end) in self._caches.bounds(rows).items():
            own = rows[begin:end]
            others = [request for request in candidates.others.get(worker, ()) if _decodes(request)]
            if len(own) + len(others) > budget:
                oldest = sorted([*map(self._rows.at, own.tolist()), *others], key=_arrival)[:budget]
                own = np.array(sorted(request.row for request in oldest if request.steady), dtype=np.intp)
            kept.append(own)
        if sum(map(len, kept)) == len(rows):
            return rows
        return np.sort(np.concatenate(kept))

    def _grow_at_once(self, needy: Indices) -> Indices | None:
        """Get a block for each of these rows, if every worker has enough of them. Returns [n, 2] the rows and their
        blocks; None if they have to be handled one by one."""
        caches, columns = self._caches.by_worker, self._rows
        if not len(needy):
            return None
        bounds = {worker: bound for worker, bound in self._caches.bounds(needy).items() if bound[0] < bound[1]}
        if any(
            caches[worker].windows is not None or end - begin > caches[worker].pool.num_free
            for worker, (begin, end) in bounds.items()
        ):
            return None
        blocks = [0] * len(needy)
        for worker, (begin, end) in bounds.items():
            blocks[begin:end] = caches[worker].pool.allocate(end - begin)
        for row, block in zip(needy.tolist(), blocks, strict=True):
            columns.at(row).blocks.append(block)
        columns.room[needy] += self._block_size
        return np.stack([needy, np.array(blocks, dtype=np.intp)], axis=1)

    def _told(self, given: Indices) -> dict[WorkerId, Grown]:
        """What plans tell of blocks that were given at once. `given` as from `_grow_at_once`."""
        rows = given[:, 0]
        numbers = self._rows.room[rows] // self._block_size - 1
        columns = np.stack([self._caches.seats(rows), numbers, given[:, 1]], axis=1).astype(np.int32)
        data, each = columns.tobytes(), columns.itemsize * columns.shape[1]
        return {
            worker: Grown(blocks=array("i", data[each * begin : each * end]))
            for worker, (begin, end) in self._caches.bounds(rows).items()
            if begin < end
        }

    def _grow_rows(self, rows: Indices) -> list[RunningRequest]:
        """Get a block for each of these rows, if necessary by preempting newer requests. Returns their requests."""
        needy = sorted(map(self._rows.at, rows.tolist()), key=_arrival)
        for request in needy:
            # an older request may have preempted this one meanwhile
            if request.cache is not None:
                block = request.cache.pool.allocate_one()
                if block is None:
                    self._grow(request)
                else:
                    request.blocks.append(block)
        seated = [request for request in needy if request.cache is not None]
        for request in seated:
            if request.window is not None and request.cache is not None:
                request.cache.grow_window(request)
        room = [len(request.blocks) * self._block_size for request in seated]
        self._rows.room[[request.row for request in seated]] = room
        return seated

    def _grow(self, request: RunningRequest) -> None:
        """Get a block for the request's newest token, if necessary by preempting the worker's newest request, which
        may be this one."""
        cache = request.cache
        assert cache is not None
        while len(request.blocks) * self._block_size < request.known:
            if cache.pool.num_free:
                cache.grow(request, cache.pool.allocate(1))
                return
            newest = cache.running.items[-1]
            self._book.preempt(newest)
            if newest is request:
                return


def _run_others(part: Part, requests: Sequence[RunningRequest]) -> None:
    """Continue these requests of this worker: one token of each that decodes, then the prompts that have begun."""
    present = [request for request in requests if request.cache is not None and not request.exhausted]
    for request in present:
        if request.remaining == 1 and part.budget:
            part.decode(request)
    for request in present:
        # those that have just run their newest token go on by rule
        if request.remaining > 1 and part.room:
            part.prefill(request)


def _decodes(request: RunningRequest) -> bool:
    """Whether a running request has only its newest token to run."""
    return request.remaining == 1 and not request.exhausted


_arrival = attrgetter("arrival")
