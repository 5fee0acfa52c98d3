"""What clients of every path must see when a part of a deployment of two ranks is killed: used
behind Ray's proxy (tests/live) and behind HAProxy with direct streaming (test_direct_streaming.py).
"""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tests.live.traffic import at_once, counted
from tests.serve.deployment import ADMIN, RESTART_SECONDS, wait_for

SEEN_SECONDS = 30
"""Ray sees a replica's end within some seconds; a busy machine needs more."""
CHANGES_NOTHING = {"mode": "on", "select_top_k": 4, "threshold": 0.25, "min_primary_experts": 0}
"""S = K: no slot is re-routed. Under the policy of the deployment file, and the next, some are."""
CHANGES_MUCH = {"mode": "on", "select_top_k": 1, "threshold": None, "min_primary_experts": 0}


@dataclass(frozen=True)
class End:
    """How a request ended; times are monotonic seconds."""

    stream: bool
    status: int
    retry_after: str | None
    error: Any
    """OpenAI's, as the answer or as the last event of a stream; None: the answer is whole."""
    begun: float
    ended: float


def ask(served, *, stream, tokens=240, answering=None):
    """Send a completion and read it to its end; ``answering`` gets ``stream`` when it begins."""
    begun = time.monotonic()
    body = {"max_tokens": tokens, "ignore_eos": True, "stream": stream}
    answer = served.begin("1 + 1", **body).getresponse()
    if answering is not None:
        answering.append(stream)
    content, retry_after = answer.read(), answer.headers["retry-after"]
    if not stream or answer.status != 200:
        error = json.loads(content).get("error")
    else:
        last = content.split(b"\n\n")[-2].removeprefix(b"data: ")
        error = None if last == b"[DONE]" else json.loads(last)["error"]
    return End(stream, answer.status, retry_after, error, begun, time.monotonic())


def check_killed_router(served):
    """Requests never fail and keep the policy that was set; the actor comes back with its state,
    and a policy that is set then reaches every rank."""
    status, artifact = served.sere("policy", CHANGES_NOTHING), served.sere("artifact")
    assert status["replicas_settled"] == 2
    stop = threading.Event()

    def client(number):
        ends = []
        while not stop.is_set():
            ends.append(ask(served, stream=number % 2 == 0, tokens=24))
        return ends

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        try:
            counts, (killed, back) = counted(served, lambda: _outage(served))
        finally:
            stop.set()
        ends = [end for one in clients for end in one.result(60)]
    meanwhile = [end for end in ends if killed < end.begun and end.ended < back]
    print(f"router back after {back - killed:.1f} s, {len(meanwhile)} answers meanwhile, {counts}")
    assert meanwhile
    assert all((end.status, end.error) == (200, None) for end in ends), ends
    assert counts["steps_counted"] == counts["steps"] > 0, "a step in another mode"
    assert counts["slots_rerouted"] == 0, "a step under another policy"
    assert served.sere("policy") == status
    assert served.sere("artifact") == artifact
    assert served.sere("audit")["entries"][-1]["what"] == "restart"
    assert served.sere("policy", CHANGES_MUCH)["replicas_settled"] == 2
    before = _rerouted(served)
    at_once(served, 8)
    after = _rerouted(served)
    assert all(after[rank] > before[rank] for rank in (0, 1)), "a rank without the new policy"


def _outage(served):
    """Kill the policy actor and wait until both replicas are attached again; when this was."""
    (router,) = served.processes("ray::RouterActor")
    router.kill()
    killed = time.monotonic()
    found, answer, headers = served.request("GET", "/sere/policy", None, ADMIN)
    assert found in (200, 503)
    if found == 503:
        assert "retry-after" in {name.lower() for name in headers}
        assert "policy actor restarts" in answer["error"]["message"]

    def is_back():
        found, answer, _ = served.request("GET", "/sere/policy", None, ADMIN)
        return found == 200 and answer["replicas_settled"] == 2

    return killed, killed + wait_for(is_back, 90, "the router with both replicas")


def _rerouted(served):
    """Slots by rank, so far."""
    replicas = served.sere("stats")["per_replica"]
    return {r["rank"]: sum(r["counters"]["decode_only"]["slots_rerouted"]) for r in replicas}


def check_killed_engine(served):
    """Requests under way end with a clear error, in bounded time, on both ranks of the gang."""
    (engine,) = served.processes("VLLM::EngineCore_DP1")
    answering = []
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, served, stream=n % 2 == 0, answering=answering) for n in range(8)]
        wait_for(lambda: answering.count(True) == 4, 30, "the streams begin")
        time.sleep(0.3)  # the others were sent at the same time
        killed = time.monotonic()
        engine.kill()
        ends = [one.result(60) for one in asked]
    print(*ends, sep="\n")
    for end in ends:
        assert (end.status, end.retry_after) == ((200, None) if end.stream else (503, "5"))
        assert end.error["code"] == "engine_lost"
        assert "again" in end.error["message"]
    assert max(end.ended for end in ends) - killed < SEEN_SECONDS


def check_requests_wait_for_the_gang(served):
    """After :func:`check_killed_engine`: requests are held until the gang answers again, once the
    proxy knows that no replica is left. Before, each is told at once to come again."""
    start = time.monotonic()

    def answer(_):
        refused = []
        while True:
            asked = time.monotonic()
            status, said, headers = served.complete(max_tokens=4, timeout=RESTART_SECONDS + 30)
            if status == 200:
                return refused, time.monotonic() - asked
            refused.append(asked - start)
            assert status == 503
            assert "again" in said["error"]["message"]
            assert "retry-after" in {name.lower() for name in headers}
            time.sleep(1)

    with ThreadPoolExecutor(6) as pool:
        ends = list(pool.map(answer, range(6)))
    print("refused after s, then held for s:", *ends, sep="\n")
    assert max((after for refused, _ in ends for after in refused), default=0) < SEEN_SECONDS
    assert max(held for _, held in ends) > 1, "the gang was back before anybody waited"
