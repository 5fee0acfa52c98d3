"""The keys `similarity` and `masks`, which name files, and `level`: what goes together."""

from collections.abc import Mapping
from typing import Any

from sere_ray.rules import RULES
from sere_ray.rules.registry import RULES_AFTER_MASKS

FILE_KEYS = ("similarity", "masks")
"""Keys that name files: a running deployment changes neither with its policy."""


def does_without_similarity(rule: str, keys: Mapping[str, Any]) -> bool:
    """Whether a policy may leave out the artifact.

    Its rule must read nothing of it, and, where it changes routing, masks must say which gates the
    policy is for.

    Args:
        rule: its name.
        keys: of the policy; None = not given.
    """
    takes = RULES[rule]
    reads = takes.needs_similarity or takes.statistics or keys.get("loss") is not None
    return not reads and (rule == "none" or keys.get("masks") is not None)


def wrong_with_masks(rule: str, keys: Mapping[str, Any]) -> str | None:
    """What is wrong about masks and level, beginning with the key; None = nothing.

    Args:
        rule: its name.
        keys: of the policy; None = not given.
    """
    masks, level, loss = keys["masks"], keys["level"], keys["loss"]
    if masks is None:
        if level is not None:
            return f"level = {level}: is one of masks; give masks, too, or leave it out"
        return None
    if level is None:
        return (
            f"level is missing: masks = {masks!r} may have several; give one, 1 or above, or 0 "
            "to mask nothing"
        )
    if rule not in RULES_AFTER_MASKS:
        return (
            f"masks = {masks!r}: go with the rules {', '.join(RULES_AFTER_MASKS)}, not with "
            f"{rule!r}; leave it out"
        )
    if level and loss is not None:
        return f"loss = {loss}: was measured without masks; give tau, level = 0, or no masks"
    return None
