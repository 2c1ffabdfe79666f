"""The engine's loop with simulated workers behind real sockets: whatever fails, every request gets the tokens that it
gets alone."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import chain

import pytest

from elastic_moe.actors.engine import step_deadline, step_loop
from elastic_moe.actors.engine import worker_links as group
from elastic_moe.actors.engine.clients import Clients
from elastic_moe.actors.engine.engine import Engine, _die_of
from elastic_moe.actors.engine.step_loop import StepLoop
from elastic_moe.actors.remote.codec import Message
from elastic_moe.actors.remote.links import Link, connect
from elastic_moe.actors.scheduler.scheduler import Scheduler
from elastic_moe.actors.worker.step_server import StepServer
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import NotReadyError, StepAborted
from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec, WorkerInfo
from elastic_moe.cluster.messages.requests import (
    AbortRequests,
    Endpoint,
    FinishReason,
    GenerateRequest,
    Hello,
    Outputs,
    RequestId,
    SamplingParams,
    Submit,
    TokenOutput,
)
from elastic_moe.cluster.messages.steps import StepPlan, StepResult
from elastic_moe.cluster.placement import Worker, WorkerId, contiguous
from tests.actors.fakes import MODEL
from tests.actors.simulated_worker import EOS, SimulatedWorker, alone

BLOCKS = 40
MAX_MODEL_LEN = 60
STEP_S = 0.004


class Lockstep:
    """The process group of an epoch: no worker finishes a step before every worker has begun it."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)


class ConnectedWorker:
    """A simulated worker that an engine connects to: it has epochs, aborts steps, and refuses steps after a failure."""

    def __init__(self, name: str) -> None:
        self.id = WorkerId(name)
        self.simulated = SimulatedWorker(BLOCKS, 4, rope_limit=1000)
        self.epoch = Epoch(0)
        self.prepared: dict[Epoch, tuple[int, Lockstep]] = {}
        self.group: Lockstep | None = None
        self.failed = False
        self.steps = 0
        self.before: Callable[[StepPlan], None] = lambda plan: None
        """Called in a step, where tests put faults."""
        self.server = StepServer(self, "127.0.0.1")

    def step(self, plan: StepPlan) -> StepResult:
        if plan.epoch != self.epoch or self.failed:
            raise StepAborted("not this one")
        try:
            self.before(plan)
            assert self.group is not None
            try:
                self.group.barrier.wait(10)
            except threading.BrokenBarrierError:
                raise StepAborted("a peer is gone") from None
            time.sleep(STEP_S)
            self.steps += 1
            return self.simulated.run(plan, self.rank)
        except BaseException:
            self.failed = True
            raise

    def commit(self, epoch: Epoch) -> None:
        if epoch not in self.prepared:
            raise StepAborted(f"epoch {epoch} was not prepared")
        self.rank, self.group = self.prepared.pop(epoch)
        self.epoch, self.failed = epoch, False

    def forget_sequences(self) -> None:
        self.simulated.known.clear()

    def rest(self) -> None:
        pass

    @property
    def info(self) -> WorkerInfo:
        return WorkerInfo(
            worker=self.id,
            node="n",
            endpoint=self.server.endpoint,
            pid=1,
            device="cpu",
            num_kv_blocks=BLOCKS,
            memory_bytes=1,
        )


