"""Ports of this machine for servers that are about to start."""

import random
import socket
from pathlib import Path

from sere_ray.util.errors import SereError

_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 20_000
"""Ray gives its workers ports up to 19,999."""


def free_port() -> int:
    """A port that nobody listens on; see :func:`free_ports`."""
    return free_ports(1)[0]


def free_ports(count: int, *, apart: int = 1) -> list[int]:
    """Different ports that nobody listens on, from 20,000 up.

    Ports outside of the range that the kernel gives to outgoing connections come first. Binding to
    port 0 would give one within it: a connection may have it by the time that a program, which
    takes seconds to start, listens.

    Args:
        count: how many.
        apart: the least distance between two, for programs that count up from theirs.

    Raises:
        SereError: there are not as many.
    """
    first, last = map(int, _CONNECTIONS.read_text(encoding="ascii").split())
    ports = list(range(_LOWEST, 65_536 - apart))
    random.SystemRandom().shuffle(ports)
    ports.sort(key=lambda port: first <= port <= last)
    found: list[int] = []
    for port in ports:
        if all(abs(port - other) >= apart for other in found) and _is_free(port, ""):
            found.append(port)
        if len(found) == count:
            return found
    raise SereError(f"{count} ports: not so many are free from {_LOWEST} up")


def check_free(port: int, option: str, *, host: str = "127.0.0.1") -> None:
    """Refuse a port on which somebody listens already.

    Raises:
        SereError: the port is taken; names the option.
    """
    if not _is_free(port, host):
        raise SereError(f"{option} = {port}: already in use; choose another")


def _is_free(port: int, host: str) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
