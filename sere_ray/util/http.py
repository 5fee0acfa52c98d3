"""HTTP of the command line: addresses as people write them, past proxies that read tokens."""

import os
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from sere_ray.util.errors import SereError


def root(url: str, option: str = "--url") -> str:
    """An endpoint's address without ``/v1`` and slashes at its end.

    Raises:
        SereError: it is no address of HTTP; an IPv6 host needs brackets.
    """
    address = url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(address)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises where it is no number
    except ValueError:
        is_one = False
    if not is_one:
        raise SereError(
            f"{option} = {url!r}: must be an address such as http://127.0.0.1:8000 or "
            "http://[::1]:8000"
        )
    return address


def address(host: str, port: int) -> str:
    """``host:port``; an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(url: str) -> bool:
    """Whether the host of an address is this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def is_direct(url: str, *, has_secret: bool) -> bool:
    """Whether no proxy of the environment may be asked.

    That is so on this machine, which a proxy elsewhere is not, and wherever the proxy would read a
    token or key: through HTTPS it passes on what it cannot read.
    """
    return is_loopback(url) or (has_secret and urlsplit(url).scheme == "http")


def open_url(request: Request | str, timeout: float) -> Any:
    """``urlopen`` that leaves proxies out by :func:`is_direct`; raises what that one raises."""
    if isinstance(request, str):
        request = Request(request)
    if is_direct(request.full_url, has_secret=request.has_header("Authorization")):
        return build_opener(ProxyHandler({})).open(request, timeout=timeout)
    return build_opener().open(request, timeout=timeout)  # `urlopen` keeps the first call's proxies


def environment_for(url: str) -> dict[str, str]:
    """This process's environment for a program that asks an address with a key."""
    if not is_direct(url, has_secret=True):
        return dict(os.environ)
    hosts = urlsplit(url).hostname or ""
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    without = f"{others},{hosts}" if others else hosts
    return {**os.environ, "no_proxy": without, "NO_PROXY": without}
