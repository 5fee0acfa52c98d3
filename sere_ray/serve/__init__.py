"""The Ray Serve application: OpenAI routes in front of vLLM engines that re-route."""

from sere_ray.serve.app import build_app
from sere_ray.serve.config import ServeConfig

__all__ = ["ServeConfig", "build_app"]
