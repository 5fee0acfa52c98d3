"""Batch-level expert re-routing for mixture-of-experts serving. Imports neither vLLM nor CUDA."""

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.policy.policy import Policy
from sere_ray.rules import reroute
from sere_ray.util.errors import SereError

__version__ = "0.2.0"
__all__ = ["Policy", "SereError", "SimilarityArtifact", "__version__", "reroute"]
