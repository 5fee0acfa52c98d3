"""The policies of a comparison: read from the command line, completed, and put back at the end."""

import json
import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from sere_ray.policy.policy import RULE_KEYS, Policy
from sere_ray.serve.client import parse_changes, read_policy, request, set_policy, settable
from sere_ray.util.errors import SereError

_MODES = ("on", "off", "observe", "auto")
_RESTORE_TRIES = 3
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def parse_policies(text: str) -> dict[str, dict[str, Any]]:
    """Name and changed keys of each policy of ``off,S=2,rule=margin:tau=0.01,tuned.yaml``.

    ``off``, ``observe`` and ``auto`` are modes; ``S=2`` is the rule ``sere``; keys are separated by
    colons; a file holds the keys of a policy, as `sere-ray tune` writes it.

    Raises:
        SereError: another form, a file that holds no policy, or a name twice.
    """
    policies: dict[str, dict[str, Any]] = {}
    for word in (part.strip() for part in text.split(",")):
        is_file = Path(word).suffix in (".yaml", ".yml")
        name = Path(word).stem if is_file else word
        if name in policies:
            raise SereError(f"--policies: {name!r} is there twice")
        policies[name] = read_policy(Path(word)) if is_file else _of_words(word)
    return policies


def whole_policy(before: Mapping[str, Any], change: Mapping[str, Any], name: str) -> dict[str, Any]:
    """All keys of the policy that runs after a change.

    Args:
        before: the policy that was found. Its keys stay, but those of another rule go.
        change: the changed keys, from :func:`parse_policies`.
        name: what the policy is called in the message.

    Raises:
        PolicyError: the keys do not belong together.
    """
    rule = before.get("rule", "sere")
    gone = set() if change.get("rule", rule) == rule else Policy.model_fields.keys() & RULE_KEYS
    if not change.keys().isdisjoint(("rule", *RULE_KEYS)):
        gone.add("by_rows")  # it would overrule the keys that are named
    policy = {**before, **dict.fromkeys(gone), **change}
    checked = {**policy, "mode": "off"} if policy.get("mode") == "auto" else policy
    Policy.parse(checked, where=f"--policies: {name}")
    return policy


@contextmanager
def kept_policy(url: str, console: Console) -> Iterator[dict[str, Any]]:
    """Put the policy back afterwards, also after an error, Ctrl-C, SIGTERM or SIGHUP.

    Yields:
        The policy as it was found; in mode ``auto`` the keys under its levels.

    Raises:
        SereError: the endpoint has no control API, or refuses the admin token.
    """
    try:
        before = _as_asked_for(request(url, "policy"))
    except SereError as error:
        raise SereError(
            f"{error}\nComparing policies needs a sere-ray deployment and its admin token in "
            "SERE_ADMIN_TOKEN; `sere-ray loadtest run` loads any OpenAI endpoint"
        ) from None
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if handlers[number] is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _terminate)
    try:
        yield before
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _restore(url, before, console)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _of_words(text: str) -> dict[str, Any]:
    head, *keys = text.split(":")
    if head in _MODES:
        change: dict[str, Any] = {"mode": head}
    elif head.startswith("S=") and head[2:].isdecimal():
        change = {"mode": "on", "rule": "sere", "select_top_k": int(head[2:])}
    else:
        change, keys = {"mode": "on"}, [head, *keys]
    if all("=" in key and key.partition("=")[0] in Policy.model_fields for key in keys):
        return change | parse_changes(keys)
    raise SereError(
        f"--policies: {text!r}: must be off, observe, auto, S=NUMBER, or keys of a policy such as "
        "rule=margin:tau=0.01, with further keys after colons (S=2:threshold=0.3), or a .yaml "
        "file of `sere-ray tune`"
    )


def _as_asked_for(status: Mapping[str, Any]) -> dict[str, Any]:
    """What to set, so that the deployment does again what it does now."""
    auto = status["auto"]
    keys = status["policy"] if auto is None else auto["base"]
    return {**keys, "mode": status["mode"]}


def _restore(url: str, policy: dict[str, Any], console: Console) -> None:
    for attempt in range(1, _RESTORE_TRIES + 1):
        try:
            return set_policy(url, policy)
        except SereError as error:
            if attempt == _RESTORE_TRIES:
                pairs = (
                    f"{key}={value if isinstance(value, str) else json.dumps(value)}"
                    for key, value in settable(policy).items()
                )
                command = " ".join(map(shlex.quote, pairs))
                console.print(
                    f"the policy could not be put back ({error}); when the deployment is up: "
                    f"sere-ray policy set --url {url} {command}",
                    style="red",
                    markup=False,
                    soft_wrap=True,
                )
            else:
                time.sleep(2.0)


def _terminate(*_: Any) -> NoReturn:
    raise SystemExit(143)
