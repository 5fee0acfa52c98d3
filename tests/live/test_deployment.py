"""Two ranks on this machine, through HTTP only, as `sere-ray serve` runs them."""

import json
from pathlib import Path

import openai
import psutil
import pytest

from sere_ray.util.processes import ENGINE, FORK_SERVER, processes
from tests.live.traffic import at_once, counted
from tests.serve.deployment import ADMIN, API_KEY, EXACT_KEY, MODEL_ID
from tests.serve.every_path import (
    BAD_REQUESTS,
    LIMITS,
    check_hang_up,
    check_keys_do_not_share_a_cache,
    check_refused,
    check_too_many_at_once,
)

pytestmark = pytest.mark.engine
PROBLEM = [{"role": "user", "content": "Work out 23 + 48 - 17."}]


@pytest.fixture(scope="module")
def served(live):
    policy, artifact = live.sere("policy")["policy"], live.sere("artifact")
    yield live
    live.sere("policy", {k: v for k, v in policy.items() if k != "similarity"})
    if live.sere("artifact")["sha256"] != artifact["sha256"]:
        live.sere("artifact", {"name": Path(artifact["name"]).name})


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=API_KEY, max_retries=0, timeout=60)


# --- the processes -------------------------------------------------------------------------------


def test_what_computes_nothing_has_no_torch_and_ranks_share_a_fork_server(served):
    """As ``tests/serve/test_light_processes.py``, where they run: Ray may import more."""
    has_torch, fork_servers = {}, 0
    for title, process in processes(psutil.Process(served.process.pid)):
        is_loaded = any("libtorch" in each.path for each in process.memory_maps())
        has_torch[title.partition(".")[0].partition("_DP")[0]] = is_loaded
        fork_servers += FORK_SERVER in " ".join(process.cmdline())
    light = ("ray::ServeController", "ray::RouterActor", "ray::ProxyActor")
    assert {title: has_torch[title] for title in light} == dict.fromkeys(light, False)
    assert has_torch[ENGINE]
    assert fork_servers == 1


# --- the OpenAI routes ---------------------------------------------------------------------------


def test_openai_client(served, client):
    served.sere("policy", {"mode": "off"})
    assert [model.id for model in client.models.list()] == [MODEL_ID]
    assert client.models.retrieve(MODEL_ID).id == MODEL_ID
    options = {"model": MODEL_ID, "messages": PROBLEM, "temperature": 0, "max_tokens": 64}
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content.endswith("Answer: 54")
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**options, stream=True)
    ]
    assert len(pieces) > 5
    assert "".join(pieces) == answer.choices[0].message.content
    text = client.completions.create(model=MODEL_ID, prompt="1 + 1", max_tokens=4)
    assert text.usage.completion_tokens <= 4


@pytest.mark.parametrize("case", BAD_REQUESTS, ids=lambda case: " ".join(map(str, case))[:60])
def test_bad_requests(served, case):
    check_refused(served, *case)


def test_keys_do_not_share_a_cache(served):
    check_keys_do_not_share_a_cache(served)


def test_too_many_at_once(served):
    check_too_many_at_once(served, processes=1)


# --- control -------------------------------------------------------------------------------------


def test_a_policy_takes_effect_on_all_ranks_and_back(served):
    exact = [answer["choices"][0]["text"] for _, answer, _ in at_once(served, 8)]
    status = served.sere("policy", {"mode": "on", "select_top_k": 1, "min_primary_experts": 0})
    assert status["replicas"] == status["replicas_settled"] == 2
    counts, _ = counted(served, lambda: at_once(served, 8))
    assert counts["experts_after"] < 0.8 * counts["experts_before"]
    assert counts["slots_rerouted"] > 0
    ranks = {r["rank"]: r["counters"]["decode_only"] for r in served.sere("stats")["per_replica"]}
    assert all(of_rank["decode_rows"] > 0 for of_rank in ranks.values()), "one rank had no request"
    served.sere("policy", {"mode": "observe"})
    counts, answers = counted(served, lambda: at_once(served, 8))
    assert counts["experts_after"] < counts["experts_before"]
    assert [answer["choices"][0]["text"] for _, answer, _ in answers] == exact
    served.sere("policy", {"mode": "off"})
    counts, answers = counted(served, lambda: at_once(served, 8))
    assert counts["steps"] == 0 or counts["experts_before"] == 0
    assert [answer["choices"][0]["text"] for _, answer, _ in answers] == exact


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("policy", {"select_top_k": 99}, "1..4 is allowed"),
        ("policy", {"select_top_k": "1"}, "select_top_k = '1'"),
        ("policy", {"treshold": 0.5}, "did you mean 'threshold'"),
        ("policy", {"similarity": "b.safetensors"}, "PUT /sere/artifact"),
        ("artifact", {"name": "foreign.safetensors"}, "router fingerprint of layer 0"),
        ("artifact", {"name": "missing.safetensors"}, "No such file"),
        ("artifact", {"name": "../keys.yaml"}, "name of a file in the configured folder"),
        ("artifact", {"file": "b.safetensors"}, "file"),
    ],
)
def test_a_refused_change_changes_nothing(served, path, body, words):
    before = served.sere("policy"), served.sere("artifact")
    status, answer, _ = served.request("PUT", f"/sere/{path}", body, ADMIN)
    assert status == 422, answer
    assert words in answer["error"]["message"]
    assert "Traceback" not in answer["error"]["message"]
    assert (served.sere("policy"), served.sere("artifact")) == before


