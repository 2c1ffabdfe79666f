"""Redeploys on a joined cluster, as `serve deploy` makes them: settings are taken over, models handed over to.

Serve's own HTTP proxy is used, since this process starts Serve.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray.cluster_utils import Cluster

from elastic_moe.actors.remote import generations
from elastic_moe.cluster.errors import ConfigError
from elastic_moe.deploy.launch.local_ray import free_port
from elastic_moe.deploy.launch.ray_environment import patience
from tests.e2e.conftest import PLAIN, READY_S, Reference, load_reference
from tests.e2e.streams import PROMPT
from tests.model.families import tiny_checkpoint

with warnings.catch_warnings():
    # Serve's import warns of its own use of pydantic
    warnings.simplefilter("ignore")
    from ray import serve

    from elastic_moe.deploy.launch.serve_app import build_app

pytestmark = [
    pytest.mark.ray,
    pytest.mark.hosts,
    pytest.mark.timeout(600),
    # Ray leaves sockets and subprocesses to the interpreter's end
    pytest.mark.filterwarnings("default::ResourceWarning"),
    pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"),
]

TOKENS = 24


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve's address, on a cluster with a head without cores and room for two models."""
    for name, value in {**patience(), "RAY_AUTH_MODE": "disabled"}.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=3)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def deploy(checkpoint: Path, name: str, **settings: Any) -> None:
    """Returns once Serve has the answer: the application runs, or it could not be deployed."""
    args = {"model": str(checkpoint), "served_model_name": name, "dtype": "float32", "max_model_len": 256}
    args |= {"kv_cache_memory_bytes": 20_000_000, "rebalance_interval": 0, "workers": 1, **settings}
    serve.run(build_app(args), name="emoe", route_prefix="/")


def get(url: str, path: str) -> Any:
    return httpx.get(url + path, timeout=30, verify=PLAIN).json()


class Asking(threading.Thread):
    """Asks both models again and again. `answers` has (model, status, text) of each; status 0 is a lost connection."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self.answers: list[tuple[str, int, str]] = []
        self.longest_s = 0.0
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.05):
            for name in ("first", "second"):
                body = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
                begin = time.monotonic()
                self.answers.append((name, *self._ask(body)))
                self.longest_s = max(self.longest_s, time.monotonic() - begin)

    def _ask(self, body: dict[str, Any]) -> tuple[int, str]:
        try:
            answer = httpx.post(f"{self._url}/v1/completions", json=body, timeout=120, verify=PLAIN)
        except httpx.HTTPError as error:
            return 0, repr(error)
        text: str = answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text
        return answer.status_code, text

    def stop(self) -> list[tuple[str, int, str]]:
        self.over.set()
        self.join(120)
        assert not self.is_alive(), "it waits for an answer"
        return self.answers


def test_redeploys(url: str, reference: Reference, tmp_path: Path) -> None:
    first, second = reference, load_reference(tiny_checkpoint("mixtral", tmp_path))
    texts = {name: r.text(r.greedy(PROMPT, TOKENS)) for name, r in (("first", first), ("second", second))}
    deploy(first.checkpoint, "first")
    # the application runs: so it can serve
    assert httpx.get(f"{url}/ready", timeout=30, verify=PLAIN).status_code == 200
    before = get(url, "/admin/config")
    asking = Asking(url)

    deploy(first.checkpoint, "first", workers=2, drain_timeout=1.0)
    told = get(url, "/admin/config")
    assert told["generation"] == before["generation"]
    assert (told["settings"]["workers"], told["settings"]["drain_timeout"]) == (2, 1.0)
    deadline = time.monotonic() + READY_S
    while len(get(url, "/admin/placement")["workers"]) != 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    print(f"\nother workers: the longest answer took {asking.longest_s:.2f} s")

    # more workers than experts: nothing is deployed
    with pytest.raises(ConfigError, match="workers: 99 is more than"):
        deploy(first.checkpoint, "first", workers=99)
    assert get(url, "/admin/config")["settings"]["workers"] == 2

    deploy(second.checkpoint, "second")
    assert get(url, "/v1/models")["data"][0]["id"] == "second"
    told = get(url, "/admin/config")
    assert (told["model_dir"], told["settings"]["workers"]) == (str(second.checkpoint), 1)
    time.sleep(1)
    answers = asking.stop()
    check_each_name_got_its_own_model(answers, texts)
    print(f"another model: the longest answer took {asking.longest_s:.2f} s")
    end_of_the_old_cluster()


def test_another_model_without_room_for_both(url: str, reference: Reference, tmp_path: Path) -> None:
    """The old one ends its requests and then itself, and those that come meanwhile wait for the new one."""
    first, second = reference, load_reference(tiny_checkpoint("mixtral", tmp_path))
    texts = {name: r.text(r.greedy(PROMPT, TOKENS)) for name, r in (("first", first), ("second", second))}
    deploy(first.checkpoint, "first", workers=2)
    asking = Asking(url)
    deploy(second.checkpoint, "second", workers=2, handover_timeout=3.0)
    assert httpx.get(f"{url}/ready", timeout=30, verify=PLAIN).status_code == 200
    time.sleep(1)
    answers = asking.stop()
    check_each_name_got_its_own_model(answers, texts)
    print(f"\nno room for both: the longest answer took {asking.longest_s:.2f} s")
    end_of_the_old_cluster()


def test_groups_come_and_go(url: str, reference: Reference) -> None:
    text = reference.text(reference.greedy(PROMPT, TOKENS))
    deploy(reference.checkpoint, "first")
    before = get(url, "/admin/config")
    asking = Asking(url)
    # by calls, and then by settings, which count from the next change of their own number on
    for number in (2, 1):
        answer = httpx.post(f"{url}/admin/engines", json={"data_parallel_size": number}, timeout=30, verify=PLAIN)
        assert answer.status_code == 202
        wait_for_groups(url, number)
        time.sleep(0.5)
    for number in (2, 1):
        deploy(reference.checkpoint, "first", data_parallel_size=number)
        wait_for_groups(url, number)
    assert get(url, "/admin/config")["generation"] == before["generation"]
    time.sleep(1)
    answers = asking.stop()
    assert {(name, status) for name, status, _ in answers} == {("first", 200), ("second", 404)}
    assert {answer for _, status, answer in answers if status == 200} == {text}
    print(f"\ngroups: the longest answer took {asking.longest_s:.2f} s")
    # the second group ends when no replica uses it any more
    end_of_the_old_cluster()


def wait_for_groups(url: str, number: int) -> None:
    deadline = time.monotonic() + READY_S
    while [engine["ready"] for engine in get(url, "/admin/engines")] != [True] * number:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def check_each_name_got_its_own_model(answers: Sequence[tuple[str, int, str]], texts: Mapping[str, str]) -> None:
    """Or has heard that there is no such model. There was no other answer."""
    assert {(name, status) for name, status, _ in answers} == {
        ("first", 200), ("first", 404), ("second", 200), ("second", 404)
    }  # fmt: skip
    assert {(name, text) for name, status, text in answers if status == 200} == set(texts.items())


def end_of_the_old_cluster() -> None:
    deadline = time.monotonic() + 60
    while len(generations.coordinators()) > 1:
        assert time.monotonic() < deadline, "the old cluster goes on"
        time.sleep(0.5)
    serve.delete("emoe")
    assert not generations.coordinators()
