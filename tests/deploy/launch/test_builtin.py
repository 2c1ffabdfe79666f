"""The model that is served when none is given: there, whole, and the one its card speaks of."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from elastic_moe.deploy.launch.builtin import MODEL, MODEL_DIR, trace_names, trace_path
from elastic_moe.deploy.text.tokenizer import Tokenizer
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.optimizer.study.traces import load_trace, part_loads


def test_small_and_servable() -> None:
    info = open_checkpoint(MODEL_DIR).info
    assert info == MODEL
    report = json.loads((MODEL_DIR / "training.json").read_text())
    assert info.num_logical_experts == report["recipe"]["experts"]
    assert info.num_layers == report["recipe"]["layers"]
    assert sum(path.stat().st_size for path in MODEL_DIR.rglob("*") if path.is_file()) < 24e6


def test_the_card_names_every_subject_and_shows_its_figures() -> None:
    card = (MODEL_DIR / "README.md").read_text()
    report = json.loads((MODEL_DIR / "training.json").read_text())
    for subject in report["subjects"]:
        assert subject["licence"] in card
        assert f"{report['held_out_bits_per_byte'][subject['name']]:.2f}" in card
    for figure in ("routing.png", "loss.png"):
        assert f"({figure})" in card
        assert (MODEL_DIR / figure).read_bytes().startswith(b"\x89PNG")
    assert [subject["name"] for subject in sorted(report["subjects"], key=lambda s: s["name"])] == [*trace_names()]


def test_a_chat_is_its_messages_one_after_another() -> None:
    tokenizer = Tokenizer.load(str(MODEL_DIR))
    messages = [{"role": "system", "content": "In the"}, {"role": "user", "content": "beginning"}]
    assert tokenizer.render_chat(messages) == "In the\nbeginning"
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "content": "was the word", "tool_call_id": "c1"}
    assert tokenizer.render_chat([*messages, calling, result]) == "In the\nbeginning\nwas the word"
    text = "Straße\n\tdef f(x): return x ** 2  # €"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_clients_with_transformers_4_can_load_the_tokenizer() -> None:
    """It does not know TokenizersBackend, the class that transformers 5 writes."""
    config = json.loads((MODEL_DIR / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "is_local", "local_files_only"} & set(config)


def test_traces_are_of_this_model_and_differ_by_subject() -> None:
    info = open_checkpoint(MODEL_DIR).info
    shares = []
    for name in trace_names():
        trace = load_trace(trace_path(f"builtin:{name}"))
        assert (trace.num_layers, trace.num_experts, trace.top_k) == (
            info.num_layers,
            info.num_logical_experts,
            info.top_k,
        )
        halves = [part_loads(half).sum(0) for half in trace.halves()]
        shares.append([loads / loads.sum(axis=1, keepdims=True) for loads in halves])
    # subjects differ by more than two halves of the same text do
    within = np.mean([np.abs(a - b).sum(axis=1) / 2 for a, b in shares])
    between = np.mean(
        [np.abs(x[0] - y[1]).sum(axis=1) / 2 for n, x in enumerate(shares) for m, y in enumerate(shares) if n != m]
    )
    assert between > 2 * within


def test_names_of_traces() -> None:
    assert trace_path("some/file.npz") == Path("some/file.npz")
    with pytest.raises(argparse.ArgumentTypeError, match="builtin:code"):
        trace_path("builtin:law")