class Cluster:
    """Loop, clients and workers. The coordinator's part, making epochs, is the tests'."""

    def __init__(self, *names: str) -> None:
        self.workers = {WorkerId(name): ConnectedWorker(name) for name in names}
        self.scheduler = Scheduler(
            {},
            block_size=4,
            max_num_seqs=8,
            max_num_batched_tokens=16,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=(EOS,),
        )
        self.clients = Clients(self.scheduler, submitted=lambda: self.loop.wake())
        self.loop = StepLoop(
            self.scheduler,
            self.clients,
            step_timeout_s=0.3,
            abort=self.abort,
            report=lambda *what: self.report(*what),
            late=lambda workers: self.late.append(list(workers)),
        )
        self.running: asyncio.Task[None]
        """The loop's."""
        self.endpoint: Endpoint
        """Where clients connect."""
        self.late: list[list[WorkerId]] = []
        self.reports: asyncio.Queue[tuple[Epoch, list[WorkerId], str]] = asyncio.Queue()
        self.epoch = Epoch(0)

    def abort(self, epoch: Epoch, workers: Iterable[WorkerId]) -> None:
        for worker in workers:
            simulated = self.workers[worker]
            if simulated.epoch == epoch and simulated.group is not None:
                simulated.group.barrier.abort()

    def report(self, epoch: Epoch, suspects: Sequence[WorkerId], reason: str) -> None:
        self.reports.put_nowait((epoch, list(suspects), reason))

    async def begin_epoch(self, *names: str) -> None:
        self.epoch = Epoch(self.epoch + 1)
        members = [self.workers[WorkerId(name)] for name in names]
        group = Lockstep(len(members))
        for rank, simulated in enumerate(members):
            simulated.prepared[self.epoch] = (rank, group)
        workers = tuple(Worker(id=simulated.id, node="n", slots=4) for simulated in members)
        spec = EpochSpec(
            epoch=self.epoch, placement=contiguous(1, 4, workers), group="g", transport="shm", rendezvous=""
        )
        await self.loop.change_epoch(spec, {simulated.id: simulated.info for simulated in members})


class Client:
    """An API replica: what came of its requests."""

    def __init__(self, name: str = "c") -> None:
        self.name = name
        self.tokens: dict[RequestId, list[int]] = {}
        self.ends: dict[RequestId, TokenOutput] = {}
        self.lost = asyncio.Event()
        self.news = asyncio.Event()
        self.link: Link

    async def connect(self, endpoint: Endpoint) -> None:
        self.link = await connect(endpoint, self._received, lambda _: self.lost.set())
        await self.link.call(Hello(client_id=self.name))

    def _received(self, link: Link, message: Message) -> None:
        assert isinstance(message, Outputs)
        for output in chain(message.tokens, message.outputs):
            tokens = self.tokens[output.request_id]
            assert output.offset == len(tokens) or output.error is not None
            assert output.request_id not in self.ends
            tokens += output.token_ids
            if output.finish_reason is not None:
                self.ends[output.request_id] = output
        self.news.set()

    async def submit(self, *requests: GenerateRequest) -> None:
        for request in requests:
            self.tokens.setdefault(request.request_id, list(request.output_token_ids))
        await self.link.call(Submit(requests=requests))

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.news.clear()
            await self.news.wait()

    async def finish(self, *requests: GenerateRequest) -> None:
        await self.until(lambda: all(request.request_id in self.ends for request in requests))
        for request in requests:
            assert tuple(self.tokens[request.request_id]) == alone(request, MAX_MODEL_LEN)


def request(name: str, prompt: int = 5, **params: object) -> GenerateRequest:
    fields = {"max_tokens": 30, "ignore_eos": True} | params
    return GenerateRequest(
        request_id=RequestId(name),
        prompt_token_ids=tuple(1 + (len(name) + n) % 11 for n in range(prompt)),
        params=SamplingParams(**fields),  # type: ignore[arg-type]
    )


Scenario = Callable[[Cluster, Client], Awaitable[None]]


def run(names: Sequence[str], scenario: Scenario) -> Cluster:
    cluster: list[Cluster] = []

    async def work() -> None:
        c = Cluster(*names)
        cluster.append(c)
        client = Client()
        c.running = loop = asyncio.create_task(c.loop.run())
        try:
            async with asyncio.timeout(20):
                c.endpoint = await c.clients.listen("127.0.0.1")
                await client.connect(c.endpoint)
                await c.begin_epoch(*names)
                await scenario(c, client)
        finally:
            loop.cancel()
            await c.loop._links.flip(Epoch(0), {}, 1, first=False)
            c.clients.close()
            for simulated in c.workers.values():
                simulated.server.close()
            while not client.lost.is_set():
                await asyncio.sleep(0.001)
            if loop.done() and not loop.cancelled():
                loop.result()

    asyncio.run(work())
    return cluster[0]


def test_requests_of_all_kinds() -> None:
    async def scenario(cluster: Cluster, client: Client) -> None:
        requests = [request(f"r{'x' * n}", prompt=3 + 5 * n, max_tokens=1 + 4 * n) for n in range(6)]
        requests += [request(f"s{'x' * n}", ignore_eos=False, stop_token_ids=(n,), seed=n) for n in range(6)]
        await client.submit(*requests[:7])
        await client.until(lambda: bool(client.ends))
        # the first two of these are running already
        await client.submit(*requests[5:])
        await client.finish(*requests)
        assert {r.finish_reason for r in client.ends.values()} == {FinishReason.LENGTH, FinishReason.STOP}
        assert cluster.reports.empty()

    run(["a", "b"], scenario)


