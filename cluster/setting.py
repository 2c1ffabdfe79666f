"""The settings of ServeConfig (cluster/config.py): how one is declared, read and checked.

A field's metadata carries the help text, the range of a number and, where the values are few, the choices; the command
line is made from it. Flags of other verbs are read by the same functions.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml
from yaml.error import MarkedYAMLError
from yaml.reader import ReaderError

from elastic_moe.cluster.errors import ConfigError, why
from elastic_moe.cluster.lines import counted, in_json, meant

DAY_S = 86_400.0
"""The longest wait that a setting may ask for, in seconds, unless it says another."""
MOST_BYTES = 2**50
"""A larger size is a mistake."""
MILLION = 1_000_000
"""The largest number of things that a setting may ask for, unless it says another."""

TYPES: Mapping[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
"""The types of settings in words."""
MULTIPLES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
"""What follows any number, as in vLLM."""
UNITS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip
"""What follows bytes, in small or large letters."""
SIZES = "bytes, or a size such as 8GB (10**9 each), 8GiB or 8G (2**30 each)"
_BOOLEANS = ("true", "false", "yes", "no", "on", "off")
"""What YAML takes for a boolean without quotes."""
_SCALED = re.compile(r"(\d{1,30}(\.\d{1,30})?)\s*([A-Za-z]*)", re.ASCII)


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    within: tuple[float, float] | None = None,
    scaled: bool = False,
    made_absolute: bool = False,
    like: tuple[re.Pattern[str], str] | None = None,
) -> Any:
    """A field of ServeConfig: its default, its text in --help, and the values that are allowed. `within`: the
    least and the largest number. scaled: it may be written as 32k, as bytes may be in any case. made_absolute: it is a
    path, which must not depend on the working directory, since workers have others. `like`: what a text must match, and
    that in words."""
    allowed = {"choices": choices, "within": within, "scaled": scaled, "made_absolute": made_absolute, "like": like}
    return dataclasses.field(default=default, metadata={"help": help} | allowed)


def has_unit(field: dataclasses.Field[Any]) -> bool:
    """Whether the field's number may be written with a unit or a multiple."""
    return field.name.endswith("_bytes") or bool(field.metadata["scaled"])


def forms_of(field: dataclasses.Field[Any]) -> str:
    """What a number with a unit may look like, for messages."""
    if field.name.endswith("_bytes"):
        return SIZES
    return "a whole number, or one such as 32k (10**3 each) or 32K (2**10 each)"


def with_unit(text: str, *, of_bytes: bool) -> int | None:
    """The number that a text such as 4096, 32k or, of bytes, 8GB stands for; None for another text. No bit of a large
    number is lost. A fraction takes no binary multiple of one letter, since 1.5K is 1.5k to many."""
    found = _SCALED.fullmatch(text.strip())
    if found is None:
        return None
    number, fraction, unit = found.groups()
    if unit in MULTIPLES:
        factor = None if fraction and unit.isupper() else MULTIPLES[unit]
    else:
        factor = 1 if not unit and not fraction else UNITS.get(unit.lower()) if of_bytes else None
    return None if factor is None else int(Fraction(number) * factor)


def is_within(value: float, bounds: tuple[float, float]) -> bool:
    """A NaN is not."""
    return bounds[0] <= value <= bounds[1]


def range_text(bounds: tuple[float, float]) -> str:
    """The range for a message, such as 0.1 to 86400."""
    return " to ".join(str(int(bound)) if bound == int(bound) else f"{bound:g}" for bound in bounds)


def number_flag(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], Any]:
    """The `type` of a flag that takes a number from `least` to `most`."""
    word = TYPES[kind]

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {word}, got {reprlib.repr(text)}") from None
        if not is_within(value, (least, most)):
            raise argparse.ArgumentTypeError(f"expected {range_text((least, most))}, got {reprlib.repr(text)}")
        return value

    return read


def size_flag(least: int, most: int) -> Callable[[str], int]:
    """The `type` of a flag that takes bytes, with or without a unit."""

    def read(text: str) -> int:
        if (nbytes := with_unit(text, of_bytes=True)) is None:
            raise argparse.ArgumentTypeError(f"expected {SIZES}, got {reprlib.repr(text)}")
        if not is_within(nbytes, (least, most)):
            raise argparse.ArgumentTypeError(f"expected {range_text((least, most))}, got {reprlib.repr(text)}")
        return nbytes

    return read


