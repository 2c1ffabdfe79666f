"""Stands for a CUDA GPU where there is none: tensors that say that they are on `cuda:0`, and whose values are real.

Each is a shell around a tensor of the CPU, on which every operator really runs. So the code for GPUs runs whole, with
its trials, and makes tokens that can be compared. What a GPU refuses is refused here too: operands on two devices, the
address or the numpy array of a tensor on the device, float8 in anything but copies. What makes the CPU wait for the
device is counted, and refused while a graph is recorded. All streams are one: of their order it knows nothing.

Modes of torch hold for one thread, so each thread that uses the device calls `enter`, or is `entered`. What torch.cuda
answers is in pretended_cuda.py.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)

_ASK = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
    aten.bincount.default,
}
"""Operators whose result, or its size, the CPU must know."""
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""They take indices from the CPU, which they copy to the device and wait for."""
_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu}
_COPIES = ("copy", "clone", "view", "empty", "detach", "slice", "select", "split", "alias", "as_strided", "reshape")
"""Parts of the names of operators that compute nothing."""

here = threading.local()
pinned_addresses: set[int] = set()
"""Addresses of pinned memory."""


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """How often this thread waits for the device in the block, by the operator that does."""
    here.waits = found = Counter[str]()
    try:
        yield found
    finally:
        here.waits = None


def note(what: object) -> None:
    _touch_host(what)
    found = getattr(here, "waits", None)
    if found is not None:
        found[str(what)] += 1


def _touch_host(what: object) -> None:
    """Raises RuntimeError where a graph is recorded: its replays would use what was in the host's memory then."""
    if getattr(here, "recording", False):
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


