"""The built-in model writes the same text here as in transformers: greedy, float32, on text prompts."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from elastic_moe.deploy.launch.builtin import MODEL_DIR
from elastic_moe.deploy.text.tokenizer import Tokenizer
from elastic_moe.model.checkpoints.quiet import quiet_transformers
from tests.model.lockstep import Lockstep, request

PROMPTS = {
    "bible": "And it came to pass",
    "code": "def main(",
    "novels": '"My dear Mr. Bennet," said',
    "manual": "The SELECT statement",
}
NEW_TOKENS = 48


def test_same_greedy_tokens_as_transformers() -> None:
    tokenizer = Tokenizer.load(str(MODEL_DIR))
    ids = {name: tokenizer.encode(text) for name, text in PROMPTS.items()}
    expected = transformers_tokens(ids)
    for slots in ((8, 8), (6, 5, 5)):
        got = Lockstep(MODEL_DIR, slots).run([request(name, row, max_tokens=NEW_TOKENS) for name, row in ids.items()])
        assert got == expected, slots


def transformers_tokens(ids: dict[str, list[int]]) -> dict[str, list[int]]:
    expected = {}
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            MODEL_DIR, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
    for name, row in ids.items():
        with torch.no_grad():
            out = model.generate(
                torch.tensor([row]),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        expected[name] = out[0, len(row) :].tolist()
    return expected
