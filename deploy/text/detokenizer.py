"""From token ids to text, one token at a time: incremental detokenising and stop strings.

Pure: it knows a `decode` function, no tokenizer, no engine. Every token is taken by itself, so the text is the same
however the engine cut its output into chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

REPLACEMENT = "\ufffd"
"""What decoders put in place of bytes that are no UTF-8, or not yet."""

PROMPT_TAILS = (5, 6, 7, 8, 4, 3, 2, 1)
"""How many prompt tokens to decode along, in order of preference, so that the first token keeps its leading space."""

MAX_PENDING = 8
"""Tokens without a finished character after which they are taken for what they are: bytes that are no text."""

MAX_WINDOW = 12
"""Tokens that are decoded anew with each one that comes, before the older ones are let go."""

MAX_KEPT = 4
"""Tokens before the newest text that may have to be kept, for it to have a text by itself."""

HARD_WINDOW = 3 * MAX_WINDOW
"""Tokens beyond which older ones are let go in any case, so that the time per token has a bound."""


class Detokenizer:
    """Turns a sequence of tokens into text, never handing out a character that a later token may still change.

    It decodes a short window of tokens: what is longer than at the last time is the new text. Decoding tokens one by
    one would be wrong: a character may be spread over tokens, and decoders treat the first token apart. To let go of
    the window's older tokens costs a second decoding, so that is done now and then.
    While the text ends with U+FFFD, a character may be unfinished, and nothing is handed out.
    """

    def __init__(self, decode: Decode, prompt_token_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = self._tail(prompt_token_ids)
        self._context = len(self._window)
        """Tokens at the window's start that are only there for the sake of those after them: their text is out."""
        self._given = len(decode(self._window))
        """Characters of the window's text that have been handed out."""

    def push(self, token_id: int) -> str:
        """The text that has become certain by this token; often a word, sometimes nothing."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):
            return self._give_up(text) if len(self._window) - self._context > MAX_PENDING else ""
        new, self._given = text[self._given :], len(text)
        if len(self._window) > MAX_WINDOW:
            self._let_go(new)
        self._context = len(self._window)
        return new

    def flush(self) -> str:
        """What is left when no more token comes: a character that was never finished, as U+FFFD."""
        new = self._decode(self._window)[self._given :]
        self._given += len(new)
        return new

    def _tail(self, prompt: Sequence[int]) -> list[int]:
        """The end of the prompt. It must not begin within a character: some decoders then see no text in what follows
        either."""
        for size in PROMPT_TAILS:
            tail = list(prompt[-size:])
            if REPLACEMENT not in self._decode(tail):
                return tail
        return list(prompt[-PROMPT_TAILS[0] :])

    def _let_go(self, new: str) -> None:
        """Of all but the tokens of the newest text, or a few more. They must have a text by themselves, or the next
        word might lose its space, as it does behind a lone space token; a token that has none and adds none, such as a
        special one that is skipped, is let go instead."""
        newest = len(self._window) - self._context
        for size in range(newest, min(newest + MAX_KEPT, len(self._window))):
            if text := self._decode(self._window[-size:]):
                self._window, self._given = self._window[-size:], len(text)
                return
            if not new:
                self._window.pop()
                return
        self._cut()

    def _give_up(self, text: str) -> str:
        """Hand out what does not become text, but for the last tokens: a character may begin there."""
        for start in range(len(self._window) - 1, self._context, -1):
            left = self._decode(self._window[:start])
            if left + self._decode(self._window[start:]) == text:
                new, self._given = left[self._given :], 0
                self._window, self._context = self._window[start:], 0
                return new
        # where no character ends with a token, all but the last one are certain
        certain = text.rstrip(REPLACEMENT)
        certain = certain if len(certain) > self._given else text
        new, self._given = certain[self._given :], len(certain)
        self._context = len(self._window) - 1
        self._cut(unfinished=len(text) - len(certain))
        return new

    def _cut(self, *, unfinished: int = 0) -> None:
        """Keep the last tokens only, whatever their text, of which the last characters are not handed out yet."""
        if len(self._window) > HARD_WINDOW:
            self._window = self._window[-MAX_WINDOW:]
            self._given = len(self._decode(self._window)) - unfinished
            self._context = len(self._window) - 1


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
        longest = 0
        for stop in self._stops:
            for size in range(min(len(text), len(stop) - 1), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
