"""Epochs that are given up while workers join one another, or before they begin to."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec, TransportKind
from elastic_moe.cluster.messages.requests import Endpoint
from tests.model.families import tiny_checkpoint
from tests.model.lockstep import Lockstep


def test_an_abandoned_epoch_is_not_joined(tmp_path_factory: pytest.TempPathFactory) -> None:
    cluster = Lockstep(tiny_checkpoint("olmoe", tmp_path_factory), [4, 4], transport="tcp")
    worker = next(iter(cluster.workers.values()))

    def attempt(epoch: int) -> EpochSpec:
        """With a group that nobody else joins."""
        doors: tuple[Endpoint, ...] = (worker.open_door("127.0.0.1"), worker.open_door("127.0.0.1"))
        return EpochSpec(
            epoch=Epoch(epoch),
            placement=cluster.placement,
            group=f"other-{epoch}",
            transport=TransportKind.TCP,
            rendezvous="",
            doors=doors,
        )

    threading.Timer(0.2, worker.abandon, (Epoch(50),)).start()
    with pytest.raises(StepAborted, match=r"the group was given up|epoch 50 was abandoned"):
        worker.prepare(attempt(50))
    worker.abandon(Epoch(51))
    with pytest.raises(StepAborted, match="epoch 51 was abandoned"):
        worker.prepare(attempt(51))
    spent = attempt(52)
    worker._groups._open.clear()
    with pytest.raises(StepAborted, match="the door of w0 for epoch 53 is closed"):
        worker.prepare(replace(spent, epoch=Epoch(53)))
    # what serves goes on
    cluster.step()
