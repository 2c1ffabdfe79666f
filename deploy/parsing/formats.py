"""The forms in which families of models write reasoning and tool calls, and which of them a checkpoint has.

Each file of families/ has a response template of transformers with the fields that the family knows. A form is made of
two families: one for calls, and one for reasoning, since these vary by themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from elastic_moe.cluster.errors import ConfigError

CALLS = "tool_calls"
CONTENT = "content"
REASONING = "reasoning_content"
REASONING_FIELDS = frozenset({REASONING, "reasoning", "thinking"})
"""The names that response templates give to reasoning."""
NO_PARSER = "none"
LIST_OF_CALLS = "json_list"
"""The family of models that know no calls, and are made to write them by a grammar."""

_MARKERS = ("open", "close", "open_pattern", "close_pattern")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A file of families/."""

    name: str
    tool_parsers: tuple[str, ...]
    """vLLM's names of it as a --tool-call-parser."""
    reasoning_parsers: tuple[str, ...]
    opened_by: tuple[str, ...]
    """Those of `reasoning_parsers` that take an answer for reasoning from its beginning on."""
    marks: tuple[str, ...]
    """Texts that are all in the chat template of such a model."""
    model_types: tuple[str, ...]
    call_id_chars: int | None
    """Length of the ids of calls, where the chat template insists on one."""
    template: Mapping[str, Any]
    writing: Mapping[str, Any]
    """How the family writes calls, for grammars."""


@lru_cache(maxsize=1)
def families() -> tuple[Family, ...]:
    return tuple(_family(path) for path in sorted((Path(__file__).parent / "families").glob("*.json")))


def _family(path: Path) -> Family:
    data = json.loads(path.read_text(encoding="utf-8"))
    return Family(
        name=path.stem,
        tool_parsers=tuple(data.get("tool_parsers", ())),
        reasoning_parsers=tuple(data.get("reasoning_parsers", ())),
        opened_by=tuple(data.get("opened_by", ())),
        marks=tuple(data.get("chat_template_has", ())),
        model_types=tuple(data.get("model_types", ())),
        call_id_chars=data.get("call_id_chars"),
        template=data["template"],
        writing=data.get("writing", {}),
    )


def family_called(name: str) -> Family:
    return next(family for family in families() if family.name == name)


@dataclass(frozen=True, kw_only=True)
class AnswerForm:
    """How the answers of a checkpoint are written."""

    tools: Family | None = None
    reasoning: Family | None = None
    opens: bool = False
    """Whether an answer is reasoning from its beginning on, without a mark."""
    own: Mapping[str, Any] | None = None
    """The checkpoint's own response template, by which answers are parsed instead of by the families'."""

    @property
    def has_reasoning(self) -> bool:
        if self.own is not None:
            return bool(REASONING_FIELDS & set(self.own["fields"]))
        return self.reasoning is not None

    @property
    def has_tools(self) -> bool:
        return self.tools is not None if self.own is None else CALLS in self.own["fields"]

    def spec(self, *, tools: bool) -> dict[str, Any] | None:
        """The response template, with the field of calls or without; None where nothing is to be parsed."""
        if self.own is not None:
            fields = {name: field for name, field in self.own["fields"].items() if tools or name != CALLS}
            return {**self.own, "fields": fields} if len(fields) > 1 else None
        if self.reasoning is None and not (tools and self.tools is not None):
            return None
        return _composed(self.tools if tools else None, self.reasoning)

    def template(self, *, tools: bool) -> Any:
        """The same as transformers' ResponseTemplate."""
        return self._with_tools if tools else self._without_tools

    @cached_property
    def _with_tools(self) -> Any:
        return loaded(self.spec(tools=True))

    @cached_property
    def _without_tools(self) -> Any:
        return loaded(self.spec(tools=False))

    def markers(self, special: Mapping[int, str], *, tools: bool) -> dict[int, str]:
        """Those of the special tokens that are a part of a marker, so that the parser must see them."""
        texts = self._marker_texts(tools=tools)
        return {token_id: text for token_id, text in special.items() if text and text in texts}

    def _marker_texts(self, *, tools: bool) -> str:
        spec = self.spec(tools=tools) or {"fields": {}}
        texts: list[str] = []
        for field in spec["fields"].values():
            for key in _MARKERS:
                value = field.get(key, "")
                # in a pattern, a marker's characters are escaped
                texts += [re.sub(r"\\(.)", r"\1", value)] if isinstance(value, str) else value
        return "\n".join(texts)


