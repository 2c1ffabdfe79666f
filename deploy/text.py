"""From token ids to text, one token at a time: incremental detokenising and stop strings.

Pure: it knows a `decode` function, no tokenizer, no engine. Every token is taken by itself, so the text is the same
however the engine cut its output into chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

REPLACEMENT = "\ufffd"
"""What decoders put in place of bytes that are no UTF-8, or not yet."""

PROMPT_TAIL = 5
"""Prompt tokens that are decoded along, so that the first output token keeps its leading space."""

MAX_WINDOW = 48
"""Tokens after which an unfinished character is taken for what it is: bytes that are no text."""


class Detokenizer:
    """Turns a sequence of tokens into text, never handing out a character that a later token may still change.

    It decodes a short window twice, without and with the new token: the difference is the new text. Decoding tokens
    one by one would be wrong: a character may be spread over tokens, and decoders treat the first token apart.
    """

    def __init__(self, decode: Decode, prompt_token_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt_token_ids[-PROMPT_TAIL:])
        self._known = len(self._window)
        """Tokens at the window's start whose text has been handed out in full."""
        # A prompt may end within a character; the part that completes it belongs to the answer.
        self._given = len(_settled(decode(self._window))) if self._window else 0
        """Characters of the window's text that have been handed out."""

    def push(self, token_id: int) -> str:
        """The text that has become certain by this token; often a word, sometimes nothing."""
        self._window.append(token_id)
        text = self._decode(self._window)
        settled = text if len(self._window) > MAX_WINDOW else _settled(text)
        new = settled[self._given :]
        self._given = max(self._given, len(settled))
        if len(settled) == len(text) and text:
            self._advance()
        return new

    def flush(self) -> str:
        """What is left when no more token comes: a character that was never finished, as U+FFFD."""
        new = self._decode(self._window)[self._given :]
        self._given += len(new)
        return new

    def _advance(self) -> None:
        # The tokens that were new last time stay in the window, as context for the next ones.
        self._window = self._window[self._known :]
        self._known = len(self._window)
        self._given = len(self._decode(self._window))


def _settled(text: str) -> str:
    # Only the last character can be the beginning of one that is not complete yet.
    return text[:-1] if text.endswith(REPLACEMENT) else text


class StopStrings:
    """Looks for stop strings in a text that comes in pieces, and holds back what may turn out to be a part of one.

    The stop string that is complete first wins; of several that end at the same character, the longest.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Text that can be shown now. Once `found` is set, the text has ended."""
        if not self._stops or self.found is not None:
            return "" if self.found is not None else text
        text = self._held + text
        matches = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if matches:
            end, _, self.found = min(matches)
            self._held = ""
            return text[: end if self._include else end - len(self.found)]
        keep = self._longest_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text held back, when the text ends for another reason."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for size in range(longest, 0, -1):
            end = text[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0
