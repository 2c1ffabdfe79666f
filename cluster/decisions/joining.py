"""Workers that cannot join the others: who is tried next, and who is given up.

A group forms only if every member reaches every other. One worker that cannot be reached must not keep the others from
serving: it is tried again by itself, and is ended after some attempts.
"""

from __future__ import annotations

from collections.abc import Sequence

from elastic_moe.cluster.facts.facts import Facts
from elastic_moe.cluster.facts.membership import WorkerRecord
from elastic_moe.cluster.placement import WorkerId

MAX_JOINS = 4
"""Attempts in a row that may fail before a worker is ended that does not serve."""
TOGETHER = 2
"""Failed attempts after which those who do not serve yet no longer wait for one another."""


def together(facts: Facts, wanted: Sequence[WorkerRecord]) -> list[WorkerRecord]:
    """Those of `wanted` that should form the next group. All of them, unless attempts to do so have failed."""
    if not facts.serves:
        return _smallest(facts, wanted)
    _, newcomers = facts.split(wanted)
    untried = [record for record in newcomers if not record.failed_joins]
    # alone, so that none is blamed for another's failure
    chosen = untried or sorted(newcomers, key=lambda record: record.failed_joins)[:1]
    later = {record.id for record in newcomers} - {record.id for record in chosen}
    return [record for record in wanted if record.id not in later]


def _smallest(facts: Facts, wanted: Sequence[WorkerRecord]) -> list[WorkerRecord]:
    """All, or as few as can serve every expert where all together have failed often enough."""
    if min((record.failed_joins for record in wanted), default=0) < TOGETHER:
        return list(wanted)
    best = sorted(wanted, key=lambda record: record.failed_joins)
    fewest = next(n for n in range(1, len(best) + 1) if n == len(best) or facts.fits(best[:n]))
    return [record for record in wanted if record in best[:fewest]]


def blamed(facts: Facts, members: Sequence[WorkerId]) -> list[WorkerId]:
    """The workers to blame where these could not form a group: those that serve have shown that they can."""
    ranks = set(facts.ranks) if facts.serves else set()
    return [worker for worker in members if worker not in ranks]
