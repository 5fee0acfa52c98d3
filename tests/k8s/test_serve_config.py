"""serveConfigV2, which the CRD sees only as a string: read, checked and built as Ray would."""

import importlib
import os
import shlex
import subprocess
import tomllib

import pytest
import yaml

from sere_ray.proxy.haproxy import BINARY_VARIABLE, main
from sere_ray.serve import way
from sere_ray.serve.config import ServeConfig
from tests.k8s.conftest import ROOT, only
from tests.serve.deployment import save_keys


@pytest.fixture
def service(deployment):
    return only(deployment, "RayService")["spec"]


@pytest.fixture
def config(service):
    return yaml.safe_load(service["serveConfigV2"])


@pytest.fixture(scope="module")
def ray_instance():
    """Building asks Ray for the environment of the job; no engine is started."""
    import ray

    from sere_ray.util.ray_instance import start_ray

    start_ray(num_cpus=1)
    yield
    ray.shutdown()


def read_by_ray(config):
    """What Ray Serve understands of a file; it drops keys that it does not know."""
    from ray.serve.schema import ServeDeploySchema

    return ServeDeploySchema.model_validate(config).model_dump(exclude_unset=True)


def test_the_file_is_one_of_ray_serve(config):
    assert read_by_ray(config) == config
    assert config["http_options"]["port"] == 8000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"args": "x"}, "args"),
        ({"route_prefix": 5}, "route_prefix"),
        ({"deployments": [{"name": "SereIngress", "num_replicas": "two"}]}, "num_replicas"),
        ({"deploymnts": []}, None),
        ({"deployments": [{"name": "SereIngress", "num_replica": 2}]}, None),
    ],
)
def test_a_mistake_in_the_file_is_caught(rendered, change, words):
    config = yaml.safe_load(
        only(rendered["cpu-demo", "deployment"], "RayService")["spec"]["serveConfigV2"]
    )
    config["applications"][0] |= change
    if words is None:
        assert read_by_ray(config) != config
        return
    with pytest.raises(ValueError, match=words):
        read_by_ray(config)


def environment(container):
    return {each["name"]: each["value"] for each in container.get("env", ())}


def containers(service):
    cluster = service["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"]["containers"][0] for group in groups]


def test_every_node_has_haproxy_with_our_limits(service):
    """What `sere-ray serve` sets on one machine, the manifests set on each."""
    expected = {
        **dict.fromkeys(way.SWITCHES, "1"),
        BINARY_VARIABLE: "/opt/sere/venv/bin/sere-haproxy",
        way.CALLBACK_VARIABLE: way.CALLBACK,
    }
    for container in containers(service):
        assert expected.items() <= environment(container).items()
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["sere-haproxy"] == f"{main.__module__}:{main.__name__}"


def test_the_application_is_built(config, service, tmp_path, ray_instance, monkeypatch):
    from ray.llm._internal.serve.core.ingress import builder
    from ray.serve._private import build_app as of_serve

    from sere_ray.serve.gateway import application as of_gateway

    for module in (builder, of_gateway):  # read from the environment at import
        monkeypatch.setattr(module, "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING", True)
    monkeypatch.setattr(of_serve, "RAY_SERVE_ENABLE_HA_PROXY", True)
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    save_keys(tmp_path / "keys.yaml")
    (application,) = config["applications"]
    args = application["args"]
    args["access"]["keys_file"] = str(tmp_path / "keys.yaml")
    module, _, name = application["import_path"].partition(":")
    built = of_serve.build_app(getattr(importlib.import_module(module), name)(args), name="app")

    by_name = {deployment.name: deployment for deployment in built.deployments}
    assert {d["name"] for d in application.get("deployments", [])} <= set(by_name)
    (ranks,) = (d for name, d in by_name.items() if name.startswith("SereGangServer"))
    gangs, size = args.get("num_replicas", 1), args["data_parallel_size"]
    settings = ranks._deployment_config
    assert settings.num_replicas == gangs * size
    assert settings.gang_scheduling_config.gang_size == size
    (bundle,) = ranks._replica_config.placement_group_bundles
    assert_fits(service, gangs * size, bundle)


def assert_fits(service, ranks, bundle):
    """All ranks find their place, and no GPU is idle; routers of requests need no CPU."""
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits.get("nvidia.com/gpu", 0)) * group["replicas"] == ranks * bundle.get("GPU", 0)
    cpus = int(limits["cpu"])
    on_one = ranks // group["replicas"]
    assert on_one * bundle["CPU"] <= cpus


def test_paths_lead_into_volumes(config, service):
    """Each path is below a mount of every pod that reads it, or in the image."""
    cluster = service["rayClusterConfig"]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    arguments = ServeConfig.parse(config["applications"][0]["args"])
    for container in (head, worker):
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        for path in (arguments.sere.similarity, arguments.artifacts, arguments.access.keys_file):
            assert any(os.path.commonpath([path, mount]) == mount for mount in mounts), path
    if not arguments.model.startswith("/opt/sere/demo/"):
        assert any(
            arguments.model.startswith(mount["mountPath"] + "/") for mount in worker["volumeMounts"]
        )


def test_nobody_is_served_without_keys(config):
    assert config["applications"][0]["args"]["access"]["keys_file"]


def test_the_calibration_writes_what_the_deployment_reads(config, calibration):
    entrypoint = only(calibration, "RayJob")["spec"]["entrypoint"]
    args = config["applications"][0]["args"]
    artifact = args["sere"]["similarity"]
    assert f"sere-ray calibrate {args['model']} " in entrypoint
    assert f"--out {artifact} " in entrypoint
    assert "--ray --ray-address auto" in entrypoint
    name = artifact.rpartition("/")[2]
    assert f"sha256sum {name} > {name}.sha256" in entrypoint


def test_the_entrypoint_is_a_command_of_this_version(calibration):
    """The submitter's shell reads it first, the job's shell what is between the quotes."""
    from typer.main import get_command

    from sere_ray.cli.main import app

    words = shlex.split(only(calibration, "RayJob")["spec"]["entrypoint"])
    assert words[:2] == ["bash", "-c"]
    assert len(words) == 3
    assert subprocess.run(["bash", "-n", "-c", words[2]], check=False).returncode == 0
    program, *arguments = shlex.split(words[2].partition("&&")[0])
    assert program == "sere-ray"
    name, command, rest = get_command(app).resolve_command(None, arguments)
    assert name == "calibrate"
    assert command.make_context(name, rest).params["ray_address"] == "auto"
