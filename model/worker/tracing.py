"""Records which experts tokens choose, with transformers' own model in this process, without cluster and server.

Legend: T tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.lines import counted
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.loading import load_whole
from elastic_moe.optimizer.study.traces import Trace


def record_trace(
    path: str | Path,
    requests: Iterable[Sequence[int]],
    *,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Trace:
    """Record the routing of every token of `requests`, each run as one prompt of the checkpoint in the directory
    `path`.

    The whole model is loaded on the CPU, in its stored dtype. After each request, `progress` is called with its number
    of tokens. Blocks. Raises CheckpointError for a checkpoint that cannot be served, and RequestError for a request
    that is empty or longer than the model allows, or if there is no request.
    """
    checkpoint = open_checkpoint(path)
    model = load_whole(checkpoint)
    modules = dict(model.named_modules())
    recorder = _Recorder([modules[name] for name in checkpoint.shape.expert_modules])
    lengths: list[int] = []
    chosen: list[Tensor] = []
    for request in requests:
        if not 0 < len(request) <= checkpoint.info.max_model_len:
            raise RequestError(
                f"request {len(lengths) + 1}: {counted(len(request), 'token')}, the model takes 1 to "
                f"{checkpoint.info.max_model_len}"
            )
        with torch.inference_mode():
            model(input_ids=torch.tensor([list(request)]), use_cache=False, logits_to_keep=1)
        chosen.append(recorder.take())
        lengths.append(len(request))
        progress(len(request))
    if not lengths:
        raise RequestError("no request to record")
    return Trace(
        topk_ids=torch.cat(chosen).to(torch.int16).numpy(),
        request_lengths=np.array(lengths, dtype=np.int64),
        num_experts=checkpoint.info.num_logical_experts,
    )


class _Recorder:
    """Records the choices that the routers pass to the expert modules."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        self._ids: list[Tensor] = []
        for module in experts:
            module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # expert modules take hidden states, indices and weights, by position or by names that differ by family
        index: Tensor = [*args, *kwargs.values()][1]
        self._ids.append(index.reshape(-1, index.shape[-1]))

    def take(self) -> Tensor:
        """The choices [T, L, K] since the last call."""
        ids, self._ids = torch.stack(self._ids, dim=1), []
        return ids
