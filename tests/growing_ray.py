"""A Ray cluster on this machine whose autoscaler adds and removes real raylets, by Ray's fake provider of nodes.

`ray.cluster_utils.AutoscalingCluster` does the same, but ends every Ray process of the machine first, and needs a file
that Ray's wheels do not have.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

from elastic_moe.deploy.launch.local_ray import free_port

START_S = 120.0
MONITOR = "/autoscaler/v2/monitor.py"
NO_COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowingRay:
    address: str
    process: psutil.Process
    """`ray start`."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile no node comes or goes, however long that takes."""
        started = self.process.children(recursive=True)
        (autoscaler,) = (process for process in started if any(word.endswith(MONITOR) for word in words(process)))
        autoscaler.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            autoscaler.send_signal(signal.SIGCONT)


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def growing_ray(
    directory: Path, head: Mapping[str, float], types: Mapping[str, Mapping[str, Any]], *, idle_s: float
) -> Iterator[GrowingRay]:
    """head: Ray's resources of the head. types: the kinds of nodes, by name, as in a file for `ray up`. idle_s: seconds
    after which an idle node is removed. `directory` must have a short path."""
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    kinds = {name: {"node_config": {}, "min_workers": 0, **kind} for name, kind in types.items()}
    config = {
        "cluster_name": "growing",
        "max_workers": 8,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            # by its class: the defaults of "fake_multinode" are a file that Ray's wheels do not have
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            # Its nodes come with Ray. Without this the autoscaler tries to install Ray over ssh, ends the node when
            # that has failed three times, and stands still while a node drains that it has not seen run yet.
            "disable_node_updaters": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
        },
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": dict(head), "node_config": {}, "max_workers": 0},
            **kinds,
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "upscaling_speed": 1.0,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in NO_COMMANDS},
    }
    file = directory / "growing.json"
    file.write_text(json.dumps(config))
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    command += [f"--temp-dir={directory}", f"--autoscaling-config={file}"]
    command += ["--include-dashboard=false", "--disable-usage-stats", f"--num-cpus={head.get('CPU', 0):g}"]
    command += [f"--object-store-memory={80 << 20}"]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in (directory / "log").read_text():
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline, f"Ray did not start: {(directory / 'log').read_text()}"
            time.sleep(0.1)
        yield GrowingRay(address=address, process=psutil.Process(process.pid))
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=20)
        process.wait(20)
