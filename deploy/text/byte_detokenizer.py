"""Text of tokens that are bytes, as most vocabularies have them (tokenizers' ByteLevel decoder).

There the text of several tokens is the text of their bytes in a row, so that a token need not be decoded together with
those before it: a table has the text of each, and only characters that are spread over tokens are put together. That
takes 0.3 us a token, where `Detokenizer` takes 10. Texts are the same.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from elastic_moe.deploy.text.detokenizer import REPLACEMENT

_incremental = codecs.getincrementaldecoder("utf-8")

LONGEST_CHARACTER = 4
"""Bytes. A token has at least one, so no more tokens of a prompt can belong to a character that is not finished."""


class Pieces(dict[int, str | bytes]):
    """The text of each token; its bytes where they are no text by themselves. Filled as tokens come."""

    def __init__(self, raw: Callable[[int], bytes]) -> None:
        """`raw` gives the bytes of a token; none for one that is not shown."""
        super().__init__()
        self._raw = raw

    def __missing__(self, token_id: int) -> str | bytes:
        raw = self._raw(token_id)
        try:
            piece: str | bytes = raw.decode()
        except UnicodeDecodeError:
            piece = raw
        self[token_id] = piece
        return piece

    def ends_within_a_character(self, token_ids: Sequence[int]) -> bool:
        """Whether the next token may finish a character that these tokens have begun."""
        decoder = _incremental("replace")
        for token_id in token_ids[-LONGEST_CHARACTER:]:
            decoder.decode(_bytes(self[token_id]))
        return bool(decoder.getstate()[0])


class ByteDetokenizer:
    """As `Detokenizer`: it never returns a character that a later token may still change."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._decoder = _incremental("replace")
        self._unfinished = False
        """Whether the newest bytes are the beginning of a character."""

    def push(self, token_id: int) -> str:
        """The text that this token has made certain; often a word, sometimes nothing."""
        piece = self._pieces[token_id]
        if not self._unfinished and isinstance(piece, str):
            return piece
        text = self._decoder.decode(_bytes(piece))
        self._unfinished = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """The rest of the text after the last token: an unfinished character, as U+FFFD."""
        unfinished, self._unfinished = self._unfinished, False
        self._decoder.reset()
        return REPLACEMENT if unfinished else ""


def _bytes(piece: str | bytes) -> bytes:
    return piece.encode() if isinstance(piece, str) else piece
