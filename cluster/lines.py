"""Text for one line of a log, a terminal or an error message."""

from __future__ import annotations

import difflib
import json
import re
import reprlib
import sys
from collections.abc import Iterable

from elastic_moe.cluster.errors import why

ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
"""ANSI escape sequences: for colours, cursor movements, window titles, and the two-character ones."""


def single_line(text: str) -> str:
    """`text` without colours, line breaks and other characters that move a terminal's cursor."""
    words = " ".join(ESCAPES.sub("", text).split())
    return "".join(letter if letter.isprintable() else "?" for letter in words)


def ending(text: str, most: int) -> str:
    """The last `most` characters of a line, from a whole word on. Programs usually name the cause of an error last."""
    if len(text) <= most:
        return text
    kept = text[-most:]
    return "... " + (kept.partition(" ")[2] or kept)


def counted(number: int, noun: str, nouns: str = "") -> str:
    """A number with its noun, such as `1 worker`, `2 workers` or, with `nouns`, `2 copies`."""
    return f"{number} {noun if number == 1 else nouns or noun + 's'}"


def present(number: int, noun: str) -> str:
    """That there is so much already, as a sentence: `there are 2 workers already`."""
    return f"there {'is' if number == 1 else 'are'} {counted(number, noun)} already"


def in_json(value: object) -> str:
    """A value in a message as JSON has it. What is long is cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return reprlib.repr(value)


def size_text(nbytes: float) -> str:
    """A number of bytes in the unit in which it has one to three digits before the point, such as 12.2 MB."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        nbytes /= 1000
        if nbytes < 1000:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1000:.1f} TB"


def expected_engine(groups: int) -> str:
    """What a message says that was expected where the number of a group's engine is out of range."""
    return "0, since there is one group" if groups == 1 else f"0 to {groups - 1}"


_JSON_FAULTS = {
    "Expecting property name enclosed in double quotes": "expected a key in double quotes, got {}",
    "Illegal trailing comma before end of object": "expected a key in double quotes behind the comma, got {}",
    "Illegal trailing comma before end of array": "expected a value behind the comma, got {}",
    "Expecting value": "expected a value, got {}",
    "Expecting ',' delimiter": "expected a comma or the end of the list or object, got {}",
    "Expecting ':' delimiter": "expected a colon behind the key, got {}",
    "Extra data": "expected the end, got {}",
    "Unterminated string starting at": "the closing quote is missing of the text that begins",
    "Invalid control character at": "expected \\n, \\t or the like in a text, got the character itself",
    "Invalid \\escape": "expected a known character behind the \\",
    "Invalid \\uXXXX escape": "expected four hexadecimal digits behind the \\u",
}
"""What is wrong in plain words, by the beginning of Python's message. {} is the character there."""


def json_fault(error: ValueError | RecursionError) -> str:
    """What a message says of a text that json.loads has refused with `error`."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return why(error)
    if not isinstance(error, json.JSONDecodeError):
        # Python reads no longer integers, since the time grows with the square of their digits
        return f"a number has more than {sys.get_int_max_str_digits()} digits"
    there = error.doc[error.pos : error.pos + 1]
    known = (words for begin, words in _JSON_FAULTS.items() if error.msg.startswith(begin))
    fault = next(known, error.msg).format(repr(there) if there else "the end")
    return f"{fault}, at line {error.lineno}, column {error.colno}"


def meant(name: str, known: Iterable[str]) -> str:
    """What a message says behind a name that is not known, such as ` (did you mean port?)`; empty if none is alike."""
    words = {word.lstrip("-"): word for word in known}
    alike = difflib.get_close_matches(name.lstrip("-"), list(words), n=1)
    return f" (did you mean {words[alike[0]]}?)" if alike else ""
