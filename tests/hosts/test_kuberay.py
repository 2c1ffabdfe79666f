"""The application of the Kubernetes manifests, deployed by `serve deploy` to hosts instead of pods, and then edited."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest
import yaml

from elastic_moe.deploy.joined.environment import cluster_environment, haproxy_path
from tests.e2e.conftest import PLAIN, READY_S, Server
from tests.hosts.cluster import HostCluster
from tests.hosts.streams import Streaming
from tests.paths import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.hosts, pytest.mark.timeout(900)]

KEY, ADMIN = "user", "admin"
"""Of the Secret that the manifests name."""
BODY = {"prompt": "And it came to pass", "temperature": 0, "ignore_eos": True}


def application(**args: Any) -> str:
    """`serveConfigV2` of the base, with other `args`."""
    service = yaml.safe_load((ROOT / "k8s/base/rayservice.yaml").read_text())
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    config["applications"][0]["args"] |= args
    return yaml.safe_dump(config)


def call(server: Server, method: str, path: str, key: str = "", body: Any = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.request(method, server.url + path, json=body, headers=headers, timeout=60, verify=PLAIN)


def serves(server: Server, workers: int) -> bool:
    """Whether so many workers serve, and Serve takes the application for running."""
    try:
        if call(server, "GET", "/ready").status_code != 200:
            return False
    except httpx.HTTPError:
        return False
    placed = call(server, "GET", "/admin/placement").json()["workers"]
    return len(placed) == workers


class Asking(threading.Thread):
    """Asks again and again until it is told to stop. `answers` has the status and text of each."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server = server
        self.answers: list[tuple[int, str]] = []
        self.longest_s = 0.0
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.02):
            begin = time.monotonic()
            try:
                answer = call(self._server, "POST", "/v1/completions", KEY, {**BODY, "max_tokens": 8})
                text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text
                self.answers.append((answer.status_code, text))
            except httpx.HTTPError as error:
                self.answers.append((0, repr(error)))
            self.longest_s = max(self.longest_s, time.monotonic() - begin)


def test_the_application_of_the_manifests_is_deployed_and_edited(cluster: HostCluster) -> None:
    # what the image and the Secret put into the pods' environment
    cluster.env |= cluster_environment(haproxy_path()) | {"EMOE_API_KEY": KEY, "EMOE_ADMIN_API_KEY": ADMIN}
    cluster.start_head(dashboard=True)
    for number in (1, 2):
        cluster.join(number, cpus=2)
    server = cluster.deploy(application())
    server.wait("two workers", lambda: serves(server, 2), READY_S, every_s=0.5)
    assert call(server, "POST", "/v1/completions", body=BODY).status_code == 401
    expected = call(server, "POST", "/v1/completions", KEY, {**BODY, "max_tokens": 8}).json()["choices"][0]["text"]
    assert call(server, "POST", "/admin/scale", KEY, {"workers": 1}).status_code in (401, 403), "an admin's business"
    config = call(server, "GET", "/admin/config", KEY).json()["settings"]
    assert (config["workers"], config["max_workers"], config["api_replicas"]) == (2, 4, 2)
    # no worker's pod holds connections
    replicas = [host.run("ps", "-e", "-o", "args").count("ServeReplica:emoe:api") for host in cluster.lab.hosts]
    assert replicas == [2, 0, 0]

    model = call(server, "GET", "/v1/models", KEY).json()["data"][0]["id"]
    asking, streaming = Asking(server), Streaming(server, [17, 42, 99, 7], 200, model=model, key=KEY)
    cluster.deploy(application(workers=1, max_workers=2))
    server.wait("the edit", lambda: serves(server, 1), READY_S, every_s=0.5)
    time.sleep(2)
    asking.over.set()
    asking.join(60)
    gap_s, count = streaming.end(), len(streaming.streams)
    print(f"\n{'serveConfigV2 with other workers':32} longest answer {asking.longest_s:5.2f} s", end=", ")
    print(f"longest gap in {count} streams {gap_s:5.2f} s")
    assert gap_s < 4
    assert set(asking.answers) == {(200, expected)}
