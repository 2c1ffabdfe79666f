"""Serves requests while everything happens to a cluster that may: the tokens must be those of an undisturbed one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic_moe.cluster.messages.requests import GenerateRequest
from tests.model.lockstep import Lockstep, request

LOSE_EVERY = 9
"""Turns after which the steps in flight are dropped and run again."""
REPLACE_AT = 12
LOSE_WORKER_AT = 17


@dataclass(slots=True)
class Disturbances:
    lost_steps: int = 0
    moved_experts: int = 0
    homeless: int = 0
    """Requests whose home worker was gone."""


def serve_disturbed(
    cluster: Lockstep, requests: Sequence[GenerateRequest], happened: Disturbances
) -> dict[str, list[int]]:
    """Run the requests to their end, and note in `happened` what was done to them. Tokens by request."""
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    for one in requests:
        cluster.scheduler.add(one)
    turn = 0
    while cluster.scheduler.num_requests:
        turn += 1
        if turn % LOSE_EVERY == 0:
            cluster.send()
            happened.lost_steps += cluster.lose_steps()
        if turn == REPLACE_AT:
            slots = [worker.slots for worker in cluster.placement.workers]
            happened.moved_experts += cluster.replace(cluster.shuffled(turn), slots)
        if turn == LOSE_WORKER_AT:
            happened.homeless += lose_worker(cluster)
        for output in cluster.step():
            assert output.offset == len(tokens[output.request_id])
            tokens[output.request_id] += output.token_ids
    return tokens


def answers_disturbed(cluster: Lockstep, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """The answers to the prompts, and then to the last prompt again, where everything has happened that may: steps that
    are run again, a re-placement, the loss of a home worker, preemption, and a prefix that is found.
    """
    happened = Disturbances()
    asked = [request(f"r{n}", prompt, max_tokens=tokens) for n, prompt in enumerate(prompts)]
    answers = serve_disturbed(cluster, asked, happened)
    before = cluster.scheduler.status()
    again = cluster.run([request("again", prompts[-1], max_tokens=tokens // 4)])["again"]
    assert min(happened.lost_steps, happened.moved_experts, happened.homeless, before.preemptions) > 0, happened
    assert cluster.scheduler.status().prefix_hits > before.prefix_hits
    return [*answers.values(), again]


def lose_worker(cluster: Lockstep) -> int:
    """Forget what the worker with the most requests knows of them, as if it had died and another had taken its place.

    Returns the number of its requests.
    """
    while cluster.flights:
        cluster.land()
    caches = cluster.scheduler._caches.by_worker
    blocks = {worker: cache.pool.num_blocks for worker, cache in caches.items()}
    gone = max(caches, key=lambda worker: len(caches[worker].running))
    states = {name: worker.state_room for name, worker in cluster.workers.items() if worker.state_room is not None}
    windows = {name: worker.window_room for name, worker in cluster.workers.items() if worker.window_room is not None}
    others = {worker: count for worker, count in blocks.items() if worker != gone}
    homeless = cluster.scheduler.set_workers(others, states, windows)
    cluster.workers[gone].forget_sequences()
    cluster.scheduler.set_workers(blocks, states, windows)
    return homeless
