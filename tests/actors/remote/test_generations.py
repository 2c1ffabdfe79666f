"""What a coordinator saves is found by itself alone, and ends with its cluster."""

import pytest

from elastic_moe.actors.remote import generations
from elastic_moe.actors.remote.generations import StateStore
from elastic_moe.actors.remote.key_value import LocalKeyValue
from elastic_moe.cluster.redeploy import Generation

ONE, OTHER = Generation("one"), Generation("other")


def test_a_coordinator_finds_what_it_saved_and_no_other_coordinator_does() -> None:
    values = LocalKeyValue()
    store = StateStore(ONE, "actor-1", values)
    assert store.saved() is None
    store.save(b"state")
    store.save_part("a", b"part")
    again = StateStore(ONE, "actor-1", values)
    assert again.saved() == b"state"
    assert again.saved_part("a") == b"part"
    assert StateStore(ONE, "actor-2", values).saved() is None
    assert StateStore(OTHER, "actor-1", values).saved() is None
    again.drop_part("a")
    assert store.saved_part("a") is None


def test_to_clear_forgets_the_state_and_the_parts_of_one_cluster() -> None:
    values = LocalKeyValue()
    one, other = (StateStore(generation, "actor", values) for generation in (ONE, OTHER))
    for store in (one, other):
        store.save(b"state")
        for name in ("a", "b"):
            store.save_part(name, b"part")
    StateStore(ONE, "", values).clear()
    assert one.saved() is None
    assert one.saved_part("a") is None
    assert other.saved() == b"state"
    assert len(values.keys("")) == 3


def test_the_number_of_groups_counts_until_the_settings_say_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "_values", LocalKeyValue())
    assert generations.number_of_groups(ONE, 2) == 2
    generations.ask_for_groups(ONE, 2, 5)
    assert (generations.number_of_groups(ONE, 2), generations.number_of_groups(OTHER, 2)) == (5, 2)
    generations.ask_for_groups(ONE, 2, 1)
    generations.drop_other_numbers(ONE, 2)
    assert (generations.number_of_groups(ONE, 2), generations.number_of_groups(ONE, 3)) == (1, 3)
    # a redeploy with 3 groups, and another one with 2 again
    generations.drop_other_numbers(ONE, 3)
    assert generations.number_of_groups(ONE, 2) == 2
