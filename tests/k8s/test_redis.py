"""The command of the Redis container, run here: it starts, and the password is asked for."""

import os
import shutil
import subprocess
import time

import pytest

from sere_ray.util.ports import free_port
from tests.k8s.conftest import only

PASSWORD = "a-password-of-this-test"


@pytest.fixture
def redis(rendered, tmp_path):
    """The port of a server that runs as the StatefulSet says."""
    if shutil.which("redis-server") is None:
        pytest.skip("the container's command is run: apt install redis-server")
    pod = only(rendered["multi-node", "deployment"], "StatefulSet")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    port = str(free_port())
    *shell, script = container["command"]
    assert script.count("--dir /data") == 1
    script = script.replace("--dir /data", f"--dir {tmp_path} --port {port} --bind 127.0.0.1")
    environment = {"PATH": os.environ["PATH"], container["env"][0]["name"]: PASSWORD}
    process = subprocess.Popen([*shell, script], env=environment, stdout=subprocess.DEVNULL)
    try:
        yield port, container["readinessProbe"]["exec"]["command"], process
    finally:
        process.terminate()
        process.wait(10)


def ask(port, password, *words):
    environment = {"PATH": os.environ["PATH"]}
    if password is not None:
        environment["REDISCLI_AUTH"] = password
    command = ["redis-cli", "-p", port, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def test_the_password_is_needed_and_in_no_argument(redis):
    port, probe, process = redis
    deadline = time.monotonic() + 15
    while ask(port, PASSWORD, "ping") != "PONG":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "NOAUTH" in ask(port, None, "ping")
    assert ask(port, PASSWORD, "config", "get", "appendonly").split() == ["appendonly", "yes"]
    with open(f"/proc/{process.pid}/cmdline") as arguments:
        command_line = arguments.read()
    assert "redis-server" in command_line
    assert PASSWORD not in command_line

    ready = probe[-1].replace("redis-cli", f"redis-cli -p {port}")
    for password, healthy in ((PASSWORD, True), ("wrong", False)):
        environment = {"PATH": os.environ["PATH"], "REDISCLI_AUTH": password}
        done = subprocess.run([*probe[:-1], ready], env=environment, check=False)
        assert (done.returncode == 0) == healthy
