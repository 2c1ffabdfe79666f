"""A real server, as a user starts it: `emoe serve` in a process of its own, over a real local Ray."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

from elastic_moe.cluster.messages.grammars import Grammar
from elastic_moe.deploy.launch.local_ray import free_port
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.quiet import quiet_transformers
from elastic_moe.model.grammars.compiling import compile_grammar
from elastic_moe.model.grammars.vocabulary import read_vocabulary
from tests.model.families import tiny_checkpoint

READY_S = 180
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Given to httpx, which otherwise loads all certificates for every call: 20 ms of a core, ten times a second while
something is waited for, beside the server that is measured."""
MODEL = "tiny"


@dataclass(slots=True)
class Server:
    process: subprocess.Popen[str]
    url: str
    log: Path

    def get(self, path: str) -> Any:
        response = httpx.get(self.url + path, timeout=30, verify=PLAIN)
        response.raise_for_status()
        return response.json()

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, verify=PLAIN)

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def wait(self, what: str, true: Callable[[], object], timeout_s: float = 60, every_s: float = 0.1) -> None:
        deadline = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < deadline, f"{what} did not come about in {timeout_s} s"
            time.sleep(every_s)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5, verify=PLAIN).status_code == 200
        except httpx.HTTPError:
            assert self.process.poll() is None, self.log.read_text()
            return False

    def stop(self) -> int:
        """As Ctrl-C or a supervisor does. Returns the exit code; nothing of the server's is left."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive, f"left behind: {[p.cmdline()[:2] for p in alive]}"
        return code


def start(arguments: Sequence[str], log: Path) -> Server:
    port = free_port()
    emoe = Path(sys.executable).with_name("emoe")
    with log.open("w") as sink:
        process = subprocess.Popen(
            [str(emoe), "serve", *arguments, "--port", str(port), "--log-file", f"{log}.processes"],
            stdout=sink,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        )
    return Server(process=process, url=f"http://127.0.0.1:{port}", log=log)


def kill_family(server: Server) -> None:
    """Its supervisor ends what is below a command that was killed."""
    if server.process.poll() is None:
        family = psutil.Process(server.process.pid).children(recursive=True)
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive, f"left behind: {[p.cmdline()[:2] for p in alive]}"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen3_moe", tmp_path_factory)


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Three workers for eight experts, so that the split is uneven."""
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--workers", "3", "--dtype", "float32", "--max-model-len", "1024", "--served-model-name", MODEL]
    server = start([str(checkpoint), *flags, "--rebalance-interval", "0", "--no-standby"], log)
    try:
        server.wait("readiness", server.ready, READY_S)
        yield server
    finally:
        kill_family(server)


@dataclass(slots=True)
class Reference:
    """transformers' own answers on the same files."""

    model: Any
    tokenizer: Any
    checkpoint: Path
    known: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    """The longest answer to each prompt. A shorter one is its beginning."""

    def greedy(self, prompt: list[int], tokens: int, claimed: Sequence[int] = ()) -> list[int]:
        """`claimed` is an answer that may be it. One pass confirms it if it is."""
        known = self.known.setdefault(tuple(prompt), [])
        if not known and len(claimed) == tokens and self._confirms(prompt, claimed):
            known += claimed
        if len(known) < tokens:
            known += self._generated([*prompt, *known], tokens - len(known))
        return known[:tokens]

    def _confirms(self, prompt: list[int], claimed: Sequence[int]) -> bool:
        with torch.no_grad():
            logits = self.model(torch.tensor([[*prompt, *claimed[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
        return bool(logits.argmax(1).tolist() == list(claimed))

    def _generated(self, prompt: list[int], tokens: int) -> list[int]:
        with torch.no_grad():
            out = self.model.generate(
                torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None
            )
        return list(out[0, len(prompt) :].tolist())

    def chat(self, text: str) -> list[int]:
        """The prompt of a chat of one turn."""
        turn = [{"role": "user", "content": text}]
        return list(self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))

    def structured(self, prompt: list[int], tokens: int, grammar: Grammar) -> list[int]:
        """Greedy tokens of an answer that follows a grammar, up to its end or so many."""
        info = open_checkpoint(self.checkpoint).info
        eos = info.eos_token_ids
        vocabulary = read_vocabulary(str(self.checkpoint), width=info.vocab_size, eos_token_ids=eos)
        compiled = compile_grammar(grammar, vocabulary)

        def only_allowed(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            # from the beginning in every step: no state can be wrong
            matcher = compiled.deep_copy()
            assert matcher.consume_tokens(ids[0, len(prompt) :].tolist())
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            # any end-of-sequence token may end the answer
            bits[list(eos)] = bits[vocabulary.end]
            return scores.masked_fill(torch.from_numpy(bits[: scores.shape[1]] == 0), -torch.inf)

        with torch.no_grad():
            out = self.model.generate(
                torch.tensor([prompt]),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=list(eos),
                logits_processor=LogitsProcessorList([only_allowed]),
            )
        return list(out[0, len(prompt) :].tolist())

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Reference:
    return load_reference(checkpoint)


def load_reference(checkpoint: Path) -> Reference:
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
    return Reference(model=model.eval(), tokenizer=AutoTokenizer.from_pretrained(checkpoint), checkpoint=checkpoint)
