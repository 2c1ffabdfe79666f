"""Structural tags: free text in which certain beginnings must be followed by what a schema says, as for calls of tools.

vLLM has two forms. The old one has `structures` (begin, schema, end) and `triggers`: text is free up to a trigger, and
then one of the structures that begin with it must follow. The new one has a `format`, a tree of objects with a `type`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLTokenizer, regex_to_lark

_MARKED = re.compile(r"(<[^<>\s]+>)")
"""What a special token looks like in a text."""
_MOST_NODES = 4096


def tags_source(tags: Mapping[str, Any], tokenizer: LLTokenizer) -> str:
    """The grammar in llguidance's form of Lark. Raises ValueError for a form that is not known."""
    writer = _Writer(tokenizer)
    if "format" in tags:
        start = writer.node(tags["format"])
    else:
        structures = [{**one, "content": {"type": "json_schema", "json_schema": one.get("schema", {})}}
                      for one in _objects(tags, "structures")]  # fmt: skip
        start = writer.triggered(structures, _strings(tags, "triggers"))
    return "\n".join(["%llguidance {}", f"start: {start}", r"TEXT: /(.|\n)*/", *writer.rules])


class _Writer:
    """Each method returns an expression, and adds the rules that the expression needs to `rules`."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self.rules: list[str] = []
        self._nodes = 0

    def node(self, node: Any) -> str:
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            raise ValueError(f"structural tag: expected at most {_MOST_NODES} formats")
        kind = node.get("type") if isinstance(node, dict) else None
        match kind:
            case "const_string":
                return self._literal(_string(node, "value"))
            case "json_schema":
                return f"%json {json.dumps(node.get('json_schema', {}), ensure_ascii=False)}"
            case "regex":
                return f"/{regex_to_lark(_string(node, 'pattern'))}/"
            case "any_text":
                return "TEXT"
            case "sequence":
                return self._rule(" ".join(self.node(part) for part in _objects(node, "elements")))
            case "or":
                return self._rule(" | ".join(self.node(part) for part in _objects(node, "elements")))
            case "tag":
                return self._rule(f"{self._literal(_string(node, 'begin'))} {self._rest(node)}")
            case "triggered_tags":
                return self.triggered(_objects(node, "tags"), _strings(node, "triggers"), node)
            case "tags_with_separator":
                return self._separated(node)
        raise ValueError(f"structural tag: the format {str(kind)[:40]!r} is not supported")

    def triggered(
        self, tags: Sequence[Mapping[str, Any]], triggers: Sequence[str], how: Mapping[str, Any] | None = None
    ) -> str:
        """Free text with tags, each of which begins with a trigger."""
        one = self._rule(" | ".join(self._triggered(tag, triggers) for tag in tags))
        least = bool(how and how.get("at_least_one"))
        if how and how.get("stop_after_first"):
            return one if least else self._rule(f"{one} | TEXT")
        return self._rule(f"{one}+ TEXT" if least else f"{one}* TEXT")

    def _triggered(self, tag: Mapping[str, Any], triggers: Sequence[str]) -> str:
        begin = _string(tag, "begin")
        trigger = next((one for one in triggers if one and begin.startswith(one)), None)
        if trigger is None:
            raise ValueError(f"structural tag: {begin[:80]!r} begins with none of the triggers")
        return self._rule(f"{self._text_up_to(trigger)} {self._literal(begin[len(trigger) :])} {self._rest(tag)}")

    def _rest(self, tag: Mapping[str, Any]) -> str:
        """What follows the beginning of a tag: its content and its end."""
        ends = tag.get("end", "")
        options = [ends] if isinstance(ends, str) else _strings(tag, "end")
        content = tag.get("content")
        if isinstance(content, dict) and content.get("type") == "any_text" and all(options):
            return self._rule(" | ".join(self._text_up_to(end) for end in options))
        return f"{self.node(content)} {self._rule(' | '.join(self._literal(end) for end in options))}"

    def _separated(self, node: Mapping[str, Any]) -> str:
        one = self._rule(" | ".join(self.node({**tag, "type": "tag"}) for tag in _objects(node, "tags")))
        more = "" if node.get("stop_after_first") else f"({self._literal(_string(node, 'separator'))} {one})*"
        return self._rule(f"{one} {more}" if node.get("at_least_one") else f"({one} {more})?")

    def _text_up_to(self, end: str) -> str:
        """Any text up to the first `end`, which is included."""
        if self._is_special(end):
            # no text contains a special token
            return f"TEXT {end}"
        return self._rule(f"TEXT {json.dumps(end)}", "[lazy]")

    def _literal(self, text: str) -> str:
        """Exactly this text, in which special tokens stand for themselves."""
        parts = [part for part in _MARKED.split(text) if part]
        return " ".join(part if self._is_special(part) else json.dumps(part) for part in parts) or '""'

    def _is_special(self, text: str) -> bool:
        if not _MARKED.fullmatch(text):
            return False
        tokens = self._tokenizer.tokenize_str(text, parse_special=True)
        return len(tokens) == 1 and self._tokenizer.is_special_token(tokens[0])

    def _rule(self, expression: str, attributes: str = "") -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {expression}")
        return name


def _string(node: Mapping[str, Any], key: str) -> str:
    value = node.get(key)
    if not isinstance(value, str):
        raise ValueError(f"structural tag: expected a string for {key}")
    return value


def _strings(node: Mapping[str, Any], key: str) -> list[str]:
    value = node.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise ValueError(f"structural tag: expected a list of strings for {key}")
    return value


def _objects(node: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = node.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise ValueError(f"structural tag: expected a list of objects for {key}")
    return value
