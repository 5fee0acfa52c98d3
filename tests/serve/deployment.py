"""A deployment as a user runs it: `sere-ray serve`, a Ray instance of its own, real engines."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import yaml

from sere_ray import assets
from sere_ray.bench.differential_examples import MODEL as MODEL_ID
from sere_ray.bench.differential_servers import ENGINE
from sere_ray.bench.servers import served
from sere_ray.serve.gateway.keys import digest
from sere_ray.util.ports import free_ports
from sere_ray.util.processes import processes_named
from tests.engine.conftest import random_artifact

API_KEY, NO_TIER_KEY, EXACT_KEY, ADMIN = "sk-all", "sk-default-only", "sk-exact", "token-admin"
UNSCORED_KEY = "sk-unscored"

RESTART_SECONDS = 150
HALF_SENT_SECONDS, ANSWER_SECONDS = 4, 25
"""Limits: the first for headers, and for bodies."""
KEY_LIMIT = 32
"""Requests under way at once of one key, in one process that answers."""


def save_artifacts(folder):
    """``a`` and ``b`` fit the demo model, ``foreign`` does not."""
    artifact = random_artifact(assets.MODEL)
    artifact.save(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes(b"")
    changed = {layer: matrix.sqrt() for layer, matrix in artifact.layers.items()}
    type(artifact)(changed, artifact.metadata).save(folder / "b.safetensors")
    others = dict.fromkeys(artifact.layers, "0" * 32)
    metadata = artifact.metadata.model_copy(update={"router_fingerprint": others})
    type(artifact)(artifact.layers, metadata).save(folder / "foreign.safetensors")


def save_keys(path):
    keys = [
        {"name": "all", "sha256": digest(API_KEY)},
        {"name": "plain", "sha256": digest(NO_TIER_KEY), "tiers": ["default"]},
        {"name": "exact", "sha256": digest(EXACT_KEY), "default_tier": "exact"},
        {"name": "unscored", "sha256": digest(UNSCORED_KEY), "score": False},
    ]
    admin = [{"name": "ops", "sha256": digest(ADMIN)}]
    path.write_text(yaml.safe_dump({"keys": keys, "admin": admin}))


class Served:
    """The process, and its HTTP side."""

    def __init__(self, process, url, log, metrics_port):
        self.process, self.url, self.log = process, url, log
        self.metrics_port = metrics_port

    def request(self, method, path, body=None, key=None, headers=None, timeout=60):
        """``(status, JSON or text, headers)``."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {"content-type": "application/json", **(headers or {})}
        if key is not None:
            sent["authorization"] = f"Bearer {key}"
        try:
            with urlopen(
                Request(self.url + path, data, sent, method=method), timeout=timeout
            ) as response:
                return response.status, _parsed(response.read()), dict(response.headers)
        except HTTPError as error:
            if error.code == 307:  # as most clients do: HAProxy was replaced while this waited
                return self.request(method, path, body, key, headers, timeout)
            return error.code, _parsed(error.read()), dict(error.headers)

    def complete(
        self, prompt="Work out 23 + 48 - 17.", key=API_KEY, headers=None, timeout=60, **body
    ):
        body = {
            "model": MODEL_ID,
            "prompt": prompt,
            "max_tokens": 16,
            "temperature": 0,
            "ignore_eos": True,
            **body,
        }
        return self.request("POST", "/v1/completions", body, key, headers, timeout)

    def begin(self, prompt, key=API_KEY, headers=None, **body):
        """Send a completion and read nothing: the open connection."""
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        body = {"model": MODEL_ID, "prompt": prompt, **body}
        sent = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        sent |= headers or {}
        connection.request("POST", "/v1/completions", json.dumps(body), sent)
        return connection

    def sere(self, what, change=None):
        """GET or PUT with the admin's token; must succeed."""
        method = "GET" if change is None else "PUT"
        status, answer, _ = self.request(method, f"/sere/{what}", change, ADMIN)
        assert status == 200, answer
        return answer

    def cli(self, *arguments):
        command = [sys.executable, "-m", "sere_ray", *arguments, "--url", self.url]
        environment = {**os.environ, "SERE_ADMIN_TOKEN": ADMIN}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    def processes(self, name):
        """Processes of this deployment whose title starts with ``name``."""
        return processes_named(psutil.Process(self.process.pid), name)


def _parsed(content):
    """JSON, or the text that it is not."""
    try:
        return json.loads(content)
    except ValueError:
        return content.decode()


@contextmanager
def deployed(folder, *, keys=True, environment=None, proxy="default", **arguments):
    """Run a deployment file from ``folder``; ends every process that it started."""
    port, metrics_port = free_ports(2)
    save_artifacts(folder)
    access = {"max_body_bytes": 100_000, "max_concurrent_per_key": KEY_LIMIT}
    if keys:
        save_keys(folder / "keys.yaml")
        access["keys_file"] = str(folder / "keys.yaml")
    arguments = {
        "limits": {
            "header_s": HALF_SENT_SECONDS,
            "body_s": HALF_SENT_SECONDS,
            "answer_s": ANSWER_SECONDS,
            "queue_while_restarting_s": RESTART_SECONDS,
        },
        "model": str(assets.MODEL),
        "model_id": MODEL_ID,
        "sere": {"similarity": str(folder / "a.safetensors"), "select_top_k": 1},
        "artifacts": str(folder),
        "access": access,
        "env": {"HF_HUB_OFFLINE": "1"},
        "engine": ENGINE,
        **arguments,
    }
    variables = {"PYTHONPATH": str(Path(__file__).parents[2]), **(environment or {})}
    with served(folder, port, arguments, variables, metrics_port, proxy=proxy) as process:
        yield Served(process, f"http://127.0.0.1:{port}", folder / "log", metrics_port)


def wait_for(condition, seconds, what):
    """Poll until it holds; returns the seconds it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"{what}: not within {seconds} s"
        time.sleep(0.2)
    return time.monotonic() - start
