"""How the built-in model is trained; train_builtin.py is the command.

Legend: B sequences, S tokens per sequence, T = B * S, H hidden, E experts, K experts per token, L layers.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from examples.corpus import Text, load_corpus

END = "<|endoftext|>"
"""The token between two documents."""

LONGEST_STEP_S = 10.0
"""The most seconds that a step counts for; a longer step was interrupted."""

Tokens = np.ndarray[Any, np.dtype[np.uint16]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What the result depends on, besides the time."""

    vocabulary: int = 3072
    hidden: int = 128
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    experts: int = 16
    top_k: int = 2
    expert_width: int = 96
    sequence: int = 256
    sequences_per_process: int = 5
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 100
    decay_share: float = 0.4
    """The share of the time, at its end, in which the learning rate falls to zero."""
    balance: float = 0.01
    """Coefficient of the load-balancing loss (Switch Transformer, arXiv 2101.03961, uses the same), over
    whole batches that mix all subjects: no expert dies, and experts may still specialise."""
    initial_std: float = 0.05
    seed: int = 1


RECIPE = Recipe()


def learn_tokenizer(texts: list[Text], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE from two million characters of each subject."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    samples = ["".join(text.train)[:2_000_000] for text in texts]
    tokenizer.train_from_iterator((line for sample in samples for line in sample.splitlines(True)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe, end: int) -> Qwen3MoeForCausalLM:
    """An untrained model. Outputs into the residual stream start smaller, by the root of their number (as GPT-2's)."""
    config = Qwen3MoeConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden // recipe.heads,
        intermediate_size=recipe.expert_width,
        moe_intermediate_size=recipe.expert_width,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.top_k,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        initializer_range=recipe.initial_std,
        router_aux_loss_coef=recipe.balance,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        attn_implementation="sdpa",
        experts_implementation="by_expert",
    )
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                parameter /= (2 * recipe.layers) ** 0.5
    return model


def _experts_by_expert(module: Any, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """The experts as transformers defines them, over rows sorted by expert: one pair of products per expert."""
    tokens, top_k = ids_TK.shape
    order = ids_TK.flatten().argsort(stable=True)
    counts = torch.bincount(ids_TK.flatten(), minlength=module.num_experts).tolist()
    outputs = []
    # unbind, unlike indexing, has a backward pass that writes each expert's gradient once
    weights = zip(module.gate_up_proj.unbind(0), module.down_proj.unbind(0), strict=True)
    for rows, (gate_up, down) in zip(x_TH[order // top_k].split(counts), weights, strict=True):
        gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, down))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return (torch.cat(outputs)[back].view(tokens, top_k, -1) * weights_TK[..., None]).sum(dim=1)


ALL_EXPERTS_FUNCTIONS.register("by_expert", _experts_by_expert)


def losses(model: Qwen3MoeForCausalLM, ids_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean nats per predicted token of texts [B, S + 1], and the load-balancing loss (1 for even loads), the mean over
    layers."""
    outputs = model.model(input_ids=ids_BS[:, :-1], use_cache=False, output_router_logits=True)
    logits = model.lm_head(outputs.last_hidden_state)
    text = F.cross_entropy(logits.flatten(0, 1), ids_BS[:, 1:].flatten())
    balances = []
    for logits_TE in outputs.router_logits:
        probabilities = logits_TE.softmax(dim=-1)
        top_k, experts = model.config.num_experts_per_tok, model.config.num_experts
        chosen = probabilities.topk(top_k, dim=-1).indices.flatten().bincount(minlength=experts)
        balances.append(experts * (chosen / chosen.sum() * probabilities.mean(dim=0)).sum())
    return text, torch.stack(balances).mean()


def learning_rate(recipe: Recipe, step: int, done: float) -> float:
    """Warm-up by steps, then constant, then linear to zero by the share of the time that is `done`."""
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps, max(0.0, (1 - done) / recipe.decay_share))


def batch(recipe: Recipe, tokens: dict[str, Tokens], step: int, rank: int) -> torch.Tensor:
    """[B, S + 1] pieces from random places, the subjects in turn, so that every one weighs the same."""
    rng = np.random.default_rng([recipe.seed, step, rank])
    subjects = list(tokens.values())
    first = int(rng.integers(len(subjects)))
    rows = []
    for number in range(recipe.sequences_per_process):
        subject = subjects[(first + number) % len(subjects)]
        start = int(rng.integers(len(subject) - recipe.sequence))
        rows.append(subject[start : start + recipe.sequence + 1].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def held_out_bits(
    model: Qwen3MoeForCausalLM, texts: list[Text], tokenizer: PreTrainedTokenizerFast, limit: int | None = None
) -> dict[str, float]:
    """Bits per byte of UTF-8 on the held-out documents of each subject, in windows of 256 tokens.

    `limit` is the number of windows per subject, all if None.
    """
    found = {}
    for text in texts:
        ids = encode(text.held_out, tokenizer)
        windows = torch.from_numpy(ids[: len(ids) // 257 * 257].astype(np.int64)).view(-1, 257)[:limit]
        nats = sum(float(losses(model, part)[0]) * part[:, 1:].numel() for part in windows.split(16))
        text_bytes = sum(len(tokenizer.decode(row[1:]).encode()) for row in windows)
        found[text.subject.name] = nats / math.log(2) / text_bytes
    return found


def encode(documents: tuple[str, ...], tokenizer: PreTrainedTokenizerFast) -> Tokens:
    """Documents one after another, an END after each."""
    end = tokenizer.eos_token_id
    parts = tokenizer(list(documents), add_special_tokens=False).input_ids
    return np.concatenate([np.array([*part, end], dtype=np.uint16) for part in parts])


class Run:
    """One process's share of a training run; rank 0 writes checkpoints, the report and the progress bar."""

    def __init__(self, args: argparse.Namespace, rank: int, recipe: Recipe) -> None:
        self._recipe, self._rank, self._args = recipe, rank, args
        self._texts = load_corpus(args.out / "packages")
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out / "model")
        saved = np.load(args.out / "tokens.npz")
        self._tokens: dict[str, Tokens] = {name: saved[name] for name in saved.files}
        torch.manual_seed(recipe.seed)
        self._model = build_model(recipe, self._tokenizer.eos_token_id)
        decayed = [p for p in self._model.parameters() if p.ndim > 1]
        other = [p for p in self._model.parameters() if p.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": other, "weight_decay": 0.0}],
            betas=recipe.betas,
            fused=True,
        )
        self._step, self._elapsed_s, self._history = 0, 0.0, list[dict[str, Any]]()
        if self._checkpoint.exists():
            self._load()

    @property
    def _checkpoint(self) -> Path:
        return Path(self._args.out) / "checkpoint.pt"

    def _load(self) -> None:
        saved = torch.load(self._checkpoint, weights_only=True)
        self._model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self._step, self._elapsed_s, self._history = saved["step"], saved["elapsed_s"], saved["history"]

    def _save(self) -> None:
        state = {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self._step,
            "elapsed_s": self._elapsed_s,
            "history": self._history,
        }
        draft = self._checkpoint.with_suffix(".draft")
        torch.save(state, draft)
        draft.replace(self._checkpoint)

    def train(self) -> None:
        """Train until the time is over. Every process uses rank 0's clock, so that all stop after the same step."""
        budget_s = self._args.minutes * 60
        before, saved_at, measured_at = time.monotonic(), self._elapsed_s, self._elapsed_s
        bar = tqdm(total=round(budget_s), initial=round(self._elapsed_s), unit="s", disable=self._rank > 0)
        while True:
            clock = torch.tensor([self._elapsed_s])
            dist.broadcast(clock, 0)
            self._elapsed_s = float(clock)
            if self._elapsed_s >= budget_s:
                break
            text, balance = self._one_step(self._elapsed_s / budget_s)
            now = time.monotonic()
            self._elapsed_s, before = self._elapsed_s + min(now - before, LONGEST_STEP_S), now
            if self._rank == 0:
                self._history.append({"step": self._step, "s": self._elapsed_s, "loss": text, "balance": balance})
                bar.update(round(self._elapsed_s) - bar.n)
                bar.set_postfix(step=self._step, loss=f"{text:.3f}", balance=f"{balance:.2f}")
                if self._elapsed_s - measured_at > self._args.measure_every_s:
                    measured_at = self._elapsed_s
                    self._history[-1]["held_out"] = held_out_bits(self._model, self._texts, self._tokenizer, 16)
                    tqdm.write(json.dumps(self._history[-1]))
                if self._elapsed_s - saved_at > self._args.save_every_s:
                    saved_at = self._elapsed_s
                    self._save()
        bar.close()
        if self._rank == 0:
            self._save()
            self.export()

    def _one_step(self, done: float) -> tuple[float, float]:
        text, balance = losses(self._model, batch(self._recipe, self._tokens, self._step, self._rank))
        self._optimizer.zero_grad()
        (text + self._recipe.balance * balance).backward()
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), text.detach()[None], balance.detach()[None]])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        at = 0
        for gradient in gradients:
            gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
            at += gradient.numel()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._recipe, self._step, done)
        self._optimizer.step()
        self._step += 1
        return float(flat[-2]), float(flat[-1])

    def export(self) -> None:
        """Write the model in bfloat16, and the report on what is written."""
        model = self._model.to(torch.bfloat16)
        folder = Path(self._args.out) / "model"
        model.config.dtype = torch.bfloat16
        model.generation_config = GenerationConfig(eos_token_id=self._tokenizer.eos_token_id)
        model.save_pretrained(folder)
        model.float()
        write_report(
            self._args,
            self._recipe,
            self._texts,
            self._tokens,
            self._history,
            {
                "held_out_bits_per_byte": held_out_bits(model, self._texts, self._tokenizer),
                "steps": self._step,
                "minutes": self._elapsed_s / 60,
                "processes": dist.get_world_size(),
                "parameters": sum(p.numel() for p in model.parameters()),
            },
        )


