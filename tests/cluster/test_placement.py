"""The tiers of a placement: what is resident, what its JSON says, and when two placements are equal."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.placement import EMPTY, Placement, Tier, Worker, WorkerId

A, B = WorkerId("a"), WorkerId("b")
WORKERS = (Worker(id=A, node="n", slots=3), Worker(id=B, node="n", slots=2))
PLAIN = Placement(num_logical_experts=4, workers=WORKERS, physical_to_logical_map=np.array([[2, 0, EMPTY, 1, 3]]))
TIERED = replace(PLAIN, tiers=np.array([[Tier.DISK, Tier.DEVICE, Tier.DISK, Tier.HOST, Tier.DEVICE]]))


def test_everything_is_resident_unless_said_otherwise() -> None:
    assert PLAIN.all_resident
    assert PLAIN.resident_share == 1.0
    assert PLAIN.resident(A, 0) == (2, 0)
    assert "tiers" not in PLAIN.to_dict()


def test_tiers_of_slots() -> None:
    assert TIERED.tiers_of(A, 0) == (Tier.DISK, Tier.DEVICE, Tier.DEVICE), "an empty slot is of no tier but the device"
    assert (TIERED.resident(A, 0), TIERED.resident(B, 0)) == ((0,), (3,))
    assert TIERED.resident_share == 0.5
    assert TIERED.experts_of(A, 0) == (2, 0, EMPTY)


def test_json_keeps_the_tiers() -> None:
    data = json.loads(json.dumps(TIERED.to_dict()))
    assert data["tiers"] == [["disk", "device", "device", "host", "device"]]
    assert Placement.from_dict(data) == TIERED


def test_placements_differ_by_their_tiers() -> None:
    assert PLAIN != TIERED
    assert hash(PLAIN) != hash(TIERED)
    assert replace(TIERED, tiers=PLAIN.tiers) == PLAIN


@pytest.mark.parametrize("tiers", [np.array([[3, 0, 0, 0, 0]]), np.array([[-1, 0, 0, 0, 0]]), np.array([[0, 0]])])
def test_no_other_tiers(tiers: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> None:
    with pytest.raises(PlacementError, match="tier"):
        replace(PLAIN, tiers=tiers)