def test_the_artifact_is_swapped_live(served):
    served.sere("policy", {"mode": "on", "select_top_k": 1, "threshold": 0.9})
    counts, _ = counted(served, lambda: at_once(served, 8))
    before = served.sere("artifact")
    after = served.sere("artifact", {"name": "b.safetensors"})
    assert after["sha256"] != before["sha256"]
    # b's similarities are the square roots of a's: more of them pass the threshold
    swapped, _ = counted(served, lambda: at_once(served, 8))
    assert (
        swapped["slots_rerouted"] / swapped["decode_rows"]
        > counts["slots_rerouted"] / counts["decode_rows"]
    )
    entry = served.sere("audit")["entries"][-1]
    assert (entry["who"], entry["what"]) == ("ops", "artifact")
    assert any("foreign" in e.get("refused", "") for e in served.sere("audit")["entries"])
    served.sere("policy", {"threshold": None})


def test_command_line(served):
    done = served.cli("policy", "set", "select_top_k=2", "mode=observe")
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert (status["policy"]["select_top_k"], status["policy"]["mode"]) == (2, "observe")
    assert json.loads(served.cli("policy", "get").stdout) == status
    wrong = served.cli("policy", "set", "select_top_k=9")
    assert wrong.returncode == 2
    assert "1..4 is allowed" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    line = served.cli("stats").stdout
    assert f"version {status['version']} (observe, S=2)  2/2 ranks" in line


def test_openapi_document(served):
    document = served.sere("openapi.json")
    assert {"/policy", "/stats", "/artifact", "/audit"} == set(document["paths"])
    change = document["paths"]["/policy"]["put"]["requestBody"]["content"]["application/json"]
    assert "select_top_k" in str(change["schema"])


# --- tiers ---------------------------------------------------------------------------------------


def test_exact_requests_have_no_re_routable_row(served):
    served.sere("policy", {"mode": "on", "select_top_k": 1, "min_primary_experts": 0})
    header = {"x-sere-tier": "exact"}
    xargs = {"vllm_xargs": {"sere_tier": "exact"}}
    for options in ({"headers": header}, xargs, {"key": EXACT_KEY}):
        counts, answers = counted(served, lambda options=options: at_once(served, 4, **options))
        assert [status for status, *_ in answers] == [200] * 4
        assert (counts["decode_rows"], counts["steps"]) == (0, 0)
    counts, _ = counted(
        served, lambda: served.complete(key=EXACT_KEY, headers={"x-sere-tier": "default"})
    )
    assert counts["decode_rows"] > 0


def test_exact_second_turn_after_a_re_routed_first(served):
    """Its log-probabilities are those of an engine that never re-routed."""

    def logprobs(prompt, **options):
        status, answer, _ = served.complete(prompt, logprobs=3, max_tokens=8, **options)
        assert status == 200, answer
        return answer["choices"][0]["logprobs"]["token_logprobs"]

    prompt = "def add(first, second):\n    return first + second\n\n\ndef subtract("
    _, first, _ = served.complete(prompt, max_tokens=96)
    second = prompt + first["choices"][0]["text"] + "\n\n\ndef multiply("
    rerouted = logprobs(second)
    exact = logprobs(second, headers={"x-sere-tier": "exact"})
    served.sere("policy", {"mode": "off"})
    stock = logprobs(second)
    assert exact == pytest.approx(stock, abs=1e-4)
    assert rerouted != pytest.approx(stock, abs=1e-4)


# --- clients that hang up ------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(served, stream):
    check_hang_up(served, stream=stream)


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", LIMITS, ids=lambda check: check.__name__)
def test_limits(served, check):
    check(served)
