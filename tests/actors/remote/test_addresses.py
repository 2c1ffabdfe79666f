"""Which address is chosen among those of a node."""

from __future__ import annotations

import pytest

from elastic_moe.actors.remote.addresses import choose
from elastic_moe.cluster.errors import ConfigError

FOUND = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.5", "fe80::1"], "ib0": ["fd00::5", "192.168.7.5"], "down0": []}


@pytest.mark.parametrize(
    ("interface", "known", "expected"),
    [
        ("ib0", "10.0.0.5", "192.168.7.5"),
        ("ib0", "fd00::1", "fd00::5"),
        ("eth0", "10.0.0.5", "10.0.0.5"),
        ("192.168.0.0/16", "10.0.0.5", "192.168.7.5"),
        ("192.168.7.5", "10.0.0.5", "192.168.7.5"),
        ("fd00::/8", "10.0.0.5", "fd00::5"),
        ("0.0.0.0/0", "10.0.0.5", "10.0.0.5"),
    ],
)
def test_by_name_or_by_network(interface: str, known: str, expected: str) -> None:
    assert choose(interface, known, FOUND) == expected


@pytest.mark.parametrize("interface", ["eth7", "down0", "172.16.0.0/12", "", "10.0.0.0/99"])
def test_no_such_interface(interface: str) -> None:
    with pytest.raises(ConfigError, match=r"interface: .* node 10\.0\.0\.5, which has lo .*eth0 .*; got") as error:
        choose(interface, "10.0.0.5", FOUND)
    assert repr(interface) in str(error.value)
