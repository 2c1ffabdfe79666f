"""What every client is asked to do. It runs in the client's own environment, with nothing but the client installed.

A script calls `run` with a function for each check. A function returns None where its client has no such call.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

URL, MODEL = sys.argv[1:3]
CHECKS = ("chat", "stream", "structured", "tools", "logprobs")
TOKENS = 24

QUESTION = "What is the weather in Rome?"
MESSAGES = [{"role": "user", "content": QUESTION}]

# a model that knows nothing must still end: so there is no text of any length
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "enum": ["Ada", "Bob"]},
        "age": {"type": "integer", "minimum": 10, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather of a city", "parameters": WEATHER},
}


def expect(good: object, what: str) -> None:
    if not good:
        raise AssertionError(what)


def check_person(value: Any) -> None:
    value = value if isinstance(value, Mapping) else vars(value)
    expect(value["name"] in ("Ada", "Bob") and 10 <= value["age"] <= 99, f"no person: {value}")


def check_call(name: str, arguments: Any) -> None:
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    expect(name == "get_weather" and arguments["city"] in ("Rome", "Oslo"), f"no call: {name} {arguments}")


def run(**checks: Callable[[], Any]) -> None:
    """Run the checks, and print what came of each as one line of JSON."""
    results = {}
    for name in CHECKS:
        try:
            results[name] = "-" if checks[name]() is None else "ok"
        except Exception as error:  # noqa: BLE001 - clients raise errors of their own
            results[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    sys.stdout.write("\n" + json.dumps(results) + "\n")
