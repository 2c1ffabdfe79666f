"""Makes deltas of tool calls while the model writes them, for each way in which a response template writes them.

NamedCall      the marker has the name, and the region holds the arguments as JSON   (DeepSeek, Kimi, gpt-oss)
EnvelopeCall   the region holds {"name": ..., "arguments": {...}}, or a list of them (Qwen, Mistral, Llama)
TaggedCall     the marker has the name, and the region one tag for each argument     (GLM, MiniMax, Qwen3-Coder)
WholeCall      anything else: transformers reads the region when it is complete
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Protocol

from elastic_moe.deploy.parsing.events import CallArguments, CallBegin, CallEnd, Event
from elastic_moe.deploy.parsing.json_reader import ArgumentsText, CallDone, EnvelopeReader, JsonSpan, NameFound

Cast = Callable[[str, str, str], Any]
"""The value of an argument, by the names of its tool and of itself and by its text."""


class CallLog:
    """Numbers the calls of one answer, and drops those that are too many."""

    def __init__(self, new_id: Callable[[], str], max_calls: int | None = None) -> None:
        self._new_id = new_id
        self._max_calls = max_calls
        self.count = 0
        """Number of calls that have begun."""
        self.open = False
        self._dropped = False
        """Whether the call that is being read is one too many."""
        self.incomplete = False
        """Whether some call was not finished."""

    @property
    def full(self) -> bool:
        """Whether no more calls are taken, and the last one has ended."""
        return self._max_calls is not None and self.count >= self._max_calls and not self.open

    def begin(self, name: str, call_id: str | None = None) -> list[Event]:
        self._dropped = self.full
        if self._dropped:
            return []
        self.open = True
        self.count += 1
        return [CallBegin(index=self.count - 1, call_id=call_id or self._new_id(), name=name)]

    def arguments(self, text: str) -> list[Event]:
        return [CallArguments(index=self.count - 1, text=text)] if text and not self._dropped else []

    def end(self, *, complete: bool) -> list[Event]:
        if self._dropped or not self.open:
            return []
        self.open = False
        self.incomplete |= not complete
        return [CallEnd(index=self.count - 1, complete=complete)]


class CallReader(Protocol):
    """Reads one region of calls."""

    @property
    def certain(self) -> bool:
        """Whether the region is a call for certain."""
        ...

    def feed(self, text: str) -> list[Event]: ...

    def close(self, *, marked: bool) -> list[Event] | None:
        """The last events; `marked` says that the region's end marker came. None: the region was no call, and its text
        is to be shown as it came."""
        ...


class NamedCall:
    certain = True

    def __init__(self, log: CallLog, name: str, call_id: str | None) -> None:
        self._log = log
        self._span = JsonSpan()
        self._spaces: list[str] = []
        """White space that belongs to the arguments only if more of them comes."""
        self._begin = log.begin(name, call_id)

    def feed(self, text: str) -> list[Event]:
        events, self._begin = self._begin, []
        if not self._span.begun:
            text = text.lstrip()
        used = self._span.feed(text)
        # what follows an object is none of its arguments, such as the marker of an answer that is cut off
        text = text[:used] if self._span.bracketed else text
        kept = text.rstrip()
        if kept:
            events += self._log.arguments("".join(self._spaces) + kept)
            self._spaces = []
        if len(kept) < len(text):
            self._spaces.append(text[len(kept) :])
        return events

    def close(self, *, marked: bool) -> list[Event]:
        events, self._begin = self._begin, []
        if not self._span.begun and marked:
            events += self._log.arguments("{}")
        return events + self._log.end(complete=marked or self._span.done)


class EnvelopeCall:
    def __init__(self, log: CallLog, name_key: str, arguments_key: str) -> None:
        self._log = log
        self._reader = EnvelopeReader(name_key, arguments_key)
        self.certain = False
        self._open = False

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        for seen in self._reader.feed(text):
            if isinstance(seen, NameFound):
                self.certain = self._open = True
                events += self._log.begin(seen.name)
            elif isinstance(seen, ArgumentsText):
                events += self._log.arguments(seen.text)
            elif self._open:
                self._open = False
                events += self._log.end(complete=isinstance(seen, CallDone))
        return events

    def close(self, *, marked: bool) -> list[Event] | None:
        if not self.certain:
            return None
        return self._log.end(complete=False) if self._open else []


class TaggedCall:
    """Each argument is passed on when its tag is complete, since its type depends on the tool's schema."""

    certain = True

    def __init__(self, log: CallLog, name: str, call_id: str | None, tags: Tags) -> None:
        self._log = log
        self._tags = tags
        self._name = name
        self._parts: list[str] = []
        self._tail = ""
        """The end of the text, in which the end of a tag may begin."""
        self._arguments = 0
        self._begin = log.begin(name, call_id)

    def feed(self, text: str) -> list[Event]:
        events, self._begin = self._begin, []
        end = self._tags.end
        self._parts.append(text)
        recent = self._tail + text
        self._tail = recent[-len(end) + 1 :]
        # a search through all of a long argument is worth its time only where its end has come
        if end not in recent:
            return events
        text, at = "".join(self._parts), 0
        for match in self._tags.pattern.finditer(text):
            at = match.end()
            value = self._tags.cast(self._name, match["key"], match["value"])
            events += self._log.arguments(("{" if self._arguments == 0 else ", ") + _pair(match["key"], value))
            self._arguments += 1
        # an end without a beginning belongs to nothing
        self._parts = [text[max(at, text.rfind(end) + len(end)) :]]
        return events

    def close(self, *, marked: bool) -> list[Event]:
        events, self._begin = self._begin, []
        if marked:
            events += self._log.arguments("}" if self._arguments else "{}")
        return events + self._log.end(complete=marked)


class WholeCall:
    certain = False

    def __init__(self, log: CallLog, read: Callable[[str], Any]) -> None:
        """`read` makes one call or a list of calls of the region's text, in OpenAI's form. It may raise anything."""
        self._log = log
        self._read = read
        self._text: list[str] = []

    def feed(self, text: str) -> list[Event]:
        self._text.append(text)
        return []

    def close(self, *, marked: bool) -> list[Event] | None:
        try:
            read = self._read("".join(self._text))
            calls = [_call(value) for value in (read if isinstance(read, list) else [read])]
        except Exception:  # noqa: BLE001 - a checkpoint's own template may fail in any way on what a model writes
            return None
        events: list[Event] = []
        for name, call_id, arguments in calls:
            events += self._log.begin(name, call_id)
            events += self._log.arguments(arguments)
            events += self._log.end(complete=True)
        return events


class Tags:
    """How a family writes arguments as tags, and what the tools' schemas say about their types."""

    def __init__(self, pattern: str, end: str, cast: Cast) -> None:
        """`pattern` has the groups key and value, and ends with the literal `end`."""
        self.pattern = re.compile(pattern, re.DOTALL)
        self.end = end
        self.cast = cast


def _pair(key: str, value: Any) -> str:
    return f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}"


def _call(value: Any) -> tuple[str, str | None, str]:
    """Name, id and arguments of a call in OpenAI's form. Raises whatever indexing raises where it is none."""
    function = value["function"]
    name, arguments = function["name"], function.get("arguments")
    if not isinstance(name, str) or not name:
        raise ValueError("a call without a name")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False, allow_nan=False)
    return name, value.get("id"), arguments