def test_at_most_one_step_is_sent_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loop, "LEAD", 1.0)
    depths: list[int] = []

    async def scenario(cluster: Cluster, client: Client) -> None:
        schedule = cluster.scheduler.schedule

        def note(epoch: Epoch, step: int) -> dict[WorkerId, StepPlan] | None:
            depths.append(len(cluster.scheduler._flights))
            return schedule(epoch, step)

        cluster.scheduler.schedule = note  # type: ignore[method-assign]
        await client.submit(request("r"))
        await client.finish(request("r"))
        assert cluster.workers[WorkerId("a")].steps == 30, "no step is run for nothing"

    run(["a"], scenario)
    assert set(depths) == {0, 1}


@pytest.mark.parametrize("fails_at", [1, 6, 7, 20])
def test_a_worker_that_dies(fails_at: int) -> None:
    async def scenario(cluster: Cluster, client: Client) -> None:
        requests = [request(f"r{'x' * n}", prompt=4 + n) for n in range(5)]
        dying = cluster.workers[WorkerId("b")]

        def die(plan: StepPlan) -> None:
            if dying.steps == fails_at:
                dying.server.close()
                raise RuntimeError

        dying.before = die
        await client.submit(*requests)
        epoch, suspects, _ = await cluster.reports.get()
        assert (epoch, suspects) == (1, ["b"])
        await cluster.begin_epoch("a")
        await client.finish(*requests)

    run(["a", "b"], scenario)


def test_a_worker_that_dies_while_nothing_runs() -> None:
    async def scenario(cluster: Cluster, client: Client) -> None:
        cluster.workers[WorkerId("b")].server.close()
        assert (await cluster.reports.get())[:2] == (1, ["b"])
        await client.submit(request("r"))
        await cluster.begin_epoch("a")
        await client.finish(request("r"))

    run(["a", "b"], scenario)


def test_a_worker_that_aborts_is_not_to_blame() -> None:
    async def scenario(cluster: Cluster, client: Client) -> None:
        simulated = cluster.workers[WorkerId("b")]

        def abort(plan: StepPlan) -> None:
            if simulated.steps == 5:
                raise StepAborted("lost a peer")

        simulated.before = abort
        await client.submit(request("r"))
        assert await cluster.reports.get() == (1, [], "the workers lost one another")
        simulated.before = lambda plan: None
        await cluster.begin_epoch("b", "a")
        await client.finish(request("r"))

    run(["a", "b"], scenario)


@pytest.mark.parametrize("failing", [["a"], ["b"], ["a", "b"]])
def test_a_request_that_the_model_fails_on_fails_alone(failing: list[str]) -> None:
    """Whichever worker fails: an expert runs tokens of requests that are at home elsewhere."""
    good = [request(f"good{n}") for n in range(3)]

    async def scenario(cluster: Cluster, client: Client) -> None:
        def stumble(plan: StepPlan) -> None:
            [requests] = [flight.requests() for flight in list(cluster.scheduler._flights) if flight.step == plan.step]
            homes = [worker.simulated.known.get(RequestId("bad")) for worker in cluster.workers.values()]
            if "bad" in requests and any(bad is not None and len(bad.tokens) > 9 for bad in homes):
                raise ValueError("cannot")

        for name in failing:
            cluster.workers[WorkerId(name)].before = stumble
        await client.submit(*good, request("bad"))
        breaks = 0
        while not {RequestId("bad"), *(one.request_id for one in good)} <= client.ends.keys():
            if cluster.reports.empty():
                await asyncio.sleep(0.001)
                continue
            breaks += 1
            assert cluster.reports.get_nowait()[1] == []
            await cluster.begin_epoch("a", "b")
        await client.finish(*good)
        end = client.ends[RequestId("bad")]
        assert end.finish_reason is FinishReason.ERROR
        assert "ValueError: cannot" in (end.error or "")
        assert breaks <= 3

    run(["a", "b"], scenario)


