from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.peers import Networks, client_address, is_allowed_host, is_loopback, parse_address


@pytest.mark.parametrize(
    ("peer", "forwarded", "trusted", "client"),
    [
        ("127.0.0.1", [], "127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", ["9.9.9.9"], "", "127.0.0.1"),
        ("127.0.0.1", ["9.9.9.9"], "127.0.0.1", "9.9.9.9"),
        # what the client itself wrote comes first, and is not believed
        ("127.0.0.1", ["1.1.1.1, 9.9.9.9"], "127.0.0.1", "9.9.9.9"),
        ("127.0.0.1", ["1.1.1.1", "9.9.9.9"], "127.0.0.1", "9.9.9.9"),
        ("10.0.0.1", ["9.9.9.9, 10.1.2.3"], "10.0.0.0/8", "9.9.9.9"),
        ("10.0.0.1", ["9.9.9.9"], "127.0.0.1", "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.2"], "10.0.0.0/8", "10.0.0.2"),
        ("10.0.0.1", ["9.9.9.9, nonsense"], "10.0.0.0/8", "10.0.0.1"),
        ("::1", ["2001:db8::7"], "::1", "2001:db8::7"),
        ("::ffff:127.0.0.1", ["[2001:db8::7]"], "127.0.0.1", "2001:db8::7"),
        ("8.8.8.8", ["9.9.9.9, 7.7.7.7"], "*", "9.9.9.9"),
        ("a unix socket", ["9.9.9.9"], "*", "a unix socket"),
    ],
)
def test_the_clients_address(peer: str, forwarded: list[str], trusted: str, client: str) -> None:
    assert client_address(peer, forwarded, Networks.parse(trusted)) == client


@pytest.mark.parametrize("text", ["localhost", "10.0.0.0/40", "127.0.0.1;10.0.0.1", "**"])
def test_what_is_no_network(text: str) -> None:
    with pytest.raises(ConfigError, match="forwarded_allow_ips"):
        ServeConfig(forwarded_allow_ips=text)


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        ("127.0.0.1:8000", True),
        ("127.1.2.3", True),
        ("localhost", True),
        ("LocalHost.:8000", True),
        ("app.localhost:8000", True),
        ("[::1]:8000", True),
        ("emoe.example:443", True),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("evillocalhost", False),
        ("[::1].evil.example", False),
        ("[::1", False),
        ("10.0.0.1", False),
        ("", False),
    ],
)
def test_names_that_a_server_on_loopback_answers_to(header: str, allowed: bool) -> None:
    assert is_allowed_host(header, ["emoe.example"]) is allowed
    assert is_allowed_host(header, ["*"])


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("localhost", True), ("127.0.0.1.nip.io", False),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("", False)],
)  # fmt: skip
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@given(st.text(max_size=60), st.lists(st.text(max_size=40), max_size=3))
def test_any_header_is_parsed(host: str, forwarded: list[str]) -> None:
    """Any text is taken; a name that is no address of this machine's stays a stranger's."""
    trusted = Networks.parse("127.0.0.1")
    client = client_address("127.0.0.1", forwarded, trusted)
    assert client == "127.0.0.1" or parse_address(client) is not None
    assert not is_allowed_host(host + ".evil.example", ())
    is_allowed_host(host, ())
