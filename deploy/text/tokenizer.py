"""The model's tokenizer for the API: text to ids and back, chat templates, names and bytes of single tokens.

Loading imports transformers and takes seconds; encoding a long text takes long too. Callers do both in a thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

from elastic_moe.cluster.errors import CheckpointError, ConfigError, RequestError, why
from elastic_moe.cluster.interpreter import no_collection
from elastic_moe.deploy.text.byte_detokenizer import ByteDetokenizer, Pieces
from elastic_moe.deploy.text.conversation import TemplateForms, conversation, template_forms
from elastic_moe.deploy.text.detokenizer import REPLACEMENT, Detokenizer

FILES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "tekken.json", "spiece.model")
"""Files that may hold a vocabulary. Without any, transformers makes a tokenizer that knows no word."""

OWN_ARGUMENTS = frozenset(
    {"conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"}
    | {"continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length"}
    | {"return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "conversations"}
)
"""Arguments of transformers itself, which a request's `chat_template_kwargs` may not set."""

LOADING = ("name_or_path", "is_local", "local_files_only", "backend")
"""Arguments with which transformers has loaded the tokenizer, and which say nothing of it."""

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""The name that SentencePiece gives to a token of one byte."""


class Tokenizer:
    """A transformers tokenizer that several threads may use at a time."""

    def __init__(self, inner: Any, *, chat_template: str | None = None) -> None:
        self._inner = inner
        self._chat_template = chat_template
        # The Rust tokenizer alone is several times faster than the methods around it. Without truncation and padding
        # it has no state, so that threads can share it.
        self._backend = getattr(inner, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self._lock = Lock()
        self._max_token_chars = max((len(token) for token in inner.get_vocab()), default=1)
        self.token_bytes = lru_cache(maxsize=65536)(self._token_bytes)
        self.token_name = lru_cache(maxsize=65536)(self._token_name)
        self._pieces = lru_cache(maxsize=2)(self._new_pieces)

    @classmethod
    def load(cls, model_dir: str, chat_template_path: str | None = None) -> Tokenizer:
        """Load it. Raises CheckpointError where the directory has no tokenizer that works without code of its own."""
        with no_collection():
            from transformers import AutoTokenizer

        template = None
        if chat_template_path is not None:
            try:
                template = Path(chat_template_path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"chat_template: {chat_template_path}: {why(error)}") from None
        if not any(next(Path(model_dir).glob(pattern), None) for pattern in FILES):
            raise CheckpointError(f"{model_dir}: there is no tokenizer; expected a file such as tokenizer.json")
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

    def detokenizer(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool
    ) -> Detokenizer | ByteDetokenizer:
        pieces = self._pieces(skip_special_tokens)
        if pieces is None or pieces.ends_within_a_character(prompt_token_ids):
            return Detokenizer(self._decoder(skip_special_tokens), prompt_token_ids)
        return ByteDetokenizer(pieces)

    def to_json(self) -> str | None:
        """The whole tokenizer in the form of tokenizer.json; None where it needs transformers' own code."""
        return None if self._backend is None else str(self._backend.to_str())

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the text's length in tokens, which costs nothing, to refuse texts that are far too long."""
        return len(text) // self._max_token_chars

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt that the chat template makes of `messages`, and of `tools` in OpenAI's form.

        Raises RequestError where it refuses them.
        """
        if not self.has_chat_template:
            raise RequestError(
                "this model has no chat template; use /v1/completions, or start the server with --chat-template",
                param="messages",
                code="no_chat_template",
            )
        for name in sorted(OWN_ARGUMENTS & set(template_kwargs or ())):
            raise RequestError(
                f"chat_template_kwargs: {name} cannot be set here: it is not one of the template's variables",
                param="chat_template_kwargs",
                code="invalid_value",
            )
        prepared = conversation(messages, self.template_forms)
        try:
            return self.render(
                prepared,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **({"tools": [dict(tool) for tool in tools]} if tools else {}),
                **(template_kwargs or {}),
            )
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - templates raise what they like: jinja's errors, TypeError, ...
            message = f"messages: the chat template refuses them: {_one_line(error)}"
            raise RequestError(message, param="messages") from None

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat_template or self._inner.chat_template)

    @cached_property
    def template_source(self) -> str:
        """The chat template; empty where there is none."""
        try:
            return str(self._inner.get_chat_template(self._chat_template))
        except ValueError:  # there is none, or there are several, and none is the default
            return ""

    @property
    def all_templates(self) -> str:
        """The text of all chat templates, if there are several, such as one for tools."""
        several = self._inner.chat_template if self._chat_template is None else None
        return "\n".join(map(str, several.values())) if isinstance(several, dict) else self.template_source

    @property
    def response_template(self) -> Mapping[str, Any] | None:
        """The form of answers that the tokenizer's files declare, as transformers has it."""
        template = getattr(self._inner, "response_template", None)
        return template if isinstance(template, dict) else None

    @cached_property
    def special_tokens(self) -> Mapping[int, str]:
        """The special tokens, which are not shown, with their texts."""
        added = getattr(self._inner, "added_tokens_decoder", {})
        return {int(token_id): str(token) for token_id, token in added.items() if token.special}

    @cached_property
    def template_forms(self) -> TemplateForms:
        """The forms of messages that the chat template takes. The first use renders some short conversations."""
        return template_forms(self.template_source, self.render, self.all_templates)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **how: Any) -> str:
        """The text that the chat template makes of exactly these messages. Raises whatever the template raises."""
        return str(
            self._inner.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **how,
            )
        )

    def info(self) -> dict[str, Any]:
        """The tokenizer's settings, as vLLM's /tokenizer_info has them: what is JSON in tokenizer_config.json, the
        special tokens, and the chat template in force."""
        settings = {
            name: str(value) if type(value).__name__ == "AddedToken" else value
            for name, value in self._inner.init_kwargs.items()
            if not name.endswith("_file") and name not in LOADING
        }
        tokens = {f"{name}_token": getattr(self._inner, f"{name}_token", None) for name in ("bos", "eos", "pad", "unk")}
        known = {name: value for name, value in settings.items() if _is_json(value)}
        return known | {
            **tokens,
            "tokenizer_class": type(self._inner).__name__,
            "chat_template": self._chat_template or self._inner.chat_template,
        }

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence token of the tokenizer itself, if it has one."""
        token, token_id = self._inner.eos_token, self._inner.eos_token_id
        # for an end token that the vocabulary lacks, transformers returns the token for unknown words
        known = token is not None and token_id is not None and self.token_string(token_id) == token
        return (int(token_id),) if known else ()

    def token_string(self, token_id: int) -> str:
        """The token in the notation of the vocabulary."""
        token = self._inner.convert_ids_to_tokens(token_id)
        return "" if token is None else str(token)

    def id_of_piece(self, piece: str) -> int | None:
        """The id of the token that the vocabulary writes as `piece`, if there is one."""
        token_id = self._inner.convert_tokens_to_ids(piece)
        # for an unknown piece, transformers returns the token for unknown words
        return int(token_id) if token_id is not None and self.token_string(token_id) == piece else None

    def _decoder(self, skip_special_tokens: bool) -> Callable[[Sequence[int]], str]:
        if self._backend is not None:
            # this runs for every token, so nothing is between it and the Rust code
            return partial(self._backend.decode, skip_special_tokens=skip_special_tokens)
        return partial(self.decode, skip_special_tokens=skip_special_tokens)

    def _new_pieces(self, skip_special_tokens: bool) -> Pieces | None:
        """The texts of tokens, where a text is its tokens' bytes in a row; None for other vocabularies."""
        backend = self._backend
        if backend is None or type(backend.decoder).__name__ != "ByteLevel":
            return None
        added = backend.get_added_tokens_decoder()
        skipped = {token_id for token_id, token in added.items() if token.special} if skip_special_tokens else set()

        def raw(token_id: int) -> bytes:
            token = None if token_id in skipped else backend.id_to_token(token_id)
            return b"" if token is None else _byte_level(token)

        return Pieces(raw)

    def _token_bytes(self, token_id: int) -> bytes:
        text = self._text_inside(token_id)
        if REPLACEMENT not in text:
            return text.encode("utf-8", errors="replace")
        return _bytes_of_token(self.token_string(token_id)) or text.encode()

    def _text_inside(self, token_id: int) -> str:
        """The token's text after another token: at the beginning of a text, some decoders remove its space."""
        before, context = self._context
        text = self.decode([*before, token_id])
        return text[len(context) :] if text.startswith(context) else self.decode([token_id])

    @cached_property
    def _context(self) -> tuple[list[int], str]:
        """The id and the text of a token that is one plain letter; empty where the vocabulary has none."""
        before = self.encode("a", add_special_tokens=False)[-1:]
        text = self.decode(before)
        return (before, text) if text.strip() == "a" else ([], "")

    def _token_name(self, token_id: int) -> str:
        """The token's name for a reader.

        It is the token's text; or its bytes, as OpenAI writes them, where the token is a part of a character or another
        token has the same text; or its id where the vocabulary does not have it.
        """
        piece, raw = self.token_string(token_id), self.token_bytes(token_id)
        if not piece:
            return id_name(token_id)
        if not raw:
            return piece
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            return bytes_name(raw)
        return bytes_name(raw) if _BYTE_PIECE.fullmatch(piece) and piece != text and self._knows(text) else text

    def _knows(self, text: str) -> bool:
        """Whether the vocabulary has a token with this text."""
        return any(self.id_of_piece(form) is not None for form in (text, text.replace(" ", "\u2581")))


