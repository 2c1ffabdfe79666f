"""Strangers get a limited number of connections, for a limited time, and whoever has the token is let in among them."""

from __future__ import annotations

import pytest

from elastic_moe.actors.remote.codec import WireError, new_token
from elastic_moe.actors.remote.handshakes import Handshakes

TOKEN = new_token()
SENT = TOKEN.encode()


def test_a_token_may_come_in_pieces_and_what_follows_is_kept() -> None:
    handshakes: Handshakes[str] = Handshakes(TOKEN)
    handshakes.begin("a", 0.0)
    assert handshakes.show("a", SENT[:10]) is None
    assert handshakes.missing("a") == len(SENT) - 10
    assert handshakes.show("a", SENT[10:] + b"more") == b"more"
    assert len(handshakes) == 0


def test_a_wrong_token_ends_it() -> None:
    handshakes: Handshakes[str] = Handshakes(TOKEN)
    handshakes.begin("a", 0.0)
    with pytest.raises(WireError):
        handshakes.show("a", b"x" * len(SENT))
    assert len(handshakes) == 0


def test_the_whole_token_has_one_deadline() -> None:
    handshakes: Handshakes[str] = Handshakes(TOKEN, token_s=5.0)
    handshakes.begin("drips", 0.0)
    handshakes.begin("later", 2.0)
    for second in range(5):
        assert handshakes.overdue(float(second)) == []
        assert handshakes.show("drips", SENT[second : second + 1]) is None
    assert handshakes.wait_s(4.0) == 1.0
    assert handshakes.overdue(5.0) == ["drips"]
    assert handshakes.wait_s(5.0) == 2.0
    assert handshakes.overdue(7.0) == ["later"]
    assert handshakes.wait_s(7.0) is None


def test_the_oldest_connection_is_closed_when_there_are_too_many() -> None:
    handshakes: Handshakes[int] = Handshakes(TOKEN, most=3)
    assert [handshakes.begin(n, 0.0) for n in range(5)] == [None, None, None, 0, 1]
    assert handshakes.show(4, SENT) == b""
    assert handshakes.begin(5, 0.0) is None
    handshakes.end(5)
    assert handshakes.clear() == [2, 3]
