"""GET /admin/events and the page's files, in process."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import NotReadyError, RequestError
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.views import ClusterView, EngineStatus, OperationKind, Readiness, Revision
from elastic_moe.deploy.api.events import MAX_LISTENERS, QUEUE, Hub, ListenerStream
from elastic_moe.deploy.api.service import Service
from elastic_moe.deploy.page.files import FOLDER, read_files
from elastic_moe.optimizer import PLANNERS
from tests.deploy.moving_cluster import MovingCluster, SeveralGroups

Call = Callable[..., httpx.Response]
SOON_S = 20.0


def service_of(backend: MovingCluster, model_dir: Path) -> Service:
    return Service(ServeConfig(), backend, str(model_dir))


def decoded(event: bytes) -> tuple[str, dict[str, Any]]:
    name, data = event.decode().strip().split("\n")
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def events_of(hub: Hub) -> AsyncGenerator[bytes, None]:
    response = hub.listen()
    assert isinstance(response, ListenerStream)
    return response._events


def run(work: Callable[[], Any]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(SOON_S):
            await work()

    asyncio.run(bounded())


def test_a_snapshot_comes_first_and_then_what_changes(model_dir: Path) -> None:
    backend = MovingCluster()

    async def work() -> None:
        stream = events_of(Hub(service_of(backend, model_dir), poll_s=0.01))
        name, first = decoded(await anext(stream))
        assert name == "snapshot"
        assert {"members", "map", "load", "workers", "status", "model", "placement"} <= set(first["state"])
        backend.dead.add("w2")
        backend.begin(OperationKind.RECOVER, "w2 is lost")
        while True:
            name, event = decoded(await anext(stream))
            assert name == "change"
            assert "model" not in event["state"]
            if "workers" in event["state"]:
                break
        assert set(event["state"]["workers"]) == {"w2"}
        assert event["state"]["workers"]["w2"]["state"] == "dead"
        assert event["point"]["marks"] == [["recover", "w2 is lost"]]
        await stream.aclose()

    run(work)


def test_what_the_page_has_is_not_asked_for_again(model_dir: Path) -> None:
    class Still(MovingCluster):
        known: ClassVar[list[Revision]] = []

        async def cluster(self, known: Revision) -> ClusterView:
            self.known.append(known)
            return await super().cluster(known)

    backend = Still(looks_per_report=10**9)

    async def work() -> None:
        stream = events_of(Hub(service_of(backend, model_dir), poll_s=0.01))
        _, first = decoded(await anext(stream))
        assert set(first["state"]["map"]) == {str(layer) for layer in range(backend.layers)}
        assert first["state"]["planners"]["list"][0] == "auto"
        assert set(first["state"]["planners"]["list"]) == set(PLANNERS)
        for _ in range(3):
            _, event = decoded(await anext(stream))
            assert not {"map", "load", "planners"} & set(event["state"])
        backend.swap()
        while "map" not in event["state"]:
            _, event = decoded(await anext(stream))
        while backend.known[-1].placement != (Epoch(2), False, None, None):
            await anext(stream)
        await stream.aclose()

    run(work)
    assert backend.known[0] == Revision()


def test_there_is_a_point_for_each_report_of_the_engine(model_dir: Path) -> None:
    """A rate between two answers with the same report would be zero or infinite."""

    class Seldom(MovingCluster):
        async def cluster(self, known: Revision) -> ClusterView:
            view = await super().cluster(known)
            return replace(view, status_at_s=float(self.looks // 3))

    async def work() -> None:
        stream = events_of(Hub(service_of(Seldom(), model_dir), poll_s=0.01))
        await anext(stream)
        points = [decoded(await anext(stream))[1]["point"] for _ in range(9)]
        assert sum(point is not None for point in points) == 3
        await stream.aclose()

    run(work)


def test_each_group_has_a_state_of_its_own(model_dir: Path) -> None:
    second = MovingCluster(size=2, state=Readiness(ready=False, reason="starting"))
    service = service_of(SeveralGroups(others=(second,)), model_dir)

    async def work() -> None:
        await service.begin()
        for engine, workers, reason in ((0, 4, "serving"), (1, 2, "starting")):
            stream = events_of(Hub(service, poll_s=0.01, engine=engine))
            _, first = decoded(await anext(stream))
            assert first["state"]["engines"] == {"count": 2, "number": engine}
            assert (len(first["state"]["workers"]), first["state"]["status"]["reason"]) == (workers, reason)
            await stream.aclose()
        service.close()

    run(work)


def test_a_page_follows_the_number_of_groups(model_dir: Path) -> None:
    backend = SeveralGroups(others=(MovingCluster(size=2),))
    service = service_of(backend, model_dir)

    async def until(stream: AsyncGenerator[bytes, None], section: str, name: str, wanted: Any) -> None:
        while True:
            _, event = decoded(await anext(stream))
            if event["state"].get(section, {}).get(name) == wanted:
                return

    async def work() -> None:
        await service.begin()
        streams = [events_of(Hub(service, poll_s=0.01, engine=engine)) for engine in (0, 1)]
        for stream in streams:
            await anext(stream)
        backend.others += (MovingCluster(size=2),)
        await until(streams[0], "engines", "count", 3)
        backend.others = ()
        await until(streams[0], "engines", "count", 1)
        await until(streams[1], "status", "reason", "this group was retired, and is gone")
        for stream in streams:
            await stream.aclose()
        service.close()

    run(work)


def test_a_group_that_is_not_there_has_no_events(call: Call) -> None:
    refused = call("GET", "/admin/events?engine=1")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "engine")


def test_a_page_that_opens_later_gets_the_curves_so_far(model_dir: Path) -> None:
    async def work() -> None:
        hub = Hub(service_of(MovingCluster(), model_dir), poll_s=0.01)
        first, second = events_of(hub), events_of(hub)
        for _ in range(4):
            await anext(first)
        name, event = decoded(await anext(second))
        assert name == "snapshot"
        assert len(event["history"]) >= 4
        await first.aclose()
        await second.aclose()

    run(work)


def test_a_hundred_pages_ask_as_often_as_one_and_none_asks_nothing(model_dir: Path) -> None:
    backend = MovingCluster()

    async def work() -> None:
        hub = Hub(service_of(backend, model_dir), poll_s=0.01)
        assert not hub.is_looking
        streams = [events_of(hub) for _ in range(100)]
        for _ in range(3):
            # one question for each round of a hundred events
            await asyncio.gather(*map(anext, streams))
        assert backend.looks <= 8
        for stream in streams:
            await stream.aclose()
        assert not hub.is_looking
        asked = backend.looks
        await asyncio.sleep(0.1)
        assert backend.looks == asked

    run(work)


def test_a_page_that_does_not_read_is_cut_and_the_others_go_on(model_dir: Path) -> None:
    async def work() -> None:
        hub = Hub(service_of(MovingCluster(), model_dir), poll_s=0.001)
        stuck = hub.listen()
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) > 2:
                await asyncio.Event().wait()

        async def receive() -> Any:
            return await asyncio.Event().wait()

        reading = asyncio.create_task(_count(events_of(hub), 3 * QUEUE))
        # ends by itself, though nothing is read and nobody hangs up
        await stuck({"type": "http"}, receive, send)
        assert await reading == 3 * QUEUE
        assert len(sent) == 3

    run(work)


async def _count(stream: AsyncGenerator[bytes, None], wanted: int) -> int:
    seen = 0
    async for _ in stream:
        seen += 1
        if seen == wanted:
            await stream.aclose()
    return seen


def test_pages_are_bounded_in_number(model_dir: Path) -> None:
    async def work() -> None:
        hub = Hub(service_of(MovingCluster(), model_dir), poll_s=0.01)
        streams = [events_of(hub) for _ in range(MAX_LISTENERS)]
        await asyncio.gather(*map(anext, streams))
        with pytest.raises(RequestError, match="close one") as refused:
            hub.listen()
        assert refused.value.status == 503
        for stream in streams:
            await stream.aclose()
        assert hub.listen()

    run(work)


def test_a_cluster_that_cannot_answer_is_no_end_of_the_stream(model_dir: Path) -> None:
    class Lost(MovingCluster):
        lost = False

        async def status(self) -> EngineStatus:
            if self.lost:
                raise NotReadyError("there is no engine at the moment")
            return await super().status()

    backend = Lost()

    async def work() -> None:
        stream = events_of(Hub(service_of(backend, model_dir), poll_s=0.01))
        await anext(stream)
        backend.lost = True
        # one may have been on its way
        await anext(stream)
        assert decoded(await anext(stream))[1]["point"] is None
        # what begins meanwhile is marked when there are points again
        backend.begin(OperationKind.RECOVER, "the engine is lost")
        for _ in range(3):
            await anext(stream)
        backend.lost = False
        points = [decoded(await anext(stream))[1]["point"] for _ in range(4)]
        assert [["recover", "the engine is lost"]] in [point["marks"] for point in points if point and "marks" in point]
        await stream.aclose()

    run(work)


def test_a_server_that_stops_does_not_wait_for_open_pages(model_dir: Path) -> None:
    async def work() -> None:
        service = service_of(MovingCluster(), model_dir)
        hub = Hub(service, poll_s=0.01)
        stream = events_of(hub)
        await anext(stream)
        service.draining = True
        async for _ in stream:
            pass
        assert not hub.is_looking
        with pytest.raises(NotReadyError, match="shutting down"):
            hub.listen()

    run(work)


def test_the_page_and_its_files(call: Call) -> None:
    page = call("GET", "/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert call("GET", "/", headers={"if-none-match": page.headers["etag"]}).status_code == 304
    for name in read_files():
        assert call("GET", f"/page/{name}").headers["x-content-type-options"] == "nosniff"
    for name in ("none.js", "..%2fapi.py", "%2e%2e/api.py"):
        assert call("GET", f"/page/{name}").status_code == 404


def test_the_page_needs_no_key_and_its_data_does(call: Call) -> None:
    config = {"api_key": "a", "admin_api_key": "k", "admin_read_key": "r"}
    assert call("GET", "/", config=config).status_code == 200
    assert call("GET", "/page/main.js", config=config).status_code == 200
    assert call("GET", "/admin/events", config=config).status_code == 401


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost", 202),
        ("http://localhost:81", 403),
        ("http://localhost.evil.example", 403),
        ("null", 403),
        ("http://evil.example", 403),
    ],
)
def test_our_own_page_may_change_the_cluster_without_a_key(call: Call, origin: str, status: int) -> None:
    assert call("POST", "/admin/rebalance", json={}, headers={"origin": origin}).status_code == status


def test_a_dry_run_returns_a_placement_that_can_be_put(call: Call) -> None:
    backend = MovingCluster()
    preview = call("POST", "/admin/rebalance", json={"dry_run": True}, backend=backend).json()
    assert preview["placement"]["physical_to_logical_map"] == backend.swapped().physical_to_logical_map.tolist()
    put = call("PUT", "/admin/placement", json=preview["placement"], backend=backend)
    assert put.status_code == 202


def test_the_page_needs_nothing_from_elsewhere_and_little_in_all() -> None:
    """Under 150 kB; every file that is named is there; no address of another server, nothing inline, no innerHTML."""
    files = {path.name: path.read_text() for path in FOLDER.iterdir()}
    assert sum(len(text.encode()) for text in files.values()) < 150_000
    index = files["index.html"]
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|https?://", index)
    for name in re.findall(r'(?:src|href)="page/([^"]+)"', index):
        assert name in files
    for name, text in files.items():
        if name.endswith(".js"):
            for imported in re.findall(r'from "\./([^"]+)"', text):
                assert imported in files, f"{name} imports {imported}"
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), (
                name
            )
            assert not re.search(r"https?://\w", text), name
