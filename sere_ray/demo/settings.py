"""Which policies and loads the demo compares."""

from sere_ray.config import BoundPolicy, Policy

TOP_K = 4
"""K of the demo model."""
THRESHOLD = 0.3
CONCURRENCIES = (1, 4, 16)
PROBLEMS = {1: 12, 4: 48, 16: 128}
"""Arithmetic problems sent at each concurrency; few at 1, where a step serves one row."""


def policies(similarity: str) -> list[Policy]:
    """Stock, then re-routed: S = 2 and 1, without and with threshold; the floor is the default."""
    rerouted = [
        Policy.parse({"similarity": similarity, "select_top_k": size, "threshold": threshold})
        for size in (2, 1)
        for threshold in (None, THRESHOLD)
    ]
    off = Policy.parse({"similarity": similarity, "select_top_k": TOP_K, "mode": "off"})
    return [off, *rerouted]


def bound(policy: Policy) -> BoundPolicy:
    """The policy's numbers for the demo model."""
    return policy.for_model(top_k=TOP_K)


def label(rule: str, select_top_k: int | None, threshold: float | None) -> str:
    """Short name of a setting in tables and plots."""
    if rule == "off":
        return "stock"
    return f"S={select_top_k}" + ("" if threshold is None else f", rho={threshold}")
