"""The laboratory itself: hosts are apart, reach one another, and can be cut off, slowed down, killed and revived."""

from __future__ import annotations

import time

import pytest

from tests.hosts.lab import HostDown, Lab

SEND = """
import socket, sys
try:
    peer = socket.create_connection((sys.argv[1], 5000), timeout=0.5)
except OSError:
    print("unreachable")
else:
    peer.settimeout(20)
    peer.sendall(bytes(int(sys.argv[2])))
    peer.shutdown(socket.SHUT_WR)
    peer.recv(1)
    print("reached")
"""
SERVE = """
import socket
listener = socket.create_server(("0.0.0.0", 5000))
print("listening", flush=True)
while True:
    peer, _ = listener.accept()
    while peer.recv(1 << 16): pass
    peer.close()
"""


def reaches(lab: Lab, source: int, target: int, nbytes: int = 1) -> bool:
    said = lab.hosts[source].run("python3", "-c", SEND, lab.hosts[target].address, str(nbytes))
    return said.strip() == "reached"


def test_hosts_are_apart_and_reach_one_another(lab: Lab) -> None:
    first, second, _ = lab.hosts
    assert [host.run("hostname").strip() for host in lab.hosts] == ["eh0", "eh1", "eh2"]
    first.run("touch", "/tmp/mine", "/dev/shm/mine")
    assert "mine" not in second.run("ls", "/tmp", "/dev/shm")
    assert int(first.run("bash", "-c", "echo $$")) < 1000, "its processes have numbers of their own"
    log = second.private / "server"
    server = second.popen("python3", "-c", SERVE, log=log)
    while "listening" not in log.read_text():
        assert server.poll() is None, log.read_text()
        time.sleep(0.01)
    assert reaches(lab, 0, 1)
    lab.limit(1, 8)
    begin = time.monotonic()
    assert reaches(lab, 0, 1, 500_000)
    assert time.monotonic() - begin > 0.3, "4 Mbit at 8 Mbit/s"
    lab.limit(1, None)
    lab.cut(1)
    assert not reaches(lab, 0, 1)
    lab.mend(1)
    assert reaches(lab, 0, 1)
    lab.kill_host(1)
    assert server.wait(5) != 0, "its processes have ended with it"
    with pytest.raises(HostDown, match="eh1 is down"):
        second.run("true")
    lab.revive(1)
    assert second.run("ls", "/tmp").split() == [p.name for p in (second.private / "tmp").iterdir()]


def test_a_host_may_resolve_its_own_name_to_loopback(lab: Lab) -> None:
    host = lab.hosts[2]
    lab.misname(2)
    assert "127.0.1.1" in host.run("getent", "hosts", host.name)
    lab.misname(2, undo=True)
    assert host.address in host.run("getent", "hosts", host.name)
