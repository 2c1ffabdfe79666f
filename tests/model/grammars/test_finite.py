"""Schemas that only infinite values satisfy are found, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_moe.model.grammars.finite import check_finite

SELF = {"$ref": "#"}
NULL = {"type": "null"}


@pytest.mark.parametrize(
    "schema",
    [
        SELF,
        {"type": "array", "items": SELF, "minItems": 1},
        {"type": "array", "prefixItems": [NULL, SELF], "minItems": 2},
        {"type": "object", "properties": {"a": SELF}, "required": ["a"]},
        {"type": "object", "additionalProperties": SELF, "required": ["a"]},
        {"type": ["object", "array"], "properties": {"a": SELF}, "required": ["a"], "items": SELF, "minItems": 1},
        {"anyOf": [SELF, {"allOf": [NULL, SELF]}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}},
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"$ref": "#/$defs/a~1b"}}},
    ],
    ids=str,
)
def test_infinite(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no finite JSON value"):
        check_finite(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        {"type": "array", "items": SELF},
        {"type": "array", "items": SELF, "minItems": 0},
        {"type": "array", "prefixItems": [NULL, SELF], "minItems": 1},
        {"type": "object", "properties": {"a": SELF}},
        {"type": ["object", "null"], "properties": {"a": SELF}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"anyOf": [SELF, NULL]}}, "required": ["a"]},
        {"type": "object", "properties": {"a": SELF}, "required": ["a"], "const": 1},
        {"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"oneOf": [SELF, NULL]}}},
        {"$ref": "http://elsewhere/schema"},
    ],
    ids=str,
)
def test_finite(schema: Any) -> None:
    check_finite(schema)


def test_many_references_take_no_time() -> None:
    """A search along every path would take 40! steps."""
    names = [f"d{n}" for n in range(40)]
    everything = {"allOf": [{"$ref": f"#/$defs/{name}"} for name in names]}
    with pytest.raises(ValueError, match="no finite JSON value"):
        check_finite({**everything, "$defs": dict.fromkeys(names, everything)})
