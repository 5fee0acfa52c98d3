"""Batch-level expert re-routing for mixture-of-experts serving. Imports neither vLLM nor CUDA.

What is offered here is imported when it is asked for: torch takes 2 s, and most commands, and the
processes of a load test, do without it.
"""

from typing import TYPE_CHECKING

from sere_ray.util.late import late

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
__getattr__ = late(
    __name__,
    {
        "Policy": "sere_ray.policy.policy",
        "SereError": "sere_ray.util.errors",
        "SimilarityArtifact": "sere_ray.artifact.similarity",
        "merge_repeated": "sere_ray.rules",
        "reroute": "sere_ray.rules",
    },
)