def test_a_worker_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loop, "SILENT_S", 0.05)
    monkeypatch.setattr(step_loop, "ABORT_S", 0.1)
    monkeypatch.setattr(step_deadline, "LATE_FLOOR_S", 0.2)
    hangs, goes_on = threading.Event(), threading.Event()

    async def scenario(cluster: Cluster, client: Client) -> None:
        simulated = cluster.workers[WorkerId("b")]

        def hang(plan: StepPlan) -> None:
            if simulated.steps == 5 and not hangs.is_set():
                hangs.set()
                goes_on.wait(10)

        simulated.before = hang
        await client.submit(request("r", max_tokens=6), request("q"))
        epoch, suspects, reason = await cluster.reports.get()
        assert (epoch, suspects) == (1, ["b"])
        assert "no answer in time" in reason
        # before that it was asked for a sign of life: when the step was late, and when it did not give it up
        # (on a busy machine both moments may have passed at the first look)
        assert cluster.late in ([["a", "b"], ["b"]], [["b"]])
        goes_on.set()
        # it is spared, and what it answers late confuses nobody
        await cluster.begin_epoch("a", "b")
        await client.finish(request("r", max_tokens=6), request("q"))

    run(["a", "b"], scenario)


def test_a_worker_that_the_next_epoch_leaves_out_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cut off: its connection stays, and nothing comes."""
    monkeypatch.setattr(step_loop, "SILENT_S", 0.05)
    monkeypatch.setattr(step_loop, "ABORT_S", 600.0)
    monkeypatch.setattr(step_deadline, "FLOOR_S", 0.2)
    mended = threading.Event()

    async def scenario(cluster: Cluster, client: Client) -> None:
        silent = cluster.workers[WorkerId("b")]

        def be_cut_off(plan: StepPlan) -> None:
            if silent.steps == 5:
                mended.wait(30)

        silent.before = be_cut_off
        await client.submit(request("r"))
        await client.until(lambda: len(client.tokens[RequestId("r")]) >= 5)
        while not cluster.late:
            await asyncio.sleep(0.01)
        await cluster.begin_epoch("a")
        await client.finish(request("r"))

    try:
        run(["a", "b"], scenario)
    finally:
        mended.set()


def test_a_worker_that_is_given_up_after_the_others_have_finished_is_not_waited_for() -> None:
    """It is cut off when only its own answer is missing: nobody is left whom an abort could wake."""
    cut, mended = threading.Event(), threading.Event()

    async def scenario(cluster: Cluster, client: Client) -> None:
        cluster.loop._allowed = step_deadline.StepDeadline(600.0)
        silent = cluster.workers[WorkerId("b")]
        compute = silent.simulated.run

        def be_cut_off(plan: StepPlan, rank: int) -> StepResult:
            if silent.steps == 5:
                cut.set()
                mended.wait(30)
            return compute(plan, rank)

        silent.simulated.run = be_cut_off  # type: ignore[method-assign]
        # no step follows this one, in which the other worker would wait for the silent one
        last = request("r", max_tokens=5)
        await client.submit(last)
        await asyncio.to_thread(cut.wait)
        while any("a" in flight.pending for flight in cluster.loop._flights):
            await asyncio.sleep(0.01)
        cluster.loop.lose(WorkerId("b"))
        await cluster.begin_epoch("a")
        assert (await cluster.reports.get())[1] == ["b"]
        await client.finish(last)

    try:
        run(["a", "b"], scenario)
    finally:
        mended.set()


def test_a_stall_of_the_engine_is_not_blamed_on_a_worker() -> None:
    held, goes_on = threading.Event(), threading.Event()

    async def scenario(cluster: Cluster, client: Client) -> None:
        simulated = cluster.workers[WorkerId("b")]

        def hold(plan: StepPlan) -> None:
            if simulated.steps == 5 and not held.is_set():
                held.set()
                goes_on.wait(10)

        simulated.before = hold
        cluster.loop._allowed = step_deadline.StepDeadline(1.0)
        await client.submit(request("r"))
        while not held.is_set():
            await asyncio.sleep(0.001)
        # longer than a step may take; the worker answers only after that
        time.sleep(1.5)
        asyncio.get_running_loop().call_later(0.02, goes_on.set)
        await client.finish(request("r"))
        assert cluster.reports.empty()

    run(["a", "b"], scenario)


def test_epochs_change_under_load() -> None:
    async def scenario(cluster: Cluster, client: Client) -> None:
        requests = [request(f"r{'x' * n}", prompt=4 + n) for n in range(6)]
        await client.submit(*requests)
        for members in (["b"], ["b", "a"], ["a"], ["a", "b"]):
            seen = sum(map(len, client.tokens.values()))
            await client.until(lambda seen=seen: sum(map(len, client.tokens.values())) > seen + 5)  # type: ignore[misc]
            await cluster.begin_epoch(*members)
        await client.finish(*requests)
        assert cluster.reports.empty()

    run(["a", "b"], scenario)


def test_an_epoch_that_a_worker_has_not_prepared() -> None:
    async def scenario(cluster: Cluster, client: Client) -> None:
        await client.submit(request("r"))
        spec = cluster.loop._spec
        assert spec is not None
        with pytest.raises(StepAborted, match="epoch 1 was not committed by a: epoch 1 was not prepared"):
            await cluster.loop.change_epoch(
                spec, {simulated.id: simulated.info for simulated in cluster.workers.values()}
            )
        assert not client.ends
        await cluster.begin_epoch("a", "b")
        await client.finish(request("r"))

    run(["a", "b"], scenario)


def test_an_engine_that_can_open_no_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are well: to try again from the same process would fail for ever."""

    async def scenario(cluster: Cluster, client: Client) -> None:
        async def fails(*_: object) -> Link:
            raise OSError(errno.EMFILE, "Too many open files")

        await cluster.begin_epoch("a")
        monkeypatch.setattr(group, "connect", fails)
        epoch = asyncio.create_task(cluster.begin_epoch("a", "b"))
        await asyncio.wait([cluster.running])
        epoch.cancel()

    with pytest.raises(OSError, match="Too many open files"):
        run(["a", "b"], scenario)


