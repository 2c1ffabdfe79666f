"""Steps whose attention runs between recorded pieces give the tokens of steps that run whole. The recorder is one for
CPUs; tests/model/test_cuda.py records graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import elastic_moe.model.exchange.join as join
from elastic_moe.cluster.messages.requests import GenerateRequest
from elastic_moe.model.experts.store import ExpertStore
from elastic_moe.model.graph_pieces import SIZES, padded
from tests.model.eager_recorder import EagerRecorder
from tests.model.fake_device import FakeDevice
from tests.model.families import tiny_checkpoint
from tests.model.lockstep import Lockstep, request

PROMPTS = ([5, 6, 7], list(range(3, 40)), [9], list(range(20, 31)))


def requests() -> list[GenerateRequest]:
    return [request(f"r{n}", prompt, max_tokens=4 + n) for n, prompt in enumerate(PROMPTS)]


def record(cluster: Lockstep, **sizes: int) -> list[EagerRecorder]:
    recorders = []
    for worker in cluster.workers.values():
        runner = worker._runner
        recorders.append(EagerRecorder(runner))
        limits = {"max_num_seqs": 8, "max_model_len": 128, "max_tokens": 24} | sizes
        assert runner.use_graphs(**limits, recorder=recorders[-1]) is None
    return recorders


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of CPUs can be recorded too."""
    monkeypatch.setattr(ExpertStore, "graph_memory", [])


def ipc(path: Path, slots: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> Lockstep:
    monkeypatch.setattr(join, "CudaDevice", FakeDevice)
    return Lockstep(path, slots, transport="ipc")


def replays_all(recorder: EagerRecorder, cluster: Lockstep) -> bool:
    """The last step has no tokens: it was sent before the last answers came."""
    return cluster.steps - 1 <= recorder.replayed <= cluster.steps


def test_sizes() -> None:
    assert [padded(n) for n in (0, 1, 3, 5, 65, 257, 1100, 2048, 2049, 9000)] == [
        *(1, 1, 4, 8, 80, 320, 1280, 2048, 2049, 9000)
    ]
    assert all(padded(size) == size for size in SIZES)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_tokens_are_those_of_whole_steps(family: str, tmp_path: Path) -> None:
    """With windows and sinks (gpt_oss), and with latents in the cache (deepseek_v3)."""
    path = tiny_checkpoint(family, tmp_path)
    whole = Lockstep(path, [8])
    want = whole.run(requests())
    cluster = Lockstep(path, [8])
    [recorder] = record(cluster)
    assert cluster.run(requests()) == want
    assert replays_all(recorder, cluster)
    assert 0 < recorder.recorded < recorder.replayed
    [counted], [expected] = ([worker.routing_counts() for worker in one.workers.values()] for one in (cluster, whole))
    assert counted.tokens == expected.tokens


@pytest.mark.usefixtures("anywhere")
def test_logits_of_prompts_can_be_asked_for(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path)
    scored = [request("one", PROMPTS[1], max_tokens=2, prompt_logprobs=1)]
    want = Lockstep(path, [8]).run(scored)
    cluster = Lockstep(path, [8])
    [recorder] = record(cluster)
    assert cluster.run(scored) == want
    assert replays_all(recorder, cluster)


@pytest.mark.usefixtures("anywhere")
def test_workers_that_pad_their_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some steps have no tokens on one of the workers. A re-placement needs no new recordings."""
    path = tiny_checkpoint("qwen3_moe", tmp_path)
    want = Lockstep(path, [8]).run(requests())
    cluster = ipc(path, [4, 4], monkeypatch)
    recorders = record(cluster)
    assert cluster.run(requests()) == want
    assert all(replays_all(recorder, cluster) for recorder in recorders)
    made = [recorder.recorded for recorder in recorders]
    cluster.replace([[4, 5, 6, 7, 0, 1, 2, 3]] * cluster.info.num_layers, [4, 4])
    again = cluster.run([request(f"again{n}", prompt, max_tokens=4 + n) for n, prompt in enumerate(PROMPTS)])
    assert list(again.values()) == list(want.values())
    assert [recorder.recorded for recorder in recorders] == made


@pytest.mark.usefixtures("anywhere")
def test_one_worker_may_record_where_another_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path)
    want = Lockstep(path, [8]).run(requests())
    cluster = ipc(path, [4, 4], monkeypatch)
    first, second = record(cluster)
    list(cluster.workers.values())[1]._runner._graphs = []
    assert cluster.run(requests()) == want
    assert replays_all(first, cluster)
    assert not second.replayed
