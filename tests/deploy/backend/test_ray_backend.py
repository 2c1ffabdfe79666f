"""RayBackend against an engine that dies, hangs, refuses or loses outputs. No Ray: handles are stand-ins."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import ray

from elastic_moe.actors.coordinator.coordinator import Coordinator as Questions
from elastic_moe.actors.remote.ask import Remote
from elastic_moe.cluster.errors import NotReadyError, RequestError
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, RequestId, SamplingParams
from elastic_moe.deploy.backend import engine_client, ray_backend
from elastic_moe.deploy.backend.backend import GenerationFailed
from elastic_moe.deploy.backend.gcs_watch import GcsWatch
from elastic_moe.deploy.backend.ray_backend import RayBackend
from tests.deploy.backend.standins import ENGINES, Coordinator, Engine, release, until

LENGTH = 20


def request(name: str = "r1") -> GenerateRequest:
    params = SamplingParams(max_tokens=LENGTH, seed=3)
    return GenerateRequest(request_id=RequestId(name), prompt_token_ids=(1, 2), params=params)


async def collect(backend: RayBackend, name: str = "r1") -> list[int]:
    tokens: list[int] = []
    async for output in backend.engine.generate(request(name)):
        assert output.offset == len(tokens)
        tokens += output.token_ids
    return tokens


def run(
    scenario: Callable[[RayBackend, Coordinator, Engine], Awaitable[None]],
    *,
    recovery_timeout_s: float = 600.0,
    gcs: GcsWatch | None = None,
) -> None:
    async def work() -> None:
        engine = Engine()
        coordinator = Coordinator(engine)
        backend = RayBackend(Remote(coordinator), recovery_timeout_s=recovery_timeout_s, gcs=gcs)
        backend.begin()
        try:
            async with asyncio.timeout(20):
                await scenario(backend, coordinator, engine)
        finally:
            await backend.end()
            while ENGINES:
                ENGINES.pop().end()
            await asyncio.sleep(0)

    asyncio.run(work())


EXPECTED = [100 + n for n in range(LENGTH)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "RETRY_S", 0.005)
    monkeypatch.setattr(ray_backend, "READINESS_S", 0.005)


def test_several_requests() -> None:
    async def scenario(backend: RayBackend, _: Coordinator, engine: Engine) -> None:
        release(engine, 200)
        answers = await asyncio.gather(*(collect(backend, f"r{n}") for n in range(5)))
        assert answers == [EXPECTED] * 5
        assert backend.engine.resumed == 0

    run(scenario)


@pytest.mark.parametrize("made", [0, 1, 7, LENGTH - 1])
def test_a_lost_engine_costs_no_token(made: int) -> None:
    async def scenario(backend: RayBackend, coordinator: Coordinator, engine: Engine) -> None:
        answers = [asyncio.create_task(collect(backend, name)) for name in ("a", "b")]
        await until(lambda: len(engine.running) == 2)
        release(engine, made)
        await until(lambda: all(n == made for _, n in engine.running.values()) and engine.steps.locked())
        await asyncio.sleep(0.02)
        engine.kill()
        await asyncio.sleep(0.02)
        coordinator.current = successor = Engine()
        release(successor, 100)
        assert await asyncio.gather(*answers) == [EXPECTED] * 2
        assert {len(r.output_token_ids) for r in successor.submitted} == {made}
        assert backend.engine.resumed == 2

    run(scenario)


def test_an_engine_replaced_while_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "LIFE_S", 0.05)

    async def scenario(backend: RayBackend, coordinator: Coordinator, engine: Engine) -> None:
        answer = asyncio.create_task(collect(backend))
        await until(lambda: bool(engine.running))
        engine.hang()
        coordinator.current = successor = Engine()
        release(successor, 100)
        assert await answer == EXPECTED

    run(scenario)


def test_a_request_waits_for_an_engine() -> None:
    async def scenario(backend: RayBackend, coordinator: Coordinator, engine: Engine) -> None:
        coordinator.current = None
        engine.kill()
        await asyncio.sleep(0.02)
        answer = asyncio.create_task(collect(backend))
        await asyncio.sleep(0.02)
        assert not answer.done()
        coordinator.current = successor = Engine()
        release(successor, 100)
        assert await answer == EXPECTED

    run(scenario)


def test_a_request_whose_client_does_not_come_back_ends() -> None:
    async def scenario(backend: RayBackend, coordinator: Coordinator, engine: Engine) -> None:
        outputs = backend.engine.generate(request())
        first = asyncio.ensure_future(anext(outputs))
        await until(lambda: bool(engine.running))
        release(engine, 1)
        await first
        # as long as somebody serves, a request may take its time
        await asyncio.sleep(0.2)
        coordinator.current = None
        begun = time.monotonic()
        end = await anext(outputs)
        assert time.monotonic() - begun > 0.05
        assert end.finish_reason is FinishReason.ERROR
        assert "the cluster could not serve this request for 0.1 s" in (end.error or "")
        await until(lambda: engine.aborted == ["r1"])

    run(scenario, recovery_timeout_s=0.1)


def test_a_request_that_was_never_served_may_come_again_later() -> None:
    """It is told so by its status: NotReadyError is a 503."""

    async def scenario(backend: RayBackend, coordinator: Coordinator, engine: Engine) -> None:
        assert not backend.can_wait
        await until(lambda: backend._readiness.ready)
        coordinator.current = None
        engine.kill()
        await until(lambda: not backend._readiness.ready)
        assert backend.can_wait
        with pytest.raises(NotReadyError, match=r"the cluster could not serve this request for 0\.1 s"):
            await collect(backend)
        assert not backend.can_wait

    run(scenario, recovery_timeout_s=0.1)


def test_unread_outputs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads least is cut off; the others go on."""
    monkeypatch.setattr(engine_client, "MAX_UNREAD", 5)
    monkeypatch.setattr(engine_client, "UNREAD_EVERY", 1)

    async def scenario(backend: RayBackend, _: Coordinator, engine: Engine) -> None:
        slow = backend.engine.generate(request("slow"))
        first = asyncio.ensure_future(anext(slow))
        quick = asyncio.create_task(collect(backend, "quick"))
        await until(lambda: len(engine.running) == 2)
        for made in range(1, LENGTH + 1):
            release(engine, 1)
            await until(lambda made=made: engine.running.get("quick", (None, LENGTH))[1] >= made)  # type: ignore[misc]
        assert await quick == EXPECTED
        await first
        assert engine.aborted == ["slow"]
        with pytest.raises(GenerationFailed, match="reads more slowly"):
            await anext(slow)

    run(scenario)


