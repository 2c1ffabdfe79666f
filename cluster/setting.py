"""One setting of ServeConfig (cluster/config.py): how it is declared, read and checked.

A field's metadata carries the help text, the least value and, where the values are few, the choices; the command line
is made from it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import reprlib
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from elastic_moe.cluster.errors import ConfigError, why

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")


def setting(default: Any, help: str, *, choices: tuple[str, ...] = (), at_least: float | None = None) -> Any:
    """A field of ServeConfig: its default, its text in --help, and the values that are allowed."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "at_least": at_least})


def bytes_with_unit(text: str) -> int | None:
    """The bytes that a number and a unit stand for, such as 8GB; None for another text."""
    found = _SIZE.fullmatch(text.strip())
    return int(float(found[1]) * UNITS[found[2].upper()]) if found and found[2].upper() in UNITS else None


def base_type(hint: Any) -> type:
    """The type of a setting without its `| None`."""
    if isinstance(hint, types.UnionType):
        return typing.cast(type, next(arm for arm in typing.get_args(hint) if arm is not type(None)))
    return typing.cast(type, hint)


def checked(field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """`value` as the field has it. Raises ConfigError for a wrong type, and for a value that is not allowed."""
    if value is None and hint != base_type(hint):
        return None
    expected = base_type(hint)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        # an integer beyond the range of floats becomes infinity, which is refused below
        value = float(value) if abs(value) < 2**1000 else math.inf
    if expected is int and isinstance(value, str) and field.name.endswith("_bytes"):
        nbytes = bytes_with_unit(value)
        value = value if nbytes is None else nbytes
    # a few lines of YAML can stand for a value of gigabytes, which must not be written out
    shown = reprlib.repr(value)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ConfigError(f"{field.name}: expected {expected.__name__}, got {shown}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{field.name}: expected a finite number, got {shown}")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"{field.name}: expected one of {', '.join(choices)}, got {shown}")
    at_least = field.metadata["at_least"]
    # written so that a NaN fails too
    if at_least is not None and not value >= at_least:
        raise ConfigError(f"{field.name}: expected at least {at_least:g}, got {shown}")
    return value


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


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked. Raises ConfigError if it cannot be read or is no mapping."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {why(error)}") from None
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, yaml.YAMLError) as error:
        # besides its own errors, yaml raises whatever its converters of scalars do
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    except Exception as error:  # noqa: BLE001 - what Python raises of a date, a number or nesting that cannot be
        raise ConfigError(f"{path}: a value cannot be read: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    return data
