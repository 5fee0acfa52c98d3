"""A gang of two whose engines' own HTTP servers answer, behind HAProxy: the same access layer, the
same answers, the same errors when an engine is lost."""

import pytest

from tests.live.traffic import counted
from tests.serve.deployment import ADMIN, API_KEY, EXACT_KEY, MODEL_ID, deployed
from tests.serve.every_path import (
    BAD_REQUESTS,
    LIMITS,
    check_as_vllm,
    check_drains,
    check_hang_up,
    check_keys_do_not_share_a_cache,
    check_refused,
    check_too_many_at_once,
)
from tests.serve.faults import (
    check_killed_engine,
    check_killed_router,
    check_requests_wait_for_the_gang,
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("direct")
    with deployed(folder, proxy="direct", data_parallel_size=2) as deployment:
        yield deployment


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("/v1/models", API_KEY),
        (f"/v1/models/{MODEL_ID}", API_KEY),
        ("/sere/policy", ADMIN),
        ("/sere/ui", None),
        ("/sere/ui/app.js", None),
    ],
)
def test_who_may_read_what(served, path, key):
    assert served.request("GET", path, None, key)[0] == 200


@pytest.mark.parametrize("case", BAD_REQUESTS, ids=lambda case: " ".join(map(str, case))[:60])
def test_bad_requests(served, case):
    check_refused(served, *case)


def test_answers_as_vllm(served, of_vllm):
    check_as_vllm(served, of_vllm, "direct")


def test_keys_do_not_share_a_cache(served):
    check_keys_do_not_share_a_cache(served)


def test_too_many_at_once(served):
    check_too_many_at_once(served, processes=2)


def test_tiers_and_policy(served):
    status = served.sere("policy", {"mode": "on", "select_top_k": 1, "min_primary_experts": 0})
    assert status["replicas_settled"] == 2
    for key, rows in ((EXACT_KEY, False), (API_KEY, True)):
        counts, (status, answer, _) = counted(served, lambda key=key: served.complete(key=key))
        assert status == 200, answer
        assert (counts["decode_rows"] > 0) is rows


def test_both_ranks_answer(served):
    def rows():
        replicas = served.sere("stats")["per_replica"]
        return {r["rank"]: r["counters"]["decode_only"]["decode_rows"] for r in replicas}

    before = rows()
    for _ in range(4):
        assert served.complete()[0] == 200
    after = rows()
    assert all(after[rank] > before[rank] for rank in (0, 1))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(served, stream):
    check_hang_up(served, stream=stream)


@pytest.mark.parametrize("check", LIMITS, ids=lambda check: check.__name__)
def test_limits(served, check):
    check(served)


def test_a_killed_router(served):
    check_killed_router(served)


def test_a_killed_engine_ends_the_requests_of_its_gang_and_later_ones_wait(served):
    check_killed_engine(served)
    check_requests_wait_for_the_gang(served)


def test_sigterm_drains(served):
    check_drains(served)
