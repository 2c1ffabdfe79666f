"""The parts of the examples that make the built-in model: unpacking, cutting, the fast experts, the schedule."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from elastic_moe.optimizer.study.traces import Trace
from examples import corpus, training
from examples.publishing import shares
from tests.paths import ROOT


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def ar(members: dict[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    for name, content in members.items():
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{0o644:<8}{len(content):<10}`\n".encode()
        out += head + content + b"\n" * (len(content) % 2)
    return out


def test_debian_packages_are_unpacked() -> None:
    files = {"./usr/share/a": b"one", "./usr/share/b": b"two"}
    package = ar({"debian-binary": b"2.0\n!", "control.tar.xz": tar({"control": b"x"}), "data.tar.xz": tar(files)})
    assert corpus._deb_files(package) == {"usr/share/a": b"one", "usr/share/b": b"two"}


def test_subjects_become_documents() -> None:
    verses = [{"book": "Ruth", "chapter": c, "verse": v, "text": f"Verse {v}."} for c in (1, 2) for v in (1, 2)]
    source = "\n".join(map(json.dumps, verses)).encode()
    assert list(corpus._bible({"x/kjv.jsonl": source}))[1] == "Ruth 2\n\n1 Verse 1.\n2 Verse 2.\n"

    line = '00005930 03 n 02 dwarf 0 small_man 1 001 @ 00004475 n 0000 | someone small; "he\'s one"  '
    assert corpus._entry(line) == 'dwarf, small man (noun): someone small; "he\'s one"'

    page = b"<head><title>T</title></head><p>A paragraph that is\nlong enough.</p><script>x=1</script><p>short</p>"
    parser = corpus._Prose()
    parser.feed(page.decode())
    assert parser.lines() == ["A paragraph that is long enough."]

    def character(text: str) -> bytes:
        return b"\x00\x04\x00\x09" + len(text.encode()).to_bytes(4) + text.encode()

    vectors = [["CHAPTER 1", "", "It is", "so."], ["NA", "été"]]
    streams = [zlib.compress(b"X\n" + b"".join(map(character, lines))) for lines in vectors]
    database = b"".join(b"\0\0\0\0" + stream for stream in streams)
    assert list(corpus._r_strings(database)) == vectors


def test_held_out_documents_are_never_trained_on_and_always_the_same() -> None:
    documents = [f"document {n}" for n in range(100)]
    text = corpus._split(corpus.SUBJECTS[0], documents)
    assert len(text.held_out) == 5
    assert {*text.train} | {*text.held_out} == {*documents}
    assert not {*text.train} & {*text.held_out}
    random.seed(7)
    assert corpus._split(corpus.SUBJECTS[0], documents) == text


def test_a_package_that_differs_is_refused(tmp_path: Path) -> None:
    package = corpus.SUBJECTS[0].packages[0]
    (tmp_path / package.file).write_bytes(b"something else")
    with pytest.raises(SystemExit, match="digest"):
        corpus._files(corpus.SUBJECTS[0], tmp_path)


SMALL = dataclasses.replace(training.RECIPE, vocabulary=300, hidden=64, layers=2, expert_width=16)


def test_experts_as_transformers_has_them() -> None:
    """Their gradients; three tokens leave most experts without any."""
    torch.manual_seed(0)
    ours, theirs = (training.build_model(SMALL, 0) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    theirs.set_experts_implementation("eager")
    ids = torch.randint(300, (1, 4))
    for model in (ours, theirs):
        text, balance = training.losses(model, ids)
        (text + balance).backward()
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    for (name, mine), other in pairs:
        assert mine.grad is not None, name
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_learning_rate() -> None:
    rates = [training.learning_rate(SMALL, step, done) for step, done in [(0, 0), (500, 0.3), (500, 0.8), (9, 1)]]
    peak = SMALL.learning_rate
    assert rates == pytest.approx([peak / 100, peak, peak / 2, 0])


def test_batches_hold_every_subject_and_depend_on_step_and_process_alone() -> None:
    tokens = {name: np.full(1000, n, dtype=np.uint16) for n, name in enumerate("abcde")}
    batch = training.batch(SMALL, tokens, 3, 1)
    assert batch.shape == (SMALL.sequences_per_process, SMALL.sequence + 1)
    assert sorted(batch[:, 0].tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(batch, training.batch(SMALL, tokens, 3, 1))


def test_shares_of_a_trace() -> None:
    ids = np.array([[[0, 1]], [[0, 2]]], dtype=np.int16)
    trace = Trace(topk_ids=ids, request_lengths=np.array([2]), num_experts=4)
    assert shares(trace).tolist() == [[0.5, 0.25, 0.25, 0.0]]


@pytest.mark.parametrize("name", ["change_of_subject", "picture_of_the_page", "publish_builtin", "train_builtin"])
def test_help_has_a_text_for_every_flag_and_absurd_numbers_are_refused(name: str) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", f"examples.{name}", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    options = shown[shown.index("options:") :]
    flags = re.findall(r"^  (?:-h, )?(--[a-z-]+)(.*(?:\n {10,}.*)*)", options, re.M)
    assert len(flags) >= 4
    for flag, rest in flags:
        assert re.search(r"(  |\n +)[a-z][\w-]* \w", rest), flag
    absurd = {
        "change_of_subject": ["--rounds", "-1"],
        "picture_of_the_page": ["--seconds", "-1"],
        "publish_builtin": ["--trained", "/nowhere"],
        "train_builtin": ["--processes", "0"],
    }[name]
    refused = subprocess.run(
        [sys.executable, "-m", f"examples.{name}", *absurd], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert absurd[0] in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["change_of_subject", "picture_of_the_page", "publish_builtin", "train_builtin"])
def test_help_does_not_wait_for_pytorch(name: str) -> None:
    code = f"import examples.{name}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
