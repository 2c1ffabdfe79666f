"""How the trained built-in model is measured and its card is written; publish_builtin.py is the command.

Every figure and every sample in the card comes from here or from train_builtin.py's training.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, set_seed

from elastic_moe.model.worker.tracing import record_trace
from elastic_moe.optimizer.study.traces import Trace, part_loads, save_trace
from examples.corpus import Text, load_corpus
from examples.training import encode

# a turn of tool calls has no content
CHAT_TEMPLATE = "{{ messages | map(attribute='content') | select | join('\\n') }}"
"""The model only continues text, so a chat is its messages one after another."""

TEMPERATURE, TOP_P = 0.7, 0.9
"""Temperature of answers if a request names none: at 1, such a small model leaves the subject."""

PROMPTS = (
    "In the beginning",
    "Psalms 151\n\n1 The LORD is my",
    "And it came to pass in those days, that",
    "It is a truth universally acknowledged, that",
    '"My dear Mr. Bennet," said',
    "def main(",
    "import os\nimport sys\n\nclass ",
    "elephant (noun): ",
    "The SELECT statement is used to",
    "The sqlite3_open() function",
)
NEW_TOKENS = 60
TRACED_REQUESTS, REQUEST_TOKENS = 32, 256


def traced_requests(text: Text, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Held-out text in requests of equal length, spread evenly over what there is."""
    ids = encode(text.held_out, tokenizer)
    starts = np.linspace(0, len(ids) - REQUEST_TOKENS, TRACED_REQUESTS).astype(int)
    for start in starts:
        yield ids[start : start + REQUEST_TOKENS].tolist()


def record_all(model: Path, texts: list[Text], tokenizer: PreTrainedTokenizerFast) -> dict[str, Trace]:
    """A trace of each subject."""
    traces = {}
    with tqdm(total=len(texts) * TRACED_REQUESTS * REQUEST_TOKENS, unit="tok", desc="tracing") as bar:
        for text in texts:
            traces[text.subject.name] = record_trace(model, traced_requests(text, tokenizer), progress=bar.update)
    return traces


def shares(trace: Trace) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[L, E] share of each layer's tokens that an expert gets; rows sum to 1."""
    loads = part_loads(trace).sum(axis=0)
    return loads / loads.sum(axis=1, keepdims=True)


def draw_routing(traces: dict[str, Trace], path: Path) -> None:
    """A row per subject and layer, a column per expert: load over the layer's mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots(1, len(traces), sharey=True)
    for axis, (name, trace) in zip(axes, traces.items(), strict=True):
        image = axis.imshow(shares(trace) * trace.num_experts, vmin=0, vmax=4, cmap="viridis", aspect="auto")
        axis.set(title=name, xlabel="expert")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="load / mean")
    figure.savefig(path, dpi=70)


def routing_tables(traces: dict[str, Trace]) -> str:
    """Load max/mean of each subject by layer, and total variation between subjects, as Markdown."""
    found = {name: shares(trace) for name, trace in traces.items()}
    layers = range(len(next(iter(found.values()))))
    lines = [_row("busiest expert's load over the mean", *(f"layer {layer}" for layer in layers), "mean")]
    lines.append(_row("---", *("---:" for _ in layers), "---:"))
    for name, share_LE in found.items():
        peaks = share_LE.max(axis=1) * share_LE.shape[1]
        lines.append(_row(name, *(f"{peak:.2f}" for peak in peaks), f"{peaks.mean():.2f}"))
    lines += ["", _row("total variation", *(f"layer {layer}" for layer in layers), "mean")]
    lines.append(_row("---", *("---:" for _ in layers), "---:"))
    names = list(found)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            distance = np.abs(found[first] - found[second]).sum(axis=1) / 2
            lines.append(_row(f"{first}, {second}", *(f"{d:.2f}" for d in distance), f"{distance.mean():.2f}"))
    unused = sum(int((np.sum([s[layer] for s in found.values()], axis=0) == 0).sum()) for layer in layers)
    lines += ["", f"Experts that none of the traces uses: {unused} of {next(iter(found.values())).size}."]
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


@torch.inference_mode()
def samples(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """Each prompt's greedy and sampled continuation, as Markdown."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parts = []
    for prompt in tqdm(PROMPTS, desc="samples"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        parts.append(f"Prompt:\n\n{_quoted(prompt)}")
        for title, how in (
            ("Greedy", {"do_sample": False}),
            (
                f"Sampled (temperature {TEMPERATURE}, top_p {TOP_P}, seed 0)",
                {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0},
            ),
        ):
            set_seed(0)
            mask = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, **how)
            parts.append(f"{title}:\n\n{_quoted(tokenizer.decode(out[0], skip_special_tokens=True))}")
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.rstrip().split("\n"))