def test_a_stalled_api_does_not_blame_the_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_backend, "HANG_S", 0.1)
    ended: list[Any] = []
    monkeypatch.setattr(ray, "kill", lambda actor, *, no_restart: ended.append(actor))

    async def scenario(backend: RayBackend, coordinator: Coordinator, _: Engine) -> None:
        await until(lambda: backend._readiness.ready)
        coordinator.stalls = True
        await until(lambda: not coordinator.stalls)
        await asyncio.sleep(0.02)
        assert ended == []
        assert (await backend.readiness()).ready

    run(scenario)


def test_an_engine_that_is_not_started_yet() -> None:
    async def scenario(backend: RayBackend, _: Coordinator, engine: Engine) -> None:
        engine.started = False
        release(engine, 100)
        answer = asyncio.create_task(collect(backend))
        await asyncio.sleep(0.02)
        engine.started = True
        assert await answer == EXPECTED

    run(scenario)


def test_lost_outputs_are_made_again() -> None:
    async def scenario(backend: RayBackend, _: Coordinator, engine: Engine) -> None:
        answer = asyncio.create_task(collect(backend))
        await until(lambda: bool(engine.running))
        release(engine, 3)
        await until(lambda: engine.running["r1"][1] == 3)
        engine.drops = 1
        release(engine, 100)
        assert await answer == EXPECTED
        assert "r1" in engine.aborted

    run(scenario)


def test_refusals_reach_the_client() -> None:
    async def scenario(backend: RayBackend, _: Coordinator, engine: Engine) -> None:
        await until(lambda: backend.engine.current is not None)
        engine.refuses = True
        with pytest.raises(RequestError) as refused:
            await collect(backend)
        assert refused.value.param == "prompt"

    run(scenario)


def test_closing_aborts() -> None:
    async def scenario(backend: RayBackend, _: Coordinator, engine: Engine) -> None:
        await asyncio.sleep(0.02)
        outputs = backend.engine.generate(request())
        first = asyncio.ensure_future(anext(outputs))
        await until(lambda: bool(engine.running))
        release(engine, 1)
        await first
        await outputs.aclose()
        await until(lambda: engine.aborted == ["r1"])

    run(scenario)


def test_a_coordinator_that_hangs_is_ended_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[Any, bool]] = []
    monkeypatch.setattr(ray_backend, "HANG_S", 0.02)
    monkeypatch.setattr(ray_backend, "READINESS_S", 0.01)
    monkeypatch.setattr(ray, "kill", lambda actor, *, no_restart: ended.append((actor, no_restart)))

    async def scenario(backend: RayBackend, coordinator: Coordinator, _: Engine) -> None:
        await until(lambda: backend._readiness.ready)
        coordinator.hangs = True
        await until(lambda: bool(ended))
        await asyncio.sleep(0.1)
        # its successor may take longer to begin
        assert ended == [(coordinator, False)]
        assert (await backend.readiness()).ready

    run(scenario)


def test_a_coordinator_that_is_away() -> None:
    async def scenario(backend: RayBackend, coordinator: Coordinator, engine: Engine) -> None:
        assert await backend.ask(Questions.operations) == []
        await until(lambda: backend._readiness.ready)
        coordinator.dead.set()
        with pytest.raises(NotReadyError):
            await backend.ask(Questions.operations)
        # requests need the engine alone
        await asyncio.sleep(0.05)
        assert (await backend.readiness()).ready
        engine.kill()
        await until(lambda: not backend._readiness.ready)

    run(scenario)


def test_requests_end_with_an_error_when_the_gcs_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster serves on, but Ray is about to end this process."""
    monkeypatch.setattr(ray_backend, "LOOK_S", 0.005)
    # nobody listens on port 1
    watch = GcsWatch("127.0.0.1:1", 0.05)

    async def scenario(backend: RayBackend, coordinator: Coordinator, engine: Engine) -> None:
        outputs = backend.engine.generate(request())
        first = asyncio.ensure_future(anext(outputs))
        await until(lambda: bool(engine.running))
        release(engine, 1)
        await first
        end = await anext(outputs)
        assert end.finish_reason is FinishReason.ERROR
        assert "GCS at 127.0.0.1:1 has not answered" in (end.error or "")
        assert "GCS" in (await backend.readiness()).reason
        assert not backend.can_wait

    run(scenario, gcs=watch)
