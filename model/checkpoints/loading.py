"""Loads a model in parts: the trunk (everything but experts), and the experts that a worker holds.

Both have the same bits as after transformers' `from_pretrained`. Only the bytes that are needed are read, and no tensor
is held twice: while a worker loads, its memory stays close to the size of the weights that it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.checkpoints.checkpoint import Checkpoint
from elastic_moe.model.checkpoints.conversion import convert
from elastic_moe.model.checkpoints.kept import load_codes
from elastic_moe.model.checkpoints.packed import PackedTensor, Stored
from elastic_moe.model.checkpoints.quiet import quiet_transformers
from elastic_moe.model.checkpoints.servability import is_expert_module
from elastic_moe.model.heap import return_freed_memory

_TRIM_BYTES = 8 << 20
"""Bytes of experts that are made between two calls of return_freed_memory. Unpacking leaves holes of the size of what
is made, which may be four times what is stored."""

Progress = Callable[[int, int], None]
"""A function that is called with (done_bytes, total_bytes) from time to time."""


def load_trunk(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str = "emoe",
    experts_implementation: str = "emoe",
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load the causal language model without expert weights, in evaluation mode and without gradients.

    Its expert modules keep their flags, and have an empty buffer in place of each parameter. The two implementations
    are names in transformers' registries; both must be registered before this call. Blocks while it reads. Raises
    CheckpointError if a file has become unreadable since the checkpoint was opened.
    """
    tensors = {name: checkpoint.tensors[name] for name in checkpoint.conversion.trunk}
    reading = _Reading(total=sum(tensor.nbytes for tensor in tensors.values()), progress=progress)
    with quiet_transformers():
        cls: Any = _without_experts(type(checkpoint.skeleton))
        model, report = cls.from_pretrained(
            None,
            config=checkpoint.config,
            state_dict={name: _LazyTensor(tensor, reading, dtype) for name, tensor in tensors.items()},
            dtype=dtype,
            attn_implementation=attn_implementation,
            experts_implementation=experts_implementation,
            output_loading_info=True,
        )
    _refuse_report(checkpoint, report)
    trunk: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return_freed_memory()
    return trunk


def load_whole(checkpoint: Checkpoint) -> PreTrainedModel:
    """Load the causal language model with all experts, in the stored dtype, as transformers itself computes it."""
    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
    cls: Any = type(checkpoint.skeleton)
    with quiet_transformers():
        if type(config) is type(checkpoint.config):
            model = cls.from_pretrained(checkpoint.path, dtype=checkpoint.stored_dtype, local_files_only=True)
        else:
            reading = _Reading(total=0, progress=None)
            dtype = checkpoint.stored_dtype
            state = {name: _LazyTensor(tensor, reading, dtype) for name, tensor in checkpoint.tensors.items()}
            model = cls.from_pretrained(None, config=checkpoint.config, state_dict=state, dtype=dtype)
    loaded: PreTrainedModel = model.eval()
    return loaded


def expert_modules(model: nn.Module) -> list[nn.Module]:
    """The expert modules of a model. A module's index in the list is the number of its MoE layer."""
    return [module for module in model.modules() if is_expert_module(module)]


