"""Batch-level expert re-routing for mixture-of-experts serving. Imports neither vLLM nor CUDA."""

from sere_ray.artifact import SimilarityArtifact
from sere_ray.config import Policy
from sere_ray.errors import SereError
from sere_ray.rules import reroute

__version__ = "0.1.0"
__all__ = ["Policy", "SereError", "SimilarityArtifact", "__version__", "reroute"]
