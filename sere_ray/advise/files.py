"""What is written for use: a policy, and a deployment file that serves it."""

from pathlib import Path
from typing import Any

import yaml

from sere_ray.evaluation.tune import write_policy
from sere_ray.policy.policy import Policy
from sere_ray.util.files import atomic_path


def write_for_use(folder: Path, model: str, settings: dict[str, Any], *, on_gpu: bool) -> None:
    """Write ``policy.yaml`` and ``serve.yaml``.

    Args:
        folder: where to.
        model: checkpoint folder or hub name.
        settings: the rule and its keys.
        on_gpu: whether to serve on a GPU.
    """
    policy = {"similarity": str(folder / "similarity.safetensors"), **settings}
    Policy.parse(policy)  # what is written can be served
    write_policy(policy, folder / "policy.yaml")
    served = {
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [
            {
                "name": "sere",
                "import_path": "sere_ray.serve:build_app",
                "args": {
                    "model": model,
                    "model_id": Path(model).name,
                    "device": "gpu" if on_gpu else "cpu",
                    "sere": str(folder / "policy.yaml"),
                },
            }
        ],
    }
    with atomic_path(folder / "serve.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(served, sort_keys=False), encoding="utf-8")
