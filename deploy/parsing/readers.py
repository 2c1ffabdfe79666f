"""Which reader a response template's field of calls needs, and how arguments get the types of the tool's schema."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_moe.deploy.parsing.calls import (
    CallLog,
    CallReader,
    Cast,
    EnvelopeCall,
    NamedCall,
    TaggedCall,
    Tags,
    WholeCall,
)

Tools = Sequence[Mapping[str, Any]]

_CAPTURED_NAME = "{name}"
_BODY = "{content}"
_KEY = re.compile(r"\{(?:content\.)?(\w+)\}")
_LITERAL_END = re.compile(r"</[\w:.-]+>$")


def reader_of(field: Any, captures: Mapping[str, str], log: CallLog, tools: Tools) -> CallReader:
    """The reader of a region. `field` is the template's field of calls."""
    transform = field.transform if isinstance(field.transform, dict) else {}
    function = transform.get("function")
    named = function == {"name": _CAPTURED_NAME, "arguments": _BODY} and "name" in captures
    call_id = captures.get("id") if transform.get("id") == "{id}" else None
    if named and field.content == "json" and not field.content_args:
        return NamedCall(log, captures["name"].strip(), call_id)
    if named and field.content == "xml-inline" and (tags := _tags(field.content_args, tools)) is not None:
        return TaggedCall(log, captures["name"].strip(), call_id, tags)
    if field.content == "json" and not field.content_args and (keys := _keys(function, field.transform_each)):
        return EnvelopeCall(log, *keys)
    return WholeCall(log, lambda body: _whole(body, field, captures, tools))


def _keys(function: Any, each: bool) -> tuple[str, str] | None:
    """The keys of name and arguments in the region's object."""
    if function == _BODY:
        return "name", "arguments"
    if not isinstance(function, dict):
        return None
    name, arguments = (str(function.get(key)) for key in ("name", "arguments"))
    if all(text.startswith("{content.") != each for text in (name, arguments)):
        found = _KEY.fullmatch(name), _KEY.fullmatch(arguments)
        if found[0] and found[1]:
            return found[0][1], found[1][1]
    return None


def _tags(args: Mapping[str, Any], tools: Tools) -> Tags | None:
    """None where tags cannot be read one by one: their end is no literal, or a value has a parser of its own."""
    pattern = str(args.get("tag_pattern"))
    end = _LITERAL_END.search(pattern)
    if end is None or set(args) != {"tag_pattern"}:
        return None
    return Tags(pattern, end.group(), caster(tools))


def _whole(body: str, field: Any, captures: Mapping[str, str], tools: Tools) -> Any:
    from transformers.utils.chat_parsing.content_parsers import process_field

    value = process_field(body, field, dict(captures))
    cast = caster(tools)
    for call in value if isinstance(value, list) else [value]:
        function = call["function"]
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            typed = {
                key: cast(function["name"], key, text) if isinstance(text, str) else text
                for key, text in arguments.items()
            }
            call["function"] = {**function, "arguments": typed}
    return value


def caster(tools: Tools) -> Cast:
    """Gives a text the type that the tool's schema has for it, as transformers does. Without one, it stays a text."""
    from transformers.utils.chat_parsing.response_parser import _coerce, _schema_types

    properties = {tool["function"]["name"]: _properties(tool["function"]) for tool in tools}

    def cast(tool: str, key: str, text: str) -> Any:
        types = _schema_types(properties.get(tool, {}).get(key))
        return _coerce(text, types) if types else text

    return cast


def _properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return properties if isinstance(properties, dict) else {}
