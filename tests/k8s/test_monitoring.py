"""Rules and dashboard in the cluster are those of deploy/; every alert says what to do."""

import json
import re

import yaml

from tests.k8s.conftest import ROOT, of_kind, only

DEPLOY = ROOT / "deploy"


def groups(file):
    return yaml.safe_load((DEPLOY / "prometheus" / file).read_text())["groups"]


def test_the_operators_rules_are_those_of_the_files(deployment):
    rule = only(deployment, "PrometheusRule")
    assert rule["spec"]["groups"] == groups("recording.yml") + groups("alerts.yml")


def test_every_dashboard_is_a_config_map(deployment):
    maps = of_kind(deployment, "ConfigMap")
    assert all(m["metadata"]["labels"]["grafana_dashboard"] == "1" for m in maps)
    contents = {name: text for m in maps for name, text in m["data"].items()}
    files = {f.name: f.read_text() for f in (DEPLOY / "grafana" / "dashboards").glob("*.json")}
    assert contents == files
    assert all(json.loads(text) for text in contents.values())
    assert sum(map(len, contents.values())) < 1 << 20  # a ConfigMap's limit


def test_each_alert_has_its_section_and_each_section_its_alert():
    alerts = {rule["alert"] for group in groups("alerts.yml") for rule in group["rules"]}
    page = (ROOT / "docs" / "operate.md").read_text()
    assert set(re.findall(r"^### (Sere\w+)$", page, re.M)) == alerts
    for link in re.findall(r"\]\(#([a-z-]+)\)", page):
        headings = re.findall(r"^#+ (.*)$", page, re.M)
        assert link in {heading.lower().replace(" ", "-") for heading in headings}, link
