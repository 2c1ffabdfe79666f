"""Models that keep a state per sequence compute what transformers' own implementation computes, in float32."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic_moe.cluster.messages.requests import RequestId
from elastic_moe.cluster.messages.steps import Chunk, StateUse
from elastic_moe.model.checkpoints.quiet import quiet_transformers
from elastic_moe.model.sampling.greedy import NO_TOKEN
from elastic_moe.model.sampling.next_tokens import NextTokens, choose
from elastic_moe.model.sampling.state import SamplingState
from elastic_moe.model.states.batch import StateBatch
from elastic_moe.model.trunk.step_batch import SequenceSlice
from elastic_moe.model.worker.data_plane import DataPlane
from tests.model.disturbed import answers_disturbed
from tests.model.families import HYBRIDS, tiny_checkpoint
from tests.model.lockstep import Lockstep, request
from tests.model.test_parity import COMPARED, LENGTHS, NEW_TOKENS, greedy, prompts, reference

PIECES = ((0, 3), (3, 9), (9, 10), (10, 30))
"""Places at which prompts are cut: the first chunk, one that goes on, a single token, and a long one."""


@pytest.fixture(scope="module", params=list(HYBRIDS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory)


def run(worker: DataPlane, pieces: dict[int, SequenceSlice]) -> torch.Tensor:
    """Logits of each piece's last token. The keys are the numbers of the sequences."""
    assert worker.loaded.states is not None
    moves = []
    for number, piece in pieces.items():
        chunk = Chunk(
            request_id=RequestId(str(number)),
            start=piece.start,
            length=len(piece.token_ids),
            known=piece.end,
            block_offset=0,
            block_ids=(),
            state=StateUse(keep_from=piece.start),
        )
        moves.append((chunk.length, worker.loaded.states.begin(chunk)))
    states = StateBatch.build(moves, worker.loaded.states, torch.device("cpu"))
    return worker._runner.run([*pieces.values()], [sum(length for length, _ in moves)], states=states)


def test_logits_of_mixed_prompts_in_chunks(checkpoint: Path) -> None:
    """Prompts of different lengths in one batch, in up to four chunks: logits within 1e-4 at the end of each chunk."""
    [worker] = Lockstep(checkpoint, [8]).workers.values()
    texts = prompts(checkpoint)
    for first, last in PIECES:
        pieces = {
            number: SequenceSlice(
                token_ids=text[first:last],
                start=first,
                block_ids=range(number * 8, number * 8 + 8),
                prompt_length=len(text),
            )
            for number, text in enumerate(texts)
            if len(text) > first
        }
        for row, (number, piece) in zip(run(worker, pieces), pieces.items(), strict=True):
            with torch.no_grad():
                expected = reference(checkpoint)(torch.tensor([texts[number][: piece.end]])).logits[0, -1]
            assert (row - expected).abs().max() < 1e-4, f"prompt of {LENGTHS[number]} tokens up to {piece.end}"


def test_greedy_tokens_whatever_happens(checkpoint: Path) -> None:
    """On three workers with little memory, twice each prompt: see `answers_disturbed`."""
    texts = [text for text in prompts(checkpoint) if len(text) in COMPARED] * 2
    got = answers_disturbed(Lockstep(checkpoint, (3, 3, 2), kv_blocks=28), texts, NEW_TOKENS)
    for text, answer in zip([*texts, texts[-1]], got, strict=True):
        assert answer == greedy(checkpoint, text, claimed=answer)[: len(answer)], f"prompt of {len(text)} tokens"


def test_greedy_tokens_on_one_worker(delta: Path) -> None:
    """The families answer on two workers in `test_a_prefix_goes_on_from_a_snapshot`."""
    compare(Lockstep(delta, [8]), delta, copies=1)


