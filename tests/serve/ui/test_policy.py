"""The policy form: changes, refusals, ranks that do not follow yet, mode auto."""

import json

import pytest
from typer.testing import CliRunner

from sere_ray.cli.main import app
from sere_ray.serve.client import request
from sere_ray.util.errors import SereError
from tests.artifact.strengths import make_strength
from tests.browser import watched
from tests.serve.deployment import ADMIN
from tests.serve.test_actor import save_artifact
from tests.serve.ui.actions import REFUSED, UNAUTHORIZED, connect, poll, text

pytestmark = pytest.mark.timeout(120)


def test_a_policy_change(page, site):
    field = page.get_by_label("select_top_k")
    assert field.input_value() == "2"
    apply = page.get_by_role("button", name="Apply")
    assert apply.is_disabled()
    field.fill("1")
    page.get_by_label("observe").check(force=True)
    assert text(page, "#policy > .note") == "select_top_k 2 → 1, mode on → observe"
    poll(page)
    assert field.input_value() == "1", "a poll must not undo what is being edited"
    apply.click()
    page.get_by_text("Version 1 runs on all 2 ranks.").wait_for()
    assert site.newest["policy"]["select_top_k"] == 1
    assert apply.is_disabled()
    poll(page)
    poll(page)
    assert text(page, "#audit li:first-child b") == "ops"
    assert "select_top_k 2 → 1, mode on → observe" in text(page, "#audit li:first-child")
    assert "mode on would save 50 %" in text(page, "#tile-saved-note")
    assert "Mode observe" in text(page, "#notice")
    page.get_by_role("button", name="Load version 0 into the policy form").click()
    assert field.input_value() == "2"
    assert text(page, "#policy > .note") == "select_top_k 1 → 2, mode observe → on"


def test_the_form_has_the_keys_of_the_chosen_rule(page, site):
    """And takes back what another rule had."""
    page.expected_errors.append(REFUSED)
    page.get_by_label("threshold").fill("0.5")
    page.get_by_role("button", name="Apply").click()
    page.get_by_text("Version 1 runs on all 2 ranks.").wait_for()
    assert page.get_by_label("tau", exact=True).is_hidden()
    page.get_by_label("margin", exact=True).check(force=True)
    assert page.get_by_label("threshold").is_hidden()
    page.get_by_role("button", name="Apply").click()
    page.get_by_text("policy.tau is missing").wait_for()
    for name, value in {"tau": "0.1", "fill": "1", "runners_up": "3"}.items():
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_role("button", name="Apply").click()
    page.get_by_text("Version 2 runs on all 2 ranks.").wait_for()
    policy = site.newest["policy"]
    assert (policy["rule"], policy["tau"], policy["threshold"]) == ("margin", 0.1, None)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("select_top_k", "9", "policy.select_top_k = 9: this model chooses K = 4"),
        ("select_top_k", "", "policy.select_top_k is missing: give it"),
        ("threshold", "a lot", "policy.threshold = 'a lot': input should be a valid number"),
    ],
)
def test_a_refused_change_is_explained_at_its_field(page, site, name, value, words):
    page.expected_errors.append(REFUSED)
    page.get_by_label(name).fill(value)
    page.get_by_label("observe").check(force=True)
    page.get_by_label(name).press("Enter")
    page.locator(f"#policy-{name}-error", has_text=words).wait_for()
    assert page.get_by_label(name).get_attribute("aria-invalid") == "true"
    assert page.get_by_label(name).input_value() == value, "what was typed stays"
    assert page.get_by_label("observe").is_checked()
    assert site.newest["version"] == 0
    page.get_by_role("button", name="Undo edits").click()
    assert page.get_by_label("on", exact=True).is_checked()


def test_a_change_that_not_all_ranks_follow_yet(page, site):
    site.engines[1].hangs = True
    poll(page)  # frees the rank from its long poll; now it hangs
    page.get_by_label("select_top_k").fill("1")
    page.get_by_role("button", name="Apply").click()
    page.locator("#settled", has_text="version 1 on 0 of 2 ranks").wait_for()
    assert page.locator("#settling").is_visible()
    site.engines[1].hangs = False
    page.get_by_text("Version 1 runs on all 2 ranks.").wait_for()
    assert page.locator("#settling").is_hidden()


def test_mode_auto_shows_its_level_and_why(browser, make_site):
    levels = [{"select_top_k": 2}, {"select_top_k": 1}]
    site = make_site(auto={"tpot_ms": 0.1, "interval_s": 0.5, "patience": 1, "levels": levels})
    with watched(browser, site.url) as page:
        page.expected_errors.append(UNAUTHORIZED)
        connect(page, ADMIN)
        page.locator("#connection", has_text="live").wait_for()
        page.get_by_label("auto", exact=True).check(force=True)
        page.get_by_role("button", name="Apply").click()
        page.locator("#notice", has_text="Mode auto at level 2 of 2 (0 = exact): p90").wait_for()
        assert page.get_by_label("auto", exact=True).is_checked()
        assert page.get_by_label("select_top_k").input_value() == "1"
        assert page.get_by_role("button", name="Apply").is_disabled()
        page.locator("#audit li", has_text="level 2: ").wait_for()
        assert "level 2: p90 0.2 ms > 0.1 ms." in text(page, "#audit li:first-child")


def test_a_loss_is_set_from_a_terminal(site, tmp_path, monkeypatch, has_words):
    """Of an artifact that says what it means; no other one may take its place then."""
    monkeypatch.setenv("SERE_ADMIN_TOKEN", ADMIN)
    save_artifact(tmp_path / "b.safetensors", strengths={"margin": make_strength(layers=2)})
    url = site.url.removesuffix("/sere/ui")

    def set_keys(*pairs):
        return CliRunner().invoke(app, ["policy", "set", *pairs, "--url", url])

    refused = set_keys("rule=margin", "loss=0.01")
    assert refused.exit_code == 2
    has_words(
        refused.output.replace("\n", " "), "loss = 0.01", "sere-ray strength", "a.safetensors"
    )
    assert request(url, "artifact", change={"name": "b.safetensors"})["losses"]["margin"]
    done = set_keys("rule=margin", "loss=0.01", "guard=true")
    assert done.exit_code == 0, done.output
    status = json.loads(done.stdout)
    assert (status["replicas_settled"], status["replicas"]) == (2, 2)
    policy = site.engines[0].told[-1].policy
    assert (policy["loss"], policy["guard"], policy["tau"]) == (0.01, True, None)
    beyond = set_keys("loss=0.5")
    assert beyond.exit_code == 2
    has_words(beyond.output.replace("\n", " "), "loss = 0.5", "0.001 to 0.1")
    with pytest.raises(SereError, match="sere-ray strength"):
        request(url, "artifact", change={"name": "a.safetensors"})
    assert site.newest["policy"]["loss"] == 0.01
