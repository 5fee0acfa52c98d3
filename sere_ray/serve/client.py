"""Client of the control API, for the command line and the demo."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request

import yaml

from sere_ray.observe.stats import STEP_KINDS, between, means
from sere_ray.policy.named_files import FILE_KEYS
from sere_ray.policy.policy import Policy
from sere_ray.serve.gateway.keys import ADMIN_TOKEN
from sere_ray.util.errors import SereError
from sere_ray.util.http import open_url, root
from sere_ray.util.token_times import quantile_ms

TIMEOUT_SECONDS = 30.0


def request(url: str, what: str, change: dict[str, Any] | None = None) -> dict[str, Any]:
    """GET ``/sere/{what}``, or PUT a change to it. The admin token is in ``SERE_ADMIN_TOKEN``.

    Args:
        url: of the deployment, with or without ``/v1``.
        what: path below ``/sere/``, such as ``policy``.
        change: JSON to PUT; None = GET.

    Returns:
        The JSON of the answer.

    Raises:
        SereError: the server is not there, or refuses (then with its own words).
    """
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get(ADMIN_TOKEN, "").strip():
        if not (token.isascii() and token.isprintable()):
            raise SereError(f"{ADMIN_TOKEN}: holds characters that no token has; set it anew")
        headers["Authorization"] = f"Bearer {token}"
    address = f"{root(url)}/sere/{what}"
    body = None if change is None else json.dumps(change).encode()
    method = "GET" if change is None else "PUT"
    try:
        with open_url(Request(address, body, headers, method=method), TIMEOUT_SECONDS) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except HTTPError as error:
        raise SereError(f"{address}: {error.code}: {_message(error)}") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error) or type(error).__name__
        raise SereError(f"{address}: {reason}; is the deployment up, and --url right?") from None


def settable(policy: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that ``PUT /sere/policy`` takes: all but those of files."""
    return {key: value for key, value in policy.items() if key not in FILE_KEYS}


def is_followed(status: Mapping[str, Any]) -> bool:
    """Whether there are replicas and all of them run the newest version."""
    replicas: int = status["replicas"]
    settled: int = status["replicas_settled"]
    return 0 < replicas <= settled


def set_policy(url: str, policy: Mapping[str, Any]) -> None:
    """Set all keys of a policy on all replicas; its artifact is the one that runs.

    Raises:
        SereError: refused, or not all replicas follow within the server's time limit.
    """
    status = request(url, "policy", settable(policy))
    if not is_followed(status):
        raise SereError(
            f"{url}: {status['replicas_settled']} of {status['replicas']} replicas follow the "
            "policy; see `sere-ray policy get`"
        )


def parse_changes(pairs: Sequence[str]) -> dict[str, Any]:
    """``["mode=on", "threshold=null"]`` as a mapping; values are YAML, but on and off are words.

    Raises:
        SereError: one is not ``KEY=VALUE``.
    """
    changes: dict[str, Any] = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found:
            raise SereError(f"{pair!r}: must be KEY=VALUE, such as select_top_k=1")
        try:
            changes[name] = value if value in ("on", "off") else yaml.safe_load(value)
        except yaml.YAMLError:
            raise SereError(f"{pair!r}: the value must be YAML, such as 0.3 or null") from None
    return changes


def read_policy(file: Path) -> dict[str, Any]:
    """Every key of a policy file but those of files: what it does not name is at its default.

    Raises:
        SereError: not readable, or no policy.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SereError(f"{file}: not a readable YAML file ({type(error).__name__})") from None
    return Policy.parse(content, where=str(file)).model_dump(exclude=set(FILE_KEYS))


class Deployment:
    """A running deployment, as one engine.

    Args:
        url: of its HTTP side.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._last: dict[str, Any] | None = None

    def set_policy(self, policy: Policy) -> None:
        """Set all keys of a policy on all replicas; the artifact stays the one that runs.

        Raises:
            SereError: refused, or not all replicas follow within the server's time limit.
        """
        set_policy(self._url, policy.model_dump())

    def read_counters(self) -> dict[str, Any]:
        """What all engines counted since the last call: fields of
        :class:`~sere_ray.observe.stats.Totals`."""
        now = request(self._url, "stats")
        counted = now["total"] if self._last is None else between(self._last, now)
        self._last = now
        return counted


def print_stats(url: str, interval: float | None) -> None:
    """Print totals since the engines' start, or of each interval until Ctrl-C."""
    last = request(url, "stats")
    if interval is None:
        print(_text(last["total"], last))
        return
    try:
        while True:
            time.sleep(interval)
            now = request(url, "stats")
            print(_text(between(last, now), now), flush=True)
            last = now
    except KeyboardInterrupt:
        return


def _text(total: dict[str, Any], stats: dict[str, Any]) -> str:
    """A line on the policy, and one for each kind of step."""
    policy = stats["policy"]
    lines = [
        f"version {stats['version']} ({policy['mode']}, {_rule(policy)})  "
        f"{stats['replicas_settled']}/{stats['replicas']} ranks{_tokens(total)}"
    ]
    return "\n".join(lines + [_line(kind, total[kind]) for kind in STEP_KINDS])


def _tokens(total: dict[str, Any]) -> str:
    p90 = quantile_ms(total["token_times"], 0.9)
    return "" if p90 is None else f"  {p90:.1f} ms/token (p90)"


def _rule(policy: dict[str, Any]) -> str:
    size = "" if policy["select_top_k"] is None else f"S={policy['select_top_k']}"
    return size if policy["rule"] == "sere" else f"{policy['rule']} {size}".rstrip()


def _line(kind: str, sums: dict[str, Any]) -> str:
    """Means of the steps of one kind; experts are per layer, ``-`` is what was not counted."""
    mean = means(sums)
    of = {name: "-" if value is None else f"{value:.4g}" for name, value in mean.items()}
    share = "-" if mean["rerouted_share"] is None else f"{mean['rerouted_share']:.1%}"
    return (
        f"  {kind.replace('_', ' '):<11} {sums['steps']} steps  {of['rows']} rows  "
        f"{of['step_ms']} ms  experts {of['experts_before']} -> {of['experts_after']}  "
        f"busiest rank {of['experts_max_rank_before']} -> {of['experts_max_rank_after']}  "
        f"critical {of['critical_kept']}  re-routed {share}  "
        f"bytes sent {of['bytes_dispatched_before']} -> {of['bytes_dispatched_after']}"
    )


def _message(error: HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
