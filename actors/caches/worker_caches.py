"""The caches of all workers: who is a member, and which rows of the columns belong to whom."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from elastic_moe.actors.caches.rows import Indices, Rows
from elastic_moe.actors.caches.running_requests import RunningRequest
from elastic_moe.actors.caches.worker_cache import WorkerCache
from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.epochs import StateRoom, WindowRoom
from elastic_moe.cluster.placement import WorkerId


class WorkerCaches:
    """All workers, in rank order."""

    def __init__(self, rows: Rows, *, max_num_seqs: int, prefix_caching: bool) -> None:
        """`max_num_seqs` is per worker."""
        self.by_worker: dict[WorkerId, WorkerCache] = {}
        self._rows = rows
        self._max_num_seqs = max_num_seqs
        self._prefix_caching = prefix_caching
        self._bases: Indices = np.zeros(0, dtype=np.intp)
        """The first row of each worker."""

    def replace(
        self,
        workers: Mapping[WorkerId, int],
        state_rooms: Mapping[WorkerId, StateRoom],
        window_rooms: Mapping[WorkerId, WindowRoom],
    ) -> list[RunningRequest]:
        """Set the workers, with their numbers of KV blocks and their room for states and windows, in rank order.
        Returns the requests that have lost their worker.

        A worker with room for more or less than before counts as a new worker.
        """
        rooms = {worker: (n, state_rooms.get(worker), window_rooms.get(worker)) for worker, n in workers.items()}
        old, self.by_worker = self.by_worker, {}
        kept = {worker: c for worker, c in old.items() if rooms.get(worker) == c.whole_room}
        homeless: list[RunningRequest] = []
        gone = [cache for worker, cache in old.items() if worker not in kept]
        for cache in gone:
            for request in cache.running.items.copy():
                cache.drop(request)
                homeless.append(request)
        for cache in gone:
            cache.close()
        for worker, (blocks, state_room, window_room) in rooms.items():
            self.by_worker[worker] = kept.get(worker) or WorkerCache(
                worker,
                blocks,
                self._rows,
                max_num_seqs=self._max_num_seqs,
                prefix_caching=self._prefix_caching,
                state_room=state_room,
                window_room=window_room,
            )
        self._bases = np.array([cache.base for cache in self.by_worker.values()], dtype=np.intp)
        return homeless

    def drain(self, workers: Collection[WorkerId]) -> None:
        """Give no new requests to exactly these workers from now on."""
        for cache in self.by_worker.values():
            cache.draining = cache.worker in workers

    def bounds(self, rows: Indices) -> dict[WorkerId, tuple[int, int]]:
        """Where the rows of each worker begin and end in `rows`."""
        begins = np.searchsorted(rows, self._bases).tolist()
        ends = np.searchsorted(rows, self._bases + self._max_num_seqs).tolist()
        return dict(zip(self.by_worker, zip(begins, ends, strict=True), strict=True))

    def seats(self, rows: Indices) -> Indices:
        """[n] the seats of rows: their numbers among those of their worker, each of which has equally many."""
        return rows % self._max_num_seqs

    def check(self, request: RunningRequest) -> None:
        """Raises RequestError if no worker can ever hold the request."""
        caches = self.by_worker.values()
        # while there are no workers, no size is known, and the request waits
        if not caches or any(cache.can_ever_hold(request) for cache in caches):
            return
        room = self._rows.block_size * max(cache.pool.num_blocks for cache in caches)
        raise RequestError(
            f"the prompt has {counted(request.num_prompt_tokens, 'token')} and max_tokens is "
            f"{request.params.max_tokens}: no worker's KV cache holds more than {counted(room, 'token')}",
            param="prompt" if request.num_prompt_tokens > room else "max_tokens",
            code="context_length_exceeded",
        )
