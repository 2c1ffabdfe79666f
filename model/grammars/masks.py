"""Computes the masks of a step in threads, while the model runs, so that sampling finds them ready.

A mask that is late holds up nobody: its sequence is not sampled in this step, and is asked for again in the next. So a
grammar that is slow, or is still being compiled, costs its own request time and no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from elastic_moe.model.grammars.compiling import Compiled
from elastic_moe.model.grammars.progress import MaskJob, Progress

WAIT_S = 0.002
"""Seconds that sampling waits for masks that are late."""
SLOW_THREADS = 2


class MaskThreads:
    """Use it from one thread. It starts threads when it first has work."""

    def __init__(self) -> None:
        self._quick: ThreadPoolExecutor | None = None
        self._slow: ThreadPoolExecutor | None = None

    def begin(self, sequences: Iterable[Progress]) -> None:
        """Begin the masks of the next tokens of these sequences."""
        begun = [(progress, job) for progress in sequences if (job := progress.begin_mask()) is not None]
        if not begun:
            return
        if self._quick is None:
            self._quick = ThreadPoolExecutor(1, thread_name_prefix="masks")
        # one call for all: to hand a job to a thread takes longer than most jobs
        if quick := [job for progress, job in begun if not progress.slow]:
            self._quick.submit(_run_all, quick)
        for progress, job in begun:
            if progress.slow:
                self._begin_slow(progress.compiled, job)

    def _begin_slow(self, compiled: Future[Compiled], job: MaskJob) -> None:
        if self._slow is None:
            self._slow = ThreadPoolExecutor(SLOW_THREADS, thread_name_prefix="slow masks")
        threads = self._slow

        def run(_: Future[Compiled]) -> None:
            threads.submit(job.run)

        compiled.add_done_callback(run)

    def finish(self, sequences: Sequence[Progress]) -> None:
        """Wait for these masks, but not for long. Afterwards `Progress.ready` says which are there."""
        late = [job.future for progress in sequences if (job := progress.job) is not None and not job.future.done()]
        if late:
            wait(late, timeout=WAIT_S)


def _run_all(jobs: Sequence[MaskJob]) -> None:
    for job in jobs:
        job.run()
