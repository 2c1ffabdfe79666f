"""`emoe trace`, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_moe.deploy.cli import main as cli
from elastic_moe.deploy.launch.builtin import MODEL_DIR, trace_names
from elastic_moe.deploy.text.tokenizer import Tokenizer
from elastic_moe.optimizer.study.traces import load_trace


def emoe(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_record_text_and_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, prompts, out = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "trace.npz"
    text.write_text("In the beginning God created the heaven and the earth.\n" * 4)
    prompts.write_text('{"prompt": "def main("}\n\n{"prompt": "import os", "id": 3}\n')
    assert emoe("trace", "record", text, prompts, "--request-tokens", 16, "--out", out) == 0
    tokenizer = Tokenizer.load(str(MODEL_DIR))
    whole = len(tokenizer.encode(text.read_text()))
    pieces = [16] * (whole // 16) + ([whole % 16] if whole % 16 else [])
    trace = load_trace(out)
    assert trace.request_lengths.tolist() == [*pieces, *(len(tokenizer.encode(p)) for p in ("def main(", "import os"))]
    assert f"{trace.num_tokens} tokens" in capsys.readouterr().out

    assert emoe("trace", "record", text, "--request-tokens", 16, "--max-tokens", 20, "--out", out) == 0
    assert load_trace(out).request_lengths.tolist() == [16, 4]


@pytest.mark.parametrize(
    ("line", "says"), [("{", "b.jsonl:1"), ('{"text": "x"}', "prompt"), ('{"prompt": ""}', "prompt")]
)
def test_mistakes(line: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "b.jsonl"
    prompts.write_text(line)
    assert emoe("trace", "record", prompts, "--out", tmp_path / "t.npz") == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "a.txt: expected some text, got none"), (b"a\xff", "a.txt: it is not UTF-8: byte 2 is")]
)
def test_texts_that_are_none(content: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "a.txt"
    text.write_bytes(content)
    assert emoe("trace", "record", text, "--out", tmp_path / "t.npz") == 2
    assert says in capsys.readouterr().err


def test_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "a.txt"
    assert emoe("trace", "record", text, "--out", tmp_path / "t.npz") == 2
    assert "a.txt" in capsys.readouterr().err
    text.write_text("x")
    assert emoe("trace", "record", text, "--out", tmp_path / "no" / "t.npz") == 2
    assert f"--out: there is no directory {tmp_path / 'no'}" in capsys.readouterr().err
    assert emoe("trace", "record", text, "--out", tmp_path / "t.npz", "--max-tokens", 0) == 2


def test_names_of_traces_stand_for_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert emoe("trace", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"builtin:{name}" for name in trace_names()]
    assert all(Path(line.split("\t")[1]).is_file() for line in lines)
    assert emoe("plan", "builtin:code", "--workers", 2, "--planner", "greedy", "--json") == 0
    assert "load_imbalance" in capsys.readouterr().out
    assert emoe("plan", "builtin:law") == 2
    assert "builtin:code" in capsys.readouterr().err


def test_a_missing_text_is_named_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "load", lambda *_: pytest.fail("the model was loaded first"))
    missing = tmp_path / "x.txt"
    assert emoe("trace", "record", missing, "--out", tmp_path / "trace.npz") == 2
    assert capsys.readouterr().err == f"emoe: error: {missing}: No such file or directory\n"