def path_flag(text: str) -> Path:
    """The `type` of a flag that takes a path. An empty one, as of a variable that is not set, is the working directory
    to Path."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return Path(text)


def check_file(path: Path | None) -> None:
    """Raises ConfigError where --out cannot become a file, before there is something to lose."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"--out: {path} is a directory, expected a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--out: there is no directory {path.parent}")


def base_type(hint: Any) -> type:
    """The type of a setting without its `| None`."""
    if isinstance(hint, types.UnionType):
        return typing.cast(type, next(arm for arm in typing.get_args(hint) if arm is not type(None)))
    return typing.cast(type, hint)


def check_fields(settings: Any) -> None:
    """Check every field of a frozen dataclass of settings, and give it the value as it is to be. Raises ConfigError."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = _checked(field, hints[field.name], getattr(settings, field.name))
        object.__setattr__(settings, field.name, value)


def _checked(field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """`value` as the field has it. Raises ConfigError for a wrong type, and for a value that is not allowed."""
    if value is None and hint != base_type(hint):
        return None
    expected = base_type(hint)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        # an integer beyond the range of floats becomes infinity, which is refused below
        value = float(value) if abs(value) < 2**1000 else math.inf
    # a few lines of YAML can stand for a value of gigabytes, which must not be written out
    shown = reprlib.repr(value)
    if expected is int and isinstance(value, str) and has_unit(field):
        value = with_unit(value, of_bytes=field.name.endswith("_bytes"))
        if value is None:
            raise ConfigError(f"{field.name}: expected {forms_of(field)}, got {shown}")
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ConfigError(f"{field.name}: expected {TYPES[expected]}, got {in_yaml(value)}{_hint(expected, value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{field.name}: expected a finite number, got {shown}")
    if hint != expected and isinstance(value, str) and not value.strip():
        # such as of a variable that is not set; as a path it would be the working directory
        raise ConfigError(f"{field.name}: expected some text, got an empty one; leave it out for its default")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"{field.name}: expected one of {', '.join(choices)}, got {shown}")
    bounds = field.metadata["within"]
    if bounds is not None and not is_within(typing.cast(float, value), bounds):
        raise ConfigError(f"{field.name}: expected {range_text(bounds)}, got {shown}")
    like = field.metadata["like"]
    if like is not None and not like[0].fullmatch(value):
        raise ConfigError(f"{field.name}: expected {like[1]}, got {shown}")
    if field.metadata["made_absolute"]:
        value = os.path.abspath(os.path.expanduser(typing.cast(str, value)))
    return value


def in_yaml(value: object) -> str:
    """A value as a file has it, for messages."""
    if value is None:
        return "nothing"
    # YAML makes dates of texts that look like one
    return str(value) if isinstance(value, datetime.date) else in_json(value)


def _hint(expected: type, value: object) -> str:
    """What a message adds where a value of another type may be meant as one of the expected type."""
    if value is None:
        return "; leave the key out for its default"
    if expected is str:
        return "; write it in quotes" if isinstance(value, bool | int | float | datetime.date) else ""
    if expected is int and isinstance(value, float) and value.is_integer():
        return f"; write {value:.0f}"
    if isinstance(value, str) and (expected is bool or _is_number(value)):
        return "; write it without quotes" if expected is not bool or value.lower() in _BOOLEANS else ""
    return ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def names(field: str, text: str) -> tuple[str, ...]:
    """The names in a text, separated by commas or in a JSON list. Raises ConfigError."""
    if not text.lstrip().startswith("["):
        return tuple(filter(None, (part.strip() for part in text.split(","))))
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{field}: expected names separated by commas, or a JSON list of them, got {text[:80]!r}")
    return tuple(names)


class _Loader(yaml.SafeLoader):
    """The safe loader, which takes the last of several equal keys; that would hide a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and names.count(key.value) > 1:
                times = counted(names.count(key.value), "time")
                raise MarkedYAMLError(None, None, f"the key {key.value!r} is there {times}", key.start_mark)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
            # of a date or a number that cannot be
            text = f"the value {reprlib.repr(getattr(node, 'value', ''))} cannot be read"
            raise MarkedYAMLError(None, None, text, node.start_mark) from None


