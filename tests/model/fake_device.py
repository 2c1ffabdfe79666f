"""Stands for a GPU that processes or threads share: device memory is a file in /dev/shm, streams run on the CPU.

`FakeDevice` does at once what is launched, and waits in the caller's thread. `StreamedDevice` does it later, in order,
in a thread of its own that is slow at random, as a GPU's stream is for the CPU.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import random
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_moe.model.shared_gpu.driver import DeviceError
from elastic_moe.model.shared_gpu.signals import reached


class FakeDevice:
    """`refuses`: a method that raises DeviceError, as a driver's call may."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.owned: dict[int, tuple[mmap.mmap, Path]] = {}
        self.opened: dict[int, mmap.mmap] = {}
        self.registered: dict[int, mmap.mmap] = {}

    @property
    def holds_nothing(self) -> bool:
        return not (self.owned or self.opened or self.registered)

    def again(self) -> FakeDevice:
        return FakeDevice(self.refuses)

    def attach(self) -> None: ...

    def follow(self) -> None: ...

    def aside(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def allocate(self, num_bytes: int) -> int:
        self._may("allocate")
        path = Path(f"/dev/shm/emoe-fake-{uuid.uuid4().hex[:16]}")
        path.touch()
        # without pages until they are written
        os.truncate(path, num_bytes)
        memory = _map(path)
        self.owned[_address(memory)] = memory, path
        return _address(memory)

    def free(self, address: int) -> None:
        self.owned.pop(address)[1].unlink()

    def export(self, address: int) -> bytes:
        self._may("export")
        return str(self.owned[address][1]).encode()

    def open(self, handle: bytes) -> int:
        self._may("open")
        memory = _map(Path(handle.decode()))
        self.opened[_address(memory)] = memory
        return _address(memory)

    def close(self, address: int) -> None:
        del self.opened[address]

    def register(self, memory: mmap.mmap) -> int:
        self._may("register")
        self.registered[_address(memory)] = memory
        return _address(memory)

    def unregister(self, memory: mmap.mmap) -> None:
        del self.registered[_address(memory)]

    def view(self, address: int, num_bytes: int) -> Tensor:
        memory = self.owned[address][0] if address in self.owned else self.opened[address]
        return torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes]

    def copy(self, address: int, source: Tensor) -> None:
        self._launch(lambda: ctypes.memmove(address, source.data_ptr(), source.nbytes))

    def write(self, address: int, value: int) -> None:
        def store() -> None:
            ctypes.c_uint32.from_address(address).value = value

        self._launch(store)

    def wait(self, address: int, value: int) -> None:
        self._may("wait")
        word = ctypes.c_uint32.from_address(address)

        def spin() -> None:
            while not reached(word.value, value):
                time.sleep(1e-5)

        self._launch(spin)

    def mark(self) -> Callable[[], bool]:
        passed = threading.Event()
        self._launch(passed.set)
        return passed.is_set

    def _launch(self, work: Callable[[], object]) -> None:
        work()

    def _may(self, call: str) -> None:
        if call == self.refuses:
            raise DeviceError(f"{call} was refused")


class StreamedDevice(FakeDevice):
    """Its stream ends with `end`."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def launch(self, work: Callable[[], object]) -> None:
        """Have the stream call `work`, as it would run a kernel."""
        self._work.put(work)

    def end(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _launch(self, work: Callable[[], object]) -> None:
        self.launch(work)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if self._rng.random() < 0.2:
                time.sleep(self._rng.random() * 0.001)
            work()


def _map(path: Path) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
