"""Writes the log probabilities of a prompt's tokens: for `echo` in the form of an answer's tokens, and as vLLM's
`prompt_logprobs`.

Both take milliseconds for a hundred tokens, so callers write long ones in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from elastic_moe.cluster.messages.requests import TokenLogprobs
from elastic_moe.cluster.messages.scores import PromptScores
from elastic_moe.deploy.generation.answer import ScoredToken
from elastic_moe.deploy.text.tokenizer import Tokenizer

Name = Callable[[int], str]


def scored_tokens(scores: PromptScores | None, offsets: Sequence[int], alternatives: int) -> list[ScoredToken]:
    """The prompt's tokens after the first, which has no score. `offsets`: characters before each token, the first
    included."""
    if scores is None:
        return []
    return [
        ScoredToken(
            logprobs=TokenLogprobs(token_id=token.token_id, logprob=token.logprob, top=token.top[:alternatives]),
            text_offset=offset,
        )
        for token, offset in zip(scores.tokens(), offsets[1:], strict=True)
    ]


def prompt_logprobs(scores: PromptScores | None, alternatives: int, name: Name) -> list[dict[str, Any] | None]:
    """An entry for each token of the prompt: by id, the token itself and the `alternatives` most likely ones."""
    entries: list[dict[str, Any] | None] = [None]
    if scores is None:
        return entries
    for token in scores.tokens():
        entry = {str(token.token_id): _value(token.logprob, token.rank, name(token.token_id))}
        for rank, (token_id, logprob) in enumerate(token.top[:alternatives], 1):
            entry.setdefault(str(token_id), _value(logprob, rank, name(token_id)))
        entries.append(entry)
    return entries


def _value(logprob: float, rank: int, name: str) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": name}


def text_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int]:
    """For each of the prompt's tokens, the number of characters of `text`, the echo, that come before it."""
    detokenizer = tokenizer.detokenizer((), skip_special_tokens=False)
    offsets, chars = [], 0
    for token_id in token_ids:
        offsets.append(chars)
        chars += len(detokenizer.push(token_id))
    chars += len(detokenizer.flush())
    # the tokenizer may have put tokens in front, such as the one that begins a text
    added = max(0, chars - len(text))
    return [min(max(0, offset - added), len(text)) for offset in offsets]
