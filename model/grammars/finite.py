"""Finds JSON schemas that no finite value satisfies, such as an object that must contain an object like itself.

An answer would open one bracket after another until its last token. Only what makes a schema infinite is looked at:
references, required properties and the least number of items. Anything else counts as satisfiable.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote


def check_finite(schema: Any) -> None:
    """Raises ValueError where every value of `schema` would be infinite, RecursionError where it is nested too deep."""
    if not _Search(schema).is_finite():
        raise ValueError("no finite JSON value satisfies this schema: a reference leads back to itself")


class _Search:
    """The least fixed point of: a schema has a finite value if all its necessary parts have one."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._found: set[int] = set()
        """Identities of the schemas that are known to have a finite value."""
        self._seen: set[int] = set()
        """Identities of the schemas that this round has looked at. Another one may find more."""

    def is_finite(self) -> bool:
        while True:
            before = len(self._found)
            self._seen.clear()
            if self.finite(self._root):
                return True
            if len(self._found) == before:
                return False

    def finite(self, schema: Any) -> bool:
        if not isinstance(schema, dict) or id(schema) in self._found:
            return True
        if id(schema) in self._seen:
            return False
        self._seen.add(id(schema))
        found = self._combined(schema) and self._typed(schema)
        if found:
            self._found.add(id(schema))
        return found

    def _combined(self, schema: dict[str, Any]) -> bool:
        if isinstance(ref := schema.get("$ref"), str) and not self.finite(self._resolve(ref)):
            return False
        if not all(self.finite(part) for part in _list(schema.get("allOf"))):
            return False
        options = [_list(schema.get(name)) for name in ("anyOf", "oneOf")]
        return all(any(self.finite(part) for part in parts) for parts in options if parts)

    def _typed(self, schema: dict[str, Any]) -> bool:
        if "const" in schema or "enum" in schema:
            return True
        kinds = _list(schema.get("type")) or [schema.get("type")]
        if any(kind not in ("object", "array") for kind in kinds):
            return True
        return any(self._object(schema) if kind == "object" else self._array(schema) for kind in kinds)

    def _object(self, schema: dict[str, Any]) -> bool:
        properties = schema.get("properties")
        named = properties if isinstance(properties, dict) else {}
        other = schema.get("additionalProperties")
        return all(self.finite(named.get(name, other)) for name in _list(schema.get("required")) if _is_name(name))

    def _array(self, schema: dict[str, Any]) -> bool:
        least = schema.get("minItems")
        if not isinstance(least, int | float) or least < 1:
            return True
        first = _list(schema.get("prefixItems"))[: int(least)]
        return all(self.finite(part) for part in first) and (len(first) >= least or self.finite(schema.get("items")))

    def _resolve(self, ref: str) -> Any:
        """What a local reference names. None, which counts as finite, for any other: the compiler judges those."""
        if not ref.startswith("#") or (ref[1:] and not ref.startswith("#/")):
            return None
        at: Any = self._root
        for step in ref[1:].split("/")[1:]:
            key = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(at, dict):
                at = at.get(key)
            elif isinstance(at, list) and key.isdigit() and int(key) < len(at):
                at = at[int(key)]
            else:
                return None
        return at


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_name(value: Any) -> bool:
    return isinstance(value, str)
