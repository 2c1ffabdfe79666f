"""Computes logits: of any tokens of the last step, after the step, from the trunk's last hidden states; and in a step,
together with workers that have no tokens.

transformers' causal models compute logits inside `forward`, and some scale or cap them there. So `forward` is called
again, with the body of the model replaced by its last output: nothing but the head runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elastic_moe.model.native.layers import NativeHead
from elastic_moe.model.native.linear import Packed
from elastic_moe.model.trunk.linear import PackedLinear, replace_module
from elastic_moe.model.trunk.step_batch import StepBatch, current_batch


class OutputHead:
    """The head of one trunk, whose body it makes remember its output where it is asked to."""

    def __init__(self, trunk: Any) -> None:
        self._trunk = trunk
        body: nn.Module = trunk.base_model
        self._run_body = body.forward
        self._keeps = self._replays = False
        self.output: Any = None
        """The body's output in the last step that was kept. Whoever sets it lets the body seem to have run."""
        self.vocabulary = int(trunk.config.get_text_config().vocab_size)
        """Number of logits of each token."""
        body.forward = self._forward

    def keep(self, wanted: bool) -> None:
        """Whether to remember the hidden states of the steps from now on. They are forgotten when it says False."""
        self._keeps = wanted
        if not wanted:
            self.output = None

    def logits(self, rows: Tensor, input_ids: Tensor) -> Tensor:
        """Logits [R, V] of the step's tokens number `rows` [R]; `input_ids` [1, T] are the step's."""
        assert self.output is not None, "the last step was not kept"
        self._replays = True
        try:
            out: Any = self._trunk(input_ids=input_ids, use_cache=False, logits_to_keep=rows)
        finally:
            self._replays = False
        logits: Tensor = out.logits[0]
        return logits

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._replays:
            return self.output
        output = self._run_body(*args, **kwargs)
        if self._keeps:
            self.output = output
        return output


class _SharedHead(nn.Module):
    """Takes the place of the head's linear layer. In a step it is computed with the others of the native exchange."""

    def __init__(self, alone: PackedLinear, native: NativeHead) -> None:
        super().__init__()
        self._alone = alone
        self.native = native

    def forward(self, x: Tensor) -> Tensor:
        try:
            batch: Any = current_batch()
        except LookupError:  # after a step
            batch = None
        experts = batch.dispatcher.joint if isinstance(batch, StepBatch) and batch.dispatcher is not None else None
        if experts is None or experts.exchange is None or x.dtype != torch.bfloat16:
            return self._alone(x)  # type: ignore[no-any-return]
        logits = self.native(experts, x.reshape(-1, x.shape[-1]))
        return logits.view(*x.shape[:-1], logits.shape[-1])


def share_head(trunk: Any) -> NativeHead | None:
    """Have the trunk's output head computed with the help of workers without tokens, if it is native: then it is
    returned."""
    head = trunk.get_output_embeddings()
    if not isinstance(head, PackedLinear) or not isinstance(head.packed, Packed):
        return None
    shared = _SharedHead(head, NativeHead(head.packed, head.bias))
    replace_module(trunk, head, shared)
    return shared.native
