"""Processes that compute nothing do without torch and vLLM: they take seconds to import.

Two of them stand in the way of every start: Serve makes no replica before its controller has
unpickled the policy actor's class and the actor is ready.
"""

import json
import subprocess
import sys

import pytest

from tests.serve.test_actor import save_artifact
from tests.serve.test_actor_masks import save_masks

HEAVY = ("torch", "vllm", "transformers")
SAY = f"import json; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
SENT = """
import pathlib, sys
from ray.serve.config import DeploymentActorConfig, RequestRouterConfig
from sere_ray.serve.policy_actor.actor import RouterActor
folder = pathlib.Path(sys.argv[1])
actor = DeploymentActorConfig(name="a", actor_class=RouterActor, init_kwargs=dict())
(folder / "actor").write_bytes(actor._serialized_actor_class)
names = "sere_ray.serve.by_experts.router:DirectExpertsRouter"
router = RequestRouterConfig(request_router_class=names)
(folder / "router").write_bytes(router.get_serialized_request_router_cls())
"""
"""What the process that deploys sends to Serve's others, as Ray pickles it."""
CONTROLLER = """
import pathlib, sys
import ray.serve._private.controller
from ray import cloudpickle
folder = pathlib.Path(sys.argv[1])
for name in ("actor", "router"):
    cloudpickle.loads((folder / name).read_bytes())
"""
ACTOR = """
import asyncio, pathlib, sys
from ray import cloudpickle
from sere_ray.serve.policy_actor.store import memory_store
folder = pathlib.Path(sys.argv[1])
actor = cloudpickle.loads((folder / "actor").read_bytes()).__ray_actor_class__.__mro__[1]
keys = {"similarity": "a", "masks": "m", "level": 1, "rule": "margin", "tau": 0.01}
policy = keys | {key: f"{folder}/{keys[key]}.safetensors" for key in ("similarity", "masks")}
found = actor(
    policy,
    folder=str(folder),
    max_artifact_bytes=1 << 20,
    store=memory_store("router", dict()),
    put=lambda content: content,
)
asyncio.run(found.join("gang"))
assert asyncio.run(found.set_policy(dict(tau=0.02), "test", 0))["version"] == 1
assert asyncio.run(found.set_artifact("b.safetensors", "test", 0))["version"] == 2
"""
"""Its whole life: files are read and checked, the policy is changed, an artifact is swapped."""
PROXY = "import sys, sere_ray.proxy.slow_clients, sere_ray.proxy.haproxy"
INGRESS = "import sys, sere_ray.serve.gateway.ingress"


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sent")
    save_artifact(folder / "a.safetensors")
    save_artifact(folder / "b.safetensors", seed=1)
    save_masks(folder / "m.safetensors")
    run(SENT, folder)
    return folder


def run(code, folder):
    command = [sys.executable, "-c", f"{code}\n{SAY}", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "process",
    [CONTROLLER, ACTOR, PROXY, INGRESS],
    ids=["controller", "policy actor", "proxy", "ingress of Ray's proxy"],
)
def test_what_computes_nothing_imports_nothing_heavy(process, sent):
    assert run(process, sent) == []
