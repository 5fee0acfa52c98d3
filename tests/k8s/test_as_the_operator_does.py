"""The CPU overlay as KubeRay would run it, without Kubernetes.

Its `ray start` commands for head and worker, token authentication, its probes, and serveConfigV2
put to the dashboard's API. On one machine: ports and paths differ from the pods'. Nothing of
containers, volumes, services or network policies is tested by it.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest
import yaml

from sere_ray import assets
from sere_ray.proxy.haproxy import BINARY_VARIABLE
from sere_ray.serve import way
from sere_ray.util.ports import free_port, free_ports
from tests.k8s.conftest import ROOT, only
from tests.k8s.test_serve_config import environment
from tests.serve.deployment import ADMIN, API_KEY, save_artifacts, save_keys, wait_for

pytestmark = pytest.mark.engine
OVERLAY = "cpu-demo"
RAY = str(Path(sys.executable).parent / "ray")


class Cluster:
    """A head and a worker, each a process group of its own."""

    def __init__(self, service, folder):
        self.folder = folder
        self.token = secrets.token_hex(16)
        names = ("gcs", "dashboard", "head", "serve", "head_agent", "worker_agent")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self._groups = service["rayClusterConfig"]
        self._processes = []

    def start(self):
        head, worker = self._groups["headGroupSpec"], self._groups["workerGroupSpecs"][0]
        self._ray_start(
            "head",
            head["rayStartParams"],
            "--head",
            f"--port={self.ports['gcs']}",
            f"--dashboard-port={self.ports['dashboard']}",
            f"--temp-dir={self.folder}",
            "--include-dashboard=true",
        )
        wait_for(lambda: self.healthy("head"), 90, "the head's probe")
        limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
        self._ray_start(
            "worker",
            {"num-cpus": limits["cpu"], **worker["rayStartParams"]},
            f"--address=127.0.0.1:{self.ports['gcs']}",
        )
        wait_for(lambda: self.healthy("worker"), 90, "the worker's probe")

    def stop(self):
        for process in reversed(self._processes):
            os.killpg(process.pid, signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        for process in psutil.process_iter(["cmdline"]):  # HAProxy outlives who started it
            if any(str(self.folder) in part for part in process.info["cmdline"] or ()):
                with suppress(psutil.Error):
                    process.kill()

    def healthy(self, node):
        """The operator's exec probe, with this machine's port."""
        url = f"http://localhost:{self.ports[f'{node}_agent']}/api/local_raylet_healthz"
        command = f"wget --tries 1 -T 2 -q -O- {url} | grep -q success"
        return subprocess.run(["bash", "-c", command], check=False).returncode == 0

    def dashboard(self, method, path, body=None, token=True):
        headers = {"content-type": "application/json"}
        if token:
            headers["authorization"] = f"Bearer {self.token}"
        return request(method, f"http://127.0.0.1:{self.ports['dashboard']}{path}", body, headers)

    def _ray_start(self, node, parameters, *more):
        own = {"dashboard-host": "127.0.0.1", "object-store-memory": str(100 << 20)}
        flags = [f"--{name}={own.get(name, value)}" for name, value in parameters.items()]
        command = [
            RAY,
            "start",
            *flags,
            *more,
            "--node-ip-address=127.0.0.1",
            f"--dashboard-agent-listen-port={self.ports[f'{node}_agent']}",
            f"--metrics-export-port={free_port()}",
            "--disable-usage-stats",
            "--block",
        ]
        environment = {
            **os.environ,
            **self._environment(node),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "PYTHONPATH": str(ROOT),
        }
        environment.pop("RAY_ADDRESS", None)
        with (self.folder / f"{node}.log").open("w") as log:
            self._processes.append(
                subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            )

    def _environment(self, node):
        """The container's, with this machine's paths and ports: both nodes have a proxy here."""
        groups = self._groups
        group = groups["headGroupSpec"] if node == "head" else groups["workerGroupSpecs"][0]
        found = environment(group["template"]["spec"]["containers"][0])
        assert BINARY_VARIABLE in found
        files = {variable: str(self.folder / file) for variable, file in way.FILES.items()}
        ports = {variable: str(free_port()) for variable in way.PORTS}
        return {
            **found,
            **files,
            **ports,
            BINARY_VARIABLE: str(way.write_program(self.folder)),
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(self.ports["serve"]),
        }


def request(method, url, body=None, headers=None):
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data, headers or {}, method=method), timeout=180) as response:
            return response.status, json.loads(response.read() or "null")
    except HTTPError as error:
        return error.code, error.read().decode()


def serve_config(service, folder, port):
    """The rendered serveConfigV2 with this machine's folders in place of the pods' mounts; with
    one thread an engine, and eager, as other tests run beside it."""
    places = {
        "/opt/sere/demo": str(assets.MODEL.parent),
        "/artifacts/demo.safetensors": str(folder / "a.safetensors"),
        "/artifacts": str(folder),
        "/etc/sere/keys": str(folder),
    }
    text = service["serveConfigV2"]
    for place, here in places.items():
        assert place in text
        text = text.replace(place, here)
    config = yaml.safe_load(text)
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    arguments = config["applications"][0]["args"]
    arguments["engine"] |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 26}
    arguments["env"] |= {"OMP_NUM_THREADS": "1"}
    return config


@pytest.fixture(scope="module")
def cluster(rendered):
    if shutil.which("wget") is None:
        pytest.skip("KubeRay's probes call wget: apt install wget")
    folder = Path(tempfile.mkdtemp(prefix="sere-", dir="/tmp"))  # sockets need a short path
    save_artifacts(folder)
    save_keys(folder / "keys.yaml")
    service = only(rendered[OVERLAY, "deployment"], "RayService")["spec"]
    cluster = Cluster(service, folder)
    try:
        cluster.start()
        config = serve_config(service, folder, cluster.ports["head"])
        status, answer = cluster.dashboard("PUT", "/api/serve/applications/", config)
        assert status == 200, answer
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def test_the_application_runs_on_the_worker_behind_keys(cluster):
    status, answer = cluster.dashboard("GET", "/api/serve/applications/", token=False)
    assert status in (401, 403), answer

    def running():
        _, state = cluster.dashboard("GET", "/api/serve/applications/")
        (application,) = state["applications"].values()
        assert application["status"] not in ("DEPLOY_FAILED", "UNHEALTHY"), application["message"]
        return application["status"] == "RUNNING"

    wait_for(running, 300, "the application")
    _, state = cluster.dashboard("GET", "/api/serve/applications/")
    (application,) = state["applications"].values()
    (ranks,) = (d for n, d in application["deployments"].items() if n.startswith("SereGangServer"))
    head = state["controller_info"]["node_id"]
    assert len(ranks["replicas"]) == 2
    assert head not in {replica["node_id"] for replica in ranks["replicas"]}

    url = f"http://127.0.0.1:{cluster.ports['serve']}"
    command = [str(ROOT / "deploy" / "healthcheck.sh"), str(cluster.ports["serve"])]
    # HAProxy of the worker's node hears of ranks a moment later.
    wait_for(lambda: subprocess.run(command, check=False).returncode == 0, 30, "health")
    body = {"model": "sere-demo", "prompt": "Work out 2 + 3.", "max_tokens": 4}
    key, admin = ({"authorization": f"Bearer {value}"} for value in (API_KEY, ADMIN))
    headers = {"content-type": "application/json"}
    assert request("POST", f"{url}/v1/completions", body, headers)[0] == 401

    def answers():
        found, answer = request("POST", f"{url}/v1/completions", body, {**headers, **key})
        print(found, answer)
        return found == 200

    wait_for(answers, 30, "HAProxy of the worker knows both ranks")
    assert all(answers() for _ in range(8))
    status, policy = request("GET", f"{url}/sere/policy", None, admin)
    assert (status, policy["replicas"]) == (200, 2)
