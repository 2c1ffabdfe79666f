"""Decodes JSON bodies, with an error in words for a body that is not JSON."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from typing import Any

from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.lines import json_fault

LONGEST_PARAM = 60
"""Most characters of a key that are shown as the field to blame."""


def decode(body: bytes | bytearray) -> Any:
    """The values of a body. Raises RequestError, which says what is wrong, also for NaN, infinity, half a surrogate
    pair, and two equal keys of an object."""
    if not body.strip():
        raise RequestError("the body is empty; expected a JSON object", code="invalid_json")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} is wrong", code="invalid_json") from None
    try:
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_with_unique_keys)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {json_fault(error)}", code="invalid_json") from None
    if "\\u" in text:
        # half a surrogate pair is fine in JSON, but no text
        try:
            json.dumps(data, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            message = "the body has an escaped surrogate without its other half"
            raise RequestError(message, code="invalid_json") from None
    return data


def type_name(value: object) -> str:
    """A value's type in JSON's words, with an article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One of two equal keys would have no effect, and which one differs between readers: a gateway that checks a body
    may see another value than the server."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, times),) = Counter(name for name, _ in pairs).most_common(1)
        text = f"the key {reprlib.repr(twice)} is there {times} times in one object"
        raise RequestError(text, param=twice[:LONGEST_PARAM], code="invalid_json")
    return found


def _refuse_constant(name: str) -> Any:
    raise RequestError(f"the body is no JSON: {name} is no JSON number", code="invalid_json")
