"""Every call of the driver gets its arguments as the driver's C header has them: against a library that plays it."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from elastic_moe.model.shared_gpu import driver as cuda_driver
from elastic_moe.model.shared_gpu.driver import CudaDevice, DeviceError

SOURCE = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
/* The prototypes are those of cuda.h. Device memory is the host's, and a stream does everything at once. */
typedef int CUresult; typedef int CUdevice; typedef void *CUcontext; typedef unsigned long long CUdeviceptr;
typedef struct CUstream_st *CUstream; typedef struct { char reserved[64]; } CUipcMemHandle;
static CUcontext current; static int opened, registered; static uintptr_t last_stream; static size_t allocated;
CUresult cuInit(unsigned f) { return f ? 1 : 0; }
CUresult cuGetErrorName(CUresult e, const char **s) {
  *s = e == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR"; return 0;
}
CUresult cuDeviceGet(CUdevice *d, int o) { *d = o + 7; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (void *)(0x7f00000000000000ull + d); return 0; }
CUresult cuCtxSetCurrent(CUcontext c) { current = c; return c == (void *)(0x7f00000000000007ull) ? 0 : 201; }
CUresult cuMemAlloc_v2(CUdeviceptr *p, size_t n) {
  if (n > 1ull << 32) return 2;
  allocated = n; *p = (CUdeviceptr)(uintptr_t)calloc(1, n); return 0;
}
CUresult cuMemFree_v2(CUdeviceptr p) { free((void *)(uintptr_t)p); return 0; }
CUresult cuIpcGetMemHandle(CUipcMemHandle *h, CUdeviceptr p) {
  memset(h, 0, 64); memcpy(h->reserved + 1, &p, 8); h->reserved[63] = 9; return 0;
}
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *p, CUipcMemHandle h, unsigned flags) {
  if (h.reserved[63] != 9 || flags != 1) return 1;
  memcpy(p, h.reserved + 1, 8); opened++; return 0;
}
CUresult cuIpcCloseMemHandle(CUdeviceptr p) { opened--; return p ? 0 : 1; }
CUresult cuMemHostRegister_v2(void *p, size_t n, unsigned f) { registered++; return n == 4096 && f == 3 && p ? 0 : 1; }
CUresult cuMemHostUnregister(void *p) { registered--; return p ? 0 : 1; }
CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *d, void *p, unsigned f) { *d = (uintptr_t)p; return f; }
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream t) {
  last_stream = (uintptr_t)t; memcpy((void *)(uintptr_t)d, (void *)(uintptr_t)s, n); return 0;
}
CUresult cuStreamWriteValue32_v2(CUstream t, CUdeviceptr p, uint32_t v, unsigned f) {
  last_stream = (uintptr_t)t; *(uint32_t *)(uintptr_t)p = v; return f;
}
CUresult cuStreamWaitValue32_v2(CUstream t, CUdeviceptr p, uint32_t v, unsigned f) {
  last_stream = (uintptr_t)t; return (int32_t)(*(uint32_t *)(uintptr_t)p - v) >= 0 ? f : 600;
}
unsigned long long state(int what) {
  return what == 0 ? opened : what == 1 ? registered : what == 2 ? last_stream : allocated;
}
"""
STREAM = 0x7FFF_1234_5678_9ABC


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, built = tmp_path / "driver.c", tmp_path / "driver.so"
    source.write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", built, source], check=True)
    found = ctypes.CDLL(str(built))
    found.state.restype = ctypes.c_ulonglong
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda name: found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=STREAM))
    cuda_driver._library.cache_clear()
    yield found
    cuda_driver._library.cache_clear()


def test_calls(library: ctypes.CDLL) -> None:
    device = CudaDevice()
    device.follow()
    address = device.allocate(1000)
    assert library.state(3) == 2 << 20, "the driver shares whole pieces"
    handle = device.export(address)
    assert len(handle) == 64
    assert device.open(handle) == address
    assert library.state(0) == 1
    device.copy(address + 16, torch.arange(10))
    assert library.state(2) == STREAM
    assert (ctypes.c_int64 * 10).from_address(address + 16)[:] == list(range(10))
    device.close(address)
    device.free(address)
    assert library.state(0) == 0


def test_words_of_the_host(library: ctypes.CDLL) -> None:
    device, memory = CudaDevice(), mmap.mmap(-1, 4096)
    device.follow()
    address = device.register(memory)
    device.write(address + 64, 0xFFFF_FFFF)
    assert memory[64:68] == b"\xff" * 4
    device.wait(address + 64, 0xFFFF_FFF0)
    with pytest.raises(DeviceError, match=r"cuStreamWaitValue32_v2 failed: CUDA_ERROR \(600\)"):
        device.wait(address + 64, 3)
    assert library.state(2) == STREAM
    device.unregister(memory)
    assert library.state(1) == 0


def test_a_refusal_names_the_call_and_the_error(library: ctypes.CDLL) -> None:
    device = CudaDevice()
    device.attach()
    with pytest.raises(DeviceError, match="cuMemAlloc_v2 failed: CUDA_ERROR_OUT_OF_MEMORY"):
        device.allocate(1 << 40)


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    cuda_driver._library.cache_clear()
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", missing)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    device = CudaDevice()
    with pytest.raises(DeviceError, match=r"lacks what a shared GPU needs: libcuda\.so\.1"):
        device.attach()
