"""Makes the grammar that a request's fields ask for. It is not compiled here, so it may still be wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.lines import json_fault
from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.deploy.bodies.bounds import check_sizes
from elastic_moe.deploy.bodies.json_text import type_name
from elastic_moe.deploy.bodies.structured import (
    MAX_GRAMMAR_CHARS,
    ResponseFormat,
    StructuredFields,
    StructuredOutputs,
)

ANY_OBJECT: dict[str, Any] = {"type": "object"}
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
"""Between the elements of JSON. A bound, since models that have nothing to say write spaces up to their last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedGrammar:
    grammar: Grammar
    param: str
    """The field that it came from, for error messages."""


def requested_grammar(fields: StructuredFields) -> RequestedGrammar | None:
    """The grammar that the fields ask for, if any. Raises RequestError where they ask for two."""
    found = [*_of_format(fields.response_format), *_of_outputs(fields.structured_outputs), *_of_old_names(fields)]
    for one in found:
        if len(one.grammar.text) > MAX_GRAMMAR_CHARS:
            raise _fault(one.param, f"expected at most {MAX_GRAMMAR_CHARS} characters")
    if len(found) > 1:
        raise _fault(found[1].param, f"cannot be given together with {found[0].param}")
    return found[0] if found else None


def json_grammar(
    schema: object, *, whitespace: bool = True, whitespace_pattern: str | None = None, closed: bool = False
) -> Grammar:
    """A grammar of a JSON schema.

    `whitespace` allows spaces and line feeds between the elements, and `whitespace_pattern` says which. `closed` allows
    in an object only the properties that its schema names, unless the schema says otherwise itself.
    """
    schema = _closed(schema) if closed else schema
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    options: dict[str, Any] = {"whitespace_flexible": False}
    if whitespace_pattern is not None or whitespace:
        options["whitespace_pattern"] = WHITESPACE if whitespace_pattern is None else whitespace_pattern
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": options}
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=text)


def _of_format(wanted: ResponseFormat | None) -> Iterator[RequestedGrammar]:
    if wanted is None or wanted.type == "text":
        return
    if wanted.type == "json_object":
        yield RequestedGrammar(grammar=json_grammar(ANY_OBJECT), param="response_format")
    elif wanted.json_schema is not None and wanted.type == "json_schema":
        grammar = json_grammar(wanted.json_schema.json_schema)
        yield RequestedGrammar(grammar=grammar, param="response_format.json_schema.schema")
    else:
        tags = wanted.model_dump(by_alias=True, exclude_none=True, include={"structures", "triggers", "format"})
        grammar = Grammar(kind=GrammarKind.STRUCTURAL_TAG, text=json.dumps(tags, ensure_ascii=False))
        yield RequestedGrammar(grammar=grammar, param="response_format")


def _of_outputs(wanted: StructuredOutputs | None) -> Iterator[RequestedGrammar]:
    if wanted is None:
        return
    how: dict[str, Any] = {
        "whitespace": not wanted.disable_any_whitespace,
        "whitespace_pattern": wanted.whitespace_pattern,
        "closed": bool(wanted.disable_additional_properties),
    }
    name = "structured_outputs"
    count = 0
    if wanted.json_ is not None:
        count += 1
        yield _json(wanted.json_, f"{name}.json", how)
    if wanted.json_object:
        count += 1
        yield RequestedGrammar(grammar=json_grammar(ANY_OBJECT, **how), param=f"{name}.json_object")
    for one in _plain(name, wanted.regex, wanted.choice, wanted.grammar, wanted.structural_tag):
        count += 1
        yield one
    if not count:
        raise _fault(name, "expected one of json, regex, choice, grammar, json_object and structural_tag")


def _of_old_names(fields: StructuredFields) -> Iterator[RequestedGrammar]:
    if fields.guided_json is not None:
        how = {"whitespace_pattern": fields.guided_whitespace_pattern}
        yield _json(fields.guided_json, "guided_json", how)
    yield from _plain("guided", fields.guided_regex, fields.guided_choice, fields.guided_grammar, fields.structural_tag)


def _plain(
    name: str, regex: str | None, choice: list[str] | None, grammar: str | None, tag: str | None
) -> Iterator[RequestedGrammar]:
    old = name == "guided"
    prefix = f"{name}_" if old else f"{name}."
    texts = {
        GrammarKind.REGEX: (regex, f"{prefix}regex"),
        GrammarKind.CHOICE: (None if choice is None else json.dumps(choice, ensure_ascii=False), f"{prefix}choice"),
        GrammarKind.EBNF: (grammar, f"{prefix}grammar"),
        GrammarKind.STRUCTURAL_TAG: (tag, "structural_tag" if old else f"{prefix}structural_tag"),
    }
    for kind, (text, param) in texts.items():
        if text is not None:
            yield RequestedGrammar(grammar=Grammar(kind=kind, text=text), param=param)


def _json(schema: str | dict[str, Any], param: str, how: dict[str, Any]) -> RequestedGrammar:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise _fault(param, f"expected a JSON schema: {json_fault(error)}") from None
        # a text has not been checked with the body
        check_sizes({param: schema}, (param,))
    if not isinstance(schema, dict | bool):
        raise _fault(param, f"expected a JSON schema, which is an object, got {type_name(schema)}")
    return RequestedGrammar(grammar=json_grammar(schema, **how), param=param)


def _fault(param: str, message: str) -> RequestError:
    return RequestError(f"{param}: {message}", param=param, code="invalid_value")


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: _closed(value) for key, value in schema.items()}
    if "properties" in inner or inner.get("type") == "object":
        inner.setdefault("additionalProperties", False)
    return inner
