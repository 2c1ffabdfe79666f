"""Whether Ray's GCS, the store of the whole cluster, still answers.

Serving does not need it: engine, workers and API speak over connections of their own. But Ray ends every process that
has not reached the GCS for a while, in the middle of whatever it does. So requests have to end in order before that.
"""

from __future__ import annotations

import asyncio

from elastic_moe.actors.remote.calls import within

LOOK_S = 1.0
"""Seconds between two looks."""
ANSWER_S = 2.0
RECONNECT_S = 60.0
"""Seconds without the GCS after which Ray ends a process, unless RAY_gcs_rpc_server_reconnect_timeout_s says otherwise.
"""
MARGIN_S = 15.0
"""Seconds before that in which requests end with an error."""
LEAST_S = 5.0


def limit_s(reconnect: str | None) -> float:
    """Seconds of silence after which requests are ended. reconnect: Ray's setting, in seconds; None: its default."""
    try:
        most = RECONNECT_S if reconnect is None else float(reconnect)
    except ValueError:
        most = RECONNECT_S
    return max(LEAST_S, most - MARGIN_S)


class GcsWatch:
    """Looks at the GCS by connecting to its port."""

    def __init__(self, address: str, limit_s: float) -> None:
        """address: host:port. limit_s: seconds of silence after which the GCS counts as lost."""
        self._address = address
        self._limit_s = limit_s
        self._answered_at: float | None = None
        self.lost: str | None = None
        """Why requests must end, while the GCS is lost."""

    async def look(self, now: float) -> None:
        """Look once, at the time `now`, and set `lost`."""
        try:
            await within(_connect(self._address), ANSWER_S)
        except (OSError, TimeoutError):
            since = now if self._answered_at is None else self._answered_at
            self._answered_at = since
            if now - since >= self._limit_s:
                self.lost = (
                    f"Ray's GCS at {self._address} has not answered for {now - since:.0f} s, and Ray ends processes"
                    " that cannot reach it: start the cluster again (a GCS with storage, RAY_gcs_storage=rocksdb or"
                    " Redis, can be restarted without this)"
                )
        else:
            self._answered_at, self.lost = now, None


async def _connect(address: str) -> None:
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    writer.close()
    await writer.wait_closed()