def test_a_replica_that_reconnects_gets_every_output() -> None:
    async def scenario(cluster: Cluster, client: Client) -> None:
        await client.submit(request("r", max_tokens=20), request("gone"))
        await client.until(lambda: len(client.tokens[RequestId("r")]) > 3)
        client.link.send(AbortRequests(request_ids=(RequestId("gone"),)))
        await client.submit()
        old = client.link
        await client.connect(cluster.endpoint)
        await client.submit(request("r", max_tokens=20))
        await client.finish(request("r", max_tokens=20))
        assert RequestId("gone") not in client.ends
        assert old.closed

    run(["a"], scenario)


def test_an_engine_begins_to_serve_with_the_first_epoch_that_it_is_told_of() -> None:
    """A coordinator that dies before the first epoch of an engine that it has made leaves it to its successor."""

    async def scenario() -> None:
        cluster = Cluster("a")
        engine = Engine(ServeConfig(), None)  # type: ignore[arg-type]
        with pytest.raises(NotReadyError):
            await engine.endpoint()
        for _ in range(2):
            cluster.epoch = Epoch(cluster.epoch + 1)
            [worker] = cluster.workers.values()
            worker.prepared[cluster.epoch] = (0, Lockstep(1))
            placement = contiguous(1, 4, (Worker(id=worker.id, node="n", slots=4),))
            spec = EpochSpec(epoch=cluster.epoch, placement=placement, group="g", transport="shm", rendezvous="")
            assert await engine.change_epoch(MODEL, spec, {}, {worker.id: worker.info}) == 0
            assert worker.epoch == cluster.epoch
        assert (await engine.endpoint()).port
        for task in engine._tasks:
            task.remove_done_callback(_die_of)
            task.cancel()
        assert engine._clients is not None
        engine._clients.close()
        await engine.lose(worker.id)
        worker.server.close()
        # what is closed ends at the loop's next turn
        await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_the_status_tells_the_epoch_before_its_first_step() -> None:
    """A coordinator that comes back asks for it to know whether a flip was done, and so does the metric."""

    async def scenario(c: Cluster, client: Client) -> None:
        engine = Engine(ServeConfig(), None)  # type: ignore[arg-type]
        assert (await engine.status()).epoch == 0
        engine._loop, engine._clients, engine._scheduler = c.loop, c.clients, c.scheduler
        assert (await engine.status()).epoch == 1
        await c.begin_epoch("a")
        assert (await engine.status()).epoch == 2

    run(("a", "b"), scenario)
