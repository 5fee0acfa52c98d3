"""What a comparison compares: policies by short names, by their keys, or from a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sere_ray.policy.policy import RULE_KEYS, Policy
from sere_ray.serve.client import parse_changes, read_policy
from sere_ray.util.errors import SereError

_MODES = ("on", "off", "observe", "auto")


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
        before: the policy that was found. Its keys stay, but not those of another rule.
        change: of :func:`parse_policies`.
        name: of the policy, for the message.

    Raises:
        PolicyError: the keys do not belong together.
    """
    rule = before.get("rule", "sere")
    gone = set() if change.get("rule", rule) == rule else set(RULE_KEYS)
    if not change.keys().isdisjoint(("rule", *RULE_KEYS)):
        gone.add("by_rows")  # it would overrule the keys that are named
    policy = {**before, **dict.fromkeys(gone), **change}
    checked = {**policy, "mode": "off"} if policy.get("mode") == "auto" else policy
    Policy.parse(checked, where=f"--policies: {name}")
    return policy


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
