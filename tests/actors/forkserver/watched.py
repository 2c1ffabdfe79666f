"""A process with a watcher, as one that a raylet starts: sys.argv has a file for its beginnings, and what it becomes,
as a shell's command."""

import os
import sys

from elastic_moe.actors.forkserver.setup_worker import be_watched, stand_by

log, command = sys.argv[1:]
descriptor = stand_by(os.environ)
with open(log, "a") as file:
    file.write("began\n")
if descriptor is not None:
    be_watched(os.environ, descriptor, by_programs=True)
os.execvp("bash", ["bash", "-c", command])
