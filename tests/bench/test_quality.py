"""Experts in 8 bits predict a text as well as bfloat16 experts, on the path that serves requests."""

from __future__ import annotations

import pytest

from elastic_moe.deploy.launch.builtin import MODEL_DIR
from elastic_moe.deploy.text.tokenizer import Tokenizer
from elastic_moe.model.native import unavailable
from tests.bench.quality import bits_per_token
from tests.bench.step import load_worker

TEXT = """And it came to pass, when the people were gathered together, that the king said unto them, Hear my words."""


@pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")
def test_rounded_experts_cost_next_to_nothing() -> None:
    ids = Tokenizer.load(str(MODEL_DIR)).encode(TEXT)
    plain, rounded = (
        bits_per_token(load_worker(MODEL_DIR, 1, dtype="bfloat16", expert_dtype=name), [ids])
        for name in ("auto", "int8")
    )
    assert plain < 8  # a model that knew nothing would need 11.6
    assert plain != rounded
    assert abs(rounded / plain - 1) < 0.01
