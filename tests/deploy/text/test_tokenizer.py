"""The tokenizer of an API replica: the same without torch, which a process with a model cannot do without."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from elastic_moe.deploy.launch.builtin import MODEL_DIR
from elastic_moe.deploy.text.tokenizer import Tokenizer
from tests.deploy.fakes import make_sentencepiece_tokenizer, make_tokenizer

TEXT = "Straße\n\tdef f(x): return x ** 2  # €"
MESSAGES = [{"role": "system", "content": "In the"}, {"role": "user", "content": "beginning"}]

REPLICA = f"""
import json, sys
from elastic_moe.deploy.text.tokenizer import Tokenizer, without_torch
without_torch()
tokenizer = Tokenizer.load({str(MODEL_DIR)!r})
said = [tokenizer.encode({TEXT!r}), tokenizer.render_chat({MESSAGES!r}), "torch" in sys.modules]
print(json.dumps(said))
"""


def test_the_tokenizer_is_the_same_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", REPLICA], check=True, capture_output=True, text=True, timeout=120)
    tokenizer = Tokenizer.load(str(MODEL_DIR))
    assert json.loads(done.stdout) == [tokenizer.encode(TEXT), tokenizer.render_chat(MESSAGES), False]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("sentencepiece")
    make_sentencepiece_tokenizer(directory)
    return Tokenizer.load(str(directory))


def test_names_of_tokens_tell_them_apart(sentencepiece: Tokenizer) -> None:
    """Two thirds of the vocabulary were called as another token was."""
    for tokenizer, known in ((sentencepiece, 400), (Tokenizer.load(str(MODEL_DIR)), 3072)):
        names = Counter(tokenizer.token_name(token) for token in range(known + 40))
        assert [name for name, count in names.items() if count > 1] == []
    inside, word = (sentencepiece.id_of_piece(piece) for piece in ("self", "\u2581self"))
    assert inside is not None
    assert word is not None
    assert [sentencepiece.token_name(token) for token in (inside, word)] == ["self", " self"]
    letter = sentencepiece.id_of_piece("<0x41>")
    assert letter is not None
    assert (sentencepiece.token_name(letter), sentencepiece.token_bytes(letter)) == ("bytes:\\x41", b"A")
    assert (sentencepiece.token_name(5000), sentencepiece.token_bytes(5000)) == ("token_id:5000", b"")


@pytest.mark.parametrize("text", ["the self itself", "naïve 😀 日本語 ✂", " self  A\n\tA"])
def test_bytes_of_tokens_are_the_text(sentencepiece: Tokenizer, text: str) -> None:
    """After a prompt: the space of the first word is a part of its token."""
    tokens = sentencepiece.encode(text, add_special_tokens=False)
    detokenizer = sentencepiece.detokenizer(sentencepiece.encode("quick"), skip_special_tokens=True)
    streamed = "".join(map(detokenizer.push, tokens)) + detokenizer.flush()
    assert streamed == " " + text
    assert b"".join(map(sentencepiece.token_bytes, tokens)).decode() == streamed


def test_the_tokenizers_own_end(sentencepiece: Tokenizer, tmp_path: Path) -> None:
    assert sentencepiece.eos_token_ids == (sentencepiece.id_of_piece("<|im_end|>"),)
    make_sentencepiece_tokenizer(tmp_path / "none", eos="")
    assert Tokenizer.load(str(tmp_path / "none")).eos_token_ids == ()
    make_tokenizer(tmp_path / "bytes")
    assert Tokenizer.load(str(tmp_path / "bytes")).eos_token_ids == (0,)
