"""What a redeploy changes, setting by setting."""

import dataclasses

import pytest

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.redeploy import (
    API,
    LIVE,
    MASK,
    SECRETS,
    changes,
    cluster_of,
    generation_of,
    group_name,
    in_force,
    in_words,
    number_of,
    shown,
)

NAMES = {field.name for field in dataclasses.fields(ServeConfig)}


def test_the_lists_name_settings_each_at_most_once() -> None:
    assert LIVE | API | SECRETS <= NAMES
    assert not LIVE & API


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"workers": 3, "drain_timeout": 1.0, "rebalance_interval": 0}, True),
        ({"served_model_name": "other", "api_key": "k", "model": "/elsewhere/../models/a"}, True),
        ({"data_parallel_size": 3}, True),
        ({"dtype": "float32"}, False),
        ({"expert_dtype": "int8"}, False),
        ({"trunk_dtype": "int8"}, False),
        ({"max_num_seqs": 8}, False),
        ({"device": "cuda"}, False),
    ],
)
def test_another_model_or_what_workers_are_made_with_needs_another_cluster(
    settings: dict[str, object], same: bool
) -> None:
    before = generation_of(ServeConfig(), "/models/a")
    assert (generation_of(ServeConfig(**settings), "/models/a") == before) is same  # type: ignore[arg-type]
    assert generation_of(ServeConfig(), "/models/b") != before


def test_groups_have_names_of_their_own_and_the_first_one_that_of_its_cluster() -> None:
    cluster = generation_of(ServeConfig(), "/models/a")
    names = [group_name(cluster, number) for number in range(12)]
    assert names[0] == cluster
    assert len(set(names)) == 12
    assert {cluster_of(name) for name in names} == {cluster}
    assert [number_of(name) for name in names] == list(range(12))


def test_a_setting_that_nobody_has_sorted_needs_another_cluster() -> None:
    """The safe answer: it is in force once it is shown to be."""
    assert "block_size" in NAMES - LIVE - API


def test_differences_in_words_without_keys() -> None:
    old, new = ServeConfig(api_key="old"), ServeConfig(api_key="new", workers=3)
    assert in_words(changes(old, new)) == f"workers 2 -> 3, api_key {MASK} -> {MASK}"
    assert changes(new, new) == {}


def test_what_is_in_force_is_told_by_whoever_reads_it_and_keys_are_masked() -> None:
    api = ServeConfig(workers=2, max_waiting_requests=7, api_key="secret", dtype="float32")
    told = in_force(api, ServeConfig(workers=3, max_waiting_requests=9, dtype="bfloat16"))
    assert (told["workers"], told["max_waiting_requests"], told["dtype"]) == (3, 7, "bfloat16")
    assert (told["api_key"], told["admin_api_key"]) == (MASK, None)
    assert "secret" not in str(shown(api))
