"""What is saved is whole at any time, little is written for a change, and nothing is left behind."""

from __future__ import annotations

import pytest

from elastic_moe.cluster.control import saving
from elastic_moe.cluster.control.saving import Saver
from elastic_moe.cluster.control.state import ControlState
from elastic_moe.cluster.facts.events import ScaleRequested
from elastic_moe.cluster.messages.epochs import ModelSpec
from tests.cluster.stories import serving

SPEC = ModelSpec(path="/model", dtype="float32", device="cpu", max_model_len=64)


class Store:
    """Keeps what it is given, and every moment between two writes."""

    def __init__(self) -> None:
        self.main: bytes | None = None
        self.parts: dict[str, bytes] = {}
        self.moments: list[tuple[bytes | None, dict[str, bytes]]] = []

    def _note(self) -> None:
        self.moments.append((self.main, dict(self.parts)))

    def save(self, state: bytes) -> None:
        self.main = state
        self._note()

    def saved(self) -> bytes | None:
        return self.main

    def save_part(self, name: str, part: bytes) -> None:
        self.parts[name] = part
        self._note()

    def saved_part(self, name: str) -> bytes | None:
        return self.parts.get(name)

    def drop_part(self, name: str) -> None:
        del self.parts[name]
        self._note()


def look(state: ControlState) -> object:
    facts = state.facts
    assert facts.spec is not None
    return (
        facts.epoch,
        facts.spec.placement.physical_to_logical_map.tolist(),
        {name: (record.state, record.held.tolist(), record.info) for name, record in facts.records.items()},
        state.operations.all(),
        facts.target,
    )


def loaded(store: Store) -> object:
    found = Saver(store).load()
    assert found is not None
    assert found[1] == SPEC
    return look(found[0])


def test_a_state_is_read_as_it_was_saved() -> None:
    assert Saver(Store()).load() is None
    store = Store()
    saver = Saver(store)
    sim = serving(2)
    saver.save(sim.state, SPEC)
    before = look(sim.state)
    assert loaded(store) == before
    sim.feed(ScaleRequested(workers=3, retire=(), operation_id=None, replace=False))
    sim.settle()
    begun = len(store.moments)
    saver.save(sim.state, SPEC)
    after = look(sim.state)
    assert after != before
    assert loaded(store) == after
    # a coordinator that dies between two writes leaves the old state or the new one
    seen = []
    for main, parts in store.moments[begun:]:
        moment = Store()
        moment.main, moment.parts = main, parts
        seen.append(loaded(moment))
    assert seen[0] == before
    assert seen[-1] == after
    assert all(one in (before, after) for one in seen)


def test_what_has_not_changed_is_not_written_again() -> None:
    store = Store()
    saver = Saver(store)
    sim = serving(4)
    saver.save(sim.state, SPEC)
    parts = dict(store.parts)
    assert len(parts) == 1
    saver.save(sim.state, SPEC)
    assert store.parts == parts
    # a successor knows what it has read
    successor = Saver(store)
    found = successor.load()
    assert found is not None
    successor.save(*found)
    assert store.parts == parts


def test_parts_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "MOST_PARTS", 3)
    store = Store()
    saver = Saver(store)
    sim = serving(2)
    for workers in (3, 2, 4, 1, 3, 2, 4, 2):
        sim.feed(ScaleRequested(workers=workers, retire=(), operation_id=None, replace=False))
        sim.settle()
        saver.save(sim.state, SPEC)
        assert len(store.parts) <= 3
        assert loaded(store) == look(sim.state)
