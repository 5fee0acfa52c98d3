import pytest

from sere_ray.loadtest.policies import parse_policies, whole_policy
from sere_ray.util.errors import PolicyError, SereError

SERE = {"similarity": "a", "rule": "sere", "select_top_k": 3, "threshold": 0.5, "mode": "on"}


def test_policies_of_the_command_line():
    assert parse_policies("off, S=2,S=1:threshold=0.3,rule=margin:tau=0.01:union=local") == {
        "off": {"mode": "off"},
        "S=2": {"mode": "on", "rule": "sere", "select_top_k": 2},
        "S=1:threshold=0.3": {
            "mode": "on",
            "rule": "sere",
            "select_top_k": 1,
            "threshold": 0.3,
        },
        "rule=margin:tau=0.01:union=local": {
            "mode": "on",
            "rule": "margin",
            "tau": 0.01,
            "union": "local",
        },
    }
    assert parse_policies("auto") == {"auto": {"mode": "auto"}}
    assert parse_policies("mode=off") == {"mode=off": {"mode": "off"}}


@pytest.mark.parametrize("text", ["S=", "fast", "off,off", "S=1:threshold", ""])
def test_other_forms_are_refused(text, has_words):
    with pytest.raises(SereError) as error:
        parse_policies(text)
    has_words(str(error.value), "--policies")


def test_a_policy_that_tune_wrote_is_named_by_its_file(tmp_path):
    file = tmp_path / "tuned.yaml"
    file.write_text("{similarity: b, rule: margin, tau: [0.02, 0.05], beta: 0.25}")
    policies = parse_policies(f"off,{file}")
    assert list(policies) == ["off", "tuned"]
    policy = whole_policy(SERE, policies["tuned"], "tuned")
    assert (policy["similarity"], policy["rule"]) == ("a", "margin")
    assert list(policy["tau"]) == [0.02, 0.05]
    with pytest.raises(SereError, match=r"none\.yaml: not a readable YAML file"):
        parse_policies(str(tmp_path / "none.yaml"))
    file.write_text("{similarity: b, rule: margin, taut: 0.02}")
    with pytest.raises(
        PolicyError, match=r"tuned\.yaml\.taut = 0\.02: unknown key; did you mean 'tau'"
    ):
        parse_policies(str(file))


def test_keys_of_the_found_policy_stay_unless_they_are_of_another_rule():
    assert whole_policy(SERE, {"mode": "off"}, "off") == {**SERE, "mode": "off"}
    by_rows = {**SERE, "by_rows": [{"up_to": 8, "select_top_k": 1}]}
    assert whole_policy(by_rows, {"mode": "off"}, "off")["by_rows"]
    assert whole_policy(by_rows, {"select_top_k": 2}, "two")["by_rows"] is None
    two = whole_policy(SERE, parse_policies("S=2")["S=2"], "S=2")
    assert (two["select_top_k"], two["threshold"]) == (2, 0.5)
    margin = whole_policy(SERE, {"rule": "margin", "tau": 0.01}, "ours")
    assert (margin["select_top_k"], margin["threshold"], margin["tau"]) == (None, None, 0.01)
    back = whole_policy(margin, parse_policies("S=2")["S=2"], "S=2")
    assert (back["select_top_k"], back["threshold"], back["tau"]) == (2, None, None)
    assert whole_policy(SERE, {"mode": "auto"}, "auto")["mode"] == "auto"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rule": "margin"}, ["ours.tau is missing"]),
        ({"rule": "margin", "tau": 0.01, "select_top_k": 2}, ["'margin' has no such key"]),
        ({"mode": "fast"}, ["ours.mode = 'fast'"]),
    ],
)
def test_keys_that_do_not_belong_together_are_refused(change, words, has_words):
    with pytest.raises(PolicyError) as error:
        whole_policy(SERE, change, "ours")
    has_words(str(error.value), "--policies: ours", *words)
