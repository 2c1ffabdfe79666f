"""Text for one line of a log, a terminal or an error message."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

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


def expected_engine(groups: int) -> str:
    """What a message says that was expected where the number of a group's engine is out of range."""
    return "0, since there is one group" if groups == 1 else f"0 to {groups - 1}"


def meant(name: str, known: Iterable[str]) -> str:
    """What a message says behind a name that is not known, such as ` (did you mean port?)`; empty if none is alike."""
    words = {word.lstrip("-"): word for word in known}
    alike = difflib.get_close_matches(name.lstrip("-"), list(words), n=1)
    return f" (did you mean {words[alike[0]]}?)" if alike else ""
