"""Experts in 8 and 4 bits predict a text about as well as bfloat16 experts, on the path that serves requests."""

from __future__ import annotations

import pytest

from elastic_moe.deploy.launch.builtin import MODEL_DIR
from elastic_moe.deploy.text.tokenizer import Tokenizer
from elastic_moe.model.native import unavailable
from tests.bench.quality import costs
from tests.bench.step import load_worker

TEXT = """And it came to pass, when the people were gathered together, that the king said unto them, Hear my words.
The Ray cluster has two nodes, and each node has one GPU. A worker hosts a subset of the experts of every layer, and the
coordinator decides which. It counts how often each expert is chosen, and now and then it solves for a better placement.
Then the migrator moves weights between the workers while requests run, and no request is lost. If a worker dies, the
others take its experts over, and what was begun is computed again. To start the server, type make serve, and wait."""


@pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")
def test_rounded_experts_cost_little() -> None:
    ids = Tokenizer.load(str(MODEL_DIR)).encode(TEXT)
    names = ("bfloat16", "int8", "int4")
    workers = [load_worker(MODEL_DIR, 1, dtype="bfloat16", expert_dtype=name) for name in names]
    plain, int8, int4 = costs(workers, [ids])
    assert plain.bits < 8  # a model that knew nothing would need 11.6
    assert plain.kl == 0
    assert plain.bits != int8.bits
    assert abs(int8.bits / plain.bits - 1) < 0.01
    assert abs(int4.bits / plain.bits - 1) < 0.05
    # a token whose experts are nearly ties costs much if they turn, so this takes more than a sentence
    assert 0 < int8.kl < 0.004 < int4.kl < 0.05
