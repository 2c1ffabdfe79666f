"""A trunk in 8 bits: what is rounded and what stays, what it takes, what it answers, and what is refused."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import nn

from elastic_moe.cluster.errors import ConfigError, UserError
from elastic_moe.cluster.expert_forms import ExpertForm, trunk_form
from elastic_moe.cluster.fit import Part
from elastic_moe.model.native.linear import Packed
from elastic_moe.model.trunk.linear import NarrowEmbedding
from tests.model.lockstep import Lockstep
from tests.model.native.test_models import LENGTHS, logits, texts
from tests.model.random_checkpoint import make_random_checkpoint


def served(path: Path, trunk_dtype: str, slots: tuple[int, ...] = (4,), dtype: str = "bfloat16") -> Lockstep:
    return Lockstep(path, slots, dtype=dtype, trunk_dtype=trunk_dtype, block_size=16, max_num_batched_tokens=128)


@pytest.mark.parametrize("tied", [False, True])
def test_linear_layers_and_embeddings_are_in_8_bits(lib: ctypes.CDLL, tmp_path: Path, tied: bool) -> None:
    path = make_random_checkpoint(
        tmp_path / "m", "qwen3_moe", hidden=256, layers=2, experts=4, dtype="bfloat16", tie_word_embeddings=tied
    )
    plain, narrow = served(path, "auto"), served(path, "int8")
    [loaded, before] = [worker.loaded for one in (narrow, plain) for worker in one.workers.values()]
    trunk = narrow.workers_runner()._trunk
    embedding = trunk.get_input_embeddings()
    assert isinstance(embedding, NarrowEmbedding)
    assert not [m for m in trunk.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    rows = loaded.report.of(Part.LINEARS)
    assert [(row.modules, row.count, row.reason) for row in rows] == [("Linear in int8", 2 * 4 + 1, None)]
    assert loaded.report.paths() == before.report.paths()
    expected = narrow.info.served_in("bfloat16", trunk=ExpertForm.INT8).trunk_bytes
    assert before.weight_bytes - loaded.weight_bytes == narrow.info.trunk_bytes - expected
    assert expected < 0.53 * narrow.info.trunk_bytes
    head = trunk.get_output_embeddings()
    assert isinstance(head._alone.packed, Packed)
    assert (head._alone.packed is embedding.packed) is tied


def test_answers_are_near_those_of_16_bits_and_have_the_same_bits_in_any_company(
    lib: ctypes.CDLL, tmp_path: Path
) -> None:
    path = make_random_checkpoint(tmp_path / "m", "qwen3_moe", hidden=256, layers=2, experts=4, dtype="bfloat16")
    runners = [served(path, name).workers_runner() for name in ("auto", "int8")]
    parts = [(2 * i, text, 0, len(text)) for i, text in enumerate(texts(512))]
    plain, narrow = (logits(runner, parts) for runner in runners)
    error = (plain - narrow).norm(dim=1) / plain.norm(dim=1)
    # near a tie of experts the last bit decides, and then a text has another answer
    assert 0 < error.median() < 0.06
    for number, part in enumerate(parts[: len(LENGTHS) // 2]):
        assert torch.equal(logits(runners[1], [part])[0], narrow[number])


def test_what_8_bits_are_not_for(tmp_path: Path) -> None:
    def asked(name: str, packed_as: str | None = None, dtype: str = "bfloat16", device: str = "cpu") -> ExpertForm:
        return trunk_form(name, packed_as=packed_as, dtype=dtype, device=device)

    assert asked("int8") is ExpertForm.INT8
    assert {asked("auto", "FP8", "float32", "cuda"), asked("bfloat16", "FP8")} == {ExpertForm.PLAIN}
    with pytest.raises(ConfigError, match="trunk_dtype: int8 is for CPUs, and the device is cuda"):
        asked("int8", device="cuda")
    with pytest.raises(ConfigError, match="trunk_dtype: int8 needs dtype bfloat16, and float32 is served"):
        asked("int8", dtype="float32")
    with pytest.raises(ConfigError, match="linear layers in FP8, and int8 would round them a second time"):
        asked("int8", "FP8")


def test_8_bits_need_the_native_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_random_checkpoint(tmp_path / "m", "qwen3_moe", experts=4, dtype="bfloat16")
    monkeypatch.setattr("elastic_moe.model.fitting.fit.native_refusal", lambda dtype, device: "EMOE_NATIVE=0")
    with pytest.raises(UserError, match="trunk_dtype: int8 needs the native library: EMOE_NATIVE=0"):
        served(path, "int8")
