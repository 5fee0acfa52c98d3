import os

import pytest
from rich.console import Console

from sere_ray.loadtest import disturbance, soak
from sere_ray.loadtest.client import Outcome
from sere_ray.loadtest.driver import Load, LoadPlan, Target
from sere_ray.loadtest.histogram import Histogram
from sere_ray.loadtest.soak import run_soak
from sere_ray.loadtest.workload import Entry
from sere_ray.util.errors import SereError
from tests.loadtest.servers import DONE, Control, serving, token, usage

ENTRIES = (
    Entry(prompt="one", max_tokens=3, answer="5"),
    Entry(prompt="two", max_tokens=3, answer="6"),
)


def plan(url, seconds):
    return LoadPlan(Target(f"{url}/v1", "tiny"), ENTRIES, seconds)


def run_on(server, *, seconds=60.0, pid=None, kill_rank=False, save=lambda _: None):
    """A soak of this process, which is no deployment, or of ``pid``."""
    run_soak(
        plan(server.url, seconds),
        url=server.url,
        pid=os.getpid() if pid is None else pid,
        kill_rank=kill_rank,
        save=save,
        console=Console(quiet=True),
    )


def outcome(at, ended, error=None, text="Answer: 5", label="5"):
    return Outcome(at, ended=ended, error=error, text=text, label=label)


def content(exact=(), usual=(), log=None):
    loads = [Load(0.0, 100.0, list(own), Histogram()) for own in (exact, usual)]
    log = log or soak.SoakLog()
    log.usage = log.usage or [{"at": 0.0, "memory_mib": 100.0, "handles": 50}]
    return soak._content(plan("http://127.0.0.1", 100), loads, log, 0.0)["rows"][0]


def test_a_wrong_answer_of_another_prompt_is_crossed():
    row = content(
        exact=[
            outcome(1, 2),
            outcome(1, 2, text="Answer: 6"),
            outcome(1, 2, text="Answer: 7"),
            outcome(1, 2, text="no end"),
        ],
        usual=[outcome(1, 2, text="Answer: 6")],  # may be wrong: it was re-routed
    )
    assert (row["exact_answers"], row["exact_answers_wrong"], row["crossed"]) == (4, 3, 1)
    with pytest.raises(SereError, match="crossed 1"):
        soak._judge(row)


def test_failures_count_as_lost_unless_a_rank_is_replaced():
    outcomes = [
        outcome(1, 9, error="cut: early"),
        outcome(11, 12, error="HTTP 503"),
        outcome(12, 14, error="HTTP 503"),
        outcome(13, 20),
        outcome(25, 26),
    ]
    row = content(usual=outcomes, log=soak.SoakLog(killed_at=10.0))
    assert row["failed_while_a_rank_was_replaced"] == 2
    assert row["lost"] == 1
    assert row["lost_kinds"] == {"cut: early": 1}
    assert row["seconds_until_answers_came_again"] == 10
    assert content(usual=outcomes)["lost"] == 3


def test_a_failure_after_the_gang_was_replaced_is_lost():
    times = [(11, "HTTP 503"), (13, "HTTP 503"), (20, None), (31, None), (35, "cut: early")]
    log = soak.SoakLog(killed_at=10.0, wrong_statuses=[(12.0, "503 for {"), (32.0, "503 for {")])
    row = content(usual=[outcome(at - 1, at, error=error) for at, error in times], log=log)
    assert row["seconds_until_answers_came_again"] == 10
    assert (row["failed_while_a_rank_was_replaced"], row["lost"]) == (2, 1)
    assert row["bad_requests_answered_wrongly"] == {"503 for {": 1}
    with pytest.raises(SereError, match=r"lost 1, bad_requests_answered_wrongly"):
        soak._judge(row)


def test_no_answer_after_the_kill_is_a_fault():
    row = content(usual=[outcome(11, 12, error="x")], log=soak.SoakLog(killed_at=10.0))
    with pytest.raises(SereError, match="seconds_until_answers_came_again"):
        soak._judge(row)


def test_growth_of_memory_and_handles():
    log = soak.SoakLog(usage=[{"at": i, "memory_mib": 100.0 + i, "handles": 50} for i in range(30)])
    row = content(log=log)
    assert row["memory_mib_growth"] == pytest.approx(20 / 104.5, abs=1e-3)
    with pytest.raises(SereError, match="memory_mib_growth"):
        soak._judge(row)


def test_growth_of_the_new_gang_is_not_hidden_by_the_smaller_start():
    sizes = [100.0] * 15 + [80.0 + i for i in range(15)]
    log = soak.SoakLog(
        usage=[{"at": i, "memory_mib": s, "handles": 50} for i, s in enumerate(sizes)]
    )
    log.killed_at = 14.0
    row = content(usual=[outcome(14, 14.5)], log=log)
    assert row["memory_mib_growth"] < 0
    with pytest.raises(SereError, match=r"hold: memory_mib_after_the_kill_growth 0\.12"):
        soak._judge(row)


def test_against_a_server_that_takes_nonsense(monkeypatch):
    """A real one, which answers bad requests as if they were good: that is found."""
    monkeypatch.setattr(disturbance, "_STEP_SECONDS", 0.1)
    control, saved = Control(), []
    events = [token("Answer: "), token("5", "stop"), usage(2), DONE]
    with (
        serving(events, gap=0.02, control=control) as server,
        pytest.raises(SereError, match="did not hold"),
    ):
        run_on(server, seconds=4.0, save=saved.append)
    (row,) = saved[0]["rows"]
    assert row["requests"] > 20
    assert row["lost"] == 0
    assert row["policy_changes"] > 2
    assert row["disconnects"] > 2
    assert "200 for" in str(row["bad_requests_answered_wrongly"])
    assert row["crossed"] > 0  # the prompt whose answer is 6 gets the other one's
    assert control.history[-1] == ("on", 3)


@pytest.mark.timeout(60)
def test_an_error_or_a_signal_ends_the_loads(monkeypatch):
    def disturb(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(soak, "disturb", disturb)
    control = Control()
    with serving(gap=0.02, control=control) as server, pytest.raises(KeyboardInterrupt):
        run_on(server, seconds=300.0, save=lambda _: None)
    assert control.history[-1] == ("on", 3)


@pytest.mark.parametrize(
    ("pid", "words"),
    [
        (2**22 + 1, ["--pid 4194305", "no such process", "sere-ray serve"]),
        (os.getpid(), [f"--pid {os.getpid()}", "no engine", "--no-kill-rank"]),
    ],
    ids=["none", "mine"],
)
def test_a_wrong_process_is_refused_before_any_load(pid, words, has_words):
    control = Control()
    with serving(control=control) as server, pytest.raises(SereError) as error:
        run_on(server, pid=pid, kill_rank=True)
    has_words(str(error.value), *words)
    assert not server.requests
    assert not control.history


def test_a_deployment_that_does_not_serve_yet_is_refused_before_any_load(has_words):
    control = Control()
    with serving(status=503, control=control) as server, pytest.raises(SereError) as error:
        run_on(server)
    has_words(str(error.value), server.url, "503", "serving yet")
    assert len(server.requests) == 1
    assert not control.history