@torch.no_grad()
def test_bfloat16_is_as_near_to_the_truth_as_transformers(
    lib: ctypes.CDLL, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Prompts in two chunks, and then one token of each in native code where there is some."""
    texts = [text for text in prompts(checkpoint) if len(text) > 1]
    truth = torch.stack([reference(checkpoint)(torch.tensor([text])).logits[0, -1] for text in texts])
    with quiet_transformers():
        rounded = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
        ).eval()
    theirs = torch.stack([rounded(torch.tensor([text])).logits[0, -1].float() for text in texts])
    [worker] = Lockstep(checkpoint, [8], dtype="bfloat16", block_size=16, max_num_batched_tokens=64).workers.values()
    for begin, end in ((0, 4), (4, -1), (-1, None)):
        pieces = {}
        for number, text in enumerate(texts):
            part = range(len(text))[begin:end]
            if part:
                pieces[number] = SequenceSlice(
                    token_ids=[text[at] for at in part],
                    start=part[0],
                    block_ids=range(number * 2, number * 2 + 2),
                    prompt_length=len(text),
                )
        ours = run(worker, pieces)
    # the median text: near a tie, the last bit decides on an expert
    error, usual = ((got - truth).norm(dim=1).median() for got in (ours.float(), theirs))
    assert error <= 1.5 * usual + 1e-3 * truth.norm(dim=1).median()


def compare(cluster: Lockstep, path: Path, *, copies: int = 2, tokens: int = NEW_TOKENS) -> None:
    """Serve prompts, several of each, and compare their answers with transformers'."""
    texts = [text for text in prompts(path) if len(text) in COMPARED] * copies
    names = [f"r{cluster.steps}-{number}" for number in range(len(texts))]
    got = cluster.run([request(name, text, max_tokens=tokens) for name, text in zip(names, texts, strict=True)])
    for name, text in zip(names, texts, strict=True):
        assert got[name] == greedy(path, text, claimed=got[name])[:tokens], name


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen3_next", tmp_path_factory)


def test_a_prefix_goes_on_from_a_snapshot(checkpoint: Path) -> None:
    cluster = Lockstep(checkpoint, [4, 4])
    compare(cluster, checkpoint, copies=1)
    assert cluster.scheduler.status().prefix_hits == 0
    compare(cluster, checkpoint, copies=1, tokens=16)
    # 5 and 30 tokens, of which the last full blocks of 4 that leave a token to run hold 4 and 28
    assert cluster.scheduler.status().prefix_hits == 4 + 28


def test_a_late_mask_behind_a_snapshot_changes_nothing(delta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first chunk is the one token behind the snapshot. It is run again, from the snapshot again, beside others."""
    cluster = Lockstep(delta, [8])
    text = prompts(delta)[1]
    assert len(text) == 5
    cluster.run([request("first", text, max_tokens=1)])
    asked: list[int] = []

    def late(logits: torch.Tensor, states: Mapping[RequestId, SamplingState]) -> NextTokens:
        chosen = choose(logits, states)
        if RequestId("again") not in states:
            return chosen
        asked.append(len(states[RequestId("again")].token_ids))
        if len(asked) not in (1, 3, 6):
            return chosen
        return replace(
            chosen,
            samples=tuple(one for one in chosen.samples if one.request_id != "again"),
            unready=(RequestId("again"),),
            tokens={**chosen.tokens, RequestId("again"): NO_TOKEN},
        )

    monkeypatch.setattr("elastic_moe.model.worker.data_plane.choose", late)
    got = cluster.run([request("again", text, max_tokens=12), request("other", prompts(delta)[2], max_tokens=12)])
    assert cluster.scheduler.status().prefix_hits == 4
    assert asked.count(5) > 1, "the chunk was not run again"
    assert got["again"] == greedy(delta, tuple(text), 12)
    assert got["other"] == greedy(delta, tuple(prompts(delta)[2]), 12)


def test_a_conversation_goes_on_behind_its_answer(delta: Path) -> None:
    cluster = Lockstep(delta, [8])
    text = prompts(delta)[2]
    answer = cluster.run([request("first", text, max_tokens=10)])["first"]
    turn = [*text, *answer, 9, 8, 7]
    assert cluster.run([request("second", turn, max_tokens=20)])["second"] == greedy(delta, tuple(turn), 20)
    # 13 + 10 tokens, the last of which was not run
    assert cluster.scheduler.status().prefix_hits == 20


@pytest.mark.parametrize("depth", [1, 3])
def test_steps_that_are_run_again_change_nothing(delta: Path, depth: int) -> None:
    """Every third time, what the steps in flight have done is dropped, in prompts and in answers."""
    cluster = Lockstep(delta, [4, 4], depth=depth)
    texts = [text for text in prompts(delta) if len(text) in COMPARED]
    tokens: dict[str, list[int]] = {f"r{len(text)}": [] for text in texts}
    for name, text in zip(tokens, texts, strict=True):
        cluster.scheduler.add(request(name, text, max_tokens=NEW_TOKENS))
    lost = turns = 0
    while cluster.scheduler.num_requests:
        turns += 1
        for output in cluster.step():
            tokens[output.request_id] += output.token_ids
        if turns % 3 == 0:
            cluster.send()
            lost += cluster.lose_steps()
    assert lost > 20
    for text in texts:
        answer = tokens[f"r{len(text)}"]
        assert answer == greedy(delta, text, claimed=answer)


def test_requests_of_a_worker_that_is_gone_are_computed_again(delta: Path) -> None:
    cluster = Lockstep(delta, [4, 4])
    blocks = {worker: cache.pool.num_blocks for worker, cache in cluster.scheduler._caches.by_worker.items()}
    rooms = {name: worker.state_room for name, worker in cluster.workers.items() if worker.state_room is not None}
    texts = [text for text in prompts(delta) if len(text) in COMPARED]
    tokens: dict[str, list[int]] = {f"r{len(text)}": [] for text in texts}
    for name, text in zip(tokens, texts, strict=True):
        cluster.scheduler.add(request(name, text, max_tokens=NEW_TOKENS))
    turns = 0
    while cluster.scheduler.num_requests:
        turns += 1
        if turns in (10, 30):
            while cluster.flights:
                cluster.land()
            gone = list(blocks)[turns % 4 // 2]
            others = {worker: count for worker, count in blocks.items() if worker != gone}
            assert cluster.scheduler.set_workers(others, rooms) == 1
            cluster.workers[gone].forget_sequences()
            cluster.scheduler.set_workers(blocks, rooms)
        for output in cluster.step():
            tokens[output.request_id] += output.token_ids
    for text in texts:
        answer = tokens[f"r{len(text)}"]
        assert answer == greedy(delta, text, claimed=answer)


def test_a_token_too_many_changes_no_other_request(delta: Path) -> None:
    """A stop token is noticed when the next step is already in flight."""
    text = prompts(delta)[1]
    full = greedy(delta, tuple(text))
    stop = full[10]
    cluster = Lockstep(delta, [8], max_num_seqs=2)
    stopping = [request(f"s{n}", text, max_tokens=NEW_TOKENS, stop_token_ids=(stop,)) for n in range(5)]
    got = cluster.run([*stopping, request("whole", text, max_tokens=NEW_TOKENS)])
    cut = full[: full.index(stop) + 1]
    assert [got[f"s{n}"] for n in range(5)] == [cut] * 5
    assert got["whole"] == full


def test_few_states_make_requests_wait(delta: Path) -> None:
    """Memory for three sequences' states and little else: requests take turns, and all are answered."""
    [worker] = Lockstep(delta, [8]).workers.values()
    sizes = worker.loaded.memory.sizes()
    one = sizes.blocks_per_sequence * sizes.block_bytes + sizes.seat_bytes
    cluster = Lockstep(
        delta, [8], kv_cache_bytes=one + 2 * (sizes.seat_bytes + sizes.blocks_per_sequence * sizes.block_bytes // 4)
    )
    [small] = cluster.workers.values()
    assert small.state_room is not None
    assert small.state_room.seats == 3
    compare(cluster, delta, copies=4)


def test_a_prompt_without_prefix_caching_keeps_no_snapshot(delta: Path) -> None:
    cluster = Lockstep(delta, [8], prefix_caching=False)
    [worker] = cluster.workers.values()
    assert worker.state_room is not None
    assert worker.state_room.snapshots == 0
    compare(cluster, delta)
