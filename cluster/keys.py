"""Keys of the API: given as a setting, in a file, or in an environment variable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError

VARIABLES = {
    "api_key": "EMOE_API_KEY",
    "admin_api_key": "EMOE_ADMIN_API_KEY",
    "admin_read_key": "EMOE_ADMIN_READ_KEY",
}
"""Setting: the environment variable that stands in for it."""


def with_keys(config: ServeConfig, environ: Mapping[str, str]) -> ServeConfig:
    """`config` with every key that a file or `environ` holds, and without the files' names.

    A setting wins over the variable. Raises ConfigError where a key is given twice, a file cannot be read, or a key
    is none that a client could send.
    """
    found: dict[str, str | None] = {}
    for name, variable in VARIABLES.items():
        key, file = getattr(config, name), getattr(config, f"{name}_file")
        if key is not None and file is not None:
            raise ConfigError(f"{name}_file: {name} is given too; expected one of them")
        source = name
        if file is not None:
            source, key = f"{name}_file: {file}", _read(name, file)
        elif key is None and environ.get(variable):
            source, key = f"${variable}", environ[variable]
        if key is not None:
            _check(source, key)
        found |= {name: key, f"{name}_file": None}
    return dataclasses.replace(config, **found)  # type: ignore[arg-type]


def _read(name: str, file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}_file: {file}: {getattr(error, 'strerror', None) or error}") from None


def _check(source: str, key: str) -> None:
    """The message must not show the key."""
    if not key or not all("!" <= letter <= "~" for letter in key):
        raise ConfigError(f"{source}: expected a key of one or more ASCII letters, digits and signs, without spaces")


def authorization(config: ServeConfig) -> dict[str, str]:
    """The header with which this project's own processes ask GET /admin and /metrics; empty where that is open."""
    return {} if config.admin_read_key is None else {"Authorization": f"Bearer {config.admin_read_key}"}
