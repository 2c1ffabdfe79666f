"""Stands for CUDA graphs on a CPU: what was recorded is run again, with the work between its graphs at its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from elastic_moe.model.graph_pieces import Work, recorded_by
from elastic_moe.model.graphs.token_graphs import Body
from elastic_moe.model.worker.runner import ModelRunner

R = TypeVar("R")


class _Later:
    """As in a recording, nothing runs between the graphs yet."""

    def outside(self, work: Work) -> None: ...


class _Now:
    def outside(self, work: Work) -> None:
        work()


class EagerRecorder:
    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.recorded = self.replayed = 0

    def record(self, run: Callable[[], R]) -> tuple[Work, R]:
        with recorded_by(_Later()):
            result = run()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            dispatcher = self._runner.dispatcher
            assert dispatcher is not None
            # running it again begins a step of its own
            counter = dispatcher.counter
            with recorded_by(_Now()):
                again = run()
            dispatcher.counter = counter
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                old.copy_(new)

        return replay, result


def _tensors(result: object) -> list[Tensor]:
    assert isinstance(result, Body)
    return [result.output.last_hidden_state, result.choices_LTK]
