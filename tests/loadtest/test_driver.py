import itertools
import threading
import time
from dataclasses import replace

import pytest

from sere_ray.loadtest.arrivals import Arrivals
from sere_ray.loadtest.client import Limits, Outcome, now
from sere_ray.loadtest.driver import Load, LoadPlan, Target, run_part
from sere_ray.loadtest.figures import figures, pool, sample
from sere_ray.loadtest.generator import generator
from sere_ray.loadtest.histogram import Histogram
from sere_ray.loadtest.slo import Price, Slo
from sere_ray.loadtest.workload import ClientKey, Entry
from tests.loadtest.servers import DONE, serving, token, usage

ENTRIES = tuple(Entry(prompt=f"p{i}", max_tokens=3) for i in range(50))


def plan(server, **changes):
    target = Target(f"{server.url}/v1", "tiny", limits=Limits(stall=30))
    return LoadPlan(target, ENTRIES, **{"seconds": 0.6, **changes})


@pytest.mark.alone
def test_closed_loop_keeps_so_many_under_way():
    with serving(gap=0.02) as server:
        load = run_part(plan(server, streams=4, warmup=0.3), now())
    one = sample(load, Slo())
    # 6 events of 20 ms: at most 8.3 requests/s in each of 4 streams.
    assert 4 * 0.6 / 0.12 * 0.6 < one.requests <= 4 * (0.6 / 0.12 + 1)
    steps = sorted([(o.sent, 1) for o in load.outcomes] + [(o.ended, -1) for o in load.outcomes])
    assert max(itertools.accumulate(step for _, step in steps)) == 4
    assert not one.failures
    assert one.ttft.min() >= 20
    assert len(load.outcomes) > one.requests  # warm-up is not measured


@pytest.mark.alone
@pytest.mark.parametrize(
    ("part", "places"), [((0, 1), [0, 0.25, 0.5, 0.75]), ((1, 2), [0.25, 0.75])]
)
def test_users_of_a_closed_loop_begin_spread_over_the_warm_up(part, places):
    """An answer takes longer than warm-up and measured part, so each user asks once."""
    with serving(gap=0.4) as server:
        start = now()
        load = run_part(
            plan(server, streams=len(places), warmup=0.8, seconds=0.2, part=part), start
        )
    assert [(o.sent - start) / 0.8 for o in load.outcomes] == pytest.approx(places, abs=0.1)


def test_open_loop_does_not_wait_and_counts_from_the_schedule():
    with serving(gap=0.1) as server:  # an answer takes 0.6 s, 20 come in each second
        load = run_part(plan(server, arrivals=Arrivals.at(20.0), seed=5), now())
    due = [o.scheduled - load.begin for o in load.measured]
    times = Arrivals.at(20.0).times(5)
    assert sorted(due) == pytest.approx([next(times) for _ in due], abs=1e-6)
    assert len(due) > 5
    assert all(o.latency >= 0.3 for o in load.measured)


@pytest.mark.alone
def test_open_loop_latency_grows_with_a_queue():
    """A server that answers one at a time: later requests wait, and that is in their latency."""
    lock = threading.Lock()
    with serving(gap=0.0) as server:
        inner = server.RequestHandlerClass.do_POST

        def one_at_a_time(handler):
            with lock:
                time.sleep(0.1)
                inner(handler)

        server.RequestHandlerClass.do_POST = one_at_a_time
        load = run_part(plan(server, arrivals=Arrivals.at(30.0), seed=1), now())
    ttft = [o.ttft for o in sorted(load.measured, key=lambda o: o.scheduled)]
    # The last one waited for all others; 0.6 s is how long they came.
    assert max(ttft) >= 0.1 * len(ttft) - 0.6 > 0.3


def test_a_trace_is_sent_once():
    entries = tuple(Entry(prompt="p", max_tokens=3, at=0.1 * i) for i in range(4))
    with serving() as server:
        target = Target(f"{server.url}/v1", "tiny")
        load = run_part(LoadPlan(target, entries, seconds=1.0), now())
    starts = [o.scheduled - load.begin for o in load.measured]
    assert starts == pytest.approx([0, 0.1, 0.2, 0.3], abs=1e-6)


def test_processes_share_the_load():
    with serving(gap=0.01) as server, generator(2) as sender:
        load = sender.run(plan(server, streams=3, seconds=2.0))
        again = sender.run(plan(server, arrivals=Arrivals.at(30.0), seed=5))
    assert len(load.measured) > 10
    times = Arrivals.at(30.0).times(5)
    due = sorted(o.scheduled - again.begin for o in again.measured)
    assert due == pytest.approx([next(times) for _ in due], abs=1e-6)


