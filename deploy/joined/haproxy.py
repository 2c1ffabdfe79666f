"""The command `emoe-haproxy`: on the nodes of a Ray cluster, Serve runs it as if it were HAProxy.

It corrects the configuration that Serve has written, as a server with a Ray of its own does (deploy/launch/haproxy.py),
and becomes HAProxy. The address that clients connect to stays the one of Serve's http_options. Two settings of the
server that HAProxy needs come from the environment of `ray start`: EMOE_FORWARDED_ALLOW_IPS and
EMOE_MAX_CONNECTIONS_PER_ADDRESS.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError
from elastic_moe.deploy.launch.haproxy import corrections
from elastic_moe.deploy.launch.haproxy_config import Corrections, UnknownConfiguration, start, write_pages
from elastic_moe.deploy.launch.ray_private import haproxy_binary

VARIABLES = {
    "forwarded_allow_ips": "EMOE_FORWARDED_ALLOW_IPS",
    "max_connections_per_address": "EMOE_MAX_CONNECTIONS_PER_ADDRESS",
}
"""Setting -> the environment variable that sets it for HAProxy."""


def main() -> NoReturn:
    """Does not return. Ends with a line that says why, where HAProxy cannot be started as it must be."""
    arguments = sys.argv[1:]
    try:
        wanted = corrections_of(arguments, os.environ)
        write_pages(wanted.run_dir)
        start(wanted, arguments)
    except (ConfigError, UnknownConfiguration) as error:
        sys.exit(f"emoe-haproxy: {error}")


def corrections_of(arguments: Sequence[str], environ: Mapping[str, str]) -> Corrections:
    """What to change in the configuration that `arguments` name. Error pages lie beside it. Raises ConfigError."""
    configured = [path for path in arguments if path.endswith(".cfg")]
    directory = Path(configured[0]).resolve().parent if configured else Path.cwd()
    settings: dict[str, str | int] = {name: environ[key] for name, key in VARIABLES.items() if environ.get(key)}
    if text := settings.get("max_connections_per_address"):
        if not str(text).isdecimal():
            raise ConfigError(f"{VARIABLES['max_connections_per_address']}: expected a number, got {text!r}")
        settings["max_connections_per_address"] = int(text)
    config = ServeConfig.from_mapping(settings, source="environment")
    return replace(corrections(config, directory, binary=haproxy_binary()), host=None)
