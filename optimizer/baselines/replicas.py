"""Decides how many replicas of each expert the slots hold."""

from __future__ import annotations

import numpy as np

from elastic_moe.optimizer.core.problem import FloatArray, IntArray


def replica_counts(load: FloatArray, slots: int, workers: int) -> IntArray:
    """[E] replicas for one layer. Each spare slot goes to the expert with the most load per replica.

    Source: DeepSeek's EPLB, README. No expert gets more replicas than there are workers; idle experts get one,
    and slots that would only be filled by idle experts stay empty.
    """
    replicas = np.ones(len(load), dtype=np.int32)
    for _ in range(slots - len(load)):
        per_replica = np.where(replicas < workers, load / replicas, -1.0)
        heaviest = int(np.argmax(per_replica))
        if per_replica[heaviest] <= 0:
            break
        replicas[heaviest] += 1
    return replicas
