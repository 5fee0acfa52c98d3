"""`sere-ray serve` whose start fails, or is ended: why, how soon, and what it leaves running."""

import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from sere_ray import assets
from sere_ray.bench.servers import write_deployment
from sere_ray.util.ports import free_port
from tests.serve.deployment import wait_for

pytestmark = pytest.mark.engine
MARK = "SERE_TEST_START"


class Start:
    """A process that starts, and all that it has started: they inherit a variable."""

    def __init__(self, folder, *, environment=None, **changes):
        arguments = {"model": str(assets.MODEL), "model_id": "m", **changes}
        file = write_deployment(folder, free_port(), arguments)
        self.log, self._mark = folder / "log", secrets.token_hex(8)
        self.begun = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sere_ray", "serve", "--config", str(file)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, MARK: self._mark, **(environment or {})},
                start_new_session=True,
            )

    def end(self, seconds):
        """``(exit code, what it printed, seconds since the start)``; the last log line first."""
        code = self.process.wait(seconds)
        return code, self.log.read_text(), time.monotonic() - self.begun

    def left(self):
        """Processes of this start that run."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() != "zombie":
                    found.append(" ".join(process.cmdline())[:80])
        return found


def test_what_is_known_before_workers_start_ends_at_once(tmp_path):
    start = Start(tmp_path, engine={"max_model_len": 10**6})
    code, text, _ = start.end(120)
    assert code == 2, text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "1000000" in line
    assert "Traceback" not in text
    assert start.left() == []


def test_the_engines_own_reason_in_one_line(tmp_path):
    """A cache without room for one request: only the engine finds out."""
    engine = {"kv_cache_memory_bytes": 1 << 14, "enforce_eager": True, "max_model_len": 512}
    start = Start(tmp_path, engine=engine)
    code, text, seconds = start.end(300)
    print(text, seconds)
    assert code == 2, text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "app does not start: ValueError: " in line
    assert "No available memory for the cache blocks" in line
    assert "/logs)" in line
    assert "Traceback" not in text
    assert start.left() == []


@pytest.mark.parametrize("seen", ["raylet", "ServeReplica"], ids=["imports", "a replica"])
def test_sigterm_during_the_start_leaves_nothing_running(tmp_path, seen):
    """While vLLM is imported beside Ray's start, and later. Also below a path that is too long for
    sockets."""
    long = tmp_path / ("long" * 25)
    long.mkdir()
    start = Start(tmp_path, environment={"TMPDIR": str(long)})
    wait_for(lambda: any(seen in line for line in start.left()), 200, seen)
    start.process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    code, text, _ = start.end(150)  # one import is waited for, long on a busy machine
    print(text, time.monotonic() - told)
    assert code == 0
    assert "stopped while starting" in text
    assert "Traceback" not in text
    assert start.left() == []