def loaded(spec: Mapping[str, Any] | None) -> Any:
    """transformers' ResponseTemplate. Raises ValueError for a template that is none."""
    from transformers.utils.chat_parsing.response_templates import load_response_template

    return None if spec is None else load_response_template(dict(spec))


def chosen_form(
    chat_template: str,
    *,
    model_type: str | None = None,
    own: Mapping[str, Any] | None = None,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> AnswerForm:
    """The form of a checkpoint: by the names that the user gives, by its own response template, by the marks in its
    chat template, and by its type, in this order. Raises ConfigError for an unknown name."""
    tools = [family for family in families() if family.tool_parsers]
    thinkers = [family for family in families() if family.reasoning_parsers]
    if tool_parser is not None:
        named = _named(tools, tool_parser, "tool_call_parser", lambda family: family.tool_parsers)
        tools = [] if tool_parser == NO_PARSER else named
    if reasoning_parser is not None:
        named = _named(thinkers, reasoning_parser, "reasoning_parser", lambda family: family.reasoning_parsers)
        thinkers = [] if reasoning_parser == NO_PARSER else named
    return AnswerForm(
        tools=_marked(tools, chat_template, model_type, sure=tool_parser is not None),
        reasoning=_marked(thinkers, chat_template, model_type, sure=reasoning_parser is not None),
        opens=any(reasoning_parser in family.opened_by for family in thinkers),
        own=own if tool_parser is None and reasoning_parser is None else None,
    )


def _named(candidates: list[Family], name: str, setting: str, names: Any) -> list[Family]:
    found = [family for family in candidates if name in names(family)]
    if not found and name != NO_PARSER:
        known = sorted({each for family in candidates for each in names(family)} | {NO_PARSER})
        raise ConfigError(f"{setting}: expected one of {', '.join(known)}, got {name!r}")
    return found


def _marked(candidates: list[Family], chat_template: str, model_type: str | None, *, sure: bool) -> Family | None:
    """The family of which most marks are in the chat template, or else the one that the model's type belongs to.

    `sure`: one of them it is in any case.
    """
    marked = [family for family in candidates if family.marks and all(mark in chat_template for mark in family.marks)]
    if marked:
        return max(marked, key=lambda family: sum(map(len, family.marks)))
    if chat_template:
        typed = [family for family in candidates if model_type in family.model_types]
        if typed:
            return typed[0]
    return candidates[0] if sure and candidates else None


def _composed(tools: Family | None, reasoning: Family | None) -> dict[str, Any]:
    used = [family for family in (tools, reasoning) if family is not None]
    fields: dict[str, Any] = {}
    if reasoning is not None:
        fields[REASONING] = {**reasoning.template["fields"][REASONING], "repeats": True, "join": "\n"}
    if tools is not None:
        fields[CALLS] = tools.template["fields"][CALLS]
    content: dict[str, Any] = {"content": "text", "content_args": {"strip": False}, "repeats": True}
    ends = list(dict.fromkeys(end for family in used for end in _ends(family.template["fields"][CONTENT])))
    if ends:
        content["close_pattern"] = "|".join(ends)
    anchors = {anchor for family in families() for anchor in _texts(family.template["start_anchor"])}
    return {"start_anchor": sorted(anchors), "fields": {**fields, CONTENT: content}}


def _ends(content: Mapping[str, Any]) -> Iterable[str]:
    """The markers that nobody should see, as patterns."""
    if "close_pattern" in content:
        return [content["close_pattern"]]
    return [re.escape(text) for text in _texts(content.get("close", []))]


def _texts(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
