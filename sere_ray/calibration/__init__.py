"""Calibration: how well each expert of a model stands in for each other one, from text.

:func:`calibrate` runs an unmodified Hugging Face model over some text, shows every expert every
token, and writes the similarity matrices as an artifact (``sere_ray/artifact/similarity.py``).
"""

from sere_ray.calibration.run import calibrate
from sere_ray.calibration.similarity import METRICS, Metric
from sere_ray.calibration.synthetic import synthetic_artifact

__all__ = ["METRICS", "Metric", "calibrate", "synthetic_artifact"]
