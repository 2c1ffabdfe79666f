"""What the model itself answers. A server with other answers may read fewer weights or compute less."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_moe.model.checkpoints.quiet import quiet_transformers
from tests.bench.client import Client

PROMPTS, PROMPT_TOKENS = 24, 32
LEAST_RIGHT = 0.5
"""Rounding turns the choice between two tokens that are about as likely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Prompts, and what transformers says comes next."""

    prompts: list[list[int]]
    texts: list[str]

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
            chosen = transformer(torch.tensor(prompts), logits_to_keep=1).logits[:, -1].argmax(-1)
        texts = [tokenizer.decode(token) for token in chosen.tolist()]
        # no server says a part of a character alone
        whole = [n for n, text in enumerate(texts) if text and "\ufffd" not in text]
        return cls(prompts=[prompts[n] for n in whole], texts=[texts[n] for n in whole])

    def check(self, client: Client, server: str) -> None:
        """Raises RuntimeError where the server's first tokens are others."""
        said = client.first_texts(self.prompts)
        right = sum(a == b for a, b in zip(said, self.texts, strict=True))
        if right < LEAST_RIGHT * len(self.texts):
            example = next((a, b) for a, b in zip(said, self.texts, strict=True) if a != b)
            raise RuntimeError(
                f"{server} answers {right} of {len(self.texts)} prompts as the model does: {example[0]!r} instead of "
                f"{example[1]!r}; nothing that it does can be compared"
            )
        print(f"{server}: {right} of {len(self.texts)} first tokens are transformers'", flush=True)
