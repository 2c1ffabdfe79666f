"""Reads JSON that comes in pieces: where a value ends, and the name and arguments of a call in an object."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

_TELLING = re.compile(r'["\\{}\[\]]')
"""The characters that say where an object or a list ends."""
_QUOTE = re.compile(r'["\\]')
_AFTER_PLAIN = re.compile(r"[\s,}\]]")


class JsonSpan:
    """Finds the end of one JSON value. It does not check that the value is JSON: brackets and strings must end."""

    def __init__(self) -> None:
        self.begun = False
        self.done = False
        self.bracketed = False
        """Whether the value is an object or a list."""
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._plain = False

    def feed(self, text: str) -> int:
        """The number of characters of `text` that belong to the value, or come before it as white space."""
        at = 0
        if not self.begun:
            at = len(text) - len(text.lstrip())
            if at == len(text):
                return at
            self.begun = True
            self.bracketed = text[at] in "{["
            self._plain = not self.bracketed and text[at] != '"'
        if self.done:
            return 0
        if self._plain:
            return self._plain_end(text, at)
        return self._bracket_end(text, at)

    @property
    def finished(self) -> bool:
        """Whether the value has ended, or may end here, as a number may."""
        return self.done or (self.begun and self._plain)

    def _plain_end(self, text: str, at: int) -> int:
        if (end := _AFTER_PLAIN.search(text, at)) is None:
            return len(text)
        self.done = True
        return end.start()

    def _bracket_end(self, text: str, at: int) -> int:
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            match = (_QUOTE if self._in_string else _TELLING).search(text, at)
            if match is None:
                break
            at = match.end()
            self._see(match.group())
            if self._depth == 0 and not self._in_string:
                self.done = True
                return at
        return len(text)

    def _see(self, char: str) -> None:
        if char == '"':
            self._in_string = not self._in_string
        elif char == "\\":
            self._escaped = self._in_string
        elif char in "{[":
            self._depth += 1
        else:
            self._depth -= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NameFound:
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentsText:
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDone:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class NotACall:
    """The text is no call object: nothing more comes of it."""


EnvelopeEvent: TypeAlias = NameFound | ArgumentsText | CallDone | NotACall


class _At(Enum):
    BEFORE = auto()
    """Before an object: of the first one, or of the next one of several."""
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    AFTER_VALUE = auto()
    BROKEN = auto()


class EnvelopeReader:
    """Reads {"name": ..., "arguments": {...}}, or several of them: in a list, or with , or ; or nothing between.

    The arguments are passed on as they are written. Where they come before the name, they wait for it.
    """

    def __init__(self, name_key: str, arguments_key: str) -> None:
        self._name_key, self._arguments_key = name_key, arguments_key
        self._where = _At.BEFORE
        self._reset()

    def _reset(self) -> None:
        self.name: str | None = None
        self._waiting: list[str] = []
        """Arguments that came before the name."""
        self._has_arguments = False
        self._key = ""
        self._span = JsonSpan()
        self._value: list[str] = []
        """The text of the value, where it is needed as a whole."""

    def feed(self, text: str) -> Iterator[EnvelopeEvent]:
        at = 0
        while at < len(text) and self._where is not _At.BROKEN:
            if self._where in (_At.KEY, _At.VALUE) and (self._span.begun or not text[at].isspace()):
                used = self._span.feed(text[at:])
                yield from self._take(text[at : at + used])
                at += used
                if self._span.done:
                    yield from self._ended()
                continue
            char = text[at]
            at += 1
            if not char.isspace():
                yield from self._step(char)

    def _step(self, char: str) -> Iterator[EnvelopeEvent]:
        if self._where is _At.BEFORE and char == "{":
            self._reset()
            self._where = _At.KEY
        elif self._where is _At.BEFORE and char in "[],;":
            return
        elif self._where is _At.COLON and char == ":":
            self._where = _At.VALUE
            self._span, self._value = JsonSpan(), []
        elif self._where is _At.AFTER_VALUE and char == ",":
            self._where = _At.KEY
            self._span, self._value = JsonSpan(), []
        elif self._where is _At.AFTER_VALUE and char == "}":
            yield from self._closed()
        else:
            yield from self._broken()

    def _broken(self) -> Iterator[EnvelopeEvent]:
        self._where = _At.BROKEN
        yield NotACall()

    def _closed(self) -> Iterator[EnvelopeEvent]:
        if self.name is None:
            yield from self._broken()
            return
        if not self._has_arguments:
            yield ArgumentsText(text="{}")
        self._where = _At.BEFORE
        yield CallDone()

    def _take(self, text: str) -> Iterator[EnvelopeEvent]:
        """More text of a key or of a value."""
        if self._streams:
            text = text if self._has_arguments else text.lstrip()
            if text:
                self._has_arguments = True
                yield ArgumentsText(text=text)
        else:
            self._value.append(text)

    @property
    def _streams(self) -> bool:
        """Whether the value is passed on as it comes: an object of arguments, after the name."""
        return (
            self._where is _At.VALUE
            and self._key == self._arguments_key
            and self.name is not None
            and self._span.bracketed
        )

    def _ended(self) -> Iterator[EnvelopeEvent]:
        """A key or a value has ended."""
        whole = "".join(self._value)
        if self._where is _At.KEY:
            key = _string(whole)
            if key is None:
                yield from self._broken()
                return
            self._key, self._where = key, _At.COLON
            return
        self._where = _At.AFTER_VALUE
        if self._key == self._name_key and self.name is None:
            self.name = _string(whole)
            if not self.name:
                yield from self._broken()
                return
            yield NameFound(name=self.name)
            if self._waiting:
                self._has_arguments = True
                yield ArgumentsText(text="".join(self._waiting))
        elif self._key == self._arguments_key and self._value:
            arguments = _arguments(whole)
            if self.name is None:
                self._waiting.append(arguments)
            else:
                self._has_arguments = True
                yield ArgumentsText(text=arguments)


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _arguments(text: str) -> str:
    """The arguments as an object's text, where they are written as a string of JSON, or as null."""
    text = text.strip()
    if text == "null":
        return "{}"
    return (_string(text) or "{}") if text.startswith('"') else text
