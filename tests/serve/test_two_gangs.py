"""Two gangs of two real ranks: one is killed under load, then the deployment is told to stop."""

import json

import psutil
import pytest

from sere_ray.bench.chaos import Clients, answers_of, disturb
from tests.serve.deployment import MODEL_ID, deployed
from tests.serve.every_path import check_drains

pytestmark = [pytest.mark.engine, pytest.mark.nightly]
PROMPTS = [f"Work out {i + 3} + {2 * i + 5}." for i in range(12)]


@pytest.fixture(scope="module")
def two_gangs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gangs")
    options = {"keys": False, "num_replicas": 2, "data_parallel_size": 2}
    with deployed(folder, **options) as deployment:
        yield deployment


def test_a_killed_engine(two_gangs):
    """Answers of the exact tier in float32 are those of the undisturbed deployment."""
    load = Clients(two_gangs.url, MODEL_ID, answers_of(two_gangs.url, MODEL_ID, PROMPTS))
    root = psutil.Process(two_gangs.process.pid)
    engines = two_gangs.processes("VLLM::EngineCore")
    assert len(engines) == 4
    result = disturb(load, ["engine"], root=root, streams=4, console=None)
    print(json.dumps(result, indent=1))
    for end in ("wrong_answers", "hung_clients", "unclean_errors"):
        assert result[end] == 0, result["errors_seen"]
    for kill in result["killed"]:
        assert kill["answers_meanwhile"] > 0, "the other gang did not go on"
        assert kill["last_error_s"] is None or kill["last_error_s"] < 10
    now = two_gangs.processes("VLLM::EngineCore")
    assert len(now) == 4
    orphans = [e for e in engines if e.is_running() and e not in now]
    assert not orphans, "an engine outlived its replica"


def test_sigterm_drains(two_gangs):
    check_drains(two_gangs)


def test_direct_streaming_reaches_every_rank_without_keys(tmp_path):
    options = {"keys": False, "num_replicas": 2, "data_parallel_size": 2}
    with deployed(tmp_path, proxy="direct", **options) as gangs:

        def rows():
            _, stats, _ = gangs.request("GET", "/sere/stats")
            return [r["counters"]["decode_only"]["decode_rows"] for r in stats["per_replica"]]

        before = rows()
        for _ in range(8):
            assert gangs.complete(key=None)[0] == 200
        assert len(before) == 4
        assert all(after > now for now, after in zip(before, rows(), strict=True))
