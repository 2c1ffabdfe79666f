"""What the model itself answers. A server with other answers may read fewer weights or compute less."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_moe.model.checkpoints.quiet import quiet_transformers
from tests.bench.client import Client, FirstToken

PROMPTS, PROMPT_TOKENS = 24, 32
LEAST_RIGHT = 0.5
"""Rounding turns the choice between two tokens that are about as likely."""
MOST_KL = 2.5
"""Nats. Weights in 4 bits turn most of the choices of a random model, whose tokens are all about as likely. llama.cpp's
Q4_K_M, which rounds attention too, leaves a divergence of 1.6; between a model and noise it is above 5."""
_LEAST_PROBABILITY = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Prompts, and what transformers says comes next."""

    prompts: list[list[int]]
    texts: list[str]
    probabilities: Sequence[Mapping[str, float]] = ()
    """Of every text that a token has, after each prompt."""

    @classmethod
    def of(cls, model: Path) -> Truth:
        with quiet_transformers(), torch.inference_mode():
            tokenizer = AutoTokenizer.from_pretrained(model)  # type: ignore[no-untyped-call]
            transformer = AutoModelForCausalLM.from_pretrained(model)
            rng = random.Random(0)
            first = len(tokenizer.all_special_ids)
            prompts = [
                [rng.randrange(first, transformer.config.vocab_size) for _ in range(PROMPT_TOKENS)]
                for _ in range(PROMPTS)
            ]
            logits = transformer(torch.tensor(prompts), logits_to_keep=1).logits[:, -1].float()
        names = [tokenizer.decode(token) for token in range(logits.shape[1])]
        texts = [names[token] for token in logits.argmax(-1).tolist()]
        # no server says a part of a character alone
        whole = [n for n, text in enumerate(texts) if text and "\ufffd" not in text]
        rows = logits.softmax(-1).tolist()
        return cls(
            prompts=[prompts[n] for n in whole],
            texts=[texts[n] for n in whole],
            probabilities=[by_text(names, rows[n]) for n in whole],
        )

    def check(self, client: Client, server: str) -> None:
        """Raises RuntimeError where the server's first tokens are others, and their probabilities are too."""
        said = client.first_tokens(self.prompts)
        right = sum(a.text == b for a, b in zip(said, self.texts, strict=True))
        kl = self._divergence(said)
        measured = "" if kl is None else f", with a divergence of {kl:.3f} nats"
        if right < LEAST_RIGHT * len(self.texts) and (kl is None or kl > MOST_KL):
            example = next((a.text, b) for a, b in zip(said, self.texts, strict=True) if a.text != b)
            raise RuntimeError(
                f"{server} answers {right} of {len(self.texts)} prompts as the model does{measured}: {example[0]!r} "
                f"instead of {example[1]!r}; nothing that it does can be compared"
            )
        print(f"{server}: {right} of {len(self.texts)} first tokens are transformers'{measured}", flush=True)

    def _divergence(self, said: Sequence[FirstToken]) -> float | None:
        """Mean over the prompts; None where the server or the truth has no probabilities."""
        if not self.probabilities or not all(token.logprobs for token in said):
            return None
        pairs = zip(said, self.probabilities, strict=True)
        return statistics.mean(divergence(token.logprobs, truth) for token, truth in pairs)


def by_text(names: Sequence[str], probabilities: Sequence[float]) -> dict[str, float]:
    """Probabilities of texts, since servers name tokens by their texts and some tokens have the same."""
    found: dict[str, float] = {}
    for name, probability in zip(names, probabilities, strict=True):
        found[name] = found.get(name, 0.0) + probability
    return found


def divergence(said: Mapping[str, float], truth: Mapping[str, float]) -> float:
    """KL divergence from the truth of a server's likeliest tokens and of all others as one: at most that of all.

    `said` are log probabilities, `truth` probabilities.
    """
    shares = [(math.exp(logprob), truth.get(text, 0.0)) for text, logprob in said.items()]
    shares.append((1 - sum(p for p, _ in shares), 1 - sum(q for _, q in shares)))
    least = _LEAST_PROBABILITY
    return sum(p * math.log(p / max(q, least)) for p, q in shares if p > least)
