"""CUDA's driver, for what torch does not offer: memory that several processes share, and waits for words of the host.

Calls go to libcuda, which every machine with a GPU has and whose functions keep their form from version to version.
Memory comes from `cuMemAlloc` and not from torch's allocator, whose blocks cannot all be exported. Copies, writes and
waits are put on torch's present stream. Nothing here makes the CPU wait for the device.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from elastic_moe.model.foreign_memory import bytes_at
from elastic_moe.model.staging import passed, recorded

_PIECE_BYTES = 2 << 20
"""The driver exports memory in pieces of this size. Smaller allocations would share a piece with others."""
_HANDLE_BYTES = 64
_PEER_ACCESS = 1
_PORTABLE_AND_MAPPED = 3
_AT_LEAST = 0
"""A wait ends when (word - value) as a signed number is at least 0, so numbers may wrap around."""

_Handle = ctypes.c_ubyte * _HANDLE_BYTES
_address, _word = ctypes.c_uint64, ctypes.c_uint32
_pointer = ctypes.POINTER(_address)


class _PassedHandle(ctypes.Structure):
    """A handle as `cuIpcOpenMemHandle` takes it, by value."""

    _fields_ = [("reserved", _Handle)]


_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_int),
    "cuCtxSetCurrent": (ctypes.c_void_p,),
    "cuMemAlloc_v2": (_pointer, ctypes.c_size_t),
    "cuMemFree_v2": (_address,),
    "cuIpcGetMemHandle": (ctypes.POINTER(_PassedHandle), _address),
    "cuIpcOpenMemHandle_v2": (_pointer, _PassedHandle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_address,),
    "cuMemHostRegister_v2": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint),
    "cuMemHostUnregister": (ctypes.c_void_p,),
    "cuMemHostGetDevicePointer_v2": (_pointer, ctypes.c_void_p, ctypes.c_uint),
    "cuMemcpyDtoDAsync_v2": (_address, _address, ctypes.c_size_t, ctypes.c_void_p),
    "cuStreamWriteValue32_v2": (ctypes.c_void_p, _address, _word, ctypes.c_uint),
    "cuStreamWaitValue32_v2": (ctypes.c_void_p, _address, _word, ctypes.c_uint),
}
"""Each with its parameters. All return a status."""


class DeviceError(RuntimeError):
    """The driver has refused a call. Its text names the call and the driver's error."""


@cache
def _library() -> ctypes.CDLL:
    """Raises DeviceError if there is no driver, or one that is too old."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        for name, parameters in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = parameters, ctypes.c_int
    except (OSError, AttributeError) as error:
        raise DeviceError(f"the CUDA driver lacks what a shared GPU needs: {error}") from None
    return library


def _call(name: str, *arguments: Any) -> None:
    library = _library()
    status = getattr(library, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        library.cuGetErrorName(status, ctypes.byref(text))
        raise DeviceError(f"{name} failed: {(text.value or b'unknown error').decode()} ({status})")


class CudaDevice:
    """torch's present GPU. Every thread may call it. All methods raise DeviceError."""

    def __init__(self) -> None:
        self._index = torch.cuda.current_device()
        self._stream: torch.cuda.Stream | None = None
        self._context: ctypes.c_void_p | None = None

    def again(self) -> CudaDevice:
        """The same GPU, for threads that have streams of their own."""
        return CudaDevice()

    def attach(self) -> None:
        """Let this thread's next calls go to this GPU. It comes before any other call of a thread."""
        if self._context is None:
            device, context = ctypes.c_int(), ctypes.c_void_p()
            _call("cuInit", 0)
            _call("cuDeviceGet", ctypes.byref(device), self._index)
            # torch uses this context too, and keeps it until the process ends
            _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._context = context
        _call("cuCtxSetCurrent", self._context)

    def follow(self) -> None:
        """Let this thread's next calls go to this GPU, and what is launched next to torch's present stream."""
        self.attach()
        self._stream = torch.cuda.current_stream(self._index)

    @staticmethod
    def aside() -> AbstractContextManager[Any]:
        """Within the block, torch's present stream is a new one."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return torch.cuda.stream(stream)

    # --- Memory -------------------------------------------------------------------------------------------------

    def allocate(self, num_bytes: int) -> int:
        """The address of memory of its own, which `export` can share."""
        address = _address()
        _call("cuMemAlloc_v2", ctypes.byref(address), -(-num_bytes // _PIECE_BYTES) * _PIECE_BYTES)
        return address.value

    def free(self, address: int) -> None:
        """May wait until the GPU has done what was launched."""
        _call("cuMemFree_v2", address)

    def export(self, address: int) -> bytes:
        """What another process needs to `open` the memory."""
        handle = _PassedHandle()
        _call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        """The address that another process's memory has here. It stays valid when that process has ended."""
        address = _address()
        passed_handle = _PassedHandle(_Handle.from_buffer_copy(handle))
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), passed_handle, _PEER_ACCESS)
        return address.value

    def close(self, address: int) -> None:
        """Undo `open`."""
        _call("cuIpcCloseMemHandle", address)

    def register(self, memory: mmap.mmap) -> int:
        """The address by which the GPU reaches a segment of the host's memory."""
        host, address = _host_address(memory), _address()
        _call("cuMemHostRegister_v2", host, len(memory), _PORTABLE_AND_MAPPED)
        _call("cuMemHostGetDevicePointer_v2", ctypes.byref(address), host, 0)
        return address.value

    def unregister(self, memory: mmap.mmap) -> None:
        _call("cuMemHostUnregister", _host_address(memory))

    def view(self, address: int, num_bytes: int) -> Tensor:
        """The memory as a tensor of bytes, which does not own it."""
        return bytes_at(address, num_bytes, torch.device("cuda", self._index))

    # --- On the stream of the last `follow` ---------------------------------------------------------------------

    def copy(self, address: int, source: Tensor) -> None:
        """Copy a contiguous tensor's bytes to the address."""
        _call("cuMemcpyDtoDAsync_v2", address, source.data_ptr(), source.nbytes, self._handle)

    def write(self, address: int, value: int) -> None:
        """Write a word, once all that was launched before is done and seen by everybody."""
        _call("cuStreamWriteValue32_v2", self._handle, address, value, 0)

    def wait(self, address: int, value: int) -> None:
        """Let what is launched later wait until the word has reached the value."""
        _call("cuStreamWaitValue32_v2", self._handle, address, value, _AT_LEAST)

    def mark(self) -> Callable[[], bool]:
        """A function that says whether the stream has done all that was launched on it by now."""
        event = recorded(self._stream)
        return lambda: passed(event)

    @property
    def _handle(self) -> int:
        assert self._stream is not None
        return int(self._stream.cuda_stream)


def _host_address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
