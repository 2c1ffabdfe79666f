"""JSON schemas for the benchmark of structured output: generated ones, whose answers are short, and hostile ones."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

WORDS = ("name", "size", "kind", "items", "note", "at", "price", "näme", "a b", "x-1")
PATTERNS = ("^[a-z]{1,8}$", "^[A-Z][a-z]{0,6}$", r"^\d{3}-\d{4}$", "^(red|green|blue)$", r"^[^<>]{1,12}$")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email", "duration")
DEEPEST = 3


def generated(count: int, seed: int = 0) -> list[Schema]:
    """`count` schemas; equal arguments make equal ones. Every part of an answer has a bound."""
    return [_Maker(random.Random(f"{seed}/{number}")).document() for number in range(count)]


class _Maker:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._definitions: dict[str, Schema] = {}

    def document(self) -> Schema:
        schema = self._object(0)
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def _any(self, depth: int) -> Schema:
        leaves = [self._string, self._integer, self._number, self._enum, self._const, self._null_or]
        inner = [self._object, self._array, self._union, self._reference, self._all_of]
        makers = leaves + inner if depth < DEEPEST else leaves[:5]
        return self._rng.choice(makers)(depth + 1)

    def _object(self, depth: int) -> Schema:
        names = self._rng.sample(WORDS, self._rng.randint(1, 4))
        required = [name for name in names if self._rng.random() < 0.7]
        return {
            "type": "object",
            "properties": {name: self._any(depth) for name in names},
            "required": required,
            "additionalProperties": False,
        }

    def _array(self, depth: int) -> Schema:
        least = self._rng.randint(0, 2)
        schema: Schema = {"type": "array", "minItems": least, "maxItems": least + self._rng.randint(0, 2)}
        if self._rng.random() < 0.3:
            first = [self._any(depth) for _ in range(self._rng.randint(1, 2))]
            return {**schema, "prefixItems": first, "items": self._any(depth)}
        return {**schema, "items": self._any(depth)}

    def _union(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth) for _ in range(self._rng.randint(2, 3))]}

    def _all_of(self, depth: int) -> Schema:
        low = self._rng.randint(0, 50)
        return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + self._rng.randint(0, 50)}]}

    def _reference(self, depth: int) -> Schema:
        name = f"d{len(self._definitions)}"
        self._definitions[name] = {}
        self._definitions[name] = self._any(DEEPEST)
        return {"$ref": f"#/$defs/{name}"}

    def _string(self, depth: int) -> Schema:
        match self._rng.randrange(3):
            case 0:
                least = self._rng.randint(0, 4)
                return {"type": "string", "minLength": least, "maxLength": least + self._rng.randint(0, 12)}
            case 1:
                return {"type": "string", "pattern": self._rng.choice(PATTERNS)}
        return {"type": "string", "format": self._rng.choice(FORMATS), "maxLength": 40}

    def _integer(self, depth: int) -> Schema:
        low = self._rng.randint(-1000, 1000)
        return {"type": "integer", "minimum": low, "maximum": low + self._rng.choice([0, 1, 9, 123, 99999])}

    def _number(self, depth: int) -> Schema:
        low = round(self._rng.uniform(-10, 10), 2)
        return {"type": "number", "minimum": low, "exclusiveMaximum": low + self._rng.choice([0.5, 7, 1000])}

    def _enum(self, depth: int) -> Schema:
        values: list[Any] = ["tree", 'quo"te', "日本", 5, -1.5, None, True, "", [1, 2], {"a": 1}]
        return {"enum": self._rng.sample(values, self._rng.randint(1, 4))}

    def _const(self, depth: int) -> Schema:
        return {"const": self._rng.choice(["x", 0, False, None, "a\nb"])}

    def _null_or(self, depth: int) -> Schema:
        return {"type": [self._rng.choice(["boolean", "null"]), "null"]} if depth % 2 else {"type": "boolean"}


def hostile() -> list[Schema]:
    """Schemas that must be refused, or answered, within seconds, and must harm no other request."""
    many = [f"d{n}" for n in range(40)]
    everything = {"allOf": [{"$ref": f"#/$defs/{name}"} for name in many]}
    deep: Schema = {"type": "string"}
    for _ in range(45):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    return [
        {"$ref": "#"},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {**everything, "$defs": dict.fromkeys(many, everything)},
        {"type": "string", "pattern": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}b"},
        {"type": "string", "pattern": "(a|b|ab)*c" * 200},
        {"type": "string", "pattern": "(.*a.{200}){20}"},
        {"type": "string", "pattern": "(?=x)y"},
        {"type": "string", "format": "no-such-format"},
        {"type": "string", "minLength": 10**9, "maxLength": 10**9},
        {"type": "array", "minItems": 10**9},
        {"type": "integer", "multipleOf": 987654321, "minimum": 10**30},
        {"not": {"type": "string"}},
        {"$ref": "http://127.0.0.1:1/schema"},
        {"enum": [f"value {n}" for n in range(4000)]},
        {"type": "object", "properties": {f"p{n}": {"type": "string", "pattern": f"a{{{n}}}"} for n in range(1500)}},
        {"anyOf": [{"type": "object", "properties": {f"p{n}": {"$ref": "#"}}} for n in range(1500)]},
        {"type": "object", "patternProperties": {f"^.*{n}.*$": {"type": "integer"} for n in range(60)}},
        deep,
        {"type": "strinq"},
        {"properties": {"a": False}, "required": ["a"], "type": "object"},
    ]