def corpus_table(report: dict[str, Any]) -> str:
    """Subjects, packages, licences, amounts and held-out bits per byte, as Markdown."""
    lines = [_row("subject", "what", "licence", "packages", "trained on", "held out", "held-out bits per byte")]
    lines.append(_row("---", "---", "---", "---", "---:", "---:", "---:"))
    lines += [
        _row(
            subject["name"],
            subject["what"],
            subject["licence"],
            ", ".join(f"`{package}`" for package in subject["packages"]),
            f"{subject['train_bytes'] / 1e6:.1f} MB, {subject['train_tokens'] / 1e6:.1f} M tokens",
            f"{subject['held_out_bytes'] / 1e6:.2f} MB, {subject['held_out_documents']} documents",
            f"{report['held_out_bits_per_byte'][subject['name']]:.2f}",
        )
        for subject in report["subjects"]
    ]
    return "\n".join(lines)


def card(report: dict[str, Any], traces: dict[str, Trace], answers: str, note: str) -> str:
    """The model card. `note` holds what the report does not say about the training."""
    recipe = "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in report["recipe"].items())
    return f"""# emoe-mini

The built-in model of Elastic MoE: a Qwen3-MoE of {report["parameters"] / 1e6:.1f} M parameters
({report["recipe"]["layers"]} layers, {report["recipe"]["experts"]} experts, {report["recipe"]["top_k"]} per token),
small enough to come with the package. It continues text in five styles and knows nothing: do not rely on what it says.
It is here so that a server can be tried, and so that its routing is a trained model's: skewed, and different by
subject. It is not tuned to chat; its chat template puts the messages one after another.

Written by `examples/publish_builtin.py` from what `examples/train_builtin.py` made and measured. No figure or answer
was edited.

## Text

{corpus_table(report)}

The tokenizer is a byte-level BPE of {report["recipe"]["vocabulary"]} tokens, learned from the same text. One document
in twenty is held out. Bits per byte are measured on all held-out documents, in windows of 256 tokens, with the weights
as they are here (bfloat16).

WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. The other licences are named above.

## Training

{report["steps"]} steps, {report["tokens_seen"] / 1e6:.1f} M tokens, {report["minutes"]:.0f} minutes on
{report["processes"]} CPU cores that other work shared. AdamW; learning rate constant after the warm-up, then linear
to zero.{" " + note if note else ""} Hyper-parameters:

{recipe}

![losses](loss.png)

## Routing

Recorded on {TRACED_REQUESTS * REQUEST_TOKENS} held-out tokens of each subject; the traces are in `traces/`.

![load of every expert by subject](routing.png)

{routing_tables(traces)}

## Ten prompts

{NEW_TOKENS} new tokens each, in float32.

{answers}
"""


def make_readable(tokenizer_config: Path) -> None:
    """Write it for transformers 4 too, which many clients have: it does not know the class that version 5 names, and
    the other keys say how this machine has loaded the tokenizer."""
    config = json.loads(tokenizer_config.read_text())
    config = {key: value for key, value in config.items() if key not in ("backend", "is_local", "local_files_only")}
    tokenizer_config.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def publish(trained: Path, out: Path, note: str) -> None:
    """Write everything into `out`, from what train_builtin.py has left in `trained`."""
    report = json.loads((trained / "training.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(trained / "model")
    tokenizer.chat_template = CHAT_TEMPLATE
    shutil.rmtree(out, ignore_errors=True)
    (out / "traces").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(trained / "model" / name, out / name)  # not its mode, which is private
    shutil.copy(trained / "loss.png", out)
    shutil.copy(trained / "training.json", out)
    tokenizer.save_pretrained(out)
    make_readable(out / "tokenizer_config.json")
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P
    ).save_pretrained(out)
    traces = record_all(out, load_corpus(trained / "packages"), tokenizer)
    for name, trace in traces.items():
        save_trace(out / "traces" / f"{name}.npz", trace)
    draw_routing(traces, out / "routing.png")
    (out / "README.md").write_text(card(report, traces, samples(out, tokenizer), note))
