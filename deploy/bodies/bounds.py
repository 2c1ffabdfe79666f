"""Bounds of a body's fields, checked on decoded JSON before it is validated.

Validation takes time and memory for every value in a list, for each form that a field may have, and for each fault. So
a field that is far too large is refused before it. The first element of a prompt decides its form. Token ids are
packed, so that a million of them are one object.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from elastic_moe.cluster.errors import RequestError
from elastic_moe.deploy.bodies.json_text import type_name

TokenIds: TypeAlias = Sequence[int]
"""Token ids; packed ones are an array of type code "i", which is not a list."""

MAX_PROMPTS = 256
MAX_STOPS = 64
MAX_STOP_CHARS = 4096
"""Most characters of all stop strings together; they determine the time of the search for each token."""
MAX_STOP_TOKENS = 1024
MAX_LOGIT_BIASES = 1024
MAX_MESSAGES = 2048
"""The same as OpenAI's."""
MAX_TOOLS = 1024
MAX_VALUES = 2**15
"""Most JSON values in one field."""
MAX_DEPTH = 100
"""Most levels of lists and objects in one field."""

MOST_ELEMENTS = {
    "messages": MAX_MESSAGES,
    "tools": MAX_TOOLS,
    "stop": MAX_STOPS,
    "stop_token_ids": MAX_STOP_TOKENS,
    "logit_bias": MAX_LOGIT_BIASES,
}
"""Most elements of a list or an object, by field."""
MOST_VALUES = {"allowed_token_ids": 2**18}
"""Most values of the fields that may have more than MAX_VALUES: as many as a vocabulary has tokens."""

PROMPT_FORMS = "a string, a list of strings, a list of token ids, or a list of lists of token ids"


def check_sizes(data: Mapping[str, Any], fields: Sequence[str]) -> None:
    """Raises RequestError, which names the first of `fields` that is too large."""
    for name in fields:
        value = data.get(name)
        if not isinstance(value, list | dict):
            continue
        most = MOST_ELEMENTS.get(name)
        if most is not None and len(value) > most:
            raise _fault(name, f"expected at most {most} elements, got {len(value)}")
        _check_values(name, value, MOST_VALUES.get(name, MAX_VALUES))
    _check_stops(data.get("stop"))


def pack_prompt(prompt: object) -> str | list[str] | TokenIds | list[TokenIds]:
    """A prompt of any form, with packed token ids. Raises RequestError, which names the first wrong element."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise _fault("prompt", f"expected {PROMPT_FORMS}, got {type_name(prompt)}")
    first = prompt[0] if prompt else ""
    if type(first) is int:
        return pack_ids("prompt", prompt)
    if not isinstance(first, str | list):
        raise _fault("prompt.0", f"expected a string, a token id, or a list of token ids, got {type_name(first)}")
    if len(prompt) > MAX_PROMPTS:
        raise _fault("prompt", f"expected 1 to {MAX_PROMPTS} prompts, got {len(prompt)}")
    if isinstance(first, list):
        return [pack_ids(f"prompt.{at}", ids) for at, ids in enumerate(prompt)]
    _check_types("prompt", prompt, str, "a string, as the first element")
    return prompt


def pack_ids(path: str, ids: object) -> TokenIds:
    """`ids` as packed token ids. Raises RequestError, which names the first element that is no token id."""
    if not isinstance(ids, list):
        raise _fault(path, f"expected a list of token ids, got {type_name(ids)}")
    _check_types(path, ids, int, "a token id")
    try:
        return array("i", ids)
    except OverflowError:
        at = next(at for at, token_id in enumerate(ids) if not -(2**31) <= token_id < 2**31)
        raise _fault(f"{path}.{at}", f"expected a token id, got {str(ids[at])[:40]}") from None


def _check_types(path: str, values: list[Any], kind: type, expected: str) -> None:
    # a set of types is made at the speed of C; the loop runs only where there is a fault
    if set(map(type, values)) <= {kind}:
        return
    at = next(at for at, value in enumerate(values) if type(value) is not kind)
    raise _fault(f"{path}.{at}", f"expected {expected}, got {type_name(values[at])}")


def _check_stops(stop: object) -> None:
    if isinstance(stop, list):
        _check_types("stop", stop, str, "a string")
    stops = stop if isinstance(stop, list) else [stop] if isinstance(stop, str) else []
    if sum(map(len, stops)) > MAX_STOP_CHARS:
        raise _fault("stop", f"expected at most {MAX_STOP_CHARS} characters in all")


def _check_values(name: str, value: Any, most: int) -> None:
    """Count the values in `value` level by level. Raises RequestError as soon as there are too many."""
    level, count = [value], 0
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            count += len(item)
            if count > most:
                raise _fault(name, f"expected at most {most} values in all")
            below += [v for v in (item.values() if isinstance(item, dict) else item) if isinstance(v, list | dict)]
        if not below:
            return
        level = below
    raise _fault(name, f"expected at most {MAX_DEPTH} levels of lists and objects")


def _fault(path: str, message: str) -> RequestError:
    return RequestError(f"{path}: {message}", param=path, code="invalid_value")