def write_report(
    args: argparse.Namespace,
    recipe: Recipe,
    texts: list[Text],
    tokens: dict[str, Tokens],
    history: list[dict[str, Any]],
    results: dict[str, Any],
) -> None:
    """training.json, and the losses as a plot."""
    subjects = [
        {
            "name": text.subject.name,
            "what": text.subject.what,
            "licence": text.subject.licence,
            "packages": [package.request for package in text.subject.packages],
            "train_bytes": sum(len(document.encode()) for document in text.train),
            "train_tokens": len(tokens[text.subject.name]),
            "documents": len(text.train),
            "held_out_bytes": sum(len(document.encode()) for document in text.held_out),
            "held_out_documents": len(text.held_out),
        }
        for text in texts
    ]
    seen = results["steps"] * results["processes"] * recipe.sequences_per_process * recipe.sequence
    report = {"recipe": asdict(recipe), "subjects": subjects, "tokens_seen": seen, **results}
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    plot_losses(history, args.out / "loss.png")


def plot_losses(history: list[dict[str, Any]], path: Path) -> None:
    """Training loss, and held-out bits per byte of each subject, over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    minutes = np.array([entry["s"] for entry in history]) / 60
    loss = np.array([entry["loss"] for entry in history])
    width = max(1, len(loss) // 200)
    smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
    left.plot(minutes[width - 1 :], smooth)
    left.set(xlabel="minutes", ylabel="training loss, nats per token")
    measured = [entry for entry in history if "held_out" in entry]
    for name in measured[0]["held_out"] if measured else []:
        right.plot([m["s"] / 60 for m in measured], [m["held_out"][name] for m in measured], label=name)
    right.set(xlabel="minutes", ylabel="held-out bits per byte")
    if measured:
        right.legend()
    figure.savefig(path, dpi=80)


def prepare(out: Path, recipe: Recipe) -> None:
    """Make text, tokenizer and tokens if they are missing."""
    if (out / "tokens.npz").exists():
        return
    texts = load_corpus(out / "packages")
    tokenizer = learn_tokenizer(texts, recipe)
    tokenizer.save_pretrained(out / "model")
    np.savez(out / "tokens.npz", **{text.subject.name: encode(text.train, tokenizer) for text in texts})


def _process(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{args.out.absolute()}/rendezvous", rank=rank, world_size=args.processes
    )
    try:
        Run(args, rank, RECIPE).train()
    finally:
        dist.destroy_process_group()


def train(args: argparse.Namespace) -> None:
    """Train with the arguments of train_builtin.py. Blocks until it has ended."""
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(args.out, RECIPE)
    (args.out / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.start_processes(_process, args=(args,), nprocs=args.processes, start_method="spawn")
