"""All layers of a trunk become one call only if nothing else lies between them; bits and counts are the same."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.loading import expert_modules, load_trunk
from elastic_moe.model.fitting import fit as fitting
from elastic_moe.model.fitting.whole_stack import LayerRun, _one_after_another
from tests.model.families import tiny_checkpoint
from tests.model.lockstep import request
from tests.model.native.test_models import texts
from tests.model.native.test_workers import first_logits, lockstep

RUNS = ["mixtral", "mixtral-sliding", "qwen3_moe", "olmoe"]
OTHERS = ["qwen3_moe-mixed", "qwen2_moe", "minimax_m2", "glm4_moe", "gpt_oss"]
"""A dense layer, a shared expert, another router, a dense layer and another router, other attention."""


@pytest.mark.parametrize("family", RUNS + OTHERS)
def test_which_trunks_become_one_call(lib: ctypes.CDLL, family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tiny_checkpoint(family, tmp_path_factory)
    trunk = load_trunk(open_checkpoint(str(path)), dtype=torch.bfloat16, device=torch.device("cpu"))
    fitting.fit(trunk, expert_modules(trunk), block_size=16)
    runs = [module for module in trunk.modules() if isinstance(module, LayerRun)]
    assert len(runs) == (family in RUNS)


@pytest.mark.parametrize("slots", [(8,), (3, 3, 2)])
@pytest.mark.parametrize("family", RUNS)
def test_the_same_bits_and_counts_as_layer_by_layer(
    lib: ctypes.CDLL,
    family: str,
    slots: tuple[int, ...],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tiny_checkpoint(family, tmp_path_factory)
    joined = lockstep(path, slots)
    monkeypatch.setattr(fitting, "join_layers", lambda *_: "not wanted")
    single = lockstep(path, slots)
    assert torch.equal(first_logits(joined, 512), first_logits(single, 512))
    # steps of the scheduler: prompts beside decodes, workers with and without tokens, choices counted
    answers: list[Any] = []
    for workers in (joined, single):
        answers.append(workers.run([request(f"r{n}", text, max_tokens=5) for n, text in enumerate(texts(512)[:5])]))
        counts = [worker.routing_counts() for worker in workers.workers.values()]
        answers.append([np.concatenate([c.prefill.load, c.decode.load]).tolist() for c in counts])
    assert answers[:2] == answers[2:]
    assert np.sum(answers[1]) > 0


class _Layers(nn.Module):
    """Embeds tokens, runs layers with something in between, and returns logits."""

    def __init__(self, between: float, last: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
        self._between, self._last = between, last

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        hidden = input_ids[..., None].float()
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, attention_mask=None, position_embeddings=(hidden if number == self._last else None,))
            if self._between:
                hidden = hidden + self._between
        return SimpleNamespace(logits=hidden)


def test_what_lies_between_layers_is_seen() -> None:
    plain, adds, shifts = (_Layers(between, last) for between, last in ((0.0, -1), (1.0, -1), (0.0, 1)))
    assert _one_after_another(plain, plain, "layers", 2)
    assert not _one_after_another(adds, adds, "layers", 2)
    assert not _one_after_another(shifts, shifts, "layers", 2)
    assert len(plain.layers) == 2
    assert all(isinstance(layer, nn.Identity) for layer in plain.layers)
