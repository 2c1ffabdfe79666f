"""The script that a raylet of our own runs for each of its processes, in place of Ray's two scripts for them.

A raylet waits for the process that it has started until that process registers, and does not see that it has ended: it
waits for as long as the slowest machine needs, and starts nothing else meanwhile. So a second process, the watcher,
stands by until the first one has registered. If that one ends before, the watcher takes its place: it runs the same
script with the same arguments, which name the worker that the raylet expects.

A raylet starts a process in one of two ways, and both begin here, the second by default_worker.py:

    setup_worker.py default_worker.py ...    Ray prepares an environment, and then runs `py_executable` (launcher.py)
    default_worker.py ...                    the worker itself

The raylet finds the first script by its name, and leaves it out where there is nothing to prepare, so each of ours has
the name of Ray's. A watcher stays until somebody says that the process has registered or has a newer watcher, or until
all processes have ended that could say it: so a program that the first one becomes, or a fork that stands for it, is
watched from its beginning. Before the first watcher stands by, nothing is imported that Python has not imported for
itself: what ends earlier, within the 20 ms in which an idle machine starts Python, is noticed by the raylet's time
limit alone.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import MutableMapping
    from typing import Any

SCRIPTS = ("setup_worker.py", "default_worker.py")
TRIES = 3
"""Times that a watcher takes the place of a process: what ends again and again, ends for a reason that stays."""
PAUSE_S = 0.5
"""Seconds before the first of them. Each further one doubles them."""
NAME = "emoe-watcher"
_VARIABLE = "EMOE_WATCHER"
"""Has the descriptor by which a watcher is told that it may end."""
_TOLD = b"."


def main(name: str) -> None:
    """Run Ray's script of this name, with a watcher beside it."""
    tell = stand_by(os.environ)
    if tell is not None and name == SCRIPTS[0]:
        # another program goes on in this process, or has another process go on
        be_watched(os.environ, tell, by_programs=True)
    elif tell is not None:
        _tell_when_connected(tell)
    import runpy

    script = os.path.join(_scripts(), name)
    # where Ray's script would look first for modules
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


def _tell_when_connected(tell: int) -> None:
    from ray._private import worker

    connect = worker.connect

    def connect_and_tell(*args: Any, **kwargs: Any) -> Any:
        connected = connect(*args, **kwargs)
        _say(tell)
        return connected

    worker.connect = connect_and_tell


def _scripts() -> str:
    """The folder of Ray's own scripts. Ray is not imported for that."""
    from importlib.util import find_spec

    spec = find_spec("ray")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return os.path.join(next(iter(spec.submodule_search_locations)), "_private", "workers")


def stand_by(environment: MutableMapping[str, str]) -> int | None:
    """Leave a watcher of this process behind. Returns in the process that is to run the script: at once in this one,
    and in the watcher if it takes the place of this one.

    Returns the descriptor by which the watcher is told that it may end, or None where there is none.
    """
    raylet = environment.get("RAY_RAYLET_PID", "")
    if sys.platform != "linux" or not raylet.isdigit():
        return None
    for attempt in range(TRIES):
        told, tell = os.pipe()
        watched = -1
        try:
            watched = os.pidfd_open(os.getpid())
            watches = _forked()
        except OSError:
            # without memory or processes for a watcher, the worker starts alone, or with the watcher that it has
            for descriptor in {told, tell, watched} - {-1}:
                os.close(descriptor)
            known = environment.pop(_VARIABLE, None)
            return None if known is None else int(known)
        if not watches:
            os.close(told)
            os.close(watched)
            dismiss(environment)
            return tell
        os.close(tell)
        # as the process does: it may end before
        dismiss(environment)
        with open("/proc/self/comm", "w") as file:
            file.write(NAME)
        if not _ends_early(watched, told, int(raylet)):
            os._exit(0)
        sys.stderr.write(f"a process of Ray's has ended before it registered; it is started again ({attempt + 1})\n")
        sys.stderr.flush()
        import time

        time.sleep(PAUSE_S * 2.0**attempt)
    return None


def be_watched(environment: MutableMapping[str, str], descriptor: int, *, by_programs: bool = False) -> None:
    """Have the watcher that this descriptor reaches dismissed by whoever has this environment next. by_programs: which
    this process becomes or starts."""
    os.set_inheritable(descriptor, by_programs)
    environment[_VARIABLE] = str(descriptor)


def dismiss(environment: MutableMapping[str, str]) -> None:
    """End the watcher of a process that has another one now."""
    if (descriptor := environment.pop(_VARIABLE, "")).isdigit():
        _say(int(descriptor))


def _say(descriptor: int) -> None:
    try:
        os.write(descriptor, _TOLD)
        os.close(descriptor)
    except OSError:
        # the watcher has ended
        pass


class WatchedApart:
    """Meanwhile nothing that this process starts, or hands its environment to, knows of its watcher. Gives the
    descriptor that reaches it, or None where there is none."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._environment = environment
        self._descriptor: str | None = None

    def __enter__(self) -> int | None:
        self._descriptor = self._environment.pop(_VARIABLE, None)
        return None if self._descriptor is None else int(self._descriptor)

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            self._environment[_VARIABLE] = self._descriptor


def _forked() -> bool:
    """Fork. Returns whether this is the new process, which is nobody's child: a worker need not reap it."""
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        return False
    try:
        if os.fork():
            os._exit(0)
    except OSError:
        os._exit(1)
    return True


def _ends_early(watched: int, told: int, raylet: int) -> bool:
    """Wait until this watcher is told that it may end, or the raylet has ended, or the process has and all others that
    could tell it. Returns whether it is the last. Closes the descriptors."""
    import select

    try:
        parent = os.pidfd_open(raylet)
    except OSError:
        return False
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    poll.register(parent, select.POLLIN)
    poll.register(told, select.POLLIN)
    running = {watched, told}
    try:
        while running:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if parent in ready or (told in ready and os.read(told, len(_TOLD))):
                return False
            # the pipe is at its end where nobody is left who could write
            for descriptor in running & ready:
                poll.unregister(descriptor)
            running -= ready
        return True
    finally:
        for descriptor in (watched, told, parent):
            os.close(descriptor)


if __name__ == "__main__":
    # given by default_worker.py
    main(globals().get("SCRIPT", SCRIPTS[0]))
