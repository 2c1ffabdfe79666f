"""What is kept of responses, for how long, and what deletes it."""

from __future__ import annotations

import asyncio

import pytest

from elastic_moe.actors.remote.key_value import LocalKeyValue
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, RequestId, SamplingParams
from elastic_moe.deploy.responses.record import Ending, Outcome, Record
from elastic_moe.deploy.responses.store import Bounds, Entry, Store, superfluous

BOUNDS = Bounds(most=3, most_bytes=100, oldest_s=50.0)

ROOMY = Bounds(most=3, most_bytes=10_000, oldest_s=50.0)


def record(name: str, ended_at_s: float | None = None) -> Record:
    outcome = None
    if ended_at_s is not None:
        outcome = Outcome(
            token_ids=(1,),
            ending=Ending(reason=FinishReason.STOP),
            cached_tokens=0,
            ended_at_s=ended_at_s,
            response={"output": []},
        )
    request = GenerateRequest(
        request_id=RequestId(name), prompt_token_ids=(1, 2), params=SamplingParams(max_tokens=1), lasting=True
    )
    return Record(
        id=name, created_at_s=0, background=True, frame={}, input=[], history=[], chat={}, request=request,
        outcome=outcome,
    )  # fmt: skip


def entry(name: str, ended_s: float, size_bytes: int = 10) -> Entry:
    return Entry(ended_ms=int(ended_s * 1000), id=name, size_bytes=size_bytes)


@pytest.mark.parametrize(
    ("entries", "dropped"),
    [
        ([entry("a", 1), entry("b", 2), entry("c", 3)], []),
        ([entry("d", 4), entry("a", 1), entry("b", 2), entry("c", 3)], ["a"]),
        ([entry("a", 1, 60), entry("b", 2, 30), entry("c", 3, 30)], ["a"]),
        ([entry("a", 1), entry("b", 2, 101)], ["a", "b"]),
        ([entry("a", -45), entry("b", 2)], ["a"]),
    ],
)
def test_the_oldest_go_where_there_are_too_many_or_too_large_ones(entries: list[Entry], dropped: list[str]) -> None:
    assert [each.id for each in superfluous(entries, BOUNDS, 10.0)] == dropped
    assert [Entry.parse(each.key) for each in entries] == entries


def test_a_response_is_found_while_it_runs_and_afterwards_until_it_is_old() -> None:
    now = 0.0

    async def work() -> None:
        nonlocal now
        store = Store(LocalKeyValue(), ROOMY, clock=lambda: now)
        await store.begin(record("a"))
        assert await store.unfinished() == ["a"]
        assert await store.find("a") == record("a")
        done = record("a", ended_at_s=1.0)
        await store.finish(done)
        # a second replica that followed it too
        await store.finish(record("a", ended_at_s=1.5))
        assert await store.unfinished() == []
        assert await store.find("a") == done
        now = 51.1
        assert await store.find("a") is None
        assert await store.find("b") is None

    asyncio.run(work())


def test_deleting_leaves_nothing_and_marks_are_dropped_with_time() -> None:
    now = 0.0

    async def work() -> None:
        nonlocal now
        values = LocalKeyValue()
        store = Store(values, ROOMY, clock=lambda: now)
        await store.begin(record("a"))
        await store.delete("a")
        await store.finish(record("a", ended_at_s=1.0))
        assert await store.find("a") is None
        assert values.keys("") == ["gone/a"]
        now = 60.0
        await store.finish(record("b", ended_at_s=60.0))
        await store.delete("b")
        assert values.keys("") == []

    asyncio.run(work())
