"""Describes a validation error in our words: the field as the client knows it, what was expected, and what came."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.lines import counted, in_json, meant
from elastic_moe.deploy.bodies.bounds import MAX_STOPS
from elastic_moe.deploy.bodies.json_text import type_name

EXPECTED: Mapping[str, Callable[[dict[str, Any]], str]] = {
    "string_type": lambda c: "a string",
    "int_type": lambda c: "an integer",
    "int_from_float": lambda c: "an integer",
    "float_type": lambda c: "a number",
    "bool_type": lambda c: "true or false",
    "list_type": lambda c: "a list",
    "dict_type": lambda c: "an object",
    "model_type": lambda c: "an object",
    "model_attributes_type": lambda c: "an object",
    "finite_number": lambda c: "a finite number",
    "literal_error": lambda c: str(c["expected"]),
    "greater_than": lambda c: f"more than {c['gt']}",
    "greater_than_equal": lambda c: f"at least {c['ge']}",
    "less_than": lambda c: f"less than {c['lt']}",
    "less_than_equal": lambda c: f"at most {c['le']}",
    "string_too_short": lambda c: f"at least {counted(c['min_length'], 'character')}",
    "string_too_long": lambda c: f"at most {counted(c['max_length'], 'character')}",
    "string_pattern_mismatch": lambda c: f"characters as in {c['pattern']}",
    "too_short": lambda c: f"at least {counted(c['min_length'], 'element')}",
    "too_long": lambda c: f"at most {counted(c['max_length'], 'element')}",
}
"""What was expected, by pydantic's type of the error; c is the context of the error."""

FORMS = {
    "stop": f"a string or a list of up to {MAX_STOPS} strings",
    "content": "a string or a list of text parts",
    "tool_choice": "a string or an object that names a function",
}
"""What was expected of a field that may have several forms, by the field's name."""

FEW = 8
"""Most fields of a call that are all listed where another one is given."""
FORM_FAULTS = ("string_type", "list_type", "int_type")


def request_error(error: ValidationError, known: Iterable[str] = ()) -> RequestError:
    """The error for the first field that has a fault. Where a field has several forms, the form that fits best
    counts. `known`: the body's fields."""
    faults = error.errors(include_url=False, include_context=True, include_input=True)
    # a field of another name is why one is missing
    faults.sort(key=lambda fault: fault["type"] != "extra_forbidden")
    field = _path(faults[0])[0] if faults[0]["loc"] else ""
    faults = [fault for fault in faults if not fault["loc"] or fault["loc"][0] == field]
    fault = max(faults, key=lambda f: (f["type"] not in FORM_FAULTS, len(f["loc"])))
    where = _path(fault)
    path = ".".join(map(str, where))
    if fault["type"] == "missing":
        return RequestError(f"{path}: this field is required", param=path, code="missing_required_parameter")
    if fault["type"] == "extra_forbidden":
        fields = sorted(known)
        few = len(where) == 1 and len(fields) <= FEW
        hint = meant(path, fields) or (f"; it takes {', '.join(fields)}" if few else "")
        text = f"{path}: this call has no such field{hint}"
        return RequestError(text, param=path, code="unknown_parameter")
    if fault["type"] == "value_error":
        return RequestError(f"{path}: {fault['ctx']['error']}", param=path, code="invalid_value")
    form = FORMS.get(str(where[-1])) if fault["type"] in FORM_FAULTS else None
    make = EXPECTED.get(fault["type"])
    expected = form or (make(fault.get("ctx", {})) if make else "another value")
    return RequestError(f"{path}: expected {expected}, got {_shown(fault['input'])}", param=path, code="invalid_value")


def _path(fault: ErrorDetails) -> list[str | int]:
    """The path of fields to the fault, without pydantic's names of a union's forms, such as `list[TextPart]`."""
    first, *rest = fault["loc"] or ("body",)
    return [first, *(part for part in rest if isinstance(part, int) or not _is_form(part))]


def _is_form(name: str) -> bool:
    return name in ("str", "int", "float", "bool") or "[" in name


def _shown(value: object) -> str:
    short = isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 40)
    if isinstance(value, list) and not value:
        return "an empty list"
    if isinstance(value, bool):
        return in_json(value)
    return repr(value)[:80] if short else type_name(value)
