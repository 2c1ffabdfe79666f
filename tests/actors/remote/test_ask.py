"""Typed calls to actors: what they send, and that nothing else calls through Ray's handles."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from typing import Any

from elastic_moe.actors.remote.ask import Remote, ask, forward, remote_form
from tests.actors.fakes import Handle
from tests.paths import ROOT


class Adder:
    def __init__(self, start: int) -> None:
        self._start = start

    def add(self, number: int, *, times: int = 1) -> int:
        return self._start + number * times

    async def add_later(self, number: int) -> int:
        return self.add(number)


def adder(start: int) -> Remote[Adder]:
    return Remote(Handle(Adder(start)))


def test_plain_and_async_methods_are_awaited_alike() -> None:
    async def story() -> tuple[int, int]:
        return await ask(adder(1), Adder.add, 2), await ask(adder(10), Adder.add_later, 2)

    assert asyncio.run(story()) == (3, 12)


def test_an_answer_is_forwarded() -> None:
    async def story() -> int:
        return await forward(adder(100), Adder.add, ask(adder(1), Adder.add, 2))

    assert asyncio.run(story()) == 103


def test_handles_of_the_same_actor_are_equal_and_can_be_sent() -> None:
    actor: Remote[Any] = Remote("the handle")
    assert pickle.loads(pickle.dumps(actor)) == actor
    assert Remote("another handle") != actor


def files_with(text: str, *folders: str) -> set[str]:
    sources = [source for folder in folders for source in (ROOT / folder).rglob("*.py")]
    return {str(source.relative_to(ROOT)) for source in sources if text in Path(source).read_text()}


def test_only_one_file_calls_through_handles() -> None:
    """The other files make actors and tasks."""
    makers = {"actors/coordinator/fleet.py", "actors/coordinator/start.py", "deploy/calibrating/cluster_group.py"}
    assert files_with(".remote(", "actors", "deploy") == {"actors/remote/ask.py"} | makers


def test_actors_are_of_one_form_for_each_class() -> None:
    assert remote_form(Adder) is remote_form(Adder)
    assert remote_form(Adder, (("io", 2),)) is remote_form(Adder, (("io", 2),))
    assert files_with("ray.remote(", "actors", "deploy") == {
        "actors/remote/ask.py",
        "deploy/calibrating/cluster_group.py",
    }


def test_time_outs_do_not_count_stalls_of_their_own_loop() -> None:
    assert files_with("asyncio.wait_for", "actors") == set()