_YAML_FAULTS = {
    "mapping values are not allowed": "a colon does not fit here: indent all keys alike, and quote texts with a colon",
    "could not find expected ':'": "a colon is missing behind the key",
    "found character '\\t'": "a tab cannot stand here: indent with blanks",
    "found character": "a text that begins with this character must be in quotes",
    "found unexpected end of stream": "the closing quote of this text is missing",
    "expected ',' or ']'": "a comma or ] is missing of this list",
    "expected ',' or '}'": "a comma or } is missing of this object",
    "expected the node content": "a value is missing",
    "expected '<document start>'": "this does not fit the lines before: indent all keys alike",
    "expected <block end>": "this does not fit the lines before: indent all keys alike",
    "found unhashable key": "a key must be a text",
    "found undefined alias": "a text that begins with * must be in quotes",
    "could not determine a constructor": "a text that begins with ! must be in quotes",
}
"""What is wrong in plain words, by the beginning of PyYAML's message."""


def _yaml_fault(error: Exception) -> str:
    """What a message says of a file that PyYAML has refused with `error`."""
    if isinstance(error, MarkedYAMLError):
        problem = error.problem or error.context or "it cannot be read"
        known = (words for begin, words in _YAML_FAULTS.items() if problem.startswith(begin))
        # what is not closed is shown where it begins
        open_ = problem.startswith(("found unexpected end", "expected ',' or"))
        mark = (error.context_mark if open_ else None) or error.problem_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        return where + next(known, " ".join(problem.split()))
    if isinstance(error, ReaderError):
        return f"character {error.position + 1} is {error.character!r}, which no YAML file may have"
    if isinstance(error, UnicodeDecodeError):
        return why(error)
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"a value cannot be read: {' '.join(str(error).split())}"


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked. Raises ConfigError if it cannot be read or is no mapping."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {why(error)}") from None
    except Exception as error:  # noqa: BLE001 - besides its own errors, yaml raises whatever its converters do
        raise ConfigError(f"{path}: {_yaml_fault(error)}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        got = "a list" if isinstance(data, list) else f"the text {reprlib.repr(data)}"
        raise ConfigError(f"{path}: expected settings, in each line `key: value`, got {got}")
    return data


def by_fields(fields: Collection[dataclasses.Field[Any]], data: Mapping[Any, Any]) -> dict[str, Any]:
    """The values of a mapping by the names of their fields; `-` and `_` are the same in a key. They are not checked.

    Raises ConfigError for an unknown key, and for one that is given twice.
    """
    known = sorted(field.name for field in fields)
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = key.replace("-", "_") if isinstance(key, str) else ""
        if name not in known:
            hint = _misplaced(data, key, known) or _negated(fields, name, value) or meant(name, known)
            hint = hint or f"; known keys: {', '.join(known)}"
            raise ConfigError(f"unknown key {reprlib.repr(key)}{hint}")
        if name in values:
            raise ConfigError(f"{key!r} is given twice")
        values[name] = value
    return values


def _negated(fields: Collection[dataclasses.Field[Any]], name: str, value: object) -> str:
    """What a message says of a key such as no_standby, which is only a flag's name; empty for another key."""
    field = next((each for each in fields if f"no_{each.name}" == name), None)
    if field is None or not isinstance(field.default, bool):
        return ""
    return f": --{name.replace('_', '-')} is a flag; the key is {field.name}: {'true' if value is False else 'false'}"


def _misplaced(data: Mapping[Any, Any], key: object, known: Collection[str]) -> str:
    """What a message says of an unknown key of a file in which settings lie deeper, as in one for Serve; else empty."""
    for value in data.values():
        for part in value if isinstance(value, list) else ():
            if isinstance(part, Mapping) and _first_setting(part.get("args"), known) is not None:
                return "; this is a file for `serve deploy`: `emoe serve` takes what is below its `args`"
    if (first := _first_setting(data[key], known)) is None:
        return ""
    return f": settings are not nested here; write those below it, such as {first!r}, at the top level"


def _first_setting(value: object, known: Collection[str]) -> str | None:
    names = value if isinstance(value, Mapping) else ()
    return next((name for name in names if isinstance(name, str) and name.replace("-", "_") in known), None)
