"""Batch-level expert re-routing for mixture-of-experts serving. Imports neither vLLM nor CUDA.

What is offered here is imported when it is asked for: torch takes 2 s, and most commands, and the
processes of a load test, do without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sere_ray.artifact.similarity import SimilarityArtifact
    from sere_ray.policy.policy import Policy
    from sere_ray.rules import merge_repeated, reroute
    from sere_ray.util.errors import SereError

__version__ = "0.2.0"
__all__ = [
    "Policy",
    "SereError",
    "SimilarityArtifact",
    "__version__",
    "merge_repeated",
    "reroute",
]
_PLACES = {
    "Policy": "sere_ray.policy.policy",
    "SereError": "sere_ray.util.errors",
    "SimilarityArtifact": "sere_ray.artifact.similarity",
    "merge_repeated": "sere_ray.rules",
    "reroute": "sere_ray.rules",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'sere_ray' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
