"""Computes logits of any tokens of the last step, after the step, from the trunk's last hidden states.

transformers' causal models compute logits inside `forward`, and some scale or cap them there. So `forward` is called
again, with the body of the model replaced by its last output: nothing but the head runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


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
