"""Which waiting request gets which home worker.

No request starves: the queue is first come, first served. One that does not fit anywhere yet claims a worker, which
then takes no later one until it fits, while later ones may go to the other workers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from actors.homes import Home
from actors.sequences import Queue, Sequence
from cluster.placement import WorkerId
from cluster.protocol import Chunk, RequestId


@dataclass(slots=True)
class Part:
    """One worker's part of the step being made or in flight."""

    home: Home
    budget: int
    """Tokens that it may still run."""
    work: list[tuple[Sequence, Chunk]] = field(default_factory=list)
    forget: tuple[RequestId, ...] = ()

    def run(self, sequence: Sequence, length: int) -> None:
        self.work.append((sequence, sequence.chunk(length)))
        self.budget -= length


def admit(waiting: Queue, parts: Collection[Part], max_num_seqs: int, max_num_batched_tokens: int) -> None:
    """Give waiting requests a home, in order of arrival, while there are seats, blocks and tokens to run."""

    def load(part: Part) -> tuple[float, int]:
        """KV cache in use, and tokens that wait to be run."""
        home = part.home
        return home.pool.usage + home.backlog / max_num_batched_tokens, len(home.running)

    takers = {p.home.worker: p for p in parts if not p.home.draining}
    at = passed = 0
    while at < len(waiting) and passed <= len(parts):
        takers = {w: p for w, p in takers.items() if p.budget and len(p.home.running) < max_num_seqs}
        if not takers:
            return
        sequence = waiting.items[at]
        fitting = [p for p in takers.values() if p.home.slack(sequence) >= 0 and p.home.can_ever_hold(sequence)]
        if fitting:
            part = min(fitting, key=load)
            waiting.remove(sequence)
            part.home.take(sequence)
            part.run(sequence, min(sequence.remaining, part.budget))
            continue
        sequence.claim = _claim(sequence, [part.home for part in parts])
        if sequence.claim is not None:
            takers.pop(sequence.claim, None)
            # Looking only so far ahead keeps a step quick however long the queue is.
            passed += 1
        at += 1


def _claim(sequence: Sequence, homes: Iterable[Home]) -> WorkerId | None:
    """The worker that waits for it: where most is missing least. It stays the same until it runs or the worker goes."""
    able = [home for home in homes if not home.draining and home.can_ever_hold(sequence)]
    if not able:
        return None
    return next(
        (h.worker for h in able if h.worker == sequence.claim), max(able, key=lambda h: h.slack(sequence)).worker
    )
