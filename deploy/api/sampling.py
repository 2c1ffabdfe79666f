"""Makes SamplingParams from a request's fields, the model's defaults and its limits, with a seed for every choice."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.grammars import Grammar
from elastic_moe.cluster.messages.requests import SamplingParams, ThinkingBudget
from elastic_moe.deploy.bodies.bounds import MAX_LOGIT_BIASES, TokenIds
from elastic_moe.deploy.bodies.schema import SamplingFields


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """The values of generation_config.json, which stand in for fields that a request leaves out."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None

    @classmethod
    def read(cls, model_dir: str) -> SamplingDefaults:
        """Read them from the model directory. A missing file, or a value of the wrong type, leaves the default."""
        try:
            data = json.loads((Path(model_dir) / "generation_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return cls()
        if not isinstance(data, dict):
            return cls()
        numbers = {name: data[name] for name in cls.__slots__ if _is_number(data.get(name))}
        return cls(**numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()


def sampling_params(
    fields: SamplingFields,
    *,
    defaults: SamplingDefaults,
    limits: Limits,
    prompt_tokens: int,
    logprobs: int | None,
    fallback_max_tokens: int | None = None,
    bad_words: tuple[tuple[int, ...], ...] = (),
    grammar: Grammar | None = None,
    grammar_after: tuple[int, ...] | None = None,
    thinking: ThinkingBudget | None = None,
) -> SamplingParams:
    """The parameters of choice 0. Raises RequestError for values that contradict one another or the model.

    `bad_words` has the field's words as tokens. `grammar` has been checked (Service.grammar); `grammar_after` are the
    tokens after which it begins, as in SamplingParams.
    """
    max_tokens = _max_tokens(fields, prompt_tokens, defaults, limits, fallback_max_tokens)
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens: {min_tokens} is more than the {counted(max_tokens, 'token')} that the answer may have",
            param="min_tokens",
        )
    stop_token_ids = tuple(fields.stop_token_ids or ())
    check_token_ids(stop_token_ids, limits.vocab_size, "stop_token_ids")
    top_k = _either(fields.top_k, defaults.top_k)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=float(_either(fields.temperature, defaults.temperature)),
        top_p=float(_either(fields.top_p, defaults.top_p)),
        top_k=max(0, int(top_k)),
        min_p=float(_either(fields.min_p, defaults.min_p)),
        # as in vLLM, -1 means that no seed is set
        seed=secrets.randbits(63) if fields.seed in (None, -1) else fields.seed & (2**63 - 1),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=float(_either(fields.repetition_penalty, defaults.repetition_penalty)),
        logit_bias=_logit_bias(fields.logit_bias, limits.vocab_size),
        logprobs=logprobs,
        logprob_token_ids=_logprob_token_ids(fields, limits),
        prompt_logprobs=fields.scored_alternatives,
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(fields.ignore_eos),
        allowed_token_ids=_allowed(fields, min_tokens, limits, bad_words),
        bad_words=bad_words,
        thinking=thinking,
        grammar=grammar,
        grammar_after=grammar_after,
    )


def truncated(
    token_ids: TokenIds,
    fields: SamplingFields,
    *,
    defaults: SamplingDefaults,
    limits: Limits,
    fallback_max_tokens: int | None = None,
) -> TokenIds:
    """The prompt after `truncate_prompt_tokens`; -1 keeps as many tokens as leave room for the answer."""
    keep = fields.truncate_prompt_tokens
    if keep is None:
        return token_ids
    if keep == -1:
        wanted = (fields.token_limit, fallback_max_tokens, defaults.max_new_tokens, 1)
        answer = next(tokens for tokens in wanted if tokens is not None)
        keep = max(1, limits.max_model_len - answer)
    return token_ids[:keep] if fields.truncation_side == "right" else token_ids[-keep:]


def _logprob_token_ids(fields: SamplingFields, limits: Limits) -> tuple[int, ...]:
    token_ids = tuple(dict.fromkeys(fields.logprob_token_ids or ()))
    check_token_ids(token_ids, limits.vocab_size, "logprob_token_ids")
    return token_ids


def _allowed(
    fields: SamplingFields, min_tokens: int, limits: Limits, bad_words: tuple[tuple[int, ...], ...]
) -> tuple[int, ...] | None:
    """The tokens that may be chosen. Raises RequestError where the other fields leave none."""
    if fields.allowed_token_ids is None:
        return None
    allowed = sorted(set(fields.allowed_token_ids))
    check_token_ids(allowed, limits.vocab_size, "allowed_token_ids")
    excluded = {word[0] for word in bad_words if len(word) == 1}
    if min_tokens:
        excluded |= {*limits.eos_token_ids, *(fields.stop_token_ids or ())}
    if excluded.issuperset(allowed):
        raise RequestError(
            "allowed_token_ids: bad_words, or min_tokens with the tokens that end an answer, exclude all of them",
            param="allowed_token_ids",
            code="invalid_value",
        )
    return tuple(allowed)


def seed_of_choice(seed: int, index: int) -> int:
    """The seed of a choice. Choice 0 has the request's own, so that n=1 gives the first of several answers."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises RequestError for an id that the model does not have."""
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{param}: token id {token_id} is out of vocabulary, expected 0 to {vocab_size - 1}",
                param=param,
                code="invalid_value",
            )


def _max_tokens(
    fields: SamplingFields, prompt_tokens: int, defaults: SamplingDefaults, limits: Limits, fallback: int | None
) -> int:
    wanted, field = fields.token_limit, fields.token_limit_field
    room = limits.max_model_len - prompt_tokens
    if room < (0 if wanted == 0 else 1):
        raise RequestError(
            f"the prompt has {counted(prompt_tokens, 'token')}; this model's maximum context length is "
            f"{limits.max_model_len} tokens, prompt and answer together",
            param=fields.PROMPT,
            code="context_length_exceeded",
        )
    if wanted is None:
        return min(room, *(bound for bound in (fallback, defaults.max_new_tokens, room) if bound is not None))
    if wanted > room:
        raise RequestError(
            f"{field}: {wanted} is too large: this model's maximum context length is {limits.max_model_len} "
            f"tokens, of which the prompt has {prompt_tokens}",
            param=field,
            code="context_length_exceeded",
        )
    return wanted


def _logit_bias(bias: Mapping[str, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if not bias:
        return ()
    if len(bias) > MAX_LOGIT_BIASES:
        raise RequestError(f"logit_bias: expected at most {MAX_LOGIT_BIASES} entries", param="logit_bias")
    pairs: list[tuple[int, float]] = []
    for key, value in bias.items():
        # int() would accept " 5", "1_0" and "٣" too
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise RequestError(f"logit_bias: the key {key[:20]!r} is no token id", param="logit_bias")
        pairs.append((int(key), max(-100.0, min(100.0, value))))
    check_token_ids([token_id for token_id, _ in pairs], vocab_size, "logit_bias")
    return tuple(pairs)


def _either(value: Any, default: Any) -> Any:
    return default if value is None else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
