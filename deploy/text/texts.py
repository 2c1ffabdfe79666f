"""The texts of one API replica: from text to tokens and back, each by the way that holds up no stream.

A short text is done at once, a longer one in a thread or a bounded process (deploy/text/prompts.py), and a large one in
the helper process for large bodies. What may be asked for, and how long it may be, is the service's business.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import Self

from elastic_moe.deploy.bodies.aside import Aside
from elastic_moe.deploy.bodies.bounds import TokenIds
from elastic_moe.deploy.text.prompts import DirectPrompts, Prompts
from elastic_moe.deploy.text.tokenizer import Tokenizer

OpenPrompts = Callable[[str, str | None], Awaitable[Prompts]]
"""It takes the model's directory and a chat template's path. Raises CheckpointError and ConfigError."""

LONG_TEXT = 4096
"""Number of tokens from which on they are decoded in a thread, so that streams do not stall."""
LARGE_TEXT = 2**16
"""Characters from which on another process encodes a text, since its tokens come back packed."""


class Texts:
    """Use `open`, which loads the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, prompts: Prompts, aside: Aside, *, fast: bool) -> None:
        """`fast`: `aside` has the tokenizer too, which needs it as JSON."""
        self.tokenizer = tokenizer
        self.prompts = prompts
        self._aside = aside
        self._fast = fast

    @classmethod
    async def open(
        cls, model_dir: str, chat_template: str | None, open_prompts: OpenPrompts | None, aside: Aside
    ) -> Self:
        """`open_prompts` makes the Prompts that render and encode; without it, this process does so. Raises
        CheckpointError and ConfigError."""
        loading = asyncio.to_thread(Tokenizer.load, model_dir, chat_template)
        prompts: Prompts
        if open_prompts is None:
            tokenizer = await loading
            prompts = DirectPrompts(tokenizer)
        else:
            prompts, tokenizer = await asyncio.gather(open_prompts(model_dir, chat_template), loading)
        written = await asyncio.to_thread(tokenizer.to_json)
        if written is not None:
            aside.use_tokenizer(lambda: written)
        return cls(tokenizer, prompts, aside, fast=written is not None)

    def close(self) -> None:
        """End the processes that render and encode. Blocks for a moment."""
        self.prompts.close()

    async def encode(self, text: str, *, add_special_tokens: bool, param: str) -> TokenIds:
        """The tokens of a text of any length. Raises RequestError, which names `param`."""
        if len(text) >= LARGE_TEXT and self._fast:
            return await self._aside.encode(text, add_special_tokens=add_special_tokens)
        return await self.prompts.encode(text, add_special_tokens=add_special_tokens, param=param)

    async def decode(self, token_ids: TokenIds) -> str:
        """The text of any number of tokens."""
        if len(token_ids) < LONG_TEXT:
            return self.tokenizer.decode(token_ids)
        if not self._fast:
            return await asyncio.to_thread(self.tokenizer.decode, token_ids)
        return await self._aside.decode(array("i", token_ids))

    async def bad_words(self, words: Sequence[str] | None) -> tuple[tuple[int, ...], ...]:
        """The token sequences that vLLM bans for these words: the word at the beginning of a text, after a space, and
        as one token."""
        ways: dict[tuple[int, ...], None] = {}
        for word in words or ():
            bare = word.lstrip() or word
            first = await self.encode(bare, add_special_tokens=False, param="bad_words")
            spaced = await self.encode(" " + bare, add_special_tokens=False, param="bad_words")
            ways[tuple(first)] = None
            if first and len(spaced) == len(first) and spaced[0] != first[0]:
                ways[tuple(spaced)] = None
            if (single := self.tokenizer.id_of_piece(bare)) is not None:
                ways[(single,)] = None
        return tuple(way for way in ways if way)
