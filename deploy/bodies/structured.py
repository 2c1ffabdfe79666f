"""The fields that say what an answer must look like: OpenAI's response_format, and vLLM's names, new and old.

deploy/structured/requested.py makes a grammar of them.
"""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from elastic_moe.cluster.lines import meant
from elastic_moe.deploy.bodies.base import Body

MAX_GRAMMAR_CHARS = 1 << 17
"""Most characters of a schema, a regular expression or a grammar."""
MAX_GRAMMAR_CHOICES = 4096

GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_GRAMMAR_CHOICES)]
Schema = dict[str, Any] | bool
SchemaOrText = GrammarText | dict[str, Any]
"""A JSON schema, also as text."""


class JsonSchemaFormat(Body):
    """The `json_schema` of a response format."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    json_schema: Schema = Field(alias="schema")
    strict: bool | None = None
    """The answer follows the schema whether or not this is set, as in vLLM."""


class StructuralTag(Body):
    begin: Annotated[str, Field(min_length=1, max_length=1024)]
    json_schema: Schema | None = Field(None, alias="schema")
    end: Annotated[str, Field(max_length=1024)]


class ResponseFormat(Body):
    """`json_schema` is of the type json_schema; `structures` and `triggers`, or `format`, are of structural_tag."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: Annotated[list[StructuralTag], Field(min_length=1, max_length=256)] | None = None
    triggers: Annotated[list[GrammarText], Field(min_length=1, max_length=256)] | None = None
    format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_type(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("expected json_schema with the type 'json_schema'")
        legacy = self.structures is not None and self.triggers is not None
        if self.type == "structural_tag" and legacy == (self.format is not None):
            raise ValueError("expected structures and triggers, or format, with the type 'structural_tag'")
        return self


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: exactly one of json, regex, choice, grammar, json_object and structural_tag."""

    json_: SchemaOrText | None = Field(None, alias="json")
    regex: GrammarText | None = None
    choice: Choices | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None
    structural_tag: GrammarText | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: Annotated[str, Field(max_length=1024)] | None = None

    HARMLESS = frozenset({"backend", "disable_fallback", "_backend", "_backend_was_auto"})
    """vLLM's names of the code that makes the masks."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        """An unknown field may be a misspelt one, without which the answer would have any form."""
        names = sorted(cls.known() - cls.HARMLESS - {"json_"})
        for name in data if isinstance(data, dict) else ():
            if name not in names and name not in cls.HARMLESS:
                hint = meant(name, names) or f"; expected one of {', '.join(names)}"
                raise ValueError(f"unknown field {reprlib.repr(name)}{hint}")
        return data


class StructuredFields(Body):
    """The fields of completions and chats that restrict the answer's form. At most one of them may be given."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    guided_regex: GrammarText | None = None
    guided_choice: Choices | None = None
    guided_grammar: GrammarText | None = None
    guided_whitespace_pattern: Annotated[str, Field(max_length=1024)] | None = None
    structural_tag: GrammarText | None = None
