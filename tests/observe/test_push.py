"""`sere-ray dashboards push` through the real grafana-client against a stub of Grafana's API."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from typer.testing import CliRunner

from sere_ray.cli.main import app
from sere_ray.observe.alerts import ALERTS
from sere_ray.observe.dashboards import DASHBOARD
from sere_ray.observe.grafana_push import policy_marks
from sere_ray.util.ports import free_port
from tests.observe.grafana_stub import TOKEN, grafana


@pytest.fixture
def server():
    with grafana() as (url, store):
        yield url, store


def dashboards(*arguments, token=TOKEN):
    """``(exit code, standard output, standard error)`` of the command."""
    environment = {"GRAFANA_TOKEN": token}
    result = CliRunner().invoke(app, ["dashboards", *arguments], env=environment)
    return result.exit_code, result.stdout, result.stderr


def push(url, *arguments, **options):
    return dashboards("push", "--url", url, *arguments, **options)


def test_the_first_push_creates_everything_and_the_second_changes_nothing(server):
    url, store = server
    code, out, _ = push(url, "--prometheus-url", "http://prometheus:9090")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["created"] * 4
    assert store.folders["sere-ray"]["title"] == "sere-ray"
    assert store.sources["sere-prometheus"]["url"] == "http://prometheus:9090"
    held = store.dashboards["sere-ray"]
    assert held["meta"]["folderUid"] == "sere-ray"
    assert held["dashboard"]["panels"] == DASHBOARD.render()["panels"]
    rules = store.groups["sere-alerts"]["rules"]
    assert [rule["title"] for rule in rules] == [alert.name for alert in ALERTS]
    assert {rule["data"][0]["datasourceUid"] for rule in rules} == {"sere-prometheus"}

    writes = len(store.writes)
    code, out, _ = push(url, "--prometheus-url", "http://prometheus:9090")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["unchanged"] * 4
    assert len(store.writes) == writes


def test_a_push_mends_what_was_edited_and_nothing_else(server):
    url, store = server
    push(url)
    store.dashboards["sere-ray"]["dashboard"]["title"] = "mine"
    store.groups["sere-alerts"]["rules"][0]["for"] = "99m"
    code, out, _ = push(url, "--prometheus-url", "http://elsewhere:9090")
    verbs = [line.split(":")[0] for line in out.splitlines()]
    assert (code, verbs) == (0, ["unchanged", "updated", "updated", "updated"])
    assert store.dashboards["sere-ray"]["dashboard"]["title"] == "sere-ray"
    assert store.dashboards["sere-ray"]["dashboard"]["version"] == 2
    assert store.groups["sere-alerts"]["rules"][0]["for"] == ALERTS[0].lasting


def test_a_dry_run_says_what_would_change_and_writes_nothing(server):
    url, store = server
    code, out, _ = push(url, "--dry-run")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["would create"] * 4
    assert store.writes == []
    push(url)
    store.dashboards["sere-ray"]["dashboard"]["panels"].pop()
    _, out, _ = push(url, "--dry-run")
    assert out.count("would update: dashboard sere-ray") == out.count("would") == 1


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda store: setattr(store, "role", "Viewer"), ["403", "role Admin"]),
        (lambda store: setattr(store, "saved_by_others", 1), ["412", "changed meanwhile"]),
    ],
    ids=["role", "version"],
)
def test_what_grafana_refuses_is_said_in_one_line(server, spoil, words, has_words):
    url, store = server
    push(url)
    store.dashboards["sere-ray"]["dashboard"]["title"] = "mine"
    spoil(store)
    code, _, message = push(url)
    assert code == 2
    has_words(message, url, *words)
    assert "Traceback" not in message


def test_a_wrong_token_an_unset_one_and_no_server_are_said(server, has_words):
    url, _ = server
    code, _, message = push(url, token="wrong")
    assert code == 2
    has_words(message, url, "401", "token", "Service accounts")
    code, _, message = push(url, token="")
    assert code == 2
    has_words(message, "GRAFANA_TOKEN is not set", "--token-from-env")
    nobody = f"http://127.0.0.1:{free_port()}"
    code, _, message = push(nobody)
    assert code == 2
    has_words(message, nobody, "not reached", "--url")
    code, _, message = push("grafana:3000")
    assert code == 2
    has_words(message, "grafana:3000", "http://")


def test_the_token_is_never_printed(server):
    url, _ = server
    for arguments in ((), ("--dry-run",)):
        code, out, err = push(url, *arguments, token="glsa_secret_wrong")
        assert code == 2
        assert "glsa_secret_wrong" not in out + err


def test_a_server_that_is_no_grafana_is_said(has_words):
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        code, _, message = push(f"http://127.0.0.1:{server.server_address[1]}")
    finally:
        server.shutdown()
        server.server_close()
    assert code == 2
    has_words(message, "not as Grafana does", "--url")


def test_a_load_test_is_marked_once(server, has_words):
    url, store = server
    times = ["--start", "2026-01-31T12:00:00Z", "--end", "2026-01-31T13:10:00+01:00"]
    for expected in ("created", "unchanged"):
        code, out, _ = dashboards("annotate", "steady 16", *times, "--url", url)
        assert (code, out.split(":")[0]) == (0, expected)
    (mark,) = store.annotations
    assert mark["tags"] == ["sere-ray", "load-test"]
    assert (mark["text"], mark["timeEnd"] - mark["time"]) == ("steady 16", 600_000)
    code, _, message = dashboards("annotate", "x", "--start", "noon", "--end", "1", "--url", url)
    assert code == 2
    has_words(message, "'noon'", "2026-01-31T12:00:00Z")
    code, _, message = dashboards(
        "annotate", "x", "--start", times[3], "--end", "2026-01-30T12:00:00Z", "--url", url
    )
    assert code == 2
    has_words(message, "--end", "before --start")


def test_policy_changes_that_were_carried_out_become_marks():
    policy = {"mode": "on", "select_top_k": 1, "threshold": 0.3}
    after = {"version": 4, "policy": policy, "sha256": "ab" * 32}
    entries = [
        {"time": "2026-01-31T12:00:00Z", "who": "file", "what": "start", "after": after},
        {"time": "2026-01-31T12:00:01Z", "who": "ops", "what": "policy", "refused": "no"},
        {"time": "2026-01-31T12:00:02Z", "who": "ops", "what": "policy", "after": after},
        {"time": "2026-01-31T12:00:03Z", "who": "ops", "what": "artifact", "after": after},
    ]
    marks = policy_marks(json.loads(json.dumps(entries)))
    assert [mark.text for mark in marks] == [
        "version 4 by ops: mode on, S = 1, rho = 0.3",
        "version 4 by ops: artifact abababababab",
    ]
    assert marks[0].start == marks[0].end == 1_769_860_802_000
