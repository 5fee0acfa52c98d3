"""No key, no token and no prompt in any log of a deployment or of its Ray instance."""

import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from sere_ray.serve.gateway.keys import RELOAD_SECONDS, digest, new_key

pytestmark = pytest.mark.engine


@pytest.fixture
def secrets(live):
    """An API key and an admin token of this test alone; the key file is read while it serves."""
    path = live.log.parent / "keys.yaml"
    before = path.read_text()
    keys, found = yaml.safe_load(before), {"keys": new_key(), "admin": new_key()}
    for kind, value in found.items():
        keys[kind].append({"name": f"of-{kind}", "sha256": digest(value)})
    path.write_text(yaml.safe_dump(keys))
    time.sleep(RELOAD_SECONDS + 0.2)
    yield found
    path.write_text(before)


def session_logs(live):
    """Ray's log folder of this deployment, from the command line of its raylet."""
    for process in psutil.Process(live.process.pid).children(recursive=True):
        with suppress(psutil.Error):
            for argument in process.cmdline():
                name, _, value = argument.partition("=")
                if name == "--log_dir" and Path(value).is_dir():
                    return Path(value)
    raise AssertionError("no process of Ray names its logs")


def test_nothing_secret_in_any_log(live, secrets):
    prompt, wrong = f"Work out {time.time_ns()} + 1.", new_key()
    assert live.complete(prompt, key=secrets["keys"])[0] == 200
    assert live.request("GET", "/sere/policy", None, secrets["admin"])[0] == 200
    for path in ("/v1/models", "/sere/policy", "/v1/none", "/metrics"):
        for key in (wrong, secrets["keys"]):
            live.request("GET", path, None, key)
    live.complete(prompt, key=wrong)
    live.complete(prompt, key=secrets["keys"], max_tokens=-1)
    live.request("POST", "/v1/completions", b"{", secrets["keys"])
    live.request("PUT", "/sere/policy", {"mode": wrong}, secrets["keys"])
    time.sleep(1)  # logs are written behind
    files = [live.log, *(p for p in session_logs(live).rglob("*") if p.is_file())]
    assert len(files) > 10
    hidden = [secrets["keys"], secrets["admin"], wrong, digest(wrong), prompt]
    for file in files:
        text = file.read_bytes()
        for value in hidden:
            assert value.encode() not in text, f"{file.name} holds {value[:12]}..."
