"""The engine's own HTTP server behind HAProxy: the same access layer, the same answers."""

import pytest

from tests.serve.deployment import ADMIN, API_KEY, EXACT_KEY, MODEL_ID, NO_TIER_KEY, deployed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
EXACT = {"sere_tier": "exact"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with deployed(tmp_path_factory.mktemp("direct"), direct=True) as deployment:
        yield deployment


@pytest.mark.parametrize(
    ("method", "path", "body", "key", "status"),
    [
        ("GET", "/v1/models", None, API_KEY, 200),
        ("GET", "/v1/models", None, None, 401),
        ("GET", "/v1/models", None, ADMIN, 401),
        ("GET", "/sere/policy", None, ADMIN, 200),
        ("GET", "/sere/policy", None, API_KEY, 403),
        ("GET", "/sere/ui", None, None, 200),
        ("GET", "/sere/ui/app.js", None, None, 200),
        ("GET", "/sere/ui/../policy", None, None, 401),
        ("PUT", "/sere/ui", {}, None, 401),
        ("GET", "/metrics", None, ADMIN, 404),
        ("POST", "/tokenize", {"prompt": "a"}, API_KEY, 404),
        ("POST", "/collective_rpc", {"method": "sere_settle"}, ADMIN, 404),
        ("POST", "/v1/completions", b" " * 100_001, API_KEY, 413),
        ("POST", "/v1/completions", b"{", API_KEY, 400),
        ("POST", "/v1/completions", {"model": "other", "prompt": "a"}, API_KEY, 404),
        ("POST", "/v1/completions", {"prompt": "a", "vllm_xargs": EXACT}, NO_TIER_KEY, 403),
        ("PUT", "/sere/policy", {"select_top_k": 99}, ADMIN, 422),
        ("PUT", "/sere/policy", b"{", ADMIN, 400),
        ("PUT", "/sere/audit", {}, ADMIN, 405),
    ],
)
def test_access(served, method, path, body, key, status):
    if path.startswith("/v1/") and isinstance(body, dict):
        body = {"model": MODEL_ID, **body}
    found, answer, _ = served.request(method, path, body, key)
    assert found == status, answer
    if status != 200:
        assert "message" in answer["error"]


def test_tiers_and_policy(served):
    served.sere("policy", {"mode": "on", "select_top_k": 1, "min_primary_experts": 0})
    for key, rows in ((EXACT_KEY, False), (API_KEY, True)):
        before = served.sere("stats")["total"]["decode_only"]["decode_rows"]
        status, answer, _ = served.complete(key=key)
        assert status == 200, answer
        after = served.sere("stats")["total"]["decode_only"]["decode_rows"]
        assert (after > before) is rows