def test_keys_tiers_and_salts_are_sent():
    keys = (ClientKey(key="sk-a"), ClientKey(key="sk-b", tier="exact", weight=3))
    with serving() as server:
        target = Target(f"{server.url}/v1", "tiny", keys=keys)
        run_part(LoadPlan(target, ENTRIES, 0.4, streams=2, cache="cold", salt="s"), now())
        asked = server.requests
    used = {headers["Authorization"]: headers.get("x-sere-tier") for headers, _ in asked}
    assert used == {"Bearer sk-a": None, "Bearer sk-b": "exact"}
    salts = [body["cache_salt"] for _, body in asked]
    assert len(set(salts)) == len(salts)


def test_a_refusing_server_is_not_stormed():
    with serving(status=503) as server:
        load = run_part(plan(server, streams=1), now())
    assert 1 <= len(load.measured) <= 4
    assert all(o.error.startswith("HTTP 503") for o in load.measured)


def outcome(ttft, gaps, tokens=None, error=None, text="", label=None, at=0.0):
    times = [at + ttft]
    for gap in gaps:
        times.append(times[-1] + gap)
    made = Outcome(at, times=times, output_tokens=tokens or len(times), text=text, label=label)
    made.error = error
    return made


def load_of(*outcomes):
    return Load(0.0, 10.0, list(outcomes), Histogram())


def test_figures_by_hand():
    good = outcome(0.1, [0.02] * 10, text="Answer: 5", label="5")
    slow = outcome(0.1, [0.08] * 10, text="Answer: 6", label="5", at=1.0)
    failed = outcome(0.001, [0.001], error="cut: the connection was closed")
    one = sample(load_of(good, slow, failed), Slo(tpot=50))
    row = figures(one, Price(3.6, 2))
    assert (row["requests"], row["failures"]) == (3, 1)
    assert row["failure_kinds"] == {"cut: the connection was closed": 1}
    assert row["tpot_ms_p50"] == 50
    assert row["ttft_ms_p99"] == pytest.approx(100)
    assert row["goodput"] == 0.1
    assert row["slo_kept"] == pytest.approx(1 / 3, abs=1e-4)
    assert row["tokens_per_s_under_slo"] == 1.1
    # 2 GPUs x 3.6 $/h / 3600 s = 0.002 $/s for 1.1 tokens/s.
    assert row["usd_per_million_output_tokens"] == pytest.approx(0.002 / 1.1 * 1e6, rel=1e-3)
    assert row["answers_right"] == 0.5
    assert row["prefix_cache_hit_rate"] is None


def test_cost_of_an_open_loop_is_of_the_requests_that_were_due():
    """All keep the SLO and say the same; one ends after the measured seconds."""
    loads = [load_of(outcome(0.1, [gap] * 10, at=9.5)) for gap in (0.01, 0.2)]
    closed = [sample(load, Slo()).good_tokens for load in loads]
    assert closed[0] > closed[1]
    came = [replace(load, is_open=True) for load in loads]
    assert [sample(load, Slo()).good_tokens for load in came] == [11, 11]
    assert sample(came[0], Slo(tpot=5)).good_tokens == 0


def test_a_failure_is_never_good():
    failed = outcome(0.001, [0.001], error="stalled")
    assert not Slo().kept_by(failed)


def test_tokens_of_the_measured_part_only():
    early = outcome(0.5, [1.0] * 3, at=-2.0)  # events at -1.5, -0.5, 0.5, 1.5
    one = sample(load_of(early), Slo())
    assert one.tokens == 2
    assert one.requests == 0


def test_cost_counts_the_tokens_that_came():
    # A user with 10 tokens a second has 100 in 10 s. The answers that were due in these have 120.
    answers = [outcome(0.1, [0.1] * 39, at=at) for at in (-2.05, 1.95, 5.95, 9.95)]
    one = sample(load_of(*answers), Slo(ttft=500))
    assert one.tokens == one.good_tokens == 100
    slow = outcome(3.0, [0.1] * 39, at=1.0)
    one = sample(load_of(*answers, slow), Slo(ttft=500))
    assert one.tokens == 140
    assert one.good_tokens == pytest.approx(140 * 120 / 160)
    in_the_warm_up = outcome(3.0, [0.1] * 39, at=-1.0)
    one = sample(load_of(*answers, in_the_warm_up), Slo(ttft=500))
    assert one.tokens == one.good_tokens == 140


def test_pooling_is_the_sample_of_all():
    outcomes = [outcome(0.1 * i, [0.01 * i] * 5, at=float(i)) for i in range(1, 7)]
    both = pool([sample(load_of(*outcomes[:3]), Slo()), sample(load_of(*outcomes[3:]), Slo())])
    whole = sample(load_of(*outcomes), Slo())
    assert figures(both, None)["tpot_ms_p90"] == figures(whole, None)["tpot_ms_p90"]
    assert both.seconds == 2 * whole.seconds


def test_hit_rate_where_the_server_says_it():
    with serving([token("a"), token("b", "stop"), usage(2, 10, 4), DONE]) as server:
        one = sample(run_part(plan(server, streams=1), now()), Slo())
    assert figures(one, None)["prefix_cache_hit_rate"] == 0.4
