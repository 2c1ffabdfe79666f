"""Keys of the API: given as a setting, in a file, or in an environment variable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError, why

VARIABLES = {
    "api_key": "EMOE_API_KEY",
    "admin_api_key": "EMOE_ADMIN_API_KEY",
    "admin_read_key": "EMOE_ADMIN_READ_KEY",
}
"""Setting -> the environment variable that is used if neither the setting nor its file is given."""


def with_keys(config: ServeConfig, environ: Mapping[str, str]) -> ServeConfig:
    """`config` with the keys from files and from `environ` filled in, and without the names of the files.

    A setting is preferred to its variable. Raises ConfigError if a key is given both as a setting and as a file, a
    file cannot be read, or a key has characters that no client can send.
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
        raise ConfigError(f"{name}_file: {file}: {why(error)}") from None


def _check(source: str, key: str) -> None:
    """Raises ConfigError, without the key in its message."""
    if not key or not all("!" <= letter <= "~" for letter in key):
        raise ConfigError(f"{source}: expected a key of one or more ASCII letters, digits and signs, without spaces")


def authorization(config: ServeConfig) -> dict[str, str]:
    """The header that our own processes send with GET /admin and /metrics; empty if these need no key."""
    return {} if config.admin_read_key is None else {"Authorization": f"Bearer {config.admin_read_key}"}
