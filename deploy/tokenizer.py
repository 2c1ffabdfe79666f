"""The model's tokenizer as the API uses it: text to ids and back, chat templates, the bytes of one token.

Loading imports transformers and takes seconds; encoding a long text takes long too. Callers do both in a thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

from cluster.collector import no_collection
from cluster.errors import CheckpointError, ConfigError, RequestError
from deploy.text import REPLACEMENT, Detokenizer

FILES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "tekken.json", "spiece.model")
"""Where a vocabulary may be. Without any, transformers makes a tokenizer that knows no word."""


class Tokenizer:
    """Wraps a transformers tokenizer. Safe to use from several threads."""

    def __init__(self, inner: Any, *, chat_template: str | None = None) -> None:
        self._inner = inner
        self._chat_template = chat_template
        # The Rust tokenizer alone is several times faster than the methods around it, and has no state to fight over
        # once truncation and padding are off.
        self._backend = getattr(inner, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self._lock = Lock()
        self._max_token_chars = max((len(token) for token in inner.get_vocab()), default=1)
        self.token_bytes = lru_cache(maxsize=65536)(self._token_bytes)

    @classmethod
    def load(cls, model_dir: str, chat_template_path: str | None = None) -> Tokenizer:
        """Raises CheckpointError where the directory has no tokenizer that can be used without running its code."""
        with no_collection():
            from transformers import AutoTokenizer

        template = None
        if chat_template_path is not None:
            try:
                template = Path(chat_template_path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"chat_template: {chat_template_path}: {error}") from None
        if not any(next(Path(model_dir).glob(pattern), None) for pattern in FILES):
            raise CheckpointError(f"{model_dir}: no tokenizer: expected a file such as tokenizer.json")
        try:
            inner = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # noqa: BLE001 - transformers raises whatever its parsers raise
            raise CheckpointError(f"{model_dir}: cannot load the tokenizer: {_one_line(error)}") from None
        return cls(inner, chat_template=template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        with self._lock:
            return list(self._inner.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        if self._backend is not None:
            return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        with self._lock:
            return str(
                self._inner.decode(
                    list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
                )
            )

    def detokenizer(self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> Detokenizer:
        return Detokenizer(self._decoder(skip_special_tokens), prompt_token_ids)

    def to_json(self) -> str | None:
        """All of it, as tokenizer.json has it; None where only transformers' code knows how to use it."""
        return None if self._backend is None else str(self._backend.to_str())

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the text's length in tokens, at no cost: to refuse what is hopelessly long."""
        return len(text) // self._max_token_chars

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the chat template makes of `messages`. Raises RequestError where it refuses them."""
        if not (self._chat_template or self._inner.chat_template):
            raise RequestError(
                "this model has no chat template; use /v1/completions, or start the server with --chat-template",
                param="messages",
                code="no_chat_template",
            )
        fixed = {"tokenize", "chat_template", "add_generation_prompt", "continue_final_message", "return_dict"}
        try:
            return str(
                self._inner.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=self._chat_template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    **{k: v for k, v in (template_kwargs or {}).items() if k not in fixed},
                )
            )
        except Exception as error:  # noqa: BLE001 - templates raise what they like: jinja's errors, TypeError, ...
            message = f"messages: the chat template refuses them: {_one_line(error)}"
            raise RequestError(message, param="messages") from None

    def token_text(self, token_id: int) -> str:
        """The token alone, as text; U+FFFD where it is a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_string(self, token_id: int) -> str:
        """The token as the vocabulary writes it."""
        token = self._inner.convert_ids_to_tokens(token_id)
        return "" if token is None else str(token)

    def _decoder(self, skip_special_tokens: bool) -> Callable[[Sequence[int]], str]:
        if self._backend is not None:
            # for every token that is made: no layer between
            return partial(self._backend.decode, skip_special_tokens=skip_special_tokens)
        return partial(self.decode, skip_special_tokens=skip_special_tokens)

    def _token_bytes(self, token_id: int) -> bytes:
        text = self.decode([token_id])
        if REPLACEMENT not in text:
            return text.encode("utf-8", errors="replace")
        return _bytes_of_token(self.token_string(token_id)) or text.encode()


def without_torch() -> None:
    """Have transformers do without torch in this process, for good: tokenizers never need it, and importing it takes a
    second and some 180 MB. For processes that have no model."""
    from transformers import utils
    from transformers.utils import import_utils

    for module in (utils, import_utils):
        vars(module)["is_torch_available"] = lambda: False


def _bytes_of_token(token: str) -> bytes | None:
    """Bytes of a token that is no text by itself, in the two notations in use."""
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes.fromhex(match[1])
    table = _byte_of_char()
    return bytes(table[char] for char in token) if all(char in table for char in token) else None


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
