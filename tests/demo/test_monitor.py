"""Parts of `make monitor-demo`; tests/live/test_metrics.py runs the same Prometheus for real."""

import socket
from urllib.parse import parse_qs, urlparse

from typer.testing import CliRunner

from sere_ray.cli.main import app
from sere_ray.demo.monitor import QUERY, urls
from sere_ray.util.ports import free_ports
from tests.observe.test_rules import known_names


def test_without_prometheus_it_says_which_package_to_install(has_words, tmp_path):
    result = CliRunner().invoke(app, ["monitor-demo"], env={"PATH": str(tmp_path)})
    assert result.exit_code == 2
    has_words(result.stderr, "Prometheus is not installed", "apt install prometheus")


def test_a_port_that_is_taken_is_named_before_anything_starts(has_words, tmp_path):
    (tmp_path / "prometheus").touch(mode=0o755)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = ("--port", "--metrics-port", "--prometheus-port")
        for option in options:
            ports = {name: str(free) for name, free in zip(options, free_ports(3), strict=True)}
            ports[option] = str(port)
            arguments = [part for pair in ports.items() for part in pair]
            result = CliRunner().invoke(
                app, ["monitor-demo", *arguments], env={"PATH": str(tmp_path)}
            )
            assert result.exit_code == 2
            has_words(result.stderr, f"{option} = {port}", "already in use")


def test_the_links_lead_to_metrics_that_exist():
    text = urls(8000, 8080, "http://127.0.0.1:9090")
    assert "http://127.0.0.1:8000/v1" in text
    assert "http://127.0.0.1:8000/sere/ui" in text
    (link,) = [line.split()[-1] for line in text.splitlines() if line.startswith("Prometheus")]
    assert parse_qs(urlparse(link).query)["g0.expr"] == [QUERY]
    assert {"sere:experts_before:mean", "sere:experts_after:mean"} <= known_names()
