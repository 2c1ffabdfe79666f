"""The rate of a link, told from messages whose times are given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from elastic_moe.model.exchange import rates
from elastic_moe.model.exchange.tcp import TcpTransport


class Link:
    """A link of so many bytes per second. `held_up_s` comes on top of the time of the first message."""

    def __init__(self, bytes_per_s: float, held_up_s: float) -> None:
        self._bytes_per_s, self._held_up_s = bytes_per_s, held_up_s
        self.now = 0.0
        self.sent_bytes = 0

    def swap(self, peer: int, message: bytes) -> bytes:
        if len(message) < rates._SIZES[0]:
            return message
        self.now += self._held_up_s + len(message) / self._bytes_per_s
        self._held_up_s = 0.0
        self.sent_bytes += len(message)
        return message


@pytest.mark.parametrize("gbps", [0.004, 0.1, 1.0, 40.0])
@pytest.mark.parametrize("held_up_s", [0.0, 0.02])
def test_a_process_that_is_held_up_for_a_moment_makes_no_link_slow(
    gbps: float, held_up_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Link(gbps * 1e9 / 8, held_up_s)
    monkeypatch.setattr(rates, "time", SimpleNamespace(perf_counter=lambda: link.now))
    assert rates._with_one(cast(TcpTransport, link), 1) == pytest.approx(gbps)
    slow = gbps < 0.1
    assert link.sent_bytes <= 3 * (rates._SIZES[0] if slow else sum(rates._SIZES)), "a slow link is not held up"
