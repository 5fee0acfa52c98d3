"""Which policies and loads the demo compares."""

from sere_ray.bench.demo_model import TOP_K
from sere_ray.policy.policy import Policy

THRESHOLD = 0.3


def problems_at(concurrency: int) -> int:
    """How many arithmetic problems are sent: few at low concurrency, where they take long."""
    return min(128, 12 * concurrency)


def policies(similarity: str) -> list[Policy]:
    """Stock, then re-routed: S = 2 and 1, without and with threshold; the floor is the default."""
    rerouted = [
        Policy.parse({"similarity": similarity, "select_top_k": size, "threshold": threshold})
        for size in (2, 1)
        for threshold in (None, THRESHOLD)
    ]
    off = Policy.parse({"similarity": similarity, "select_top_k": TOP_K, "mode": "off"})
    return [off, *rerouted]


def label(rule: str, select_top_k: int | None, threshold: float | None) -> str:
    """Short name of a setting in tables and plots."""
    if rule == "off":
        return "stock"
    return f"S={select_top_k}" + ("" if threshold is None else f", rho={threshold}")
