"""Grammars that make a model call a tool, or think before it answers, in the form of its family.

They are in llguidance's form of Lark: texts in quotes, special tokens as <[id]>, and JSON schemas after %json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.deploy.parsing.formats import AnswerForm, Family

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""llguidance's options for the JSON of calls: as json.dumps writes it, with no place for endless white space."""

NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
TEXT = "/(?s:.*)/"
SPACE = r"/\s{0,4}/"
"""White space between reasoning and what follows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """What may or must come before the part of the answer that a grammar describes."""

    open: bool
    """Whether the answer begins within the reasoning; otherwise it may begin with reasoning."""
    marks: tuple[str, str]
    """The beginning and the end of reasoning."""
    answer: str = ""
    """What the family writes between reasoning and content."""


class Writer:
    """Writes the rules of one grammar."""

    def __init__(self, special: Mapping[str, int]) -> None:
        """`special` has the special tokens, which a grammar must name by their ids."""
        self._special = special
        self._split = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True)))) if special else None
        self._rules: list[str] = []

    def rule(self, body: str, how: str = "") -> str:
        """Add a rule, and return its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{how}: {body}")
        return name

    def text(self, text: str) -> str:
        """Exactly this text."""
        parts: list[str] = []
        at = 0
        for match in self._split.finditer(text) if self._split is not None else ():
            parts += _lexemes(text[at : match.start()])
            parts.append(f"<[{self._special[match.group()]}]>")
            at = match.end()
        parts += _lexemes(text[at:])
        return " ".join(parts) or '""'

    def until(self, end: str) -> str:
        """Any text up to the first place where `end` comes, and `end`."""
        if any(token in end for token in self._special):
            return f"{self.rule(TEXT)} {self.text(end)}"
        return self.rule(TEXT, f"[suffix={_quoted(end)}]")

    def grammar(self, start: str) -> Grammar:
        return Grammar(kind=GrammarKind.EBNF, text="\n".join((f"start: {start}", *self._rules, "")))


def answer_grammar(
    form: AnswerForm,
    special: Mapping[str, int],
    *,
    content: Grammar | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    one_call: bool = False,
    thinking: Thinking | None = None,
) -> Grammar | None:
    """An answer that is `content`, or calls some of `tools` in the form's way (`one_call`: one of them, once), after
    perhaps some `thinking`. None for a kind of grammar that cannot be a part of another one."""
    writer = Writer(special)
    ways: list[str] = []
    if tools:
        ways.append(writer.rule(_calls(form, tools, writer, one=one_call)))
    if content is not None:
        body = _embedded(content)
        if body is None:
            return None
        before = f"{writer.text(thinking.answer)} " if thinking is not None and thinking.answer else ""
        ways.append(writer.rule(before + writer.rule(body)))
    return writer.grammar(_after_thinking(writer.rule(" | ".join(ways)), thinking, writer))


def _embedded(grammar: Grammar) -> str | None:
    """The grammar as the body of a rule."""
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            return f"%json {grammar.text}"
        case GrammarKind.CHOICE:
            return " | ".join(map(_quoted, json.loads(grammar.text)))
        case GrammarKind.REGEX:
            return "/" + re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\/", grammar.text) + "/"
        case _:
            return None


def schema_grammar(function: Mapping[str, Any]) -> Grammar:
    """The arguments of a tool alone, to find out which tool has a schema that cannot be a grammar."""
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=_written(_schema(function)))


def thinking_of(form: AnswerForm, begun: str, *, in_reasoning: bool) -> Thinking | None:
    """The reasoning that may precede what a grammar describes.

    None where there is none: the model does not think, its marks are not known, or the prompt has the end of the
    reasoning already.
    """
    family = form.reasoning
    marks = family.writing.get("reasoning") if family is not None else None
    if family is None or marks is None or (marks[1] in begun and not in_reasoning):
        return None
    return Thinking(open=in_reasoning, marks=(marks[0], marks[1]), answer=family.writing.get("answer", ""))


def writes_calls(form: AnswerForm) -> bool:
    """Whether a grammar can make calls in this form."""
    return form.tools is not None and bool(form.tools.writing)