def iter_experts(
    checkpoint: Checkpoint,
    pairs: Iterable[tuple[int, int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    form: ExpertForm = ExpertForm.PLAIN,
    progress: Progress | None = None,
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Load many experts. Each is yielded as (layer, expert, tensors) as soon as it is read.

    `tensors` has one tensor for each parameter of the expert module, by name: `parameter[expert]`, in memory of its
    own. If `form` is that in which the checkpoint has its experts (`ModelInfo.kept`), they come in it, and matrices are
    always [out, in] (model/int8.py, model/int4.py); otherwise they are unpacked, and rounding them is left to the
    caller. Experts come layer by layer, which is the usual order on the disk. Beside the experts that the caller keeps,
    only one is in memory. Only the bytes of the wanted experts are read. `progress` is called after every expert, with
    stored bytes. Raises IndexError for an expert that the model does not have, and CheckpointError if a file has become
    unreadable or has values that its format does not have.
    """
    ordered = sorted(set(pairs))
    for layer, expert in ordered:
        if not (0 <= layer < len(checkpoint.conversion.experts) and 0 <= expert < checkpoint.shape.num_experts):
            raise IndexError(f"the model has no expert {expert} in MoE layer {layer}")
    sizes = {layer: expert_stored_bytes(checkpoint, layer) for layer, _ in ordered}
    done, total, made = 0, sum(sizes[layer] for layer, _ in ordered), 0
    for layer, expert in ordered:
        if form is not ExpertForm.PLAIN and form is checkpoint.info.kept:
            tensors = {k: _own(t, device) for k, t in load_codes(checkpoint, layer, expert, dtype=dtype).items()}
        else:
            tensors = _load_expert(checkpoint, layer, expert, dtype=dtype, device=device)
        done += sizes[layer]
        made += sum(tensor.nbytes for tensor in tensors.values())
        if made >= _TRIM_BYTES:
            return_freed_memory()
            made = 0
        if progress is not None:
            progress(done, total)
        yield layer, expert, tensors
    return_freed_memory()


def expert_stored_bytes(checkpoint: Checkpoint, layer: int) -> int:
    """The bytes that one expert of this MoE layer takes on the disk."""
    count = checkpoint.shape.num_experts
    return sum(
        checkpoint.tensors[name].nbytes // (count if part.fused else 1)
        for part in checkpoint.conversion.experts[layer]
        for name in part.sources_of(0).values()
    )


def _load_expert(
    checkpoint: Checkpoint, layer: int, expert: int, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for part in checkpoint.conversion.experts[layer]:
        sources = {
            pattern: [_read(checkpoint.tensors[name], expert if part.fused else None, dtype)]
            for pattern, name in part.sources_of(expert).items()
        }
        [tensor] = convert(part.group, sources, checkpoint.skeleton)[part.group.target].detach()
        made[part.parameter] = _own(tensor.to(dtype), device)
    return made


def _read(stored: Stored, row: int | None, dtype: torch.dtype) -> Tensor:
    tensor = stored.read(row)
    # packed weights are integers until they are converted, and keep their dtype until then
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, contiguous, in memory that holds nothing else."""
    tensor = tensor.to(device).contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


# --- Trunk ------------------------------------------------------------------------------------------------------------


def _without_experts(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Make a class that builds `cls` and then drops the parameters of its expert modules."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        for module in expert_modules(self):
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                # transformers neither expects a non-persistent buffer in the checkpoint nor saves it
                module.register_buffer(name, parameter.new_empty(0), persistent=False)

    # transformers recognises its own classes by their module, and finds conversions by the class's name
    return type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})


def _refuse_report(checkpoint: Checkpoint, report: Mapping[str, Any]) -> None:
    """Raise CheckpointError if any weight was not loaded: a trunk with a random weight would answer with nonsense."""
    for what in ("missing_keys", "mismatched_keys", "error_msgs", "conversion_errors"):
        if report.get(what):
            raise CheckpointError(f"{checkpoint.path}: loading the trunk left {what}: {sorted(report[what])[0]}")


@dataclass(slots=True)
class _Reading:
    """Counts the bytes that have been read, out of `total`."""

    total: int
    progress: Progress | None
    done: int = 0

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)


class _LazyTensor:
    """Stands for a stored tensor in a state dict. transformers reads the tensor by `[...]` when it needs it."""

    def __init__(self, stored: Stored, reading: _Reading, dtype: torch.dtype) -> None:
        """`dtype` is the served one. A packed weight is rounded to it when it is read, to take little memory."""
        self._stored = stored
        self._dtype = dtype if isinstance(stored, PackedTensor) else stored.dtype
        self._reading = reading

    def __getitem__(self, index: Any) -> Tensor:
        assert index is Ellipsis
        tensor = self._stored.read().to(self._dtype)
        self._reading.add(self._stored.nbytes)
        return tensor

    def get_shape(self) -> list[int]:
        return list(self._stored.shape)

    def get_dtype(self) -> torch.dtype:
        return self._dtype
