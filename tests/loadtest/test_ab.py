import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from sere_ray.loadtest import ab
from sere_ray.loadtest.ab import Amount, Comparison, run_comparison
from sere_ray.loadtest.driver import LoadPlan, Target
from sere_ray.loadtest.endpoint import find_model
from sere_ray.loadtest.options import parse_amounts, word_range
from sere_ray.loadtest.plot import by_load
from sere_ray.loadtest.policies import kept_policy
from sere_ray.loadtest.report import write_reports
from sere_ray.loadtest.slo import Price, Slo, broken_slo, check_generator
from sere_ray.loadtest.workload import ClientKey, Entry
from sere_ray.serve.client import parse_changes, set_policy
from sere_ray.util.errors import SereError
from tests.loadtest.servers import DONE, WHOLE, Control, serving, token, usage

QUIET = Console(quiet=True)
POLICIES = {"off": {"mode": "off"}, "S=1": {"mode": "on", "select_top_k": 1}}


def comparison(server, **changes):
    entries = tuple(Entry(prompt=f"p{i}", max_tokens=3) for i in range(20))
    plan = LoadPlan(Target(f"{server.url}/v1", "tiny"), entries, 0.5, warmup=0.1, cache="cold")
    fields = {
        "amounts": [Amount(streams=2)],
        "policies": POLICIES,
        "rounds": 3,
        "slo": Slo(tpot=50),
    }
    return Comparison(server.url, plan, **{**fields, **changes})


@pytest.fixture(scope="module")
def result():
    control, saved = Control(), []
    with serving(gap=0.01, control=control) as server:
        content = run_comparison(comparison(server, price=Price(2.0)), saved.append, QUIET)
    return content, control, saved


def test_policies_alternate_and_the_old_one_comes_back(result):
    _, control, _ = result
    *tried, first, restored = [*control.history[:3], control.history[-1]]
    blocks = control.history[3:-1]
    assert tried == [("off", 3), ("on", 1)]
    assert first == ("observe", 3)  # by which none is measured
    assert [sorted(blocks[i : i + 2]) for i in (0, 2, 4)] == [[("off", 3), ("on", 1)]] * 3
    assert restored == ("on", 3)


def test_rows_hold_intervals_and_ratios(result):
    content, _, saved = result
    base, other = content["rows"]
    assert (base["policy"], base["streams"], other["policy"]) == ("off", 2, "S=1")
    assert "tpot_ms_p50_ratio" not in base
    # The same server answered both.
    assert other["tpot_ms_p50_ratio"] == pytest.approx(1, abs=0.3)
    ratio = other["tpot_ms_p50"] / base["tpot_ms_p50"]
    assert other["tpot_ms_p50_ratio"] == pytest.approx(ratio, rel=1e-3)
    low, high = other["tpot_ms_p50_ratio_95"]
    assert low <= high
    assert base["usd_per_million_output_tokens"] > 0
    assert content["slo"] == "tpot <= 50 ms"
    assert content["usd_per_gpu_hour"] == 2.0
    changed = {"select_top_k": 1, "by_rows": None}
    assert content["policies"]["S=1"] == {"threshold": 0.5, "mode": "on", **changed}
    assert len(content["blocks"]) == 6
    assert saved == [content]


@pytest.mark.parametrize(("rounds", "share"), [(2, 0.50), (3, 0.76), (4, 0.80), (10, 0.90)])
def test_how_often_an_interval_of_few_rounds_holds_the_true_value(rounds, share):
    """As the page and docs/limits.md say it; rounds that vary as normal noise does."""
    draw = np.random.default_rng(1)
    noise = draw.normal(size=(4000, rounds))
    chosen = draw.integers(rounds, size=(ab._RESAMPLES, rounds))
    intervals = (ab._interval(rows[chosen].mean(axis=1)) for rows in noise)
    held = sum(low <= 0 <= high for low, high in intervals)
    assert held / len(noise) == pytest.approx(share, abs=0.025)


def test_salts_are_such_that_vllm_takes_them():
    """Its rule for ``cache_salt``; a salt once named the load, as "2 requests/s"."""
    with serving(control=Control()) as server:
        amounts = [Amount(rate=20.0)]
        run_comparison(comparison(server, amounts=amounts, rounds=1), lambda _: None, QUIET)
    salts = [body["cache_salt"] for _, body in server.requests]
    assert len(set(salts)) == len(salts) > 5
    assert all(len(salt) <= 128 and not set(salt) & set("@/\\\0") for salt in salts)


class Page(HTMLParser):
    """Collects what a page would load from elsewhere, and its text."""

    def __init__(self, text):
        super().__init__()
        self.links, self.words = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words += data + " "


