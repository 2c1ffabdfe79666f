"""Writes the log probabilities of a prompt's tokens: for `echo` in the form of an answer's tokens, and as vLLM's
`prompt_logprobs`.

To write a hundred of them takes milliseconds, so callers write long prompts in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.messages.requests import TokenLogprobs
from elastic_moe.deploy.bodies.schema import SamplingFields
from elastic_moe.deploy.generation.answer import Answer, ScoredToken
from elastic_moe.deploy.text.tokenizer import Tokenizer

Name = Callable[[int], str]

MAX_SCORES = 2**20
"""Most log probabilities of prompt tokens in one response, which are some 100 MB of JSON."""


def check_scores(body: SamplingFields, prompt_tokens: Sequence[int]) -> None:
    """Raises RequestError where more log probabilities of prompts are asked for than a response may have.

    `prompt_tokens` has the number of tokens of each answer's prompt.
    """
    if body.scored_alternatives is None:
        return
    count = sum(prompt_tokens) * (1 + body.scored_alternatives)
    if count > MAX_SCORES:
        param = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
        raise RequestError(
            f"{param}: at most {MAX_SCORES} log probabilities of prompt tokens may be asked for at once, got {count}: "
            "ask for fewer alternatives, or send fewer prompts",
            param=param,
            code="invalid_value",
        )


class Scored:
    """The prompts of a request's answers, with their log probabilities, which come with the answers."""

    def __init__(self, tokenizer: Tokenizer, answers: Sequence[Answer], body: SamplingFields) -> None:
        self._tokenizer = tokenizer
        self._answers = answers
        self.alternatives = body.prompt_logprobs
        """The number that `prompt_logprobs` asks for; None where it was not given."""

    def size(self, index: int) -> int:
        """Number of the prompt's tokens."""
        return len(self._answers[index].request.prompt_token_ids)

    def prompt_logprobs(self, index: int, name: Name) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: by token id, the prompt's own token and the most likely ones."""
        scores, entries = self._answers[index].scores, list[dict[str, Any] | None]([None])
        if scores is None:
            return entries
        for token in scores.tokens():
            entry = {str(token.token_id): _value(token.logprob, token.rank, name(token.token_id))}
            for rank, (token_id, logprob) in enumerate(token.top[: self.alternatives], 1):
                entry.setdefault(str(token_id), _value(logprob, rank, name(token_id)))
            entries.append(entry)
        return entries

    def echo(self, index: int, text: str, alternatives: int) -> tuple[int, list[ScoredToken]]:
        """The first token of the prompt, which has no log probability, and the others. `text` is the echo."""
        token_ids, scores = self._answers[index].request.prompt_token_ids, self._answers[index].scores
        offsets = text_offsets(self._tokenizer, token_ids, text)
        return token_ids[0], [
            ScoredToken(
                logprobs=TokenLogprobs(token_id=token.token_id, logprob=token.logprob, top=token.top[:alternatives]),
                text_offset=offset,
            )
            for token, offset in zip(scores.tokens() if scores is not None else (), offsets[1:], strict=True)
        ]


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


def _value(logprob: float, rank: int, name: str) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": name}
