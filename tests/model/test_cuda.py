"""On a CUDA GPU, tokens are those of transformers, and no step makes the CPU wait more than once."""

from __future__ import annotations

import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from elastic_moe.cluster.placement import Placement, Tier, contiguous
from elastic_moe.model.checkpoints.quiet import quiet_transformers
from elastic_moe.model.exchange.dispatch import TransportDispatcher
from elastic_moe.model.exchange.transports import NcclTransport
from elastic_moe.model.experts.stacked import StackedExperts, keep_together, read_together
from elastic_moe.model.experts.store import ExpertStore
from elastic_moe.model.fitting.fit import layer_experts
from elastic_moe.model.sampling.sampling import sample
from elastic_moe.model.tiers.far import FarWay
from elastic_moe.model.tiers.link import Link, Pinned
from elastic_moe.model.transformers_private import STATES_REFUSAL
from elastic_moe.model.trunk.step_batch import SequenceSlice
from elastic_moe.model.worker.runner import ModelRunner
from tests.model.families import FAMILIES, tiny_checkpoint
from tests.model.gpu_pair import Pair, compare, kill_one
from tests.model.groups import ToyExperts, workers
from tests.model.lockstep import Lockstep, request
from tests.model.packing import CASES, pack_checkpoint
from tests.model.random_checkpoint import make_random_checkpoint
from tests.model.sampling.test_sampling import state
from tests.model.test_parity import COMPARED, NEW_TOKENS, greedy, prompts
from tests.model.two_planes import (
    logits_of_two,
    seconds_until_a_lost_worker_is_noticed,
    tokens_across_replacements,
)

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(not GPUS, reason="no CUDA GPU, or a torch without CUDA")
hopper = pytest.mark.skipif(
    not GPUS or torch.cuda.get_device_capability() < (9, 0),
    reason="needs a Hopper GPU, on which torch multiplies groups without a wait",
)
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"needs 2 CUDA GPUs, {GPUS} here")
HYBRID = ["qwen3_next", "kimi_linear", "granitemoehybrid-mamba"]


