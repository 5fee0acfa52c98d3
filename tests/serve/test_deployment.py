"""Two ranks on this machine, through HTTP only, as `sere-ray serve` runs them.

One deployment for the whole module; the tests that hurt it come last, in the order of the file.
"""

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.serve.deployment import (
    ADMIN,
    API_KEY,
    EXACT_KEY,
    MODEL_ID,
    NO_TIER_KEY,
    deployed,
    wait_for,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
PROBLEM = [{"role": "user", "content": "Work out 23 + 48 - 17."}]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with deployed(tmp_path_factory.mktemp("served"), data_parallel_size=2) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=API_KEY, max_retries=0, timeout=60)


def counted(served, action):
    """What the engines counted of decode-only steps during an action."""
    before = served.sere("stats")["total"]["decode_only"]
    result = action()
    after = served.sere("stats")["total"]["decode_only"]
    names = ("experts_before", "experts_after", "slots_rerouted")
    numbers = {name: sum(after[name]) - sum(before[name]) for name in names}
    for name in ("steps", "decode_rows"):
        numbers[name] = after[name] - before[name]
    return numbers, result


def at_once(served, count, **options):
    with ThreadPoolExecutor(count) as pool:
        prompts = [f"Work out {i + 3} + {2 * i + 5}." for i in range(count)]
        return list(pool.map(lambda prompt: served.complete(prompt, **options), prompts))


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


@pytest.mark.parametrize(
    ("method", "path", "body", "key", "status", "words"),
    [
        ("GET", "/v1/models", None, None, 401, "Authorization: Bearer"),
        ("GET", "/v1/models", None, "sk-wrong", 401, "wrong key"),
        ("GET", "/v1/models", None, ADMIN, 401, "wrong key"),
        ("GET", "/sere/policy", None, None, 401, "wrong key"),
        ("GET", "/sere/policy", None, API_KEY, 403, "does not open /sere"),
        ("GET", "/v1/models/other", None, API_KEY, 404, "other"),
        ("GET", "/metrics", None, API_KEY, 404, "No such path"),
        ("GET", "/openapi.json", None, API_KEY, 404, "No such path"),
        ("DELETE", "/v1/models", None, API_KEY, 405, "not allowed"),
        ("OPTIONS", "/sere/policy", None, None, 401, "wrong key"),
        ("OPTIONS", "/sere/policy", None, ADMIN, 405, "Not Allowed"),
        ("PUT", "/sere/audit", b"{", ADMIN, 405, "Not Allowed"),
        ("PUT", "/sere/policy", b"{", ADMIN, 400, "not JSON"),
        ("PUT", "/sere/policy", b"[]", ADMIN, 422, "dictionary"),
        ("PUT", "/sere/artifact", {"name": 5}, ADMIN, 422, "name"),
        ("PUT", "/sere/artifact", b" " * 100_001, ADMIN, 413, "100000 bytes"),
        ("POST", "/v1/completions", b"{", API_KEY, 400, "not JSON"),
        ("POST", "/v1/completions", b"[]", API_KEY, 400, "JSON object"),
        ("POST", "/v1/completions", b" " * 100_001, API_KEY, 413, "100000 bytes"),
        ("POST", "/v1/completions", {"model": "other", "prompt": "a"}, API_KEY, 404, "other"),
        ("POST", "/v1/completions", {"prompt": 5}, API_KEY, 400, "prompt"),
        ("POST", "/v1/completions", {"prompt": "a", "max_tokens": -1}, API_KEY, 400, "max_tokens"),
        ("POST", "/v1/completions", {"prompt": "a " * 999}, API_KEY, 400, "256"),
        ("POST", "/v1/completions", {"prompt": "a", "vllm_xargs": 1}, API_KEY, 422, "vllm_xargs"),
        (
            "POST",
            "/v1/completions",
            {"prompt": "a", "vllm_xargs": {"sere_tier": "best"}},
            API_KEY,
            422,
            "'best'; allowed: default, exact",
        ),
        (
            "POST",
            "/v1/completions",
            {"prompt": "a", "vllm_xargs": {"sere_tier": "exact"}},
            NO_TIER_KEY,
            403,
            "'exact'",
        ),
    ],
)
def test_bad_requests(served, method, path, body, key, status, words):
    if isinstance(body, dict):
        body = {"model": MODEL_ID, **body}
    found, answer, _ = served.request(method, path, body, key)
    assert found == status, answer
    assert words in answer["error"]["message"]
    assert {"message", "type", "code"} <= set(answer["error"])


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


# --- faults --------------------------------------------------------------------------------------


def test_a_killed_router_comes_back_with_its_state(served):
    status = served.sere("policy", {"mode": "on", "select_top_k": 1, "threshold": 0.25})
    artifact = served.sere("artifact")
    (router,) = served.processes("ray::RouterActor")
    router.send_signal(signal.SIGKILL)
    found, answer, headers = served.request("GET", "/sere/policy", None, ADMIN)
    assert found in (200, 503)
    if found == 503:
        assert "retry-after" in {name.lower() for name in headers}
        assert "restarting" in answer["error"]["message"]
    assert at_once(served, 4)[0][0] == 200  # replicas go on with what they have

    def is_back():
        found, answer, _ = served.request("GET", "/sere/policy", None, ADMIN)
        return found == 200 and answer["replicas_settled"] == 2

    seconds = wait_for(is_back, 90, "the router with both replicas")
    print(f"router back after {seconds:.1f} s")
    assert served.sere("policy") == status
    assert served.sere("artifact") == artifact
    assert served.sere("audit")["entries"][-1]["what"] == "restart"
    assert served.sere("policy", {"threshold": None})["replicas_settled"] == 2


def test_a_killed_rank_ends_its_requests_and_the_gang_comes_back(served):
    served.sere("policy", {"mode": "on", "select_top_k": 2, "threshold": 0.5})
    policy = served.sere("policy")
    (victim,) = served.processes("VLLM::Worker_DP1")
    results = []

    def long_request():
        start = time.monotonic()
        results.append((served.complete(max_tokens=200)[0], time.monotonic() - start))

    threads = [threading.Thread(target=long_request) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    victim.send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a client hangs"
    print("requests under way:", sorted(results))
    assert {status for status, _ in results} == {503}
    assert max(seconds for _, seconds in results) < 20
    status, answer, headers = served.complete(max_tokens=4)
    assert status == 503
    assert "again" in answer["error"]["message"]
    assert "retry-after" in {name.lower() for name in headers}

    def answers():
        try:
            return served.complete(max_tokens=4)[0] == 200
        except OSError:
            return False

    seconds = wait_for(answers, 240, "the gang")
    print(f"gang back after {seconds:.1f} s")
    assert served.sere("policy") == policy
    counts, _ = counted(served, lambda: at_once(served, 8))
    assert counts["slots_rerouted"] > 0


def test_sigterm_drains(served, client):
    served.sere("policy", {"mode": "on"})
    stream = client.completions.create(
        model=MODEL_ID, prompt="1 + 1", max_tokens=150, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = [next(stream)]
    served.process.send_signal(signal.SIGTERM)
    pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason == "length"
    assert served.process.wait(timeout=90) == 0
    assert "Traceback" not in served.log.read_text()