def without_torch() -> None:
    """Make transformers work without torch in this process, for good. Call this only in processes without a model.

    Tokenizers never need torch, and its import takes a second and 180 MB.
    """
    from transformers import utils
    from transformers.utils import import_utils

    for module in (utils, import_utils):
        vars(module)["is_torch_available"] = lambda: False


def _is_json(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | int | float | bool)


def id_name(token_id: int) -> str:
    """vLLM's name for a token where a client asks for ids instead of texts."""
    return f"token_id:{token_id}"


def bytes_name(raw: bytes) -> str:
    """OpenAI's name for a token that is no text by itself, made of its bytes."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _bytes_of_token(token: str) -> bytes | None:
    """The bytes of a token that is no text by itself. Vocabularies write them in one of two notations."""
    if match := _BYTE_PIECE.fullmatch(token):
        return bytes.fromhex(match[1])
    return _in_alphabet(token)


def _byte_level(token: str) -> bytes:
    """The bytes of a token as the ByteLevel decoder has them: added tokens stand for themselves."""
    raw = _in_alphabet(token)
    return token.encode() if raw is None else raw


def _in_alphabet(token: str) -> bytes | None:
    table = _byte_of_char()
    return bytes(table[char] for char in token) if all(char in table for char in token) else None


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are written as themselves, the others as characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
