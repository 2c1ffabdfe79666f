"""A script for the place of Ray's worker: writes down what its process has, and waits if it is told to."""

import gc
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

path, *rest = sys.argv[1:]
umask = os.umask(0)
os.umask(umask)
found = {
    "argv": sys.argv,
    "original": sys.orig_argv,
    "path": sys.path,
    "name": __name__,
    "file": __file__,
    "main": sys.modules["__main__"].__dict__["path"],
    "flags": str(sys.flags),
    "environment": dict(os.environ),
    "directory": os.getcwd(),
    "umask": umask,
    "session": os.getsid(0),
    "niceness": os.getpriority(os.PRIO_PROCESS, 0),
    "signals": {str(n): str(signal.getsignal(n)) for n in signal.valid_signals() if signal.getsignal(n) is not None},
    "blocked": [int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "wakes": signal.set_wakeup_fd(-1),
    "limits": [resource.getrlimit(number) for number in range(10)],
    "descriptors": sorted(os.listdir("/proc/self/fd")),
    "threads": [len(os.listdir("/proc/self/task")), threading.current_thread() is threading.main_thread()],
    "process": Path("/proc/self/comm").read_text(),
    "collector": gc.isenabled(),
}
if "ids" in rest:
    import ray

    found |= {"ray id": ray.NodeID.from_random().hex(), "imported": sorted(sys.modules)}
own = {
    "pid": os.getpid(),
    "parent": os.getppid(),
    "group": os.getpgid(0),
    "random": [random.random(), float(np.random.random())],
}
sys.stdout.write("to standard output\n")
sys.stderr.write("to standard error\n")
Path(f"{path}.part").write_text(json.dumps([found, own]))
os.rename(f"{path}.part", path)
if "wait" in rest:
    time.sleep(60)
if "fail" in rest:
    sys.exit(7)