@pytest.mark.parametrize("family", [*FAMILIES, *([] if STATES_REFUSAL else HYBRID)])
def test_greedy_tokens_of_one_worker(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """float32, against transformers on CPU."""
    path = tiny_checkpoint(family, tmp_path_factory)
    texts = prompts(path)
    got = Lockstep(path, [8], device="cuda").run([request(f"r{len(t)}", t, max_tokens=NEW_TOKENS) for t in texts])
    for text in texts:
        if len(text) in COMPARED:
            assert got[f"r{len(text)}"] == greedy(path, tuple(text))


@pytest.mark.parametrize(("family", "name"), [("deepseek_v3", "fp8-blocks"), ("gpt_oss", "awq"), ("mixtral", "gptq")])
def test_greedy_tokens_of_a_packed_checkpoint(family: str, name: str, tmp_path: Path) -> None:
    """In float32, experts are unpacked when they are loaded."""
    sizes = {"hidden": 64, "layers": 2, "experts": 8, "top_k": 2, "ff": 32, "vocab": 300}
    source = make_random_checkpoint(tmp_path / "source", family, **sizes)
    packed, meant = pack_checkpoint(source, tmp_path, CASES[name])
    prompt = list(range(5, 25))
    tokens = Lockstep(packed, [8], device="cuda").run([request("one", prompt, max_tokens=NEW_TOKENS)])
    assert tokens["one"] == greedy(meant, tuple(prompt))


def test_workers_that_share_a_gpu_across_replacements(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tiny_checkpoint("gpt_oss", tmp_path_factory)
    cluster = Lockstep(path, [4, 4], device="cuda", transport="tcp")
    text = prompts(path)[3]
    cluster.scheduler.add(request("one", text, max_tokens=NEW_TOKENS))
    tokens: list[int] = []
    for step in range(100):
        if step in (10, 30):
            assert cluster.replace(cluster.shuffled(step), [4, 4]) > 0
        for output in cluster.step():
            tokens += output.token_ids
    assert tokens == greedy(path, tuple(text))


@pytest.mark.parametrize(("pinned", "hosted"), [(4, 2), (0, 8), (2, 0)])
@pytest.mark.parametrize("lends", [True, False])
def test_greedy_tokens_where_experts_lie_in_pinned_memory_and_on_disk(
    pinned: int, hosted: int, lends: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of 8 experts of a layer. `lends`: the host's cores compute some of those that lie in pinned memory."""
    path = tiny_checkpoint("gpt_oss", tmp_path_factory)
    cluster = Lockstep(path, [8], device="cuda", pinned=pinned, hosted=hosted, cache_dir=tmp_path)
    way = far_way(cluster)
    for layer in way._layers:
        layer.borrows = lends
    text = prompts(path)[3]
    tokens = cluster.run([request("one", text, max_tokens=NEW_TOKENS)])
    assert tokens["one"] == greedy(path, tuple(text))
    [worker] = cluster.workers.values()
    counts = worker.tier_counts()
    assert (counts.accesses[Tier.HOST] > 0) == (hosted > 0)
    assert (counts.accesses[Tier.DISK] > 0) == (pinned + hosted < 8)


def far_way(cluster: Lockstep) -> FarWay:
    """The only worker's way into its GPU, once its pinned memory is filled."""
    [worker] = cluster.workers.values()
    assert worker._experts.tiers is not None
    way = worker._experts.tiers.way
    assert isinstance(way, FarWay)
    assert way.host.filled(60)
    return way


def test_a_copy_waits_for_the_products_that_read_its_slot_and_those_that_follow_wait_for_it() -> None:
    device = torch.device("cuda")
    link, nbytes = Link(device), 8 << 20
    pinned = Pinned(4 * nbytes, device).slots(nbytes)
    slots = [link.slot(nbytes) for _ in range(2)]
    found = []
    for n in range(100):
        source, slot = pinned[n % 4], slots[n % 2]
        source.wait()
        source.data.fill_(n)
        link.copy(source, slot)
        link.use(slot)
        # some products, so that the GPU is behind
        found.append(torch.stack([slot.data.view(torch.int16)[part::7].max() for part in range(7)]).max())
        link.release(slot)
    assert [int(n) & 255 for n in torch.stack(found).tolist()] == list(range(100))
    torch.cuda.synchronize()
    assert link.stall_s() >= 0


def wide_checkpoint(family: str, factory: pytest.TempPathFactory) -> Path:
    """With sizes that kernels for 16 bits take."""
    sizes = {"hidden": 256, "layers": 3, "experts": 8, "top_k": 2, "ff": 128, "vocab": 512}
    return make_random_checkpoint(factory.mktemp("cuda") / family, family, **sizes, dtype="bfloat16")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_checkpoint("qwen3_moe", tmp_path_factory)


def step_logits(runner: ModelRunner, texts: list[list[int]], cut: int) -> Tensor:
    """Of the last token of each text, the first `cut` tokens of which were a step before."""
    for first in (True, False):
        step = []
        for n, text in enumerate(texts):
            begin = cut % len(text)
            start, end = (0, begin) if first else (begin, len(text))
            blocks = list(range(8 * n, 8 * n + 8))
            step.append(SequenceSlice(token_ids=text[start:end], start=start, block_ids=blocks, prompt_length=1))
        logits = runner.run(step, [sum(len(piece.token_ids) for piece in step)])
    return logits


def test_a_flip_waits_for_copies_that_read_the_slots_it_writes() -> None:
    module: Any = ToyExperts(4, 8, 8, 0)
    experts = [{name: torch.full((2, 512, 512), float(n), device="cuda") for name in ("up", "down")} for n in range(4)]
    layers = [StackedExperts(module) for _ in range(2)]
    for layer in layers:
        layer.reserve(2)
        for number in range(4):
            layer.put(number, experts[number])
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        with read_together(layers, [(0, 0), (1, 1), (1, 7)]) as found:
            torch.cuda._sleep(200_000_000)
            copies = [found[0, 0]["up"].clone(), found[1, 1]["down"].clone()]
        assert set(found) == {(0, 0), (1, 1)}
    keep_together(layers, [{2, 3}] * 2)
    assert not side.query()
    torch.cuda.synchronize()
    assert [float(copy.mean()) for copy in copies] == [0.0, 1.0]
    assert [float(layer.get(3)["up"].mean()) for layer in layers] == [3.0, 3.0]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_bfloat16_is_as_near_as_transformers_is(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The error over float32 is at most a quarter more than that of transformers' own bfloat16, in the middle of many
    texts: where two experts are about as good, rounding decides, and then a text is far off in either."""
    checkpoint = wide_checkpoint(family, tmp_path_factory)

    def reference(dtype: torch.dtype) -> PreTrainedModel:
        with quiet_transformers():
            model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation="eager")
        return model.to("cuda").eval()  # type: ignore[no-any-return]

    runner = Lockstep(checkpoint, [8], dtype="bfloat16", device="cuda", block_size=16).workers_runner()
    assert runner._cache is not None
    assert runner._cache.path.varlen is not None, "FlashAttention was not found"
    assert runner._graphs
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 512, (n,), generator=g).tolist() for n in range(9, 128, 7)]
    exact, rounded = reference(torch.float32), reference(torch.bfloat16)
    for cut in (1, 8, -1):
        got = torch.cat([step_logits(runner, texts[n : n + 6], cut).float() for n in range(0, len(texts), 6)])
        with torch.no_grad():
            want, theirs = (
                torch.stack([model(torch.tensor([t], device="cuda")).logits[0, -1].float() for t in texts])
                for model in (exact, rounded)
            )
        our_error, their_error = ((found - want).abs().mean(1).median() for found in (got, theirs))
        assert our_error < 1.25 * their_error


@hopper
def test_a_graph_runs_as_the_kernels_one_by_one_also_with_rows_to_spare_and_other_experts(checkpoint: Path) -> None:
    def made(eager: bool) -> Lockstep:
        return Lockstep(
            checkpoint,
            [8],
            dtype="bfloat16",
            device="cuda",
            block_size=16,
            max_num_batched_tokens=512,
            enforce_eager=eager,
        )

    graphs, eager = made(False), made(True)
    assert not eager.workers_runner()._graphs
    g = torch.Generator().manual_seed(0)
    for turn, number in enumerate((4, 3, 1, 6, 7)):
        texts = [torch.randint(3, 512, (5 + 9 * n,), generator=g).tolist() for n in range(number)]
        if turn == 3:
            for cluster in (graphs, eager):
                cluster._flip(replaced(cluster, cluster.shuffled(3)))
        # decodes and prompts after them, prompts in two chunks, prompts and decodes after them
        for cut in (1, 3, -1):
            got, want = (step_logits(cluster.workers_runner(), texts, cut).float() for cluster in (graphs, eager))
            torch.testing.assert_close(got, want, rtol=0.05, atol=0.15)


def replaced(cluster: Lockstep, table: list[list[int]]) -> Placement:
    return Placement(
        num_logical_experts=8,
        workers=cluster.placement.workers,
        physical_to_logical_map=table,  # type: ignore[arg-type]
    )


@hopper
@pytest.mark.parametrize("expert_dtype", ["auto", "int8"])
def test_a_step_never_makes_the_cpu_wait(checkpoint: Path, expert_dtype: str) -> None:
    options = {"dtype": "bfloat16", "block_size": 16, "expert_dtype": expert_dtype}
    runner = Lockstep(checkpoint, [8], device="cuda", **options).workers_runner()  # type: ignore[arg-type]
    texts = [list(range(3, 3 + n)) for n in (9, 40, 100)]
    for cut in (8, -1):
        warm = step_logits(runner, texts, cut).clone()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = step_logits(runner, texts, cut)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(warm, again)


@hopper
def test_a_layer_waits_for_its_choices_alone_where_experts_come_from_pinned_memory(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Waits for events are no error in this mode; copies to the host and questions to tensors are."""
    cluster = Lockstep(
        checkpoint, [8], dtype="bfloat16", device="cuda", block_size=16, pinned=2, hosted=6, cache_dir=tmp_path
    )
    far_way(cluster)
    runner, texts = cluster.workers_runner(), [list(range(3, 3 + n)) for n in (9, 40, 100)]
    warm = step_logits(runner, texts, 8)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step_logits(runner, texts, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(warm, again, rtol=2e-2, atol=2e-2)


def test_sampling_waits_once() -> None:
    params = [{"temperature": 0.0}, {"top_k": 5, "logprobs": 2}, {"top_p": 0.9, "min_p": 0.01, "logprobs": 5}]
    states = [
        state((1, 2), (3,), eos=(), **{"max_tokens": 8, "seed": n, "presence_penalty": 0.5} | p)  # type: ignore[arg-type]
        for n, p in enumerate(params)
    ]
    logits = torch.randn(len(params), 1000, device="cuda")
    sample(logits, states)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sample(logits, states)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1


def test_stacks_on_the_gpu_compute_what_the_loop_does() -> None:
    module = ToyExperts(8, 64, 32, 0)
    x, index = torch.randn(50, 64), torch.stack([torch.randperm(8)[:2] for _ in range(50)])
    index[::3, 0] = -1
    weight = torch.rand(50, 2)
    oracle, stacked = ExpertStore([layer_experts(module)]), StackedExperts(module)
    for expert in range(8):
        oracle.put(0, expert, module.weights[expert])
        stacked.put(expert, {name: tensor.cuda() for name, tensor in module.weights[expert].items()})
    stacked.keep_only(set(range(8)))
    got = stacked.forward(x.cuda(), index.cuda(), weight.cuda())
    torch.testing.assert_close(got.cpu(), oracle.forward(0, x, index, weight), rtol=1e-4, atol=1e-5)


def _nccl_rank(rank: int, size: int, port: int, out: Any) -> None:
    torch.cuda.set_device(rank)
    module = ToyExperts(6, 64, 32, 0).to("cuda")
    placement = contiguous(1, 6, workers(*[6 // size] * size))
    transport = NcclTransport(rendezvous=f"127.0.0.1:{port}", group="nccl", rank=rank, size=size, timeout_s=60)
    device = torch.device("cuda", rank)
    store = ExpertStore([layer_experts(module)])
    for expert in placement.experts_of(placement.workers[rank].id, 0):
        store.put(0, expert, {name: tensor.to(device) for name, tensor in module.weights[expert].items()})
    store.keep_only([store.held(0)])
    found = []
    for most_dense in (0, 100):
        dispatcher = TransportDispatcher(placement, rank, store, transport, device=device, most_dense=most_dense)
        tokens = [5, 3][:size]
        dispatcher.begin(tokens, None)
        parts = [t.to(device) for t in _nccl_tokens(rank, tokens[rank])]
        found.append(dispatcher.forward(0, *parts).cpu())
        dispatcher.finish()
    out.put((rank, [t.numpy() for t in found]))


def _nccl_tokens(rank: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(rank)
    index = torch.stack([torch.randperm(6, generator=g)[:3] for _ in range(tokens)])
    return torch.randn(tokens, 64, generator=g), index, torch.rand(tokens, 3, generator=g)


@two_gpus
def test_two_gpus_exchange_tokens_by_nccl() -> None:
    from torch.distributed import TCPStore

    module = ToyExperts(6, 64, 32, 0)
    oracle = ExpertStore([layer_experts(module)])
    for expert in range(6):
        oracle.put(0, expert, module.weights[expert])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    ranks = [context.Process(target=_nccl_rank, args=(rank, 2, store.port, out)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        for rank, found in (out.get(timeout=120) for _ in ranks):
            for got in found:
                want = oracle.forward(0, *_nccl_tokens(rank, [5, 3][rank]))
                torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def test_two_processes_share_a_gpu_and_its_memory() -> None:
    """Whatever the placement, the sums are exactly those that come over TCP, and nearly those of one worker."""
    with Pair("cuda", compare) as pair:
        pair.swap_doors()
        assert [pair.answer(rank, 120) for rank in range(2)] == [60, 60]


@pytest.mark.parametrize("told", [True, False])
def test_a_process_that_shares_a_gpu_is_killed(told: bool) -> None:
    """The other notices it after the time-out, or as soon as it is told, and its GPU goes on."""
    survived, took_s = kill_one("cuda", timeout_s=60 if told else 5, told=told)
    assert survived.freed
    assert survived.works
    assert survived.reason == ("the exchange was aborted" if told else "w1 has not answered for 5 s")
    assert took_s < 30


def test_greedy_tokens_of_two_processes_that_share_a_gpu(tmp_path_factory: pytest.TempPathFactory) -> None:
    """float32, across re-placements, against transformers on CPU."""
    path = tiny_checkpoint("gpt_oss", tmp_path_factory)
    text = prompts(path)[3]
    assert tokens_across_replacements(path, "cuda", text, NEW_TOKENS) == greedy(path, tuple(text))


@hopper
def test_two_processes_that_share_a_gpu_launch_graphs_between_their_exchanges(checkpoint: Path) -> None:
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 512, (12,), generator=g).tolist() for _ in range(5)]
    options = {"dtype": "bfloat16", "block_size": 16, "max_num_batched_tokens": 64}
    got, replayed = logits_of_two(checkpoint, "cuda", texts, **options)
    want, _ = logits_of_two(checkpoint, "cuda", texts, **options, enforce_eager=True)
    assert replayed
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.15)


def test_a_worker_that_shares_a_gpu_is_killed_within_a_step(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tiny_checkpoint("gpt_oss", tmp_path_factory)
    assert seconds_until_a_lost_worker_is_noticed(path, "cuda", prompts(path)[3]) < 30
