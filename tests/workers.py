"""How tests are spread over the workers of ``pytest -n 2 --dist loadgroup``.

A file goes to one worker, as what its tests share is costly. All files that start a deployment go
to one worker, so that no two of them run at once. A test marked ``alone`` measures time: it
starts when the tests that other workers run have ended, and the next ones wait for it.
"""

import fcntl
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

GROUPS = {
    "deployments": (
        "tests/live/",
        "tests/serve/test_two_gangs.py",
        "tests/serve/test_direct_streaming.py",
        "tests/serve/test_start.py",
        "tests/demo/test_demo.py",
        "tests/bench/test_chaos.py",
        "tests/k8s/test_as_the_operator_does.py",
    ),
    "page": ("tests/serve/ui/",),  # one browser
}
"""Beginnings of paths by the group of what lies there; jobs on Ray alone may run beside these."""


def pytest_collection_modifyitems(config, items):
    if config.getoption("loadgroup", default=False):
        items.sort(key=_turn)


def _turn(item):
    """What takes longest comes first: deployments, then engines. What needs the machine alone
    comes last."""
    if item.get_closest_marker("alone"):
        return 3
    if item.nodeid.startswith(GROUPS["deployments"]):
        return 0
    return 1 if item.nodeid.startswith("tests/engine/") else 2


def pytest_sessionfinish(session):
    """What a worker printed outside of its tests would be shown after the run's closing line."""
    if hasattr(session.config, "workerinput"):
        session.config.pluginmanager.getplugin("capturemanager").read_global_capture()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """By ``GROUPS``, else by file. The mark ``xdist_group`` does nothing under pytest 9.2."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class GroupOrFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            groups = (name for name, places in GROUPS.items() if nodeid.startswith(places))
            return next(groups, nodeid.partition("::")[0])

    return GroupOrFile(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Outside everything else, so that no time limit counts the wait."""
    alone = item.get_closest_marker("alone") is not None
    with _in_turn(alone) if hasattr(item.config, "workerinput") else nullcontext():
        return (yield)


@contextmanager
def _in_turn(alone):
    """Two locks on files that every worker has: the room is shared, or one test's alone. Who wants
    it alone holds the door meanwhile, as others would come in for ever."""
    here = Path(__file__)
    with here.open() as door, here.with_name("conftest.py").open() as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:  # told, as a forked child holds these files, too
            fcntl.flock(room, fcntl.LOCK_UN)
            fcntl.flock(door, fcntl.LOCK_UN)
