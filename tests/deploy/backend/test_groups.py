"""Two groups behind one Backend, whose engines and workers are lost under requests. No Ray: handles are stand-ins."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from elastic_moe.actors.remote.ask import Remote
from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.messages.requests import GenerateRequest, RequestId, SamplingParams
from elastic_moe.cluster.messages.views import EngineStatus, Readiness
from elastic_moe.cluster.placement import WorkerId
from elastic_moe.deploy.backend import engine_client, groups, ray_backend, router
from elastic_moe.deploy.backend.groups import Groups, together
from elastic_moe.deploy.backend.ray_backend import RayBackend
from elastic_moe.deploy.backend.routing import CHUNK
from tests.deploy.backend.standins import ENGINES, Coordinator, Engine, release, until

LENGTH = 20
EXPECTED = [100 + n for n in range(LENGTH)]
PROMPT = tuple(range(2 * CHUNK))
FIRST = "c"
"""A request of this name goes to the first of two groups that are equally busy."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "RETRY_S", 0.005)
    monkeypatch.setattr(engine_client, "ADOPT_S", 0.0)
    monkeypatch.setattr(ray_backend, "READINESS_S", 0.005)
    monkeypatch.setattr(ray_backend, "MOVE_S", 0.03)
    monkeypatch.setattr(router, "LOOK_S", 0.01)


class Cluster:
    """Also the directory of its groups."""

    def __init__(self, number: int) -> None:
        self.engines: list[Engine] = []
        self.coordinators: list[Coordinator] = []
        self.number = number
        self.fails = 0
        """Number of times that coordinators cannot be made."""
        self.room = 100
        """Number of groups that may start at a time."""
        self.loading: str | None = None
        """Why new groups do not serve yet."""
        self.left: list[int] = []
        """Arguments of `leave`."""
        self.find(number)
        self.backend = Groups(number, self._make, self, "replica")
        self.router = self.backend._router

    def wanted(self) -> int:
        return self.number

    def want(self, number: int) -> None:
        self.number = number

    def find(self, number: int) -> None:
        if self.fails:
            self.fails -= 1
            raise TimeoutError
        for group in range(number):
            if group == len(self.engines):
                self.engines.append(Engine())
                self.coordinators.append(Coordinator(self.engines[group]))
                self.coordinators[group].reason = self.loading

    def at_once(self) -> int:
        return self.room

    def leave(self, number: int) -> None:
        self.left.append(number)

    def _make(self, number: int, lost: Callable[[], None]) -> RayBackend:
        coordinator = Remote[Coordinator](self.coordinators[number])
        return RayBackend(
            coordinator,  # type: ignore[arg-type]
            recovery_timeout_s=600.0,
            number=number,
            lost=lost,
        )

    async def serves(self) -> None:
        await until(lambda: all(state.serves for state in self.router.states()))

    def ask(self, name: str, prompt: tuple[int, ...] = (1, 2), *, lasting: bool = False) -> asyncio.Task[list[int]]:
        params = SamplingParams(max_tokens=LENGTH, seed=3)
        request = GenerateRequest(request_id=RequestId(name), prompt_token_ids=prompt, params=params, lasting=lasting)

        async def collect() -> list[int]:
            tokens: list[int] = []
            async for output in self.backend.engine.generate(request):
                assert output.offset == len(tokens)
                tokens += output.token_ids
            return tokens

        return asyncio.create_task(collect())

    def names(self) -> list[set[str]]:
        """The requests that run in each group."""
        return [set(engine.running) for engine in self.engines]


def run(scenario: Callable[[Cluster], Awaitable[None]], number: int = 2) -> None:
    async def work() -> None:
        cluster = Cluster(number)
        cluster.backend.begin()
        try:
            async with asyncio.timeout(20):
                await cluster.serves()
                await scenario(cluster)
        finally:
            await cluster.backend.end()
            while ENGINES:
                ENGINES.pop().end()
            await asyncio.sleep(0)

    asyncio.run(work())


def test_requests_spread_by_load_and_prefixes_stay_together() -> None:
    async def scenario(cluster: Cluster) -> None:
        answers = [cluster.ask(f"r{n}") for n in range(4)]
        await until(lambda: [len(names) for names in cluster.names()] == [2, 2])
        prompts = [PROMPT, (7, *PROMPT), (*PROMPT, 5), (7, *PROMPT, 6)]
        for number, prompt in enumerate(prompts):
            answers.append(cluster.ask(f"p{number}", prompt))
            await until(lambda number=number: any(f"p{number}" in n for n in cluster.names()))  # type: ignore[misc]
        first, second = (next(names for names in cluster.names() if name in names) for name in ("p0", "p1"))
        assert {"p0", "p2"} <= first
        assert {"p1", "p3"} <= second
        for engine in cluster.engines:
            release(engine, 100)
        assert await asyncio.gather(*answers) == [EXPECTED] * 8

    run(scenario)


