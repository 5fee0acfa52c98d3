"""The demo model behind Ray Serve's OpenAI routes, on this machine's loopback."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from sere_ray import assets
from sere_ray.policy.policy import Policy
from sere_ray.serve.client import Deployment
from sere_ray.util.progress import waiting
from sere_ray.util.ray_instance import start_ray

HOST = "127.0.0.1"
MODEL_ID = "sere-demo"
APP = "sere-demo"
RANKS = 2
"""Data-parallel ranks; each holds half of the experts."""


@contextmanager
def served(
    policy: Policy,
    port: int,
    *,
    max_streams: int,
    compiled: bool,
    console: Console,
    metrics_port: int | None = None,
) -> Iterator[Deployment]:
    """Start Ray, Serve and one gang of vLLM engines; yields its control; stops all at the end."""
    import ray
    from ray import serve

    # vLLM and Ray Serve LLM log to this process's terminal as they are imported here.
    logging.disable(logging.INFO)
    from sere_ray.serve import build_app

    environment = {"env_vars": {"HF_HUB_OFFLINE": "1"}}
    start_ray(metrics_port=metrics_port, runtime_env=environment)
    try:
        serve.start(http_options={"host": HOST, "port": port})
        arguments = {
            "model": str(assets.MODEL),
            "model_id": MODEL_ID,
            "data_parallel_size": RANKS,
            "sere": policy,
            "engine": {
                "max_model_len": 512,
                "max_num_seqs": max_streams,
                "enforce_eager": not compiled,
                "enable_prompt_tokens_details": True,  # the load test reports cache hits
            },
        }
        with waiting(console, "starting the engines"):
            serve.run(build_app(arguments), name=APP, blocking=False)
        yield Deployment(f"http://{HOST}:{port}")
    finally:
        logging.disable(logging.NOTSET)
        ray.shutdown()  # the instance is ours alone: Serve ends with it
