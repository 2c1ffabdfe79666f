"""Which grammar the fields of a request ask for, under OpenAI's names and vLLM's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.messages.grammars import GrammarKind
from elastic_moe.deploy.bodies.schema import CompletionRequest, parse
from elastic_moe.deploy.structured.requested import WHITESPACE, RequestedGrammar, requested_grammar

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FLEXIBLE = {"x-guidance": {"whitespace_flexible": False, "whitespace_pattern": WHITESPACE}}
OPEN = json.dumps({**SCHEMA, **FLEXIBLE}, separators=(",", ":"))
OBJECT = json.dumps({"type": "object", **FLEXIBLE}, separators=(",", ":"))
JSON, REGEX, CHOICE = GrammarKind.JSON_SCHEMA, GrammarKind.REGEX, GrammarKind.CHOICE
EBNF, TAG = GrammarKind.EBNF, GrammarKind.STRUCTURAL_TAG
TAGS = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}
CHOICES = ["a", "é"]


def asked(fields: dict[str, Any]) -> RequestedGrammar | None:
    return requested_grammar(parse(CompletionRequest, {"prompt": "a", **fields}))


def of_json_schema(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", **fields}}}


@pytest.mark.parametrize(
    ("fields", "kind", "text", "param"),
    [
        ({"response_format": {"type": "json_object"}}, JSON, OBJECT, "response_format"),
        (of_json_schema(schema=SCHEMA, strict=True), JSON, OPEN, "response_format.json_schema.schema"),
        ({"response_format": {"type": "structural_tag", **TAGS}}, TAG, json.dumps(TAGS), "response_format"),
        (
            {"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}},
            TAG,
            '{"format": {"type": "any_text"}}',
            "response_format",
        ),
        ({"structured_outputs": {"json": SCHEMA}}, JSON, OPEN, "structured_outputs.json"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, JSON, OPEN, "structured_outputs.json"),
        ({"structured_outputs": {"json_object": True}}, JSON, OBJECT, "structured_outputs.json_object"),
        ({"structured_outputs": {"regex": "a*"}}, REGEX, "a*", "structured_outputs.regex"),
        ({"structured_outputs": {"choice": CHOICES}}, CHOICE, '["a", "é"]', "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, EBNF, "root ::= x", "structured_outputs.grammar"),
        ({"structured_outputs": {"structural_tag": "{}"}}, TAG, "{}", "structured_outputs.structural_tag"),
        ({"guided_json": SCHEMA}, JSON, OPEN, "guided_json"),
        ({"guided_regex": "a*"}, REGEX, "a*", "guided_regex"),
        ({"guided_choice": CHOICES}, CHOICE, '["a", "é"]', "guided_choice"),
        ({"guided_grammar": "root ::= x"}, EBNF, "root ::= x", "guided_grammar"),
        ({"structural_tag": "{}"}, TAG, "{}", "structural_tag"),
    ],
)
def test_grammars(fields: dict[str, Any], kind: GrammarKind, text: str, param: str) -> None:
    found = asked(fields)
    assert found is not None
    assert (found.grammar.kind, found.grammar.text, found.param) == (kind, text, param)


@pytest.mark.parametrize(
    "fields",
    [{}, {"response_format": {"type": "text"}}, {"response_format": None}, {"structured_outputs": None}],
    ids=str,
)
def test_no_grammar(fields: dict[str, Any]) -> None:
    assert asked(fields) is None


def test_options_of_json() -> None:
    def schema(**options: Any) -> Any:
        found = asked({"structured_outputs": {"json": {**SCHEMA, "x-guidance": {"lenient": True}}, **options}})
        assert found is not None
        return json.loads(found.grammar.text)

    assert schema()["x-guidance"] == FLEXIBLE["x-guidance"], "a client cannot weaken its own schema"
    assert schema(disable_any_whitespace=True)["x-guidance"] == {"whitespace_flexible": False}
    pattern = {"whitespace_flexible": False, "whitespace_pattern": " ?"}
    assert schema(whitespace_pattern=" ?")["x-guidance"] == pattern
    assert "additionalProperties" not in schema()
    assert schema(disable_additional_properties=True)["additionalProperties"] is False


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "5"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[" * 5000}}, "structured_outputs.json"),
        ({"guided_json": '{"a":' * 300 + "1" + "}" * 300}, "guided_json"),
        ({"guided_json": {"enum": ["x" * 1000] * 200}}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "a" * 200_000}, "guided_regex"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {"type": "structural_tag", "format": {}, **TAGS}}, "response_format"),
    ],
    ids=str,
)
def test_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        asked(fields)
    assert caught.value.status == 400
    assert (caught.value.param or "").startswith(param)
    assert str(caught.value).startswith(param)


def test_an_unknown_field_of_structured_outputs_is_named() -> None:
    with pytest.raises(RequestError, match=r"structured_outputs: unknown field 'regx' .did you mean regex") as caught:
        asked({"structured_outputs": {"regx": "a"}})
    assert (caught.value.param, caught.value.code) == ("structured_outputs", "invalid_value")
    with pytest.raises(RequestError, match="unknown field 'strict'; expected one of choice, "):
        asked({"structured_outputs": {"regex": "a", "strict": True}})
    assert asked({"structured_outputs": {"regex": "a", "backend": "xgrammar", "disable_fallback": True}})
