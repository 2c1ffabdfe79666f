"""The parser of one answer: pieces of text go in, and events come out.

    parser = AnswerParser(form, begun=begun_answer(form, prompt), tools=tools)
    for text in pieces:
        for event in parser.push(text): ...
    for event in parser.end(): ...

White space beside a marker is not shown: it belongs to the marker. Between two parts of the content there is a newline.
"""

from __future__ import annotations

import secrets
import string
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from elastic_moe.deploy.parsing.calls import CallLog, CallReader
from elastic_moe.deploy.parsing.events import Event, TextKind, TextPiece
from elastic_moe.deploy.parsing.formats import CALLS, CONTENT, REASONING_FIELDS, AnswerForm
from elastic_moe.deploy.parsing.readers import reader_of
from elastic_moe.deploy.parsing.regions import RegionBegin, RegionEnd, RegionEvent, Regions, RegionText

SEARCH_S = 0.05
"""Seconds of a search for a marker, where the pattern comes with the checkpoint."""


class AnswerParser:
    def __init__(
        self,
        form: AnswerForm,
        *,
        begun: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        max_calls: int | None = None,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        """`begun` is the beginning of the answer that the chat template has written already, if it has.

        Calls are looked for only where there are `tools`, in OpenAI's form. After `max_calls` of them the answer has
        `finished`.
        """
        template = form.template(tools=bool(tools))
        assert template is not None, "a form without markers needs no parser"
        self._template = template
        self._tools = tools
        self._regions = Regions(template, timeout_s=None if form.own is None else SEARCH_S)
        self._log = CallLog(new_id or id_maker(form), max_calls)
        self._content = _Shown()
        self._reasoning = _Shown(trim=True)
        self._reader: CallReader | None = None
        self._raw: list[str] = []
        """The text of a region that may turn out to be no call."""
        self._opening = _Opening("")
        self._begin(form, begun)

    @property
    def in_reasoning(self) -> bool:
        return self._regions.current in REASONING_FIELDS

    @property
    def holds_back(self) -> bool:
        """Whether the end of the text may be the beginning of a marker."""
        return self._regions.holds_back

    @property
    def finished(self) -> bool:
        """Whether all calls were made that may be. What the model writes after them is not looked at."""
        return self._log.full

    @property
    def called(self) -> bool:
        """Whether there are calls, and the model has finished each of them."""
        return self._log.count > 0 and not self._log.open and not self._log.incomplete

    def push(self, text: str) -> list[Event]:
        return self._read(self._regions.feed(self._opening.push(text)))

    def end(self) -> list[Event]:
        """The events of what was held back. The text ends here."""
        events = self._read(self._regions.feed(self._opening.flush(), last=True))
        if self._reader is not None and not self.finished:
            events += self._close_call(marker="", marked=False)
        return events + _pieces(TextKind.CONTENT, "" if self.finished else self._content.flush())

    def _begin(self, form: AnswerForm, begun: str) -> None:
        """Read what is in the prompt already; nothing of it is an event."""
        self._read(self._regions.feed(begun))
        self._read(self._regions.settle())
        self._reader = None
        self._content.forget()
        self._reasoning.forget()
        name = next((name for name in self._template.fields if name in REASONING_FIELDS), None)
        if form.opens and name is not None and not self.in_reasoning:
            opener = (self._template.fields[name].open_literals or [""])[0]
            self._read(self._regions.feed(opener))
            self._opening = _Opening(opener)

    def _read(self, found: Iterable[RegionEvent]) -> list[Event]:
        events: list[Event] = []
        for event in found:
            if self.finished:
                break
            match event:
                case RegionBegin():
                    events += self._region_begins(event)
                case RegionText():
                    events += self._more(event.field, event.text)
                case RegionEnd():
                    events += self._region_ends(event)
        return events

    def _region_begins(self, event: RegionBegin) -> list[Event]:
        dropped = self._content.marker()
        if event.field in REASONING_FIELDS:
            self._reasoning.marker()
        elif event.field == CALLS:
            self._raw = [dropped, event.marker]
            self._reader = reader_of(self._template.fields[CALLS], event.captures, self._log, self._tools)
        return []

    def _more(self, field: str | None, text: str) -> list[Event]:
        if field == CONTENT:
            return _pieces(TextKind.CONTENT, self._content.push(text))
        if field in REASONING_FIELDS:
            return _pieces(TextKind.REASONING, self._reasoning.push(text))
        if field != CALLS or self._reader is None:
            return []
        events = self._reader.feed(text)
        if self._reader.certain:
            self._raw = []
        else:
            self._raw.append(text)
        return events

    def _region_ends(self, event: RegionEnd) -> list[Event]:
        if event.field == CALLS and self._reader is not None:
            return self._close_call(marker=event.marker, marked=True)
        self._content.marker()
        return []

    def _close_call(self, *, marker: str, marked: bool) -> list[Event]:
        assert self._reader is not None
        events = self._reader.close(marked=marked)
        self._reader = None
        if events is not None:
            self._content.marker()
            return events
        self._content.trim = False
        return _pieces(TextKind.CONTENT, self._content.push("".join(self._raw) + marker))


class _Shown:
    """The shown text of one kind: without the white space beside markers, and a newline between two parts."""

    def __init__(self, *, trim: bool = False) -> None:
        self.trim = trim
        """Whether white space is dropped now, because a marker was before it."""
        self._spaces: list[str] = []
        """White space that is shown if more text comes, and dropped if a marker comes."""
        self._any = False

    def push(self, text: str) -> str:
        if self.trim:
            text = text.lstrip()
            if not text:
                return ""
            self.trim = False
            text = "\n" + text if self._any else text
        kept = text.rstrip()
        spaces = text[len(kept) :]
        if not kept:
            self._spaces.append(spaces)
            return ""
        shown = "".join(self._spaces) + kept
        self._spaces, self._any = ([spaces] if spaces else []), True
        return shown

    def marker(self) -> str:
        """A marker comes. Returns the white space that is dropped."""
        dropped, self._spaces, self.trim = "".join(self._spaces), [], True
        return dropped

    def flush(self) -> str:
        spaces, self._spaces = "".join(self._spaces), []
        return spaces

    def forget(self) -> None:
        """What was pushed so far does not belong to the answer."""
        self._spaces, self._any = [], False


class _Opening:
    """Drops a marker at the very beginning that stands for itself: the parser counts it as written already."""

    def __init__(self, marker: str) -> None:
        self._marker = marker
        self._held = ""

    def push(self, text: str) -> str:
        if not self._marker:
            return text
        self._held += text
        begun = self._held.lstrip()
        if self._marker.startswith(begun):
            if begun == self._marker:
                self._marker = self._held = ""
            return ""
        return self.flush().lstrip().removeprefix(self._marker_gone())

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _marker_gone(self) -> str:
        marker, self._marker = self._marker, ""
        return marker


def id_maker(form: AnswerForm) -> Callable[[], str]:
    """Makes ids of calls, which are all different."""
    chars = form.tools.call_id_chars if form.tools is not None else None
    if chars is None:
        return lambda: f"call_{uuid.uuid4().hex[:24]}"
    alphabet = string.ascii_letters + string.digits
    return lambda: "".join(secrets.choice(alphabet) for _ in range(chars))


def begun_answer(form: AnswerForm, prompt: str) -> str:
    """The part of the answer that is at the end of the prompt, such as a <think> that the chat template writes.

    Where the prompt has no beginning of an answer that the form knows, it is at most the mark of reasoning.
    """
    template = form.template(tools=form.has_tools)
    if template is None:
        return ""
    literals = template.start_anchor_literals
    if literals is not None:
        # the last one counts, and to search from the end takes no time in a long prompt
        ends = [at + len(text) for text in literals if (at := prompt.rfind(text)) >= 0]
    else:
        ends = [match.end() for match in template.start_anchor_re.finditer(prompt)]
    if ends:
        return prompt[max(ends) :]
    for name, field in template.fields.items():
        for opener in field.open_literals or ():
            if name in REASONING_FIELDS and prompt.rstrip().endswith(opener.rstrip()):
                return str(opener)
    return ""


def _pieces(kind: TextKind, text: str) -> list[Event]:
    return [TextPiece(kind=kind, text=text)] if text else []
