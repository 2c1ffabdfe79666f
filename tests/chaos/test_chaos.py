"""A small part of the matrix; `make chaos` runs all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.driver import run, start_server, tiny_flags
from tests.chaos.load import Expected
from tests.chaos.scenarios import CALM, FAULTS
from tests.e2e.conftest import kill_family, load_reference
from tests.model.families import tiny_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

FEW = ("kill worker", "kill engine", "kill API replica")


def test_no_request_is_lost_and_no_token_changes(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = tiny_checkpoint("qwen3_moe", tmp_path_factory)
    expected = Expected(load_reference(checkpoint), 160)
    server = start_server(checkpoint, tmp_path / "log", "--rebalance-interval", "0", *tiny_flags(checkpoint))
    try:
        calm = run(server, expected, {"every expert moves": CALM["every expert moves"]}, seed=1, tell=True)
        faults = run(server, expected, {name: FAULTS[name] for name in FEW}, seed=1, tell=True)
        assert not [fault for row in (*calm, *faults) for fault in row.faults]
        assert all(row.answers for row in (*calm, *faults))
        assert server.stop() == 0
    finally:
        kill_family(server)
