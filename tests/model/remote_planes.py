"""A worker's data plane in a process of its own, as Lockstep uses it: for workers that share a GPU."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from torch import Tensor

import elastic_moe.model.exchange.join
import elastic_moe.model.worker.runner
from elastic_moe.cluster.messages.epochs import StateRoom, WindowRoom, WorkerSpec
from elastic_moe.model.graph_pieces import CudaRecorder, Work
from elastic_moe.model.trunk.step_batch import SequenceSlice
from elastic_moe.model.worker.data_plane import DataPlane
from tests.model.fake_device import FakeDevice

R = TypeVar("R")


class RemotePlane:
    """Every method of DataPlane, called there. `abort_step` may be called while another call is under way."""

    def __init__(self, spec: WorkerSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self._calls, calls = context.Pipe()
        self._aborts, aborts = context.Pipe()
        self._locks = {"calls": threading.Lock(), "aborts": threading.Lock()}
        self.process = context.Process(target=_serve, args=(spec, calls, aborts), daemon=True)
        self.process.start()
        calls.close()
        aborts.close()

    @property
    def state_room(self) -> StateRoom | None:
        return self._ask("state_room")  # type: ignore[no-any-return]

    @property
    def window_room(self) -> WindowRoom | None:
        return self._ask("window_room")  # type: ignore[no-any-return]

    def exchange(self) -> str:
        """The class by which this worker exchanges tokens."""
        return self._ask("exchange")  # type: ignore[no-any-return]

    def logits(self, slices: Sequence[SequenceSlice], tokens_per_rank: Sequence[int]) -> Tensor:
        """Of the last tokens of the sequences, after a step [n, V], in float32."""
        return self._ask("logits", slices, tokens_per_rank)  # type: ignore[no-any-return]

    def launched(self) -> tuple[int, int]:
        """How many recordings there are, and how many steps were replays of them."""
        return self._ask("launched")  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self._ask(name, *arguments)

    def _ask(self, name: str, *arguments: object) -> Any:
        """Raises what the worker raises, and EOFError if it has ended."""
        way = "aborts" if name == "abort_step" else "calls"
        pipe = self._aborts if way == "aborts" else self._calls
        with self._locks[way]:
            try:
                pipe.send((name, arguments))
                answer = pipe.recv()
            except ConnectionError:
                raise EOFError("the worker has ended") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.join()


class _Counting(CudaRecorder):
    """Counts what it records and what is replayed."""

    recorded = replayed = 0

    def record(self, run: Callable[[], R]) -> tuple[Work, R]:
        replay, result = super().record(run)
        _Counting.recorded += 1

        def counted() -> None:
            _Counting.replayed += 1
            replay()

        return counted, result


def _serve(spec: WorkerSpec, calls: Connection, aborts: Connection) -> None:
    if spec.model.device == "cpu":
        elastic_moe.model.exchange.join.CudaDevice = FakeDevice  # type: ignore[misc, assignment]
    elastic_moe.model.worker.runner.CudaRecorder = _Counting  # type: ignore[misc]
    plane = DataPlane(spec)
    threading.Thread(target=_answer, args=(plane, aborts), daemon=True).start()
    _answer(plane, calls)


def _answer(plane: DataPlane, pipe: Connection) -> None:
    with contextlib.suppress(EOFError):
        while True:
            name, arguments = pipe.recv()
            try:
                if name == "exchange":
                    assert plane._epoch is not None
                    pipe.send(type(plane._epoch.exchange).__name__)
                    continue
                if name == "logits":
                    pipe.send(plane._runner.run(*arguments).float().cpu())
                    continue
                if name == "launched":
                    pipe.send((_Counting.recorded, _Counting.replayed))
                    continue
                found = getattr(plane, name)
                pipe.send(found(*arguments) if callable(found) else found)
            except Exception as error:  # noqa: BLE001 the parent raises it
                pipe.send(error)