def _after_thinking(body: str, thinking: Thinking | None, writer: Writer) -> str:
    if thinking is None:
        return body
    begin, end = thinking.marks
    rest = writer.rule(f"{writer.until(end)} {writer.rule(SPACE)}")
    return f"{rest} {body}" if thinking.open else f"( {writer.text(begin)} {rest} )? {body}"


def _calls(form: AnswerForm, tools: Sequence[Mapping[str, Any]], writer: Writer, *, one: bool) -> str:
    assert form.tools is not None
    how = form.tools.writing
    each = [writer.rule(_call(form.tools, tool["function"], writer)) for tool in tools]
    call = writer.rule(" | ".join(each))
    # in some families the end of a call ends the answer
    more = "" if one or "between" not in how else f"( {writer.text(how['between'])} {call} )*"
    return f"{writer.text(how.get('before', ''))} {call} {more} {writer.text(how.get('after', ''))}"


def _call(family: Family, function: Mapping[str, Any], writer: Writer) -> str:
    how = family.writing
    name = json.dumps(function["name"]) if how.get("name") == "json" else function["name"]
    schema = _schema(function)
    begin = writer.text(how["begin"] + name)
    if "number" in how:
        begin += f" {writer.rule('/' + how['number'] + '/')}"
    if "tag" in how:
        arguments = _tags(how["tag"], schema, writer)
    else:
        arguments = writer.rule(_json(schema))
    return f"{begin} {writer.text(how['arguments'])} {arguments} {writer.text(how['end'])}"


def _tags(tag: Sequence[str], schema: Mapping[str, Any], writer: Writer) -> str:
    """Arguments as tags: those that the schema names, in its order, and those that are not required perhaps not."""
    properties = schema.get("properties")
    required = schema.get("required")
    parts: list[str] = []
    for key, kind in (properties if isinstance(properties, dict) else {}).items():
        begin, end = writer.text(tag[0] + key + tag[1]), tag[2]
        if (texts := _texts(kind)) is not None:
            part = f"{begin} ( {' | '.join(map(writer.text, texts))} ) {writer.text(end)}"
        elif _is_text(kind):
            part = f"{begin} {writer.until(end)}"
        else:
            part = f"{begin} {writer.rule(_json(_with_definitions(kind, schema)))} {writer.text(end)}"
        needed = isinstance(required, list) and key in required
        parts.append(part if needed else f"( {part} )?")
    return " ".join(parts) or '""'


def _texts(schema: Any) -> list[str] | None:
    """The texts of which a value is one, where the schema lists them."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None) if isinstance(schema, dict) else None
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        return None
    return values


def _is_text(schema: Any) -> bool:
    """Whether a value is written as it is, and not as JSON: where it may be a text, or anything."""
    if not isinstance(schema, dict):
        return True
    kinds = schema.get("type")
    choices = [choice for name in ("anyOf", "oneOf") for choice in schema.get(name) or []]
    if kinds is None:
        return not choices or any(map(_is_text, choices))
    return "string" in kinds


def _with_definitions(kind: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a schema, with the definitions that it may refer to."""
    return {**{key: schema[key] for key in ("$defs", "definitions") if key in schema}, **kind}


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    return closed(function.get("parameters") or NO_ARGUMENTS)


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {_written(schema)}"


def _written(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": COMPACT}, ensure_ascii=False)


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without arguments that it does not name, unless it speaks of them itself."""
    speaks = {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames"}
    composed = {"$ref", "allOf", "anyOf", "oneOf", "if"}
    if isinstance(schema.get("properties"), dict) and not (speaks | composed) & set(schema):
        return {"type": "object", **schema, "additionalProperties": False}
    return dict(schema)


def _lexemes(text: str) -> list[str]:
    """The text, with the white space at its beginning by itself: of two texts that begin with it, llguidance takes the
    longer one for certain when it sees the next character."""
    rest = text.lstrip()
    return [_quoted(part) for part in (text[: len(text) - len(rest)], rest) if part]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
