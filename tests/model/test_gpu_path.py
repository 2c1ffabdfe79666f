"""Runs the code for GPUs on CPU in float32 (stacked experts, FlashAttention's interface, TCP). Tokens are
transformers'.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.nn.attention import varlen

import elastic_moe.model.exchange.join
import elastic_moe.model.fitting.fit
from elastic_moe.cluster.errors import StepAborted
from elastic_moe.cluster.placement import Tier
from elastic_moe.model.exchange.tcp import TcpTransport
from elastic_moe.model.experts.tiered_stacks import TieredStacks
from elastic_moe.model.shared_gpu.transport import DeviceMemoryTransport
from elastic_moe.model.trunk.flash import try_variants
from tests.model.fake_device import FakeDevice
from tests.model.families import tiny_checkpoint
from tests.model.kernels import KERNELS
from tests.model.lockstep import Lockstep, request
from tests.model.test_parity import COMPARED, NEW_TOKENS, greedy, prompts

EXCHANGES = {"tcp": TcpTransport, "ipc": DeviceMemoryTransport}


@pytest.fixture(params=list(KERNELS))
def as_on_gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", KERNELS[request.param])
    monkeypatch.setattr(elastic_moe.model.fitting.fit, "find_variant", try_variants)
    monkeypatch.setattr(elastic_moe.model.fitting.fit, "layer_experts", lambda module, form: TieredStacks(module))


@pytest.mark.usefixtures("as_on_gpus")
@pytest.mark.parametrize(
    ("family", "transport"),
    [("qwen3_moe-mixed", "tcp"), ("gpt_oss", "tcp"), ("deepseek_v3", "tcp"), ("gpt_oss", "ipc")],
)
def test_greedy_tokens_across_replacements(
    family: str, transport: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic_moe.model.exchange.join, "CudaDevice", FakeDevice)
    path = tiny_checkpoint(family, tmp_path_factory)
    cluster = Lockstep(path, [4, 4], transport=transport)
    exchanges = [worker._epoch.exchange for worker in cluster.workers.values() if worker._epoch is not None]
    assert [type(exchange) for exchange in exchanges] == [EXCHANGES[transport]] * 2
    assert cluster.workers_runner()._cache is not None
    assert cluster.workers_runner()._cache.path.varlen is not None
    texts = prompts(path)
    tokens: dict[str, list[int]] = {f"r{len(text)}": [] for text in texts}
    for name, text in zip(tokens, texts, strict=True):
        cluster.scheduler.add(request(name, text, max_tokens=NEW_TOKENS))
    moved = 0
    for step in range(100):
        if step in (10, 30):
            moved += cluster.replace(cluster.shuffled(step), [4, 4])
        for output in cluster.step():
            tokens[output.request_id] += output.token_ids
    assert moved > 0
    for text in texts:
        if len(text) in COMPARED:
            answer = tokens[f"r{len(text)}"]
            assert answer == greedy(path, text, claimed=answer)


@pytest.mark.usefixtures("as_on_gpus")
@pytest.mark.parametrize("as_on_gpus", ["plain"], indirect=True)
@pytest.mark.parametrize(("pinned", "hosted"), [(1, 1), (0, 4)])
def test_greedy_tokens_where_experts_lie_in_memory_beside_the_gpu_and_on_disk(
    pinned: int, hosted: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of 4 experts of a worker's layer; of those in the host's memory the host computes some."""
    path = tiny_checkpoint("gpt_oss", tmp_path_factory)
    cluster = Lockstep(path, [4, 4], transport="tcp", pinned=pinned, hosted=hosted, cache_dir=tmp_path)
    for worker in cluster.workers.values():
        assert worker.loaded.host.capacity == 8 * cluster.info.num_layers
        assert worker._experts.tiers is not None
        assert worker._experts.tiers.way.host.filled(20)  # type: ignore[attr-defined]
    [text] = [text for text in prompts(path) if len(text) == COMPARED[0]]
    tokens = cluster.run([request("one", text, max_tokens=NEW_TOKENS)])
    assert tokens["one"] == greedy(path, text, claimed=tokens["one"])
    for worker in cluster.workers.values():
        counts = worker.tier_counts()
        assert (counts.accesses[Tier.HOST] > 0) == (hosted > 0)
        assert (counts.accesses[Tier.DISK] > 0) == (pinned + hosted < 4)
        assert counts.resident <= (pinned + 1) * cluster.info.num_layers


def test_a_step_whose_exchanges_came_to_nothing_counts_nothing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device, an aborted step runs to its end with wrong numbers before the CPU notices the abort."""
    cluster = Lockstep(tiny_checkpoint("olmoe", tmp_path_factory), [4, 4], transport="tcp", depth=1)
    cluster.scheduler.add(request("one", [5, 6, 7], max_tokens=20))
    for _ in range(4):
        cluster.step()
    sequences = [s for worker in cluster.workers.values() for s in worker._sequences._sequences.values()]
    [state] = [sequence.state for sequence in sequences]
    before = list(state.token_ids)

    def check(self: TcpTransport) -> None:
        raise StepAborted("aborted")

    monkeypatch.setattr(TcpTransport, "check", check)
    with pytest.raises(StepAborted):
        cluster.step()
    assert state.token_ids == before
    for worker in cluster.workers.values():
        assert worker.routing_counts().tokens in (0, len(before) - 1)
