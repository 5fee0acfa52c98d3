import itertools
import socket

import pytest

from sere_ray.util import ports
from sere_ray.util.errors import SereError


def listening(host=""):
    server = socket.socket()
    server.bind((host, 0))
    server.listen()
    return server


@pytest.fixture
def connections(monkeypatch, tmp_path):
    """Sets the range that the kernel gives to connections, as the module reads it."""
    file = tmp_path / "ip_local_port_range"
    monkeypatch.setattr(ports, "_CONNECTIONS", file)
    return lambda first, last: file.write_text(f"{first}\t{last}\n")


def test_none_that_a_connection_gets():
    with listening("127.0.0.1") as server, socket.create_connection(server.getsockname()) as client:
        given = client.getsockname()[1]
    first, last = map(int, ports._CONNECTIONS.read_text().split())
    assert first <= given <= last
    found = ports.free_ports(200)
    assert len(set(found)) == 200
    assert min(found) >= 20_000
    assert not any(first <= port <= last for port in found)
    for port in found[:20]:
        with socket.socket() as server:
            server.bind(("", port))
            server.listen()


def test_where_connections_get_all_ports(connections):
    connections(1024, 65_535)
    assert len(set(ports.free_ports(50))) == 50


def test_apart():
    found = sorted(ports.free_ports(100, apart=8))
    assert all(after - before >= 8 for before, after in itertools.pairwise(found))
    assert found[-1] + 8 <= 65_536


@pytest.mark.parametrize("host", ["", "127.0.0.1"])
def test_not_one_that_somebody_listens_on(connections, monkeypatch, host):
    with listening(host) as server:
        taken = server.getsockname()[1]
        monkeypatch.setattr(ports, "_LOWEST", taken)
        connections(taken + 1, 65_535)  # no other is preferred to it
        assert ports.free_ports(1) != [taken]
        with pytest.raises(SereError, match=rf"--port = {taken}: already in use"):
            ports.check_free(taken, "--port")
    ports.check_free(taken, "--port")


def test_too_many(monkeypatch):
    monkeypatch.setattr(ports, "_LOWEST", 65_530)
    with pytest.raises(SereError, match="7 ports: not so many are free from 65530 up"):
        ports.free_ports(7)