class OnDevice(torch.Tensor):
    """A tensor of the device. `near` is the tensor of the CPU that has its values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> OnDevice:
        # for torch itself a shell is on the meta device: torch for CPUs cannot make one elsewhere
        with torch.inference_mode(False):
            made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                near.shape,
                strides=near.stride(),
                storage_offset=near.storage_offset(),
                dtype=near.dtype,
                device="meta",
            )
        made.near = near
        return made

    def record_stream(self, stream: Any) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = _METHODS.get(func)
        if own is not None:
            return own(*args, **kwargs or {})
        outer, here.inside = getattr(here, "inside", False), True
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})
        finally:
            here.inside = outer


def _near(x: Any) -> Any:
    """What operators of the CPU take for `x`, which may be a list of tensors, or arguments."""
    kind = type(x)
    if kind is OnDevice:
        return x.near
    if kind is tuple or kind is list:
        return kind(map(_near, x))
    return {name: _near(value) for name, value in x.items()} if kind is dict else x


def _far(x: Any) -> Any:
    if isinstance(x, Tensor):
        return OnDevice(x)
    return type(x)(map(_far, x)) if type(x) in (tuple, list) else x


def _tensors(x: Any, found: list[Tensor]) -> list[Tensor]:
    """All in `x`, added to those that are found."""
    if isinstance(x, Tensor):
        found.append(x)
    elif isinstance(x, tuple | list):
        for part in x:
            _tensors(part, found)
    return found


@cache
def _decomposes(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


# --- Operators --------------------------------------------------------------------------------------------------------


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = _tensors(list(kwargs.values()), _tensors(args, []))
    far = [x for x in tensors if isinstance(x, OnDevice)]
    if far and _decomposes(func):
        with _Operators():
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
    asked, kwargs = kwargs.get("device"), dict(kwargs)
    to_device = asked is not None and _is_device(torch.device(asked))
    pins = bool(kwargs.pop("pin_memory", False))
    if to_device:
        kwargs["device"] = torch.device("cpu")
    if func is aten._to_copy.default:
        return _to_copy(args[0], kwargs, to_device=to_device or (bool(far) and asked is None))
    if func is aten.copy_.default:
        return _copy(*args, **kwargs)
    if far:
        _check(func, args, kwargs, tensors)
    out = func(*_near(args), **_near(kwargs))
    if not far and not to_device:
        if pins:
            pinned_addresses.add(out.untyped_storage().data_ptr())
        return out
    if func._schema.is_mutable and args and isinstance(args[0], OnDevice) and not isinstance(out, tuple | list):
        return args[0] if isinstance(out, Tensor) else out
    return _far(out)


def _is_device(device: torch.device) -> bool:
    # an operator of torch makes further tensors where its operands seem to be
    return device.type == "cuda" or (device.type == "meta" and getattr(here, "inside", False))


def _check(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
    """Raises RuntimeError for what a GPU refuses."""
    if any(x.dim() for x in tensors if not isinstance(x, OnDevice)):
        if func not in _INDEXING:
            places = [f"{x.device}{list(x.shape)}" for x in tensors]
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {places}")
        note(f"{func} with an index from the CPU")
    bools = any(x.dtype == torch.bool for x in _tensors(args[1], [])) if func in _INDEXING else False
    if func in _ASK or bools or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
        note(func)
    if any(x.dtype in _FLOAT8 for x in tensors) and not any(part in str(func) for part in _COPIES):
        raise RuntimeError(f"{func} is not implemented for float8 on cuda")


def _to_copy(tensor: Tensor, kwargs: dict[str, Any], *, to_device: bool) -> Tensor:
    without_wait = kwargs.pop("non_blocking", False) and to_device
    if isinstance(tensor, OnDevice) != to_device:
        (_touch_host if without_wait else note)("to the device" if to_device else "to the CPU")
    out: Tensor = aten._to_copy.default(_near(tensor), **kwargs)
    return OnDevice(out) if to_device else out


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    ends = [isinstance(x, OnDevice) for x in (target, source)]
    if ends[0] != ends[1] and source.dim():
        pinned = _near(target).untyped_storage().data_ptr() in pinned_addresses
        without_wait = non_blocking and (ends[0] or pinned)
        (_touch_host if without_wait else note)("copy_ to the device" if ends[0] else "copy_ to the CPU")
    _near(target).copy_(_near(source))
    return target


# --- Methods that torch does not hand to operators --------------------------------------------------------------------


def _taken(tensor: Tensor, index: Any) -> Tensor:
    """tensor[index]"""
    if not isinstance(tensor, OnDevice):
        raise RuntimeError("indices should be on the CPU, as the tensor is")
    return OnDevice(tensor.near[_indices(index)])


def _put(tensor: Tensor, index: Any, value: Any) -> None:
    """tensor[index] = value"""
    if not isinstance(tensor, OnDevice):
        raise RuntimeError("an index or a value on cuda:0 for a tensor of the CPU")
    if isinstance(value, Tensor) and not isinstance(value, OnDevice) and value.dim():
        note("values from the CPU")
    tensor.near[_indices(index)] = _near(value)


def _indices(index: Any) -> Any:
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, OnDevice):
            if not part.dim() or part.dtype == torch.bool:
                note("an index that the CPU must know")
        elif isinstance(part, list | np.ndarray | Tensor):
            note("an index from the CPU")
    return _near(index)


def _moved(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """tensor.to(...)"""
    if len(args) == 1 and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype)
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    far, values = isinstance(tensor, OnDevice), _near(tensor)
    to_device = far if device is None else device.type == "cuda"
    made = values.to(dtype or values.dtype, copy=copy)
    if far == to_device:
        return tensor if made is values else OnDevice(made) if far else made if device is None else made.to(device)
    (_touch_host if non_blocking and to_device else note)("to the device" if to_device else f"to {device}")
    made = made.clone() if made is values else made
    return OnDevice(made) if to_device else made


def _listed(tensor: OnDevice) -> Any:
    note("tolist")
    return tensor.near.tolist()


def _refused(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise TypeError(f"{name} of a tensor on cuda:0")

    return refuse


_METHODS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _taken,
    Tensor.__setitem__: _put,
    Tensor.to: _moved,
    Tensor.tolist: _listed,
    Tensor.device.__get__: lambda *_: DEVICE,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda *_: True,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__: lambda *_: False,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda *_: False,  # type: ignore[attr-defined]
    Tensor.data.__get__: lambda tensor: OnDevice(tensor.near.detach()),  # type: ignore[attr-defined]
    **{
        getattr(Tensor, name): _refused(name)
        for name in ("numpy", "__array__", "data_ptr", "pin_memory", "share_memory_", "__dlpack__")
    },
}


class _Operators(TorchDispatchMode):
    # that of torch's own tensors without memory: torch does not open a device while it is in force
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            note("tensor(..., device)")
            return OnDevice(func(*args, **kwargs | {"device": "cpu"}))
        if func is Tensor.to and not isinstance(args[0], OnDevice):
            return _moved(*args, **kwargs)
        if func is Tensor.pin_memory and not isinstance(args[0], OnDevice):
            copy = args[0].clone()
            pinned_addresses.add(copy.untyped_storage().data_ptr())
            return copy
        return func(*args, **kwargs)


@contextmanager
def entered() -> Iterator[None]:
    """This thread has the device in the block."""
    with _Functions(), _Operators():
        yield


def enter() -> None:
    """This thread has the device from now on."""
    for mode in (_Functions(), _Operators()):
        mode.__enter__()  # type: ignore[no-untyped-call]


def on_values(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of the device that `kernel` computes on the CPU."""
    return lambda *args, **kwargs: _far(kernel(*_near(args), **_near(kwargs)))
