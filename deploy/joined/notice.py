"""`emoe until-notice`: runs `ray start --block` on a spot machine, and ends it in good order when its end is announced.

Ray does not ask a cloud whether it takes the machine away. `ray start --block` drains its node when it gets SIGTERM,
for RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S seconds, and a worker that is drained gives its experts away. So this process
asks the machine's metadata service every few seconds, and passes the notice on as SIGTERM.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from types import FrameType

logger = logging.getLogger(__name__)

POLL_S = 5.0
"""Seconds between two questions; a notice comes 30 s (Google) or 2 min (AWS) before the end."""
ANSWER_S = 2.0
Ask = Callable[[str, str, Mapping[str, str]], str | None]
"""Method, path and headers of a question to the metadata service -> its answer; None: no answer, or none of that."""


class Cloud(StrEnum):
    AWS = "aws"
    GCP = "gcp"


SERVICES = {Cloud.AWS: "http://169.254.169.254", Cloud.GCP: "http://metadata.google.internal"}


def asking(service: str) -> Ask:
    """Asks the metadata service at this URL, directly."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(method: str, path: str, headers: Mapping[str, str]) -> str | None:
        request = urllib.request.Request(service + path, method=method, headers=dict(headers))
        with contextlib.suppress(urllib.error.URLError, OSError), opener.open(request, timeout=ANSWER_S) as answer:
            return str(answer.read().decode())
        return None

    return ask


def has_notice(cloud: Cloud, ask: Ask) -> bool:
    """Whether the cloud has said that it takes this machine away."""
    if cloud is Cloud.GCP:
        answer = ask("GET", "/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        return answer is not None and answer.strip() == "TRUE"
    token = ask("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    # 404 while there is no notice
    return token is not None and (
        ask("GET", "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}) is not None
    )


def run(command: Sequence[str], noticed: Callable[[], bool], *, poll_s: float = POLL_S) -> int:
    """Run `command` until it ends; SIGTERM it when there is notice, or when this process gets SIGTERM. Returns its exit
    code, as a shell counts it. Raises OSError where it cannot be run."""
    process = subprocess.Popen(command)

    def pass_on(number: int, _: FrameType | None) -> None:
        process.send_signal(number)

    before = [signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)]
    ending = False
    try:
        while True:
            try:
                code = process.wait(poll_s)
            except subprocess.TimeoutExpired:
                if not ending and noticed():
                    ending = True
                    logger.warning("the cloud takes this machine away; %s gets SIGTERM", command[0])
                    process.terminate()
                continue
            return code if code >= 0 else 128 - code
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
