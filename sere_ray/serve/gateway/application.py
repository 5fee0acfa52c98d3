"""The Serve application of a deployment, in the process that deploys it.

A file of its own: it imports Ray's library for language models, and with it all of vLLM, which the
process of an ingress does not need.
"""

import os
from typing import Any

from ray import serve
from ray.llm._internal.serve.constants import RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING
from ray.serve.llm import build_llm_deployment, build_openai_app

from sere_ray.proxy.limits import SECRET
from sere_ray.serve.by_experts.router import ray_options
from sere_ray.serve.config import ServeConfig
from sere_ray.serve.gateway.ingress import ACCESS, SereIngress
from sere_ray.serve.gateway.keys import KeyRing, digest, from_environment
from sere_ray.util.errors import SereError

NO_LIMIT = 1_000_000
"""Requests that Serve lets into one process: the access layer has limits of its own, and says so to
a client, where Serve would let it wait."""


def ingress_app(config: ServeConfig, llm: Any) -> Any:
    """The Serve application of a deployment: its ingress, bound to the engines.

    Where Ray streams directly, there is no ingress of ours: the engine's own server answers, and
    the replica protects it.

    Args:
        config: of the deployment.
        llm: Ray's ``LLMConfig`` of the engines.

    Raises:
        SereError: the key file is not valid, a proxy would hide who asks while nobody has a key, or
            a request router would see nothing of what is asked.
    """
    keys = from_environment()
    ring = KeyRing(config.access.keys_file, keys)
    behind_haproxy = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    loopback = os.environ.get(SECRET) if behind_haproxy else None
    if ring.is_open and behind_haproxy and loopback is None:
        raise SereError(
            "access.keys_file is missing: behind HAProxy (RAY_SERVE_ENABLE_HA_PROXY=1) every "
            "client looks local; give keys (`sere-ray key NAME`), or let `sere-ray serve` start it"
        )
    protection: dict[str, Any] = {
        "access": config.access,
        "keys": keys,
        "limits": config.limits,
        "control": config.sere is not None,
        "loopback": None if loopback is None else digest(loopback),
    }
    if config.request_router == "experts":
        llm.deployment_config |= ray_options(is_direct=RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING)
    if RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING:
        llm.experimental_configs[ACCESS] = protection
        return build_openai_app({"llm_configs": [llm]})
    options: dict[str, Any] = {"name": SereIngress.__name__, "max_ongoing_requests": NO_LIMIT}
    if config.device == "cpu":  # of a laptop's two cores, too, something is left for the ranks
        options["ray_actor_options"] = {"num_cpus": 0.5}
    ingress = serve.deployment(serve.ingress()(SereIngress), **options)
    return ingress.bind(build_llm_deployment(llm), protection)
