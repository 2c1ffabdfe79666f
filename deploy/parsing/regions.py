"""Finds the regions of a response template, such as reasoning and tool calls, in a text that comes in pieces.

The same as transformers' ResponseParser does, with three differences: only the end of the text is kept, so time and
memory are in proportion to the text; a possible marker that goes on for too long is no marker; and neither is one that
the end of the text may have cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

CONTEXT = 64
"""Characters before the present place that are kept, for markers that look back."""
MAX_HELD = 1024
"""Most characters that are held back because they may be the beginning of a marker."""
MAX_EMPTY = 8
"""Most markers without a character at one place; more of them would never end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionBegin:
    field: str
    marker: str
    captures: Mapping[str, str]
    """The named groups of the marker's pattern."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionText:
    field: str | None
    """None: the text belongs to no field of the template."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionEnd:
    """The end of a region. The field without an opening marker has ends too: they are markers that nobody should see,
    and the field goes on after them."""

    field: str | None
    marker: str


RegionEvent: TypeAlias = RegionBegin | RegionText | RegionEnd


class Regions:
    def __init__(self, template: Any, *, timeout_s: float | None = None) -> None:
        """`template` is a transformers ResponseTemplate. `timeout_s` limits each search for a marker, for templates
        whose patterns nobody has looked at; after one that took longer, no more markers are found."""
        self._template = template
        self._timeout_s = timeout_s
        self._blind = False
        self._buffer = ""
        self._at = 0
        self._empty = 0
        self.current: str | None = template.implicit

    @property
    def holds_back(self) -> bool:
        return self._at < len(self._buffer)

    def feed(self, text: str, *, last: bool = False) -> Iterator[RegionEvent]:
        """The events that more text makes certain. `last`: the text ends here, and nothing is held back."""
        self._buffer += text
        while True:
            found, held_from = self._scan(last)
            if found is None:
                break
            yield from self._passed(found.start())
            self._at = found.end()
            yield self._crossed(found)
        yield from self._passed(held_from)
        if self._at > CONTEXT:
            self._buffer, self._at = self._buffer[self._at - CONTEXT :], CONTEXT

    def settle(self) -> Iterator[RegionEvent]:
        """Give up what is held back: the text so far and the text to come do not belong together."""
        yield from self._passed(len(self._buffer))

    def _passed(self, end: int) -> Iterator[RegionText]:
        if end > self._at:
            yield RegionText(field=self.current, text=self._buffer[self._at : end])
            self._at, self._empty = end, 0

    def _crossed(self, found: _Found) -> RegionEvent:
        self._empty = self._empty + 1 if found.start() == found.end() else 0
        if self._empty > MAX_EMPTY:
            self._blind = True
        marker, before = found.match.group(), self.current
        if found.opens:
            self.current = found.field.name
            captures = {name: value for name, value in found.match.groupdict().items() if value is not None}
            return RegionBegin(field=found.field.name, marker=marker, captures=captures)
        self.current = self._template.implicit
        return RegionEnd(field=before, marker=marker)

    def _scan(self, last: bool) -> tuple[_Found | None, int]:
        """The next certain marker, if any, and the place from which on the text is held back.

        The earliest marker counts; of several at one place the longest, and an opening one rather than a closing one.
        """
        end = len(self._buffer)
        held_from, best = end, None
        for opens, field in self._watched():
            found = self._search(opens, field, last)
            if found is None:
                continue
            if not last and (found.match.partial or found.may_grow(end)):
                held_from = min(held_from, found.start())
            elif last and opens and found.may_grow(end):
                # such as the name of a tool that is cut off
                continue
            elif best is None or found.rank < best.rank:
                best = found
        if end - held_from > MAX_HELD:
            held_from = end
        if best is not None and best.start() >= held_from:
            best = None
        return best, held_from

    def _watched(self) -> list[tuple[bool, Any]]:
        """The markers that can come now: in a region its own end, elsewhere the beginnings of all regions."""
        template = self._template
        if self._blind:
            return []
        if self.current is not None and self.current != template.implicit:
            field = template.fields[self.current]
            return [(False, field)] if field.close_re is not None else []
        watched = [(True, field) for field in template.fields.values() if field.open_re is not None]
        if template.implicit is not None and template.fields[template.implicit].close_re is not None:
            watched.append((False, template.fields[template.implicit]))
        return watched

    def _search(self, opens: bool, field: Any, last: bool) -> _Found | None:
        pattern = field.open_re if opens else field.close_re
        how = {} if self._timeout_s is None else {"timeout": self._timeout_s}
        try:
            match = pattern.search(self._buffer, self._at, partial=not last, **how)
        except TimeoutError:
            self._blind = True
            return None
        return None if match is None else _Found(opens=opens, field=field, match=match)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    opens: bool
    field: Any
    match: Any

    def start(self) -> int:
        return int(self.match.start())

    def end(self) -> int:
        return int(self.match.end())

    @property
    def rank(self) -> tuple[int, int, bool, str]:
        return self.start(), self.start() - self.end(), not self.opens, self.field.name

    def may_grow(self, end: int) -> bool:
        """Whether more text may change a match that reaches to the end: it is a pattern, or the beginning of another
        literal."""
        if self.end() != end:
            return False
        field = self.field
        literals = field.open_literals if self.opens else field.close_literals
        longer = field.open_literal_can_extend if self.opens else field.close_literal_can_extend
        return self.start() == self.end() or literals is None or longer
