"""Background responses with two replicas and one engine, any of which may die."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.deploy.backend import engine_client, ray_backend
from elastic_moe.deploy.responses import following
from tests.deploy.backend.standins import release, until
from tests.deploy.responses.replicas import Replica, Scene, run

TOKENS = 20
TEXT = "abcdefghijklmnopqrst"
BACKGROUND: dict[str, Any] = {"background": True, "max_output_tokens": TOKENS}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "RETRY_S", 0.005)
    monkeypatch.setattr(ray_backend, "READINESS_S", 0.005)
    monkeypatch.setattr(engine_client, "ADOPT_S", 0.01)
    monkeypatch.setattr(following, "ADOPT_S", 0.01)


async def ended(replica: Replica, response_id: str) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while (response := await replica.get(response_id))["status"] in ("queued", "in_progress"):
            await asyncio.sleep(0.002)
    return response


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


async def half_made(scene: Scene, replica: Replica) -> str:
    """The id of a response of which half the tokens are made."""
    created = await replica.create(**BACKGROUND)
    assert (created["status"], created["output"]) == ("queued", [])
    await until(lambda: bool(scene.engine.running))
    release(scene.engine, TOKENS // 2)
    await until(lambda: all(made == TOKENS // 2 for _, made in scene.engine.running.values()))
    return str(created["id"])


def test_every_replica_tells_the_same_events_live_and_later(model_dir: Path) -> None:
    async def scenario(scene: Scene, one: Replica, two: Replica) -> None:
        response_id = await half_made(scene, one)
        live = [asyncio.create_task(replica.events(response_id)) for replica in (one, two)]
        await until(lambda: len(two.service.following) == 1)
        assert (await two.get(response_id))["status"] == "in_progress"
        release(scene.engine, TOKENS)
        whole, other = await asyncio.gather(*live)
        assert whole == other
        await ended(two, response_id)
        await until(lambda: not len(one.service.following) and not len(two.service.following))
        assert await one.events(response_id) == await two.events(response_id) == whole
        assert await two.events(response_id, after=9) == whole[10:]
        assert [event["sequence_number"] for event in whole] == list(range(len(whole)))
        assert "".join(event["delta"] for event in whole if "delta" in event) == TEXT
        assert (await one.get(response_id)) == whole[-1]["response"]
        assert len(scene.engine.submitted) == 1

    run(scenario, model_dir)


def test_the_replica_that_accepted_it_dies(model_dir: Path) -> None:
    async def scenario(scene: Scene, one: Replica, two: Replica) -> None:
        response_id = await half_made(scene, one)
        await one.kill()
        release(scene.engine, TOKENS)
        response = await ended(two, response_id)
        assert (response["status"], text_of(response)) == ("incomplete", TEXT)
        assert response["usage"]["output_tokens"] == TOKENS
        assert len(scene.engine.submitted) == 1

    run(scenario, model_dir)


def test_all_replicas_die_and_a_new_one_finds_what_the_engine_has_made(model_dir: Path) -> None:
    async def scenario(scene: Scene, one: Replica, two: Replica) -> None:
        response_id = await half_made(scene, one)
        await one.kill()
        await two.kill()
        release(scene.engine, TOKENS)
        await until(lambda: not scene.engine.running)
        three = await scene.add()
        assert text_of(await ended(three, response_id)) == TEXT
        assert len(scene.engine.submitted) == 1

    run(scenario, model_dir)


def test_the_engine_dies(model_dir: Path) -> None:
    async def scenario(scene: Scene, one: Replica, two: Replica) -> None:
        response_id = await half_made(scene, one)
        live = asyncio.create_task(two.events(response_id))
        await until(lambda: len(two.service.following) == 1)
        release(scene.new_engine(), 2 * TOKENS)
        assert text_of(await ended(one, response_id)) == TEXT
        assert "".join(event["delta"] for event in await live if "delta" in event) == TEXT
        assert len(scene.engine.submitted) == 1

    run(scenario, model_dir)


def test_replica_and_engine_die_together(model_dir: Path) -> None:
    """The record alone is left: the answer is made again from the beginning."""

    async def scenario(scene: Scene, one: Replica, two: Replica) -> None:
        response_id = await half_made(scene, one)
        await one.kill()
        release(scene.new_engine(), 2 * TOKENS)
        assert text_of(await ended(two, response_id)) == TEXT

    run(scenario, model_dir)


def test_cancel_at_another_replica(model_dir: Path) -> None:
    async def scenario(scene: Scene, one: Replica, two: Replica) -> None:
        response_id = await half_made(scene, one)
        live = asyncio.create_task(one.events(response_id))
        answer = await two.client.post(f"/v1/responses/{response_id}/cancel")
        cancelled = answer.json()
        assert (answer.status_code, cancelled["status"]) == (200, "cancelled")
        assert text_of(cancelled) == TEXT[: TOKENS // 2]
        assert (await live)[-1]["response"] == cancelled
        assert not scene.engine.running
        await until(lambda: not len(one.service.following))
        assert await one.get(response_id) == cancelled
        assert (await two.client.post(f"/v1/responses/{response_id}/cancel")).json() == cancelled
        assert await one.events(response_id) == await live

    run(scenario, model_dir)


def test_what_is_deleted_while_it_runs_does_not_come_back(model_dir: Path) -> None:
    async def scenario(scene: Scene, one: Replica, two: Replica) -> None:
        response_id = await half_made(scene, one)
        answer = await two.client.delete(f"/v1/responses/{response_id}")
        assert answer.json() == {"id": response_id, "object": "response", "deleted": True}
        await until(lambda: not len(one.service.following))
        for replica in (one, two):
            assert (await replica.client.get(f"/v1/responses/{response_id}")).status_code == 404
        assert not scene.engine.running

    run(scenario, model_dir)


def test_a_stop_string_ends_it_everywhere(model_dir: Path) -> None:
    async def scenario(scene: Scene, one: Replica, two: Replica) -> None:
        created = await one.create(**BACKGROUND, stop="ef")
        live = asyncio.create_task(two.events(created["id"]))
        await until(lambda: len(two.service.following) == 1 and bool(scene.engine.running))
        release(scene.engine, 8)
        response = await ended(one, created["id"])
        assert (response["status"], text_of(response)) == ("completed", "abcd")
        assert response["usage"]["output_tokens"] == 6
        assert (await live)[-1]["response"] == response
        await until(lambda: not scene.engine.running)
        assert await two.events(created["id"]) == await live

    run(scenario, model_dir)


def test_a_conversation_goes_on_at_another_replica(model_dir: Path) -> None:
    async def scenario(scene: Scene, one: Replica, two: Replica) -> None:
        release(scene.engine, 100)
        first = await one.create(max_output_tokens=3, instructions="be brief")
        assert text_of(first) == "abc"
        second = await two.create(input="again", previous_response_id=first["id"], max_output_tokens=2)
        assert second["previous_response_id"] == first["id"]
        third = await one.create(input="more", previous_response_id=second["id"], max_output_tokens=1)
        prompt = one.service.texts.tokenizer.decode(scene.engine.submitted[-1].prompt_token_ids)
        # instructions are for one response
        said = ["user\nhello", "assistant\nabc", "user\nagain", "assistant\nab", "user\nmore", "assistant\n"]
        assert prompt == "".join(f"<|im|>{turn}" + "\n" * (number < 5) for number, turn in enumerate(said))
        assert third["status"] == "incomplete"
        items = (await two.client.get(f"/v1/responses/{third['id']}/input_items")).json()
        assert [item["content"] for item in items["data"]] == [[{"type": "input_text", "text": "more"}]]

    run(scenario, model_dir)


def test_only_so_many_are_kept(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_moe.deploy.responses.store.TRIM_S", -1.0)

    async def scenario(scene: Scene, one: Replica, _: Replica) -> None:
        release(scene.engine, 100)
        made = [await one.create(max_output_tokens=1) for _ in range(4)]
        found = [(await one.client.get(f"/v1/responses/{each['id']}")).status_code for each in made]
        assert found == [404, 404, 200, 200]
        gone = await one.client.post("/v1/responses", json={"input": "x", "previous_response_id": made[0]["id"]})
        error = gone.json()["error"]
        assert (gone.status_code, error["param"], error["code"]) == (
            400,
            "previous_response_id",
            "previous_response_not_found",
        )
        unstored = await one.create(max_output_tokens=1, store=False)
        assert (await one.client.get(f"/v1/responses/{unstored['id']}")).status_code == 404

    run(scenario, model_dir, max_stored_responses=2)


def test_the_counts_of_all_replicas_are_added_up(model_dir: Path) -> None:
    async def scenario(scene: Scene, one: Replica, two: Replica) -> None:
        release(scene.engine, 100)
        await one.create(max_output_tokens=3)
        await two.create(max_output_tokens=4)
        await two.create(max_output_tokens=4)
        for replica, tokens in ((one, 3), (two, 11), (one, 11)):
            text = (await replica.client.get("/metrics")).text
            assert f'vllm:generation_tokens_total{{engine="0",model_name="tiny-moe"}} {tokens}.0' in text
        assert 'finished_reason="length",model_name="tiny-moe"} 3.0' in text
        await two.kill()
        assert (await one.client.get("/metrics")).text.count("vllm:e2e_request_latency_seconds_count") == 1

    run(scenario, model_dir)