def test_a_conversation_goes_on_where_its_answer_was_made() -> None:
    async def scenario(cluster: Cluster) -> None:
        for engine in cluster.engines:
            release(engine, 300)
        beginning = tuple(range(CHUNK - LENGTH))
        busy = cluster.ask("busy", (9,))
        assert await cluster.ask("turn", beginning) == EXPECTED
        # less than a chunk was known before the answer came
        assert await cluster.ask("next", (*beginning, *EXPECTED, 1)) == EXPECTED
        await busy
        where = [{request.request_id for request in engine.submitted} for engine in cluster.engines]
        assert {"turn", "next"} in where

    run(scenario)


@pytest.mark.parametrize("made", [0, 7, LENGTH - 1])
def test_a_lost_engine_costs_no_token(made: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        answers = [cluster.ask(name) for name in "abcd"]
        await until(lambda: [len(names) for names in cluster.names()] == [2, 2])
        lost, other = cluster.engines
        release(lost, made)
        await until(lambda: all(n == made for _, n in lost.running.values()) and lost.steps.locked())
        await asyncio.sleep(0.02)
        moved = set(lost.running)
        lost.kill()
        # the group has no other engine: its coordinator goes on naming the dead one
        await until(lambda: set(other.running) >= moved)
        resumed = [r for r in other.submitted if r.request_id in moved]
        assert {len(r.output_token_ids) for r in resumed} == {made}
        release(other, 100)
        assert await asyncio.gather(*answers) == [EXPECTED] * 4
        assert cluster.backend.engine.resumed == 2
        # new ones avoid the lost group too
        assert await cluster.ask("late") == EXPECTED

    run(scenario)


def test_the_load_is_what_each_engine_said_last_even_if_another_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(router, "LOAD_S", 0.005)

    async def scenario(cluster: Cluster) -> None:
        silent, busy, _ = cluster.engines
        silent.silent = True
        busy.load = EngineStatus(running={WorkerId("w0"): 5, WorkerId("w1"): 4}, waiting=1, replicas=3)
        await until(lambda: cluster.router.states()[1].load == 5)
        busy.load = EngineStatus(waiting=2, replicas=3)
        await until(lambda: cluster.router.states()[1].load == 2)
        answers = [cluster.ask(name) for name in "abcd"]
        await until(lambda: [len(names) for names in cluster.names()] == [2, 0, 2])
        cluster.engines[1].kill()
        await until(lambda: cluster.router.states()[1].requests == 0)
        for engine in cluster.engines:
            release(engine, 100)
        assert await asyncio.gather(*answers) == [EXPECTED] * 4

    run(scenario, number=3)


def test_workers_that_are_away_for_long_are_lost_and_the_engine_is_told() -> None:
    async def scenario(cluster: Cluster) -> None:
        answer = cluster.ask(FIRST)
        engine, other = cluster.engines
        await until(lambda: FIRST in engine.running)
        release(engine, 5)
        await until(lambda: engine.running[FIRST][1] == 5)
        cluster.coordinators[0].reason = "recovering"
        await until(lambda: FIRST in other.running)
        await until(lambda: engine.aborted == [FIRST])
        release(other, 100)
        assert await answer == EXPECTED
        cluster.coordinators[0].reason = None
        await cluster.serves()
        assert (await cluster.backend.readiness()).reason == "serving"

    run(scenario)


def test_a_short_outage_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_backend, "MOVE_S", 60.0)

    async def scenario(cluster: Cluster) -> None:
        answer = cluster.ask(FIRST)
        await until(lambda: FIRST in cluster.engines[0].running)
        cluster.coordinators[0].reason = "recovering"
        await until(lambda: not cluster.router.states()[0].serves)
        await asyncio.sleep(0.05)
        assert cluster.names() == [{FIRST}, set()]
        late = cluster.ask("late", PROMPT)
        await until(lambda: "late" in cluster.engines[1].running)
        for engine in cluster.engines:
            release(engine, 100)
        assert await asyncio.gather(answer, late) == [EXPECTED] * 2

    run(scenario)


def test_while_no_group_serves_requests_wait_for_the_first_that_does() -> None:
    async def scenario(cluster: Cluster) -> None:
        answers = [cluster.ask(name) for name in "ab"]
        await until(lambda: [len(names) for names in cluster.names()] == [1, 1])
        for coordinator, engine in zip(cluster.coordinators, cluster.engines, strict=True):
            coordinator.current = None
            engine.kill()
        await until(lambda: not any(state.serves for state in cluster.router.states()))
        answers.append(cluster.ask("c"))
        assert cluster.backend.can_wait
        while (await cluster.backend.readiness()).ready:
            await asyncio.sleep(0.001)
        cluster.coordinators[1].current = successor = Engine()
        release(successor, 200)
        assert await asyncio.gather(*answers) == [EXPECTED] * 3

    run(scenario)


