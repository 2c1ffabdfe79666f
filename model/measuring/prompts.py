"""Plans of steps that read prompts of random tokens: what a worker computes most of the time that placements decide.

Legend: T tokens of a step, W workers.
"""

from __future__ import annotations

import random

from elastic_moe.cluster.messages.epochs import Epoch, WindowRoom
from elastic_moe.cluster.messages.requests import RequestId, SamplingParams
from elastic_moe.cluster.messages.steps import Chunk, NewSequence, StateUse, StepPlan, WindowBlocks

BLOCK = 16
"""Tokens of a KV block."""

PROMPT = 128
"""Tokens of a prompt, at most: attention takes little of the step then."""


class Prompts:
    """The plans of one worker of a group. Every step has the same prompts, so that steps differ by the placement."""

    def __init__(
        self, tokens: int, rank: int, size: int, vocabulary: int, windows: WindowRoom | None = None, seed: int = 0
    ) -> None:
        """`tokens`: of a step of all `size` workers. `windows`: the blocks of layers with a sliding window."""
        self._tokens_per_rank = tuple(tokens // size + (r < tokens % size) for r in range(size))
        mine, rng = self._tokens_per_rank[rank], random.Random(seed * size + rank)
        self._lengths = [PROMPT] * (mine // PROMPT) + [mine % PROMPT] * (mine % PROMPT > 0)
        self._prompts = [tuple(rng.randrange(vocabulary) for _ in range(length)) for length in self._lengths]
        self._ring = 0 if windows is None else windows.blocks // max(1, len(self._lengths))
        self._step = 0

    def next(self, epoch: Epoch) -> StepPlan:
        """The next step of the epoch."""
        self._step += 1
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        ids = [RequestId(f"{self._step}-{number}") for number in range(len(self._prompts))]
        return StepPlan(
            epoch=epoch,
            step=self._step,
            tokens_per_rank=self._tokens_per_rank,
            new=tuple(
                NewSequence(
                    request_id=name, token_ids=prompt, num_prompt_tokens=len(prompt), params=params, eos_token_ids=()
                )
                for name, prompt in zip(ids, self._prompts, strict=True)
            ),
            chunks=tuple(self._chunk(number, name) for number, name in enumerate(ids)),
            finished=tuple(RequestId(f"{self._step - 1}-{number}") for number in range(len(ids) * (self._step > 1))),
        )

    def _chunk(self, number: int, name: RequestId) -> Chunk:
        length, first = self._lengths[number], number * (PROMPT // BLOCK)
        window = None
        if self._ring:
            ring = tuple(number * self._ring + k % self._ring for k in range(-(-length // BLOCK)))
            window = WindowBlocks(first=0, ids=ring)
        return Chunk(
            request_id=name,
            start=0,
            length=length,
            known=length,
            block_offset=0,
            block_ids=tuple(range(first, first + PROMPT // BLOCK)),
            state=StateUse(keep_from=0),
            windows=window,
        )
