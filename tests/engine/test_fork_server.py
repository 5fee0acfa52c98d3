import functools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import parent_process
from pathlib import Path

import psutil
import pytest

from sere_ray.engine import fork_server, forked
from sere_ray.engine.fork_server import SharedForkServer
from sere_ray.engine.forked import ForkContext, ForkedProcess
from sere_ray.util.processes import family

PRELOAD = ("colorsys",)
WAIT = 20.0


def has_ended(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def until(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("f", numbered=True) / "s"


@pytest.fixture
def owner():
    """What the fork server lives with: in a deployment Ray's process of the node."""
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def server(monkeypatch, folder, owner):
    made = SharedForkServer(owner.pid, PRELOAD, folder)
    monkeypatch.setattr(ForkedProcess, "server", made)
    return made


def tell(pipe, names):
    print("printed by the child", flush=True)
    pipe.send(
        {
            "environment": {name: os.environ.get(name) for name in names},
            "folder": os.getcwd(),
            "is_preloaded": PRELOAD[0] in sys.modules,
            "forked_by": psutil.Process(os.getppid()).cmdline(),
            "asked_by": parent_process().pid,
        }
    )


def hang(pipe):
    pipe.send(os.getpid())
    time.sleep(1000)


def told(names=()):
    ours, theirs = ForkContext().Pipe()
    process = ForkContext().Process(target=tell, args=(theirs, names))
    process.start()
    assert ours.poll(WAIT)
    process.join(WAIT)
    assert process.exitcode == 0
    return ours.recv()


def test_a_forked_process_is_as_a_spawned_one(server, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("RAY_OF_THIS_REPLICA", "7")
    monkeypatch.chdir(tmp_path)
    found = told(["RAY_OF_THIS_REPLICA", "PATH"])
    assert found["environment"] == {"RAY_OF_THIS_REPLICA": "7", "PATH": os.environ["PATH"]}
    assert found["folder"] == str(tmp_path)
    assert found["is_preloaded"]
    assert "sere_ray.engine.fork_server" in found["forked_by"]
    assert found["asked_by"] == os.getpid()
    assert "printed by the child" in capfd.readouterr().out


def test_an_exit_code_is_told(server):
    process = ForkContext().Process(target=sys.exit, args=(3,))
    process.start()
    process.join(WAIT)
    assert process.exitcode == 3


def test_replicas_of_one_environment_share_a_server(folder, owner, monkeypatch):
    SharedForkServer(owner.pid, PRELOAD, folder)
    monkeypatch.setenv("RAY_OF_ANOTHER_REPLICA", "8")
    SharedForkServer(owner.pid, PRELOAD, folder)
    until(lambda: len(servers(owner)) == 1)
    monkeypatch.setenv("READ_BY_AN_IMPORT", "1")
    SharedForkServer(owner.pid, PRELOAD, folder)
    until(lambda: len(servers(owner)) == 2)


def servers(owner):
    return family(psutil.Process(owner.pid))[1:]


def test_the_server_ends_with_its_owner_and_what_it_forked_with_the_one_that_asked(
    server, folder, owner, monkeypatch
):
    monkeypatch.setattr(forked, "FAREWELL_SECONDS", 0.1)
    ours, theirs = ForkContext().Pipe()
    process = ForkContext().Process(target=hang, args=(theirs,))
    process.start()
    child = psutil.Process(ours.recv())
    (running,) = (each for each in servers(owner) if each != child)
    owner.kill()
    owner.wait()
    until(lambda: has_ended(running))
    assert not list(folder.iterdir())
    assert child.is_running()  # it does not live with the server but with the one that asked
    process.kill()
    until(lambda: has_ended(child))


ASK = """
import sys, time
from pathlib import Path
from sere_ray.engine import forked, fork_server
from tests.engine.test_fork_server import PRELOAD, hang
owner, folder = int(sys.argv[1]), Path(sys.argv[2])
forked.ForkedProcess.server = fork_server.SharedForkServer(owner, PRELOAD, folder)
ours, theirs = forked.ForkContext().Pipe()
forked.ForkContext().Process(target=hang, args=(theirs,)).start()
print(ours.recv(), flush=True)
time.sleep(1000)
"""


def test_a_process_that_hangs_ends_soon_after_the_one_that_asked_was_killed(folder, owner):
    command = [sys.executable, "-c", ASK, str(owner.pid), str(folder)]
    replica = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    child = psutil.Process(int(replica.stdout.readline()))
    replica.kill()
    replica.wait()
    until(lambda: has_ended(child))


def test_without_a_server_a_process_is_started_as_usual(server, owner, caplog):
    (running,) = servers(owner)
    running.kill()
    until(lambda: has_ended(running))
    found = told()
    assert not found["is_preloaded"]
    assert "is not forked but started" in caplog.text


def test_a_folder_that_others_can_enter_is_not_used(tmp_path, owner):
    tmp_path.chmod(0o755)
    with pytest.raises(PermissionError, match="others can enter it"):
        SharedForkServer(owner.pid, PRELOAD, tmp_path)
    (tmp_path / "own").mkdir(mode=0o700)
    link = tmp_path / "link"  # who made it could have it point elsewhere a moment later
    link.symlink_to("own")
    with pytest.raises(PermissionError, match="others can enter it"):
        SharedForkServer(owner.pid, PRELOAD, link)


def test_a_server_that_nobody_uses_ends(owner, monkeypatch):
    """The owner is a child of this process, so this one is in use; then it is not."""
    waits = functools.partial(fork_server.wait_until_unused, owner.pid, 0.05, 1.0)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(waits)
        time.sleep(1.5)
        assert not waiting.done()
        monkeypatch.setattr(psutil.Process, "children", lambda self: [])
        waiting.result(WAIT)
    assert owner.poll() is None
    owner.kill()
    start = time.monotonic()
    fork_server.wait_until_unused(owner.pid, 5.0, 900.0)
    assert time.monotonic() - start < 5


def test_a_server_with_a_title_is_found(owner):
    """vLLM and Ray set titles: arguments become one string."""
    title = f"python -m sere_ray.engine.fork_server 5 {owner.pid} /socket ray"
    code = f"import setproctitle, time; setproctitle.setproctitle('{title}'); time.sleep(1000)"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        until(lambda: [each.pid for each in servers(owner)] == [process.pid])
    finally:
        process.kill()
        process.wait()
