"""What torch.cuda answers where a GPU is pretended, and how a Lockstep gets workers there (pretended_tensors.py)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import elastic_moe.model.gpu.refusals
import elastic_moe.model.trunk.step_batch
import tests.model.lockstep
from elastic_moe.model.experts.stacked import StackedExperts
from elastic_moe.model.tiers.link import Pinned
from elastic_moe.model.worker.runner import ModelRunner
from tests.model.eager_recorder import EagerRecorder, R, Work
from tests.model.pretended_tensors import enter, here, note, pinned_addresses

TOTAL_BYTES = 1 << 33
"""Memory of the device."""

recorders: weakref.WeakKeyDictionary[ModelRunner, EagerRecorder] = weakref.WeakKeyDictionary()
"""What each runner has recorded."""


class _Stream:
    cuda_stream = 0

    def __init__(self, *_: Any) -> None: ...

    def synchronize(self) -> None:
        note("stream.synchronize")

    def wait_stream(self, other: _Stream) -> None: ...

    def wait_event(self, event: _Event) -> None: ...


class _Event:
    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self, stream: _Stream | None = None) -> None: ...

    def wait(self, stream: _Stream | None = None) -> None: ...

    def synchronize(self) -> None:
        note("event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


class Threads(ThreadPoolExecutor):
    """Threads that have the device."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers, initializer=enter)


class _Recorder(EagerRecorder):
    """Refuses what cannot be recorded."""

    def record(self, run: Callable[[], R]) -> tuple[Work, R]:
        turns = iter((False, True))

        def recorded() -> R:
            # the second turn is the recording, as CudaRecorder has it; then come the replays
            here.recording = next(turns, False)
            try:
                return run()
            finally:
                here.recording = False

        super().record(recorded)
        self.recorded -= 1
        return super().record(recorded)


def pretend(patch: pytest.MonkeyPatch) -> None:
    """From now on workers of a Lockstep may be on `cuda`. Skips the test where a GPU is: test_cuda.py is for those."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    stream = _Stream()
    answers: dict[str, Any] = {
        "mem_get_info": lambda *_: (TOTAL_BYTES, TOTAL_BYTES),
        "memory_reserved": lambda *_: 0,
        "empty_cache": lambda: None,
        "current_device": lambda: 0,
        "current_stream": lambda *_: stream,
        "stream": lambda _: nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
        "synchronize": lambda: note("synchronize"),
        "is_current_stream_capturing": lambda: getattr(here, "recording", False),
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, answer)
    pin, use_graphs = Pinned.__init__, ModelRunner.use_graphs

    def pinned(memory: Pinned, nbytes: int, device: torch.device) -> None:
        pin(memory, nbytes, torch.device("cpu"))
        pinned_addresses.add(memory.data.data_ptr())

    patch.setattr(Pinned, "__init__", pinned)

    def use(runner: ModelRunner, **sizes: int) -> str | None:
        recorders[runner] = _Recorder(runner)
        return use_graphs(runner, **sizes, recorder=recorders[runner])

    patch.setattr(ModelRunner, "use_graphs", use)
    # each size is recorded when it is first used
    patch.setattr(ModelRunner, "record_graphs", lambda *_: None)
    # Triton's kernels cannot run, and experts could be recorded with them alone
    patch.setattr(elastic_moe.model.gpu.refusals, "_unavailable", lambda: "this GPU is pretended")
    patch.setattr(StackedExperts, "memory", property(lambda layer: layer._slots.stacks or None))
    # a graph's memory, of which there is none
    patch.setattr(elastic_moe.model.trunk.step_batch, "borrowed", lambda tensor: tensor)
    patch.setattr(tests.model.lockstep, "ThreadPoolExecutor", Threads)
    # a parameter of the CPU cannot become a shell, so modules get new ones
    patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