def test_lasting_requests_are_looked_for_in_all_groups() -> None:
    async def scenario(cluster: Cluster) -> None:
        names = [RequestId(f"r{n}") for n in range(8)]
        answers = [cluster.ask(name, lasting=True) for name in names]
        await until(lambda: sum(map(len, cluster.names())) == 8)
        assert all(cluster.names()), "names are spread over both groups"
        unknown = RequestId("unknown")
        # this replica follows them, so that nobody else needs to
        assert await cluster.backend.engine.orphans([*names, unknown]) == (unknown,)
        cluster.backend.engine.cancel(names[0])
        assert (await answers[0]) == []
        for engine in cluster.engines:
            release(engine, 100)
        assert await asyncio.gather(*answers[1:]) == [EXPECTED] * 7
        cluster.backend.engine.forget(names[1])

    run(scenario)


def test_requests_of_a_retired_group_go_on_in_others_and_then_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "LOOK_S", 0.005)

    async def scenario(cluster: Cluster) -> None:
        backend = cluster.backend
        alone = [cluster.ask(name) for name in "ab"]
        await until(lambda: len(cluster.names()[0]) == 2)
        cluster.fails = 2
        await backend.resize(3)
        assert (backend.num_groups, backend.wanted_groups) == (1, 3)
        await until(lambda: (backend.num_groups, backend.wanted_groups) == (3, 3))
        await cluster.serves()
        answers = [cluster.ask(name) for name in "cdef"]
        await until(lambda: [len(names) for names in cluster.names()] == [2, 2, 2])
        # one of those that go is lost at the same time
        cluster.engines[2].kill()
        for engine in cluster.engines[:2]:
            release(engine, 7)
        # another replica takes the admin's call
        cluster.number = 1
        await until(lambda: cluster.left == [2, 1])
        assert backend.num_groups == 1
        assert cluster.coordinators[1].left == ["replica"]
        assert cluster.names()[0] == set("abcdef")
        assert set(cluster.engines[1].aborted) == {request.request_id for request in cluster.engines[1].submitted}
        release(cluster.engines[0], 200)
        assert await asyncio.gather(*alone, *answers) == [EXPECTED] * 6

    run(scenario, number=1)


def test_groups_start_as_few_at_a_time_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty on two cores started together, and none served for minutes."""
    monkeypatch.setattr(groups, "LOOK_S", 0.005)

    async def scenario(cluster: Cluster) -> None:
        backend = cluster.backend
        cluster.room, cluster.loading = 2, "loading"
        await backend.resize(5)
        await asyncio.sleep(0.05)
        assert (backend.num_groups, backend.wanted_groups) == (3, 5)
        state = await backend.readiness()
        assert state.ready
        assert "with 1 of 5 groups" in state.reason
        assert "group 4: waits until others have started" in state.reason
        # one that serves makes room for another
        cluster.coordinators[1].reason = None
        await until(lambda: backend.num_groups == 4)
        await asyncio.sleep(0.05)
        assert backend.num_groups == 4
        # one that has waited for long does too: it may wait for a node
        monkeypatch.setattr(groups, "START_S", 0.0)
        await until(lambda: backend.num_groups == 5)

    run(scenario, number=1)


def test_a_group_is_left_only_when_another_one_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "LOOK_S", 0.005)

    async def scenario(cluster: Cluster) -> None:
        answers = [cluster.ask(name) for name in "ab"]
        await until(lambda: [len(names) for names in cluster.names()] == [1, 1])
        cluster.coordinators[0].reason = "recovering"
        await until(lambda: not cluster.router.states()[0].serves)
        await cluster.backend.resize(1)
        await asyncio.sleep(0.05)
        # the answer goes on where it is, and new requests wait for the group that stays
        assert (cluster.backend.num_groups, cluster.backend.wanted_groups) == (2, 1)
        late = cluster.ask("late")
        cluster.coordinators[0].reason = None
        await until(lambda: cluster.names()[0] == {"a", "b", "late"})
        release(cluster.engines[0], 100)
        assert await asyncio.gather(*answers, late) == [EXPECTED] * 3
        await until(lambda: cluster.backend.num_groups == 1)

    run(scenario)


def test_one_group_is_asked_directly() -> None:
    async def scenario(cluster: Cluster) -> None:
        (engine,) = cluster.engines
        release(engine, 100)
        assert await cluster.ask("a") == EXPECTED
        assert cluster.backend.engine.group_of(RequestId("a")) == 0
        assert len(cluster.router._prefixes) == 0
        with pytest.raises(RequestError, match="engine: expected 0, since there is one group, got 1"):
            cluster.backend.group(1)

    run(scenario, number=1)


def test_what_groups_say_together() -> None:
    ready = Readiness(ready=True, reason="serving")
    degraded = Readiness(ready=True, reason="degraded", resident=0.5)
    starts = Readiness(ready=False, reason="starting")
    failed = Readiness(ready=False, reason="damaged", error="shard 3 is damaged")
    assert together([failed]) == failed
    assert together([ready, degraded]) == degraded
    some = together([starts, ready])
    assert (some.ready, some.reason) == (True, "serving, with 1 of 2 groups; group 0: starting")
    none = together([starts, failed])
    assert (none.ready, none.reason, none.error) == (False, "group 0: starting; group 1: damaged", None)
    assert together([failed, failed]).error == "shard 3 is damaged"
