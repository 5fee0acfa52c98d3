"""The keys `loss` and `guard` of a policy: which keys go with them, and which taus they are."""

from collections.abc import Mapping
from typing import Any

from sere_ray.artifact.strength import Stage, Strength
from sere_ray.rules import RULES
from sere_ray.util.errors import ArtifactError, PolicyError


def wrong_with_loss(rule: str, keys: Mapping[str, Any]) -> str | None:
    """A loss was measured for the rule's defaults, so it goes with no other key of the rule.

    Args:
        rule: its name.
        keys: of the policy; None = not given.

    Returns:
        What is wrong, beginning with the key; None = nothing.
    """
    loss = keys["loss"]
    if loss is None:
        if not keys["guard"]:
            return None
        return (
            "guard = True: is held against the demand that was given up where `loss` was "
            "measured; give loss in place of tau, or leave guard out"
        )
    for key in RULES[rule].keys:
        value = keys[key]
        if key not in ("loss", "guard") and value is not None:
            return (
                f"loss = {loss!r}: stands for tau, with the rule's other keys as they "
                f"come, and {key} = {value!r} is set; set one of them to null"
            )
    return None


def without_the_other(kept: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a policy, but for what a change to tau or to loss takes the place of."""
    if changes.get("loss") is not None:
        return {key: kept[key] for key in kept if key != "tau"}
    if changes.get("tau") is not None:
        return {key: kept[key] for key in kept if key not in ("loss", "guard")}
    return kept


def stages_of(
    rule: str, loss: float | None, strengths: Mapping[str, Strength], similarity: str, where: str
) -> list[Stage]:
    """Taus by the rows of a step; none without `loss`.

    Args:
        rule: its name.
        loss: of the policy.
        strengths: of its artifact, by rule.
        similarity: the artifact's path.
        where: name of the policy in error messages.

    Raises:
        ArtifactError: the artifact does not say what `loss` means; names the command that adds it.
        PolicyError: the loss is beyond what was measured.
    """
    if loss is None:
        return []
    if rule not in strengths:
        raise ArtifactError(
            f"{where}.loss = {loss}: {similarity} does not say which tau that is "
            f"under rule {rule!r}; `sere-ray strength MODEL --similarity "
            f"{similarity} --data TEXT --rules {rule}` adds it, or give tau"
        )
    low, high = strengths[rule].range
    if not low <= loss <= high:
        raise PolicyError(
            f"{where}.loss = {loss}: {similarity} says which tau that is from "
            f"{low:.2g} to {high:.2g} under rule {rule!r}; give a loss in this range, "
            "or mode: off for none"
        )
    return strengths[rule].stages(loss)
