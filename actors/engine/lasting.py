"""Lasting requests: they outlive the API replicas that submitted them, so the engine keeps their tokens too.

Replicas follow them, several at a time if they like, and find here what they have missed. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from elastic_moe.actors.liveness import KEPT_S
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, RequestId, TokenOutput

MOST_ENDED = 4096
"""Most requests that have ended and that no replica has stored yet."""
STORED_S = 10.0
"""Seconds that an answer is kept after a replica has stored it."""


@dataclass(slots=True)
class _Kept:
    tokens: list[int]
    followers: set[str]
    cached_tokens: int = 0
    last: TokenOutput | None = None
    """The last output, once there is one."""
    ended_at: float = 0.0
    stored_at: float | None = None
    """When a replica said that it has stored the answer."""


class Lasting:
    """The lasting requests of an engine, until a replica has stored their answers."""

    def __init__(self) -> None:
        self._kept: dict[RequestId, _Kept] = {}

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._kept

    def runs(self, request_id: RequestId) -> bool:
        kept = self._kept.get(request_id)
        return kept is not None and kept.last is None

    def begin(self, request: GenerateRequest, follower: str) -> None:
        self._kept[request.request_id] = _Kept(tokens=list(request.output_token_ids), followers={follower})

    def follow(self, request: GenerateRequest, follower: str) -> TokenOutput | None:
        """Send `follower` every output from now on. Returns what it lacks beyond the tokens in `request`, or None."""
        kept = self._kept[request.request_id]
        kept.followers.add(follower)
        have = min(len(request.output_token_ids), len(kept.tokens))
        missing = tuple(kept.tokens[have:])
        if kept.last is not None:
            return dataclasses.replace(kept.last, offset=have, token_ids=missing, cached_tokens=kept.cached_tokens)
        if not missing:
            return None
        return TokenOutput(
            request_id=request.request_id, offset=have, token_ids=missing, cached_tokens=kept.cached_tokens
        )

    def take(self, output: TokenOutput, now: float) -> Collection[str]:
        """Keep the output. Returns the names of those who follow the request."""
        kept = self._kept[output.request_id]
        if output.finish_reason is FinishReason.ERROR:
            # a failed request counts no tokens
            output = dataclasses.replace(output, offset=len(kept.tokens))
        kept.cached_tokens = kept.cached_tokens or output.cached_tokens
        kept.tokens[output.offset :] = output.token_ids
        if output.finish_reason is not None:
            kept.last, kept.ended_at = output, now
        return kept.followers

    def cancelled(self, request_id: RequestId) -> TokenOutput:
        """The last output of a request that a client has cancelled."""
        kept = self._kept[request_id]
        return TokenOutput(
            request_id=request_id,
            offset=len(kept.tokens),
            token_ids=(),
            cached_tokens=kept.cached_tokens,
            finish_reason=FinishReason.ABORT,
        )

    def leave(self, request_id: RequestId, follower: str, now: float) -> None:
        """The follower needs no more of it: the request goes on; if it has ended, it will soon be forgotten."""
        kept = self._kept[request_id]
        kept.followers.discard(follower)
        if kept.last is not None:
            kept.stored_at = now

    def forget(self, request_id: RequestId) -> None:
        self._kept.pop(request_id, None)

    def gone(self, follower: str) -> None:
        """The follower will not come back."""
        for kept in self._kept.values():
            kept.followers.discard(follower)

    def orphans(self, request_ids: Iterable[RequestId], present: Collection[str]) -> tuple[RequestId, ...]:
        """Those that none of the replicas in `present` follows, and those that are not known here."""
        return tuple(
            request_id
            for request_id in request_ids
            if request_id not in self._kept or self._kept[request_id].followers.isdisjoint(present)
        )

    def forget_old(self, now: float) -> None:
        """Forget what is stored, what has ended long ago, and the oldest of what is too many."""
        # a replica may have looked into the store just before, and submit the request only now
        for name in [n for n, kept in self._kept.items() if kept.stored_at is not None]:
            if now - (self._kept[name].stored_at or now) > STORED_S:
                del self._kept[name]
        ended = sorted((kept.ended_at, name) for name, kept in self._kept.items() if kept.last is not None)
        excess = max(0, len(ended) - MOST_ENDED)
        for number, (ended_at, name) in enumerate(ended):
            if number < excess or now - ended_at > KEPT_S:
                del self._kept[name]
