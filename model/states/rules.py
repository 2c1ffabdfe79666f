"""Single tokens of recurrent layers in native code, in place of functions of transformers' modelling files.

A modelling file has a function that updates the states of a batch for one token. Its replacement here reads each
sequence's state from one slot of the store and writes it to another, so that no state is copied. It does so only
within `slots_in_use`; any other call goes to the original.

Legend: R sequences, as in model/native/recurrent.py.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.model.native.recurrent import Slots, delta_rule, selective_update

_slots: ContextVar[Slots | None] = ContextVar("slots", default=None)

Function = Callable[..., Any]


@contextmanager
def slots_in_use(slots: Slots) -> Iterator[None]:
    """While the block runs, a replaced function takes its states from `slots`, whatever state it is passed."""
    token = _slots.set(slots)
    try:
        yield
    finally:
        _slots.reset(token)


def replace_rules(lib: ctypes.CDLL, module: nn.Module) -> bool:
    """Replace the functions that the file of the module's class has. Returns whether it has any."""
    file: Any = sys.modules[type(module).__module__]
    found = False
    for name, make in _RULES.items():
        original = getattr(file, name, None)
        if original is None:
            continue
        found = True
        if not hasattr(original, "emoe_original"):
            rule: Any = make(lib, original)
            rule.emoe_original = original
            setattr(file, name, rule)
    return found


def _delta_rule(lib: ctypes.CDLL, original: Function) -> Function:
    def rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        slots = _slots.get()
        if slots is None:
            return original(  # type: ignore[no-any-return]
                query,
                key,
                value,
                g=g,
                beta=beta,
                initial_state=initial_state,
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                **settings,
            )
        query_RKD, key_RKD = query[:, 0].float(), key[:, 0].float()
        if use_qk_l2norm_in_kernel:
            query_RKD, key_RKD = _unit(query_RKD), _unit(key_RKD)
        query_RKD = query_RKD * query_RKD.shape[-1] ** -0.5
        out = delta_rule(lib, query_RKD, key_RKD, value[:, 0], g[:, 0].float().exp(), beta[:, 0], slots)
        return out[:, None].to(query.dtype), initial_state

    return rule


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _selective_update(lib: ctypes.CDLL, original: Function) -> Function:
    def update(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        slots = _slots.get()
        if slots is None:
            return original(  # type: ignore[no-any-return]
                state,
                hidden_states,
                dt,
                A,
                B,
                C,
                D,
                dt_bias=dt_bias,
                dt_softplus=dt_softplus,
                z=z,
                **settings,
            )
        # a head has one time step and one decay, which the caller has spread over its channels
        steps_RN = dt[..., 0].float()
        if dt_bias is not None:
            steps_RN = steps_RN + dt_bias[..., 0].float()
        if dt_softplus:
            steps_RN = F.softplus(steps_RN)
        x = hidden_states.float()
        decay_RN = torch.exp(steps_RN * A[:, 0, 0].float())
        out = selective_update(lib, decay_RN, x * steps_RN[..., None], C, B, slots)
        if D is not None:
            out = out + x * D.float()
        if z is not None:
            out = out * F.silu(z.float())
        return out.to(hidden_states.dtype)

    return update


_RULES: dict[str, Callable[[ctypes.CDLL, Function], Function]] = {
    "torch_recurrent_gated_delta_rule": _delta_rule,
    "recurrent_kimi_delta_attention": _delta_rule,
    "mamba2_selective_state_update": _selective_update,
}
"""The names by which modelling files call their functions for one token."""
