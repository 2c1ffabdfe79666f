"""Describes a model in a process that ends.

A description needs PyTorch and transformers, which take four seconds and 270 MB. The processes that ask for one (the
server's main process, coordinators) never need them again.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

from elastic_moe.actors.stillness import TRIES, ended_if_still
from elastic_moe.cluster.errors import CheckpointError, EmoeError
from elastic_moe.cluster.interpreter import command_of, no_collection
from elastic_moe.cluster.messages.epochs import ModelInfo


def describe(model_dir: str) -> ModelInfo:
    """What `open_checkpoint(model_dir).info` is. Blocks for some seconds.

    Raises CheckpointError as `open_checkpoint` does, and EmoeError where the process fails.
    """
    code, answer = 0, b""
    for _ in range(TRIES):
        code, answer, stood_still = _run(model_dir)
        if not stood_still:
            break
    if code:
        raise EmoeError(f"{model_dir}: the process that reads its description ended with code {code}")
    said: ModelInfo | CheckpointError = pickle.loads(answer)
    if isinstance(said, CheckpointError):
        raise said
    return said


def _run(model_dir: str) -> tuple[int, bytes, bool]:
    """The exit code of the process, its answer, and whether it was ended because it was stopped."""
    process = subprocess.Popen(
        command_of(main, model_dir),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        # Ctrl-C is meant for this process, which then ends the other one
        start_new_session=True,
    )
    # a disk may be slow: it may wait
    with process, ended_if_still(process, may_wait=True) as ended:
        try:
            answer, _ = process.communicate()
        except BaseException:
            process.kill()
            raise
    return process.returncode, answer, ended.why is not None


def main() -> None:
    """The process itself: writes the pickled description, or the error, to its standard output."""
    # what a library prints goes to the log
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with no_collection():
        from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
    said: ModelInfo | CheckpointError
    try:
        said = open_checkpoint(sys.argv[1]).info
    except CheckpointError as error:
        said = error
    with os.fdopen(answer, "wb") as out:
        pickle.dump(said, out)
