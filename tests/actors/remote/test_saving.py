"""What is saved is whole at any time, little is written for a change, and nothing is left behind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.actors.remote.saving import MOST_PARTS, Saver
from elastic_moe.cluster.control.state import ControlState
from elastic_moe.cluster.facts.events import ScaleRequested
from elastic_moe.cluster.facts.membership import WorkerRecord
from elastic_moe.cluster.placement import Placement
from tests.cluster.simulation import Simulation
from tests.cluster.stories import serving
from tests.properties import most


class Store:
    """Keeps what it is given, and every moment between two writes."""

    def __init__(self) -> None:
        self.state: bytes | None = None
        self.parts: dict[str, bytes] = {}
        self.moments: list[tuple[bytes | None, dict[str, bytes]]] = []

    def _note(self) -> None:
        self.moments.append((self.state, dict(self.parts)))

    def save(self, state: bytes) -> None:
        self.state = state
        self._note()

    def saved(self) -> bytes | None:
        return self.state

    def save_part(self, name: str, part: bytes) -> None:
        self.parts[name] = part
        self._note()

    def saved_part(self, name: str) -> bytes | None:
        return self.parts.get(name)

    def drop_part(self, name: str) -> None:
        del self.parts[name]
        self._note()


def saver_of(store: Store) -> Saver:
    return Saver(store, (WorkerRecord, Placement))


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


def test_nothing_was_saved() -> None:
    assert saver_of(Store()).load() is None


def test_a_coordinator_that_dies_between_two_writes_leaves_the_old_state_or_the_new_one() -> None:
    store = Store()
    saver = saver_of(store)
    sim = serving(2)
    saver.save(sim.state)
    before = look(sim.state)
    begun = len(store.moments)
    sim.feed(ScaleRequested(workers=3))
    sim.settle()
    saver.save(sim.state)
    after = look(sim.state)
    assert after != before
    seen = []
    for state, parts in store.moments[begun:]:
        moment = Store()
        moment.state, moment.parts = state, parts
        seen.append(look(saver_of(moment).load()))
    assert (seen[0], seen[-1]) == (before, after)
    assert all(one in (before, after) for one in seen)


def test_what_has_not_changed_is_not_written_again() -> None:
    store = Store()
    saver = saver_of(store)
    sim = serving(4)
    saver.save(sim.state)
    parts = dict(store.parts)
    assert len(parts) == 1
    saver.save(sim.state)
    assert store.parts == parts
    # a successor knows what it has read
    successor = saver_of(store)
    successor.save(successor.load())
    assert store.parts == parts


def test_a_simulated_cluster_goes_on_from_what_was_saved() -> None:
    store = Store()
    sim: Simulation = serving(3)
    saver = saver_of(store)
    for workers in (4, 2, 3):
        sim.feed(ScaleRequested(workers=workers))
        saver.save(sim.state)
        saver = saver_of(store)
        sim.state = saver.load()
        sim.settle()
        assert len(sim.facts.ranks) == workers


@dataclass(frozen=True, eq=False)
class Large:
    number: int
    mask: np.ndarray


@given(st.lists(st.lists(st.integers(0, 7), max_size=6), max_size=60))
@settings(deadline=None, max_examples=most(100))
def test_parts_are_as_many_as_are_needed_and_what_they_hold_comes_back(values: list[list[int]]) -> None:
    """Each value refers to some of the objects that live, and each use of a number the second time is a new object."""
    store = Store()
    saver = Saver(store, (Large,))
    rng = np.random.default_rng(0)
    living: dict[int, Large] = {}
    for value in values:
        living = {number: living.get(number) or Large(number, rng.random((3, number)) < 0.5) for number in value}
        saver.save([living[number] for number in value])
        assert len(store.parts) <= min(MOST_PARTS, len(living))
        found = Saver(store, (Large,)).load()
        assert [one.number for one in found] == value
        assert all(np.array_equal(one.mask, living[one.number].mask) for one in found)
        assert len({id(one) for one in found}) == len(living)
