"""Makes text of token ids, one token at a time, and looks for stop strings.

Pure: it gets a `decode` function, and knows neither tokenizer nor engine. Each token is processed by itself, so the
text does not depend on how the engine cuts its output into chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

REPLACEMENT = "\ufffd"
"""The character that decoders write for bytes that are not UTF-8, or not yet complete."""

PROMPT_TAILS = (5, 6, 7, 8, 4, 3, 2, 1)
"""Numbers of prompt tokens to decode with the first token, which then keeps its leading space; best ones first."""

MAX_PENDING = 8
"""Number of tokens without a finished character after which their bytes count as no text."""

MAX_WINDOW = 12
"""Number of tokens that are decoded again with each new token; above it, older ones are dropped."""

MAX_KEPT = 4
"""Most tokens before the newest text that are kept so that the window decodes to a text by itself."""

HARD_WINDOW = 3 * MAX_WINDOW
"""Number of tokens above which older ones are dropped in any case, so that the time per token has a bound."""


class Detokenizer:
    """Turns a sequence of tokens into text. It never returns a character that a later token may still change.

    It decodes a short window of tokens; what was not in the text before is the new text. Decoding each token by itself
    would be wrong: a character may be spread over several tokens, and decoders treat the first token differently. To
    drop the window's older tokens costs a second decoding, so that is done only now and then.
    While the text ends with U+FFFD, a character may be unfinished, and no text is returned.
    """

    def __init__(self, decode: Decode, prompt_token_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = self._tail(prompt_token_ids)
        self._context = len(self._window)
        """Number of tokens at the window's start whose text was returned; later tokens are decoded with them."""
        self._given = len(decode(self._window))
        """Number of characters of the window's text that were returned."""

    def push(self, token_id: int) -> str:
        """The text that this token has made certain; often a word, sometimes nothing."""
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
        """The rest of the text after the last token: an unfinished character, as U+FFFD."""
        new = self._decode(self._window)[self._given :]
        self._given += len(new)
        return new

    def _tail(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of the prompt. They must not begin within a character: some decoders would then find no text
        in the tokens after them either."""
        for size in PROMPT_TAILS:
            tail = list(prompt[-size:])
            if REPLACEMENT not in self._decode(tail):
                return tail
        return list(prompt[-PROMPT_TAILS[0] :])

    def _let_go(self, new: str) -> None:
        """Drop all tokens but those of the newest text, or a few more.

        The kept tokens must decode to some text by themselves. Otherwise the next word might lose its space, as it does
        after a single space token. A token without a text, such as a skipped special token, is dropped instead.
        """
        newest = len(self._window) - self._context
        for size in range(newest, min(newest + MAX_KEPT, len(self._window))):
            text = self._decode(self._window[-size:])
            # tokens that begin within a character may decode to U+FFFD throughout, whatever comes after them
            if text and REPLACEMENT not in text:
                self._window, self._given = self._window[-size:], len(text)
                return
            if not new:
                self._window.pop()
                return
        self._cut()

    def _give_up(self, text: str) -> str:
        """Return bytes that do not become text, except for the last tokens: a character may begin there."""
        for start in range(len(self._window) - 1, self._context, -1):
            left = self._decode(self._window[:start])
            if left + self._decode(self._window[start:]) == text:
                new, self._given = left[self._given :], 0
                self._window, self._context = self._window[start:], 0
                return new
        # no character ends at the end of a token, so all characters but the last one are certain
        certain = text.rstrip(REPLACEMENT)
        certain = certain if len(certain) > self._given else text
        new, self._given = certain[self._given :], len(certain)
        self._context = len(self._window) - 1
        self._cut(unfinished=len(text) - len(certain))
        return new

    def _cut(self, *, unfinished: int = 0) -> None:
        """Keep only the last tokens, whatever their text. The last `unfinished` characters were not returned yet."""
        if len(self._window) > HARD_WINDOW:
            self._window = self._window[-MAX_WINDOW:]
            self._given = len(self._decode(self._window)) - unfinished
            self._context = len(self._window) - 1


class StopStrings:
    """Looks for stop strings in a text that comes in pieces, and holds back an end that may begin a stop string.

    The stop string that is complete first wins; of several that end at the same character, the longest.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._include = include
        self._held = ""
        self.found: str | None = None

    @property
    def looks(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self._stops)

    def push(self, text: str) -> str:
        """The text that can be shown now. Once `found` is set, the text has ended."""
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
        """Length of the longest end of `text` that is the beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(text), len(stop) - 1), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
