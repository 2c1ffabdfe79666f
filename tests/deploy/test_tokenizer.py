"""The tokenizer of an API replica: the same without torch, which a process with a model cannot do without."""

from __future__ import annotations

import json
import subprocess
import sys

from deploy.builtin import MODEL_DIR
from deploy.tokenizer import Tokenizer

TEXT = "Straße\n\tdef f(x): return x ** 2  # €"
MESSAGES = [{"role": "system", "content": "In the"}, {"role": "user", "content": "beginning"}]

REPLICA = f"""
import json, sys
from deploy.tokenizer import Tokenizer, without_torch
without_torch()
tokenizer = Tokenizer.load({str(MODEL_DIR)!r})
said = [tokenizer.encode({TEXT!r}), tokenizer.render_chat({MESSAGES!r}), "torch" in sys.modules]
print(json.dumps(said))
"""


def test_without_torch_it_does_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", REPLICA], check=True, capture_output=True, text=True, timeout=120)
    tokenizer = Tokenizer.load(str(MODEL_DIR))
    assert json.loads(done.stdout) == [tokenizer.encode(TEXT), tokenizer.render_chat(MESSAGES), False]