def test_the_page_is_whole_and_says_what_was_measured(result, tmp_path):
    content, _, _ = result
    document = {"command": "x", "machine": {"cores": 2}, **content}
    files = {"html_file": tmp_path / "a.html", "csv_file": tmp_path / "a.csv"}
    write_reports(document, **files, png=tmp_path / "a.png")
    page = Page((tmp_path / "a.html").read_text())
    assert all(link.startswith("data:") for link in page.links)
    for words in ("$2 an hour", "tpot <= 50 ms", "2 streams", "S=1 against off", "bootstrap"):
        assert words in " ".join(page.words.split()), words
    with (tmp_path / "a.csv").open() as file:
        assert [row["policy"] for row in csv.DictReader(file)] == ["off", "S=1"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_loads_stand_from_little_to_much():
    rates = [{"rate": rate, "policy": "off"} for rate in (10.0, 4.0, 16.0)]
    assert list(by_load(rates)) == ["4 requests/s", "10 requests/s", "16 requests/s"]
    streams = [{"rate": None, "streams": n, "policy": p} for n in (16, 4) for p in ("off", "on")]
    assert [[row["policy"] for row in rows] for rows in by_load(streams).values()] == [
        ["off", "on"]
    ] * 2
    assert list(by_load(streams)) == ["4 streams", "16 streams"]


def test_what_is_no_result(tmp_path, has_words):
    with pytest.raises(SereError) as error:
        write_reports({"rows": [{"batch": 1}]}, html_file=tmp_path / "a", csv_file=None, png=None)
    has_words(str(error.value), "loadtest ab")


def test_verdicts():
    row = {"policy": "S=1", "slo_kept": 0.5, "generator_lag_ms_p99": 80.0}
    content = {"slo": "tpot <= 50 ms", "rows": [row, {**row, "policy": "off", "slo_kept": 1.0}]}
    assert [line.split(":")[0] for line in broken_slo(content, 0.9)] == ["S=1"]
    with pytest.raises(SereError, match="80 ms late"):
        check_generator(content, 50.0)
    check_generator(content, 100.0)


def test_without_control_api_it_refuses(has_words):
    with serving() as server, pytest.raises(SereError) as error:
        run_comparison(comparison(server), lambda _: None, QUIET)
    has_words(str(error.value), "404", "SERE_ADMIN_TOKEN", "sere-ray loadtest run")


@pytest.mark.parametrize(("mode", "read"), [("off", 9.0), ("observe", 8.0), ("on", 3.0)])
def test_exact_modes_read_what_the_gate_chose(mode, read):
    steps = {"experts_before": 8.0, "experts_after": 3.0, "step_ms": 1.0, "rows": 4.0}
    own = [ab._Block(None, dict.fromkeys(steps) if mode == "off" else steps)]
    assert ab._steps(own, mode, {**steps, "experts_before": 9.0})["experts_read"] == read


def test_no_block_finds_the_prompts_of_another_or_of_an_earlier_run():
    with serving(control=Control()) as server:
        observe = {"observe": {"mode": "observe"}}
        what = comparison(server, policies=observe, rounds=1)
        for _ in range(2):
            run_comparison(what, lambda _: None, QUIET)
    salts = [body["cache_salt"] for _, body in server.requests]
    assert len(set(salts)) == len(salts) > 5


def test_a_refused_policy_puts_the_old_one_back():
    control = Control(refuse="off")
    last_refused = {"S=1": POLICIES["S=1"], "off": POLICIES["off"]}
    with serving(control=control) as server, pytest.raises(SereError, match="mode off is refused"):
        run_comparison(comparison(server, policies=last_refused), lambda _: None, QUIET)
    assert server.requests == []  # before any load
    assert (control.policy["mode"], control.policy["select_top_k"]) == ("on", 3)


def test_a_block_without_answers_ends_the_run_with_the_reason():
    control = Control()
    with serving(status=503, control=control) as server, pytest.raises(SereError) as error:
        run_comparison(comparison(server), lambda _: None, QUIET)
    assert "HTTP 503" in str(error.value)
    assert (control.policy["mode"], control.policy["select_top_k"]) == ("on", 3)


@pytest.fixture
def long_answers(monkeypatch):
    """A comparison whose answers take 0.6 s: whole blocks are longer, the short one that
    counts what exact routing reads is not, and no request is due in its measured part."""
    monkeypatch.setattr(ab, "_FIRST_SECONDS", 0.3)
    events = [token("a ")] * 8 + WHOLE[-3:]
    control = Control()
    with serving(events, gap=0.6 / len(events), control=control) as server:
        what = comparison(server, rounds=1, amounts=[Amount(streams=1)])
        yield replace(what, plan=replace(what.plan, seconds=1.0)), server, control


def test_the_block_that_only_counts_needs_no_whole_answer(long_answers):
    what, _, control = long_answers
    content = run_comparison(what, lambda _: None, QUIET)
    assert control.history.count(("observe", 3)) == 1
    assert control.history[-1] == ("on", 3)
    assert all(row["requests"] > row["failures"] == 0 for row in content["rows"])


def test_the_block_that_only_counts_does_not_hide_failures(long_answers):
    what, server, control = long_answers
    handler = server.RequestHandlerClass
    answer = handler.do_POST

    def fail_under_observe(self):
        if control.policy["mode"] != "observe":
            return answer(self)
        self.body()
        return self.answer_json(503, {"error": {"message": "not you"}})

    handler.do_POST = fail_under_observe
    with pytest.raises(SereError, match=r"under observe.*HTTP 503"):
        run_comparison(what, lambda _: None, QUIET)
    assert control.history[-1] == ("on", 3)


def test_mode_auto_is_put_back_with_the_keys_under_its_levels():
    control = Control()
    control.policy["mode"] = "auto"
    with serving(control=control) as server:
        with kept_policy(server.url, QUIET) as before:
            set_policy(server.url, {**before, "mode": "on", "select_top_k": 2})
        assert before["select_top_k"] == 3, "not that of the level"
    assert control.history == [("on", 2), ("auto", 3)]


def test_answers_of_one_token_have_no_time_per_token():
    events = [token("a", "stop"), usage(1), DONE]
    with serving(events, gap=0.01, control=Control()) as server:
        content = run_comparison(comparison(server), lambda _: None, QUIET)
    base, other = content["rows"]
    assert base["tpot_ms_p50"] is None
    assert other["tpot_ms_p50_ratio_95"] == [None, None]
    assert other["ttft_ms_p50_ratio"] > 0


def test_a_policy_that_cannot_be_put_back_is_printed(has_words):
    console = Console(record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: None)
        control = Control()
        control.policy["tau"] = [0.02, 0.05]
        with serving(control=control) as server, kept_policy(server.url, console):
            server.RequestHandlerClass.do_PUT = lambda self: self.answer_json(503, {})
    text = console.export_text()
    has_words(text, "sere-ray policy set", "select_top_k=3", "threshold=0.5")
    words = shlex.split(text.partition("sere-ray ")[2])
    changes = parse_changes([word for word in words if "=" in word])
    assert changes == {k: v for k, v in control.policy.items() if k != "similarity"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_puts_the_old_policy_back(number, tmp_path):
    control = Control()
    with serving(gap=0.01, control=control) as server:
        command = [sys.executable, "-m", "sere_ray", "loadtest", "ab", "--url", server.url]
        options = ["--streams", "1", "--out", str(tmp_path / "x.json")]
        # In a background job of a shell SIGINT is ignored, and children inherit that.
        before = signal.signal(number, signal.default_int_handler)
        process = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)
        signal.signal(number, before)
        deadline = time.monotonic() + 60
        while not server.requests and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(20) != 0
    assert control.history[-1] == ("on", 3)
    assert len(control.history) > 1


def test_the_endpoint_is_asked_first(has_words):
    with serving() as server:
        assert find_model(server.url, [], None) == "tiny"
        with pytest.raises(SereError) as error:
            find_model(server.url, [], "huge")
        has_words(str(error.value), "--model huge", "tiny")
        server.RequestHandlerClass.do_GET = lambda self: self.answer_json(401, {})
        with pytest.raises(SereError) as error:
            find_model(server.url, [ClientKey(key="sk-secret")], None)
        has_words(str(error.value), "401", "key 1 of 1", "--keys")
        assert "secret" not in str(error.value)
        url = server.url
    with pytest.raises(SereError) as error:
        find_model(url, [], None)
    has_words(str(error.value), url, "refused", "--url")


def test_run_on_a_plain_endpoint_judges_by_slo(tmp_path):
    out = tmp_path / "run.json"
    with serving(gap=0.02) as server:
        command = [sys.executable, "-m", "sere_ray", "loadtest", "run", "--url", server.url]
        options = ["--streams", "2", "--seconds", "1", "--warmup", "0", "--out", str(out)]
        slo = ["--slo", "tpot=1", "--require-slo", "0.9", "--max-lag-ms", "1000"]
        done = subprocess.run(
            [*command, *options, *slo], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 1, done.stderr
    assert "0.9 are required" in done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["failures"] == 0
    assert row["slo_kept"] == 0


def test_loads_of_the_command_line(has_words):
    assert parse_amounts("4,16", None) == [Amount(streams=4), Amount(streams=16)]
    assert parse_amounts(None, "0.5") == [Amount(rate=0.5)]
    for streams, rates, words in (
        (None, None, "--streams and --rates"),
        ("4", "1", "--streams and --rates"),
        ("0", None, "--streams = '0'"),
        (None, "fast", "--rates = 'fast'"),
    ):
        with pytest.raises(SereError) as error:
            parse_amounts(streams, rates)
        has_words(str(error.value), words)
    with pytest.raises(SereError) as error:
        word_range("--prompt-words", "9,3")
    has_words(str(error.value), "--prompt-words", "20,120")
