"""The policy: what is accepted, and that a refusal says what to do."""

import doctest
import json
import types
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sere_ray.policy import policy as config
from sere_ray.policy.bound import BoundPolicy, Mode, Union
from sere_ray.policy.key import parse_key
from sere_ray.policy.key_file import read_key_file
from sere_ray.policy.policy import Policy
from sere_ray.policy.startup import Dispatch, Replicas, Startup
from sere_ray.util.errors import ArtifactError, PolicyError, SereError
from tests.artifact.strengths import make_strength

SMALLEST: dict[str, Any] = {"similarity": "demo.safetensors", "select_top_k": 2}
KEYS = [
    "similarity",
    "rule",
    "select_top_k",
    "threshold",
    "min_primary_experts",
    "union",
    "mode",
    "tau",
    "loss",
    "guard",
    "beta",
    "fill",
    "runners_up",
    "balance_ranks",
    "lead",
    "limit",
    "protect",
    "by_rows",
    "masks",
    "level",
]
NAN, INF = float("nan"), float("inf")


def refusal(value: object, **options: Any) -> str:
    with pytest.raises(PolicyError) as caught:
        Policy.parse(value, **options)
    message = str(caught.value)
    assert "\n" not in message, "one line"
    assert "pydantic" not in message, "no link to the library's documentation"
    return message


def refusal_of(key: str, value: object) -> str:
    """The message for one wrong value beside a right rest; it names key and value."""
    message = refusal({**SMALLEST, key: value})
    assert message.startswith(f"sere.{key} = {value!r}: ")
    assert message.count("sere.") == 1, "one mistake is named once"
    return message


# --- accepted ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"rule": "none", "level": 2},
        {"rule": "none", "level": 0},
        {"rule": "margin", "tau": 0.1, "level": 1},
        {"similarity": "f", "select_top_k": 2, "level": 1},
        {"similarity": "f", "rule": "spare", "tau": 0.1, "level": 1},
        {"similarity": "f", "rule": "margin", "loss": 0.1, "level": 0},
    ],
)
def test_masks_go_with_every_rule_that_engines_have(keys) -> None:
    policy = Policy.parse({"masks": "m", **keys})
    assert policy.for_model(top_k=4, strengths={"margin": make_strength()}).level == keys["level"]
    assert Policy.parse(policy.model_dump()) == policy


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rule": "none", "level": 1}, "sere.level = 1: is one of masks; give masks, too"),
        ({"rule": "margin", "tau": 0.1}, "sere.similarity is missing"),
        ({"rule": "none", "masks": "m"}, "sere.level is missing: masks = 'm'"),
        ({**SMALLEST, "level": 1}, "sere.level = 1: is one of masks; give masks, too"),
        ({"select_top_k": 2, "masks": "m", "level": 1}, "sere.similarity is missing"),
        ({"rule": "spare", "tau": 0.1, "masks": "m", "level": 1}, "sere.similarity is missing"),
        ({"rule": "margin", "loss": 0.1, "masks": "m", "level": 0}, "sere.similarity is missing"),
        (
            {"similarity": "f", "rule": "margin", "loss": 0.1, "masks": "m", "level": 1},
            "sere.loss = 0.1: was measured without masks; give tau, level = 0, or no masks",
        ),
        ({**SMALLEST, "masks": "m", "level": -1}, "sere.level = -1: "),
        ({**SMALLEST, "masks": "", "level": 1}, "sere.masks = '': "),
    ],
)
def test_what_masks_do_not_go_with(keys, words) -> None:
    assert words in refusal(keys)


def test_a_level_moves_and_a_rule_keeps_its_masks() -> None:
    alone = Policy.parse({"masks": "m", "level": 1, "rule": "none"})
    assert alone.changed({"level": 3}).level == 3
    margin = alone.changed({"rule": "margin", "tau": 0.1})
    assert (margin.masks, margin.level) == ("m", 1)
    assert margin.changed({"rule": "none"}) == alone
    with pytest.raises(PolicyError, match=r"similarity is missing"):
        alone.changed({"rule": "sere", "select_top_k": 2})


def test_a_change_of_rule_leaves_out_what_the_other_rule_has():
    margin = Policy.parse({"similarity": "f", "rule": "margin", "tau": 0.1, "fill": 0.3})
    ranged = margin.changed({"by_rows": [{"up_to": 4, "tau": 0.2}], "min_primary_experts": 3})
    sere = ranged.changed({"rule": "sere", "select_top_k": 4})
    expected = {"similarity": "f", "select_top_k": 4, "min_primary_experts": 3}
    assert sere == Policy.parse(expected), "a key that both have stays"
    assert sere.changed({"rule": "sere", "threshold": 0.5}).select_top_k == 4
    assert sere.changed({"rule": "margin", "tau": 0.1}).select_top_k is None
    with pytest.raises(PolicyError, match=r"tau = 0\.5"):
        margin.changed({"rule": "sere", "select_top_k": 4, "tau": 0.5})
    for rule in ("oea", {}, ["sere"], None):
        with pytest.raises(PolicyError, match=r"sere\.rule = "):
            margin.changed({"rule": rule})


def test_defaults_are_those_of_the_specification() -> None:
    policy = Policy.parse(SMALLEST)
    assert policy.model_dump() == {
        **SMALLEST,
        "rule": "sere",
        "threshold": None,
        "min_primary_experts": None,
        "union": "global",
        "mode": "on",
        **dict.fromkeys(KEYS[KEYS.index("tau") :]),
    }
    assert sorted(Policy.model_fields) == sorted(KEYS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("select_top_k", 1),
        ("select_top_k", 64),
        ("threshold", None),
        ("threshold", 0),
        ("threshold", 0.0),
        ("threshold", 1),
        ("threshold", 1.0),
        ("threshold", 0.3),
        ("min_primary_experts", None),
        ("min_primary_experts", 0),
        ("min_primary_experts", 512),
        ("mode", "off"),
        ("mode", "observe"),
        ("mode", "on"),
        ("rule", "sere"),
        ("union", "global"),
        ("union", "local"),
        ("similarity", "~/a b.safetensors"),
    ],
)
def test_accepted(key: str, value: object) -> None:
    assert getattr(Policy.parse({**SMALLEST, key: value}), key) == value


def test_an_integer_threshold_becomes_a_float() -> None:
    assert type(Policy.parse({**SMALLEST, "threshold": 1}).threshold) is float


def test_a_policy_passes_through() -> None:
    policy = Policy.parse(SMALLEST)
    assert Policy.parse(policy) is policy


def test_the_mapping_is_not_modified() -> None:
    value = {**SMALLEST, "threshold": 1}
    Policy.parse(value)
    assert value == {**SMALLEST, "threshold": 1}
    assert type(value["threshold"]) is int


def test_path_expands_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    policy = Policy.parse({**SMALLEST, "similarity": "~/m.safetensors"})
    assert policy.similarity_path == Path("/home/someone/m.safetensors")
    assert policy.similarity == "~/m.safetensors"
    assert Policy.parse(SMALLEST).similarity_path == Path("demo.safetensors")


policies = st.fixed_dictionaries(
    {
        "similarity": st.text(min_size=1).filter(lambda s: s.isprintable()),
        "select_top_k": st.integers(1, 64),
    },
    optional={
        "rule": st.just("sere"),
        "threshold": st.none() | st.floats(0, 1) | st.integers(0, 1),
        "min_primary_experts": st.none() | st.integers(0, 4096),
        "union": st.sampled_from(get_args(Union)),
        "mode": st.sampled_from(get_args(Mode)),
    },
)


@settings(deadline=None, max_examples=100)
@given(value=policies)
def test_round_trip_through_json(value: dict[str, Any]) -> None:
    policy = Policy.parse(json.loads(json.dumps(value)))
    assert {key: getattr(policy, key) for key in value} == value
    assert Policy.parse(json.loads(policy.model_dump_json())) == policy
    assert Policy.parse(json.loads(json.dumps(policy.model_dump()))) == policy
    assert hash(Policy.parse(policy.model_dump())) == hash(policy)


# --- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "allowed", "about"),
    [
        ("similarity", "", "at least 1 character", "path of the similarity artifact"),
        ("similarity", 3, "string", "path of the similarity artifact"),
        ("similarity", b"x", "string", "path of the similarity artifact"),
        ("similarity", Path("x"), "string", "path of the similarity artifact"),
        ("select_top_k", 0, "greater than or equal to 1", "<= K"),
        ("select_top_k", -1, "greater than or equal to 1", "<= K"),
        ("select_top_k", True, "integer", "<= K"),
        ("select_top_k", False, "integer", "<= K"),
        ("select_top_k", 2.0, "integer", "<= K"),
        ("select_top_k", 2.5, "integer", "<= K"),
        ("select_top_k", "2", "integer", "<= K"),
        ("select_top_k", [2], "integer", "<= K"),
        ("select_top_k", NAN, "integer", "<= K"),
        ("select_top_k", INF, "integer", "<= K"),
        ("threshold", -0.1, "greater than or equal to 0", "null = any"),
        ("threshold", -1, "greater than or equal to 0", "null = any"),
        ("threshold", 1.5, "less than or equal to 1", "null = any"),
        ("threshold", 2, "less than or equal to 1", "null = any"),
        ("threshold", INF, "less than or equal to 1", "null = any"),
        ("threshold", -INF, "greater than or equal to 0", "null = any"),
        ("threshold", NAN, "", "null = any"),
        ("threshold", "0.5", "number", "null = any"),
        ("threshold", "null", "number", "null = any"),
        ("threshold", True, "number", "null = any"),
        ("threshold", False, "number", "null = any"),
        ("threshold", [0.5], "number", "null = any"),
        ("min_primary_experts", -1, "greater than or equal to 0", "null = K"),
        ("min_primary_experts", True, "integer", "null = K"),
        ("min_primary_experts", 8.0, "integer", "null = K"),
        ("min_primary_experts", "8", "integer", "null = K"),
        ("min_primary_experts", "K", "integer", "null = K"),
        ("mode", "On", "'off', 'observe' or 'on'", "exact"),
        ("mode", "enabled", "'off', 'observe' or 'on'", "exact"),
        ("mode", True, "'off', 'observe' or 'on'", "exact"),  # YAML 1.1 reads `mode: on` so
        ("mode", False, "'off', 'observe' or 'on'", "exact"),
        ("mode", None, "'off', 'observe' or 'on'", "exact"),
        ("mode", ["on"], "'off', 'observe' or 'on'", "exact"),
        ("rule", "SERE", "'sere'", "which rule re-routes"),
        ("rule", None, "'sere'", "which rule re-routes"),
        ("rule", "topk", "'sere', 'margin' or 'spare'", "compared by `sere-ray evaluate` only"),
        ("rule", "oea", "'sere', 'margin' or 'spare'", "compared by `sere-ray evaluate` only"),
        ("union", "rank", "'global' or 'local'", "all ranks"),
        ("union", None, "'global' or 'local'", "all ranks"),
    ],
)
def test_refusal_names_key_value_what_is_allowed_and_what_it_is(
    key: str, value: object, allowed: str, about: str
) -> None:
    message = refusal_of(key, value)
    assert allowed in message
    assert about in message


@pytest.mark.parametrize("value", [1.5, -0.5, NAN, "0.5"])
def test_threshold_refusal_names_the_whole_range(value: object) -> None:
    assert "0..1" in refusal_of("threshold", value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("treshold", "threshold"),
        ("Threshold", "threshold"),
        ("selct_top_k", "select_top_k"),
        ("select-top-k", "select_top_k"),
        ("select_topk", "select_top_k"),
        ("min_primary_expert", "min_primary_experts"),
        ("min_primary", "min_primary_experts"),
        ("modes", "mode"),
        ("similarities", "similarity"),
        ("similarity_path", "similarity"),
        ("unions", "union"),
        ("rules", "rule"),
    ],
)
def test_misspelt_key(written: str, meant: str) -> None:
    message = refusal({**SMALLEST, written: 0.3})
    assert message.startswith(f"sere.{written} = 0.3: unknown key; did you mean '{meant}'? ")
    assert all(key in message.split("allowed keys: ")[1] for key in KEYS)


@pytest.mark.parametrize("key", ["", "k", "xyz", "where", "a.b", "ключ", "prefer_local_rank"])
def test_key_like_no_other(key: str) -> None:
    message = refusal({**SMALLEST, key: 1})
    assert message.startswith(f"sere.{key} = 1: unknown key; allowed keys: ")
    assert "did you mean" not in message


def test_misspelt_required_key_says_both() -> None:
    message = refusal({"similarty": "x", "select_top_k": 1})
    assert "sere.similarity is missing" in message
    assert "did you mean 'similarity'?" in message


@pytest.mark.parametrize("key", ["similarity", "select_top_k"])
def test_missing_key(key: str) -> None:
    message = refusal({k: v for k, v in SMALLEST.items() if k != key})
    assert message == f"sere.{key} is missing: give it ({Policy.model_fields[key].description})"


def test_every_mistake_is_named() -> None:
    message = refusal({"select_top_k": 0, "threshold": "a", "modus": "on"})
    assert message.count("sere.") == 4
    for part in ("similarity is missing", "select_top_k = 0", "threshold = 'a'", "modus = 'on'"):
        assert f"sere.{part}" in message


@pytest.mark.parametrize("key", [1, None, True, ("a", "b"), b"mode"])
def test_key_that_is_no_string(key: object) -> None:
    """A YAML file can hold one: YAML 1.1 reads a key `on` or `2` so."""
    assert "unknown key" in refusal({**SMALLEST, key: 1})


@pytest.mark.parametrize(
    "value",
    [None, True, 3, "demo.safetensors", '{"select_top_k": 2}', [], [SMALLEST], set(), object()],
)
def test_no_mapping(value: object) -> None:
    message = refusal(value)
    assert message.startswith(f"sere = {value!r}: must be a mapping")
    assert '{"similarity": "FILE", "select_top_k": 2}' in message
    assert refusal(value, where="x.y").startswith(f"x.y = {value!r}: ")


def test_example_of_the_refusal_is_a_policy() -> None:
    message = refusal(None)
    Policy.parse(json.loads(message[message.index("{") :]))


def test_any_mapping_is_a_mapping() -> None:
    assert Policy.parse(types.MappingProxyType(SMALLEST)) == Policy.parse(SMALLEST)


@pytest.mark.parametrize("wrong", [{"select_top_k": 0}, {"k": 1}, {"similarity": 3}])
def test_where_names_the_mapping(wrong: dict[str, Any]) -> None:
    key = next(iter(wrong))
    assert refusal({**SMALLEST, **wrong}, where="model.sere").startswith(f"model.sere.{key} = ")
    assert refusal({}, where="model.sere").startswith("model.sere.similarity is missing")


def test_refusal_hides_its_cause() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.parse({})
    assert isinstance(caught.value, SereError)
    assert not isinstance(caught.value, ValueError), "pydantic of vLLM's config would wrap it"
    assert caught.value.__suppress_context__


def test_direct_construction_is_as_strict() -> None:
    for wrong in ({"threshold": NAN}, {"select_top_k": True}, {"k": 1}):
        with pytest.raises(ValidationError):
            Policy(**{**SMALLEST, **wrong})


# --- bound to a model --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("floor", "expected"), [(None, 8), (0, 0), (1, 1), (8, 8), (9, 9), (512, 512)]
)
def test_floor_defaults_to_k(floor: int | None, expected: int) -> None:
    policy = Policy.parse({**SMALLEST, "min_primary_experts": floor, "threshold": 0.25})
    assert policy.for_model(top_k=8) == BoundPolicy(
        mode="on", select_top_k=2, threshold=0.25, min_primary_experts=expected
    )
    assert policy.min_primary_experts == floor, "the policy itself is not changed"


@pytest.mark.parametrize("mode", get_args(Mode))
def test_mode_is_kept(mode: Literal["off", "observe", "on"]) -> None:
    assert Policy.parse({**SMALLEST, "mode": mode}).for_model(top_k=2).mode == mode


@pytest.mark.parametrize("union", get_args(Union))
def test_union_is_kept(union: Literal["global", "local"]) -> None:
    assert Policy.parse({**SMALLEST, "union": union}).for_model(top_k=2).union == union


def test_s_up_to_k() -> None:
    policy = Policy.parse({**SMALLEST, "select_top_k": 8})
    assert policy.for_model(top_k=8).select_top_k == 8
    with pytest.raises(PolicyError) as caught:
        policy.for_model(top_k=6)
    message = str(caught.value)
    assert message.startswith("sere.select_top_k = 8: ")
    assert "K = 6" in message
    assert "1..6 is allowed" in message
    with pytest.raises(PolicyError, match=r"^a\.b\.select_top_k = 8: "):
        policy.for_model(top_k=7, where="a.b")


def test_frozen() -> None:
    policy = Policy.parse(SMALLEST)
    bound = policy.for_model(top_k=8)
    for thing in (policy, bound):
        for name in type(thing).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(thing, name, getattr(thing, name))
    assert len({policy, Policy.parse(SMALLEST)}) == 1
    assert len({bound, policy.for_model(top_k=8)}) == 1


# --- other rules -------------------------------------------------------------------------------


def other(rule: str, **keys: Any) -> dict[str, Any]:
    return {"similarity": "demo.safetensors", "rule": rule, **keys}


@pytest.mark.parametrize(
    "value",
    [
        other("margin", tau=0.01),
        other("margin", tau=[0.01, 0.0, 1.0], beta=0.0, fill=0.5, runners_up=4),
        other("margin", tau=0.01, balance_ranks=True),
        other("spare", tau=0.01),
        other("spare", tau=[0.01, 0.0, 1.0], lead=0.5, limit=0.0, protect=False, runners_up=4),
    ],
)
def test_keys_of_other_rules(value: dict[str, Any]) -> None:
    policy = Policy.parse(value)
    assert Policy.parse(policy.model_dump()) == policy, "null stands for a key left out"
    assert Policy.parse(json.loads(policy.model_dump_json())) == policy
    bound = policy.for_model(top_k=4)
    layer = bound.of_layer(1, 48, None)
    expected = {key: value[key] for key in value if key not in ("similarity", "rule", "tau")}
    assert expected.items() <= vars(layer).items()
    assert layer.tau == (0.0 if isinstance(value["tau"], list) else 0.01)
    assert layer.min_primary_experts == 4
    assert hash(bound) == hash(policy.for_model(top_k=4))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (other("margin", tau=0.1, threshold=0.3), ["sere.threshold = 0.3", "'margin'", "tau"]),
        (other("margin", tau=0.1, select_top_k=2), ["sere.select_top_k = 2", "only tau"]),
        (
            other("margin", tau=0.1, runners_up=10**30),
            ["runners_up", "less than or equal to 1048576"],
        ),
        (other("sere", select_top_k=10**30), ["select_top_k", "less than or equal to 1048576"]),
        (
            other("sere", select_top_k=1, min_primary_experts=10**30),
            ["min_primary_experts", "less than or equal to 1048576"],
        ),
        (
            other("sere", select_top_k=1, by_rows=[{"up_to": 10**30, "select_top_k": 1}]),
            ["by_rows.0.up_to", "1,048,576"],
        ),
        (other("margin"), ["sere.tau is missing"]),
        (other("spare"), ["sere.tau is missing"]),
        (other("spare", tau=0.1, beta=0.5), ["sere.beta = 0.5", "'spare'", "lead, limit, protect"]),
        (other("spare", tau=0.1, lead=1.5), ["sere.lead = 1.5", "less than or equal to 1"]),
        (other("spare", tau=0.1, limit=-1.0), ["sere.limit = -1.0", "greater than or equal to 0"]),
        (other("spare", tau=0.1, protect=0), ["sere.protect = 0", "boolean"]),
        (other("margin", tau=0.1, protect=False), ["sere.protect = False", "'margin'"]),
        (other("sere", select_top_k=2, tau=0.1), ["sere.tau = 0.1", "'sere'"]),
        (other("sere", select_top_k=2, experts=3), ["sere.experts = 3: unknown key"]),
        (other("lynx", experts=3), ["sere.rule = 'lynx'", "sere.experts = 3: unknown key"]),
        (other("margin", tau=1.5), ["sere.tau = 1.5: must be a number from 0 to 1"]),
        (other("margin", tau=[0.1, 2]), ["sere.tau = [0.1, 2]: must be a number", "or a list"]),
        (other("margin", tau=True), ["sere.tau = True: must be a number"]),
        (other("margin", tau=0.1, fill=-1.0), ["sere.fill = -1.0", "greater than or equal to 0"]),
        (other("margin", tau=0.1, balance_ranks=1), ["sere.balance_ranks = 1", "boolean"]),
    ],
)
def test_keys_of_another_rule_are_refused_by_name(
    value: dict[str, Any], words: list[str], has_words: Any
) -> None:
    has_words(refusal(value), *words)


def test_a_list_has_a_number_for_each_layer(has_words: Any) -> None:
    policy = Policy.parse(other("margin", tau=[0.1, 0.2]))
    policy.check_layers(2)
    with pytest.raises(PolicyError) as caught:
        policy.check_layers(3)
    has_words(str(caught.value), "sere.tau = [0.1, 0.2]", "2 numbers", "3 MoE layers")


# --- by the rows of a step ---------------------------------------------------------------------

RANGES = [{"up_to": 4, "tau": 0.1, "fill": 1.0}, {"up_to": 16, "tau": [0.2, 0.3]}]


def test_keys_by_the_rows_of_a_step() -> None:
    policy = Policy.parse(other("margin", tau=0.4, fill=0.5, by_rows=RANGES))
    for again in (policy.model_dump(), json.loads(policy.model_dump_json())):
        assert Policy.parse(again) == policy
    assert policy.model_dump()["by_rows"][0] == RANGES[0], "an entry holds what was written"
    bound = policy.for_model(top_k=4)
    layers = {rows: bound.for_rows(rows).of_layer(1, 48, None) for rows in (0, 1, 4, 5, 16, 17)}
    assert [of.tau for of in layers.values()] == [0.1, 0.1, 0.1, 0.3, 0.3, 0.4]
    assert [of.fill for of in layers.values()] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    assert all(of.min_primary_experts == 4 for of in layers.values())
    assert len({bound, policy.for_model(top_k=4)}) == 1
    assert Policy.parse(other("margin", tau=0.4)).for_model(top_k=4).for_rows(1).by_rows == ()


def test_null_in_an_entry_is_a_key_not_given() -> None:
    entry = {"up_to": 8, "threshold": None}
    policy = Policy.parse({**SMALLEST, "threshold": 0.5, "by_rows": [entry]})
    bound = policy.for_model(top_k=4)
    assert (bound.for_rows(8).threshold, bound.for_rows(9).threshold) == (None, 0.5)


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([], ["by_rows = []", "1 to 16 entries", "up_to: 8"]),
        ({"up_to": 8, "tau": 0.1}, ["by_rows = {", "must be a list"]),
        ([[8, 0.1]], ["by_rows.0 = [8, 0.1]", "must be a mapping"]),
        ([{"tau": 0.1}], ["by_rows.0.up_to = None", "above 0"]),
        ([{"up_to": 0, "tau": 0.1}], ["by_rows.0.up_to = 0", "above 0"]),
        ([{"up_to": True, "tau": 0.1}], ["by_rows.0.up_to = True"]),
        ([RANGES[1], RANGES[0]], ["by_rows.1.up_to = 4", "above 16", "small steps to large"]),
        ([RANGES[0], RANGES[0]], ["by_rows.1.up_to = 4", "above 4"]),
        ([{"up_to": 8}], ["by_rows.0 = {'up_to': 8}", "changes nothing"]),
        ([{"up_to": 8, "tau": 2}], ["sere.by_rows.0.tau = 2: must be a number from 0 to 1"]),
        ([{"up_to": 8, "tau": None}], ["sere.by_rows.0.tau is missing"]),
        ([{"up_to": 8, "taus": 2}], ["by_rows.0.taus = 2", "up_to", "'margin'", "runners_up"]),
        ([{"up_to": 8, "mode": "off"}], ["by_rows.0.mode = 'off'", "an entry takes up_to"]),
        ([{"up_to": 8, "select_top_k": 2}], ["by_rows.0.select_top_k = 2", "'margin'"]),
        ([{"up_to": n, "tau": 0.1} for n in range(1, 18)], ["1 to 16 entries"]),
    ],
)
def test_entries_are_refused_by_name(ranges: Any, words: list[str], has_words: Any) -> None:
    has_words(refusal(other("margin", tau=0.4, by_rows=ranges)), *words)


def test_entries_are_checked_against_the_model(has_words: Any) -> None:
    policy = Policy.parse(other("margin", tau=0.4, by_rows=RANGES))
    with pytest.raises(PolicyError) as caught:
        policy.check_layers(3)
    has_words(str(caught.value), "sere.by_rows.1.tau = [0.2, 0.3]", "3 MoE layers")
    entry = {"up_to": 8, "select_top_k": 5}
    with pytest.raises(PolicyError) as caught:
        Policy.parse({**SMALLEST, "by_rows": [entry]}).for_model(top_k=4)
    has_words(str(caught.value), "sere.by_rows.0.select_top_k = 5", "K = 4")


# --- what an engine takes at its start ---------------------------------------------------------


@pytest.mark.parametrize("dispatch", get_args(Dispatch))
def test_the_key_of_an_engine_holds_a_policy_and_more(dispatch: Dispatch) -> None:
    policy, startup = parse_key({**SMALLEST, "dispatch": dispatch})
    assert policy == Policy.parse(SMALLEST)
    assert startup == Startup(dispatch=dispatch)


@pytest.mark.parametrize("replicas", get_args(Replicas))
def test_copies_are_chosen_when_an_engine_starts(replicas: Replicas) -> None:
    assert parse_key({**SMALLEST, "replicas": replicas})[1] == Startup(replicas=replicas)
    assert parse_key(SMALLEST)[1].replicas == "by_tokens"
    with pytest.raises(PolicyError, match="'by_tokens' or 'by_experts'"):
        parse_key({**SMALLEST, "replicas": "by_load"})


@pytest.mark.parametrize("files", [{}, {"similarity": "f"}])
def test_a_rule_that_changes_nothing_is_for_engines_that_choose_copies(
    files: dict[str, str], has_words: Any
) -> None:
    by_experts = Startup(replicas="by_experts")
    policy, startup = parse_key({**files, "rule": "none", "replicas": "by_experts"})
    assert startup == by_experts
    assert policy.for_model(top_k=4).rule == "none"
    assert parse_key(policy, running=by_experts)[0] == policy
    masks = {"masks": "m", "level": 1}
    assert parse_key({**files, "rule": "none", **masks})[0].masks == "m"
    for value in (policy, {**files, "rule": "none"}, policy.model_dump()):
        with pytest.raises(PolicyError) as caught:
            parse_key(value)
        has_words(
            str(caught.value), "sere.rule = 'none'", "masks and level", "replicas = 'by_experts'"
        )


def test_copies_are_chosen_by_what_all_ranks_read(has_words: Any) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_key({**SMALLEST, "union": "local", "replicas": "by_experts"})
    has_words(str(caught.value), "sere.union = 'local'", "replicas = 'by_experts'", "leave one")


def test_tensor_and_data_parallel_is_switched_on_by_name() -> None:
    assert parse_key({**SMALLEST, "tensor_and_data_parallel": True})[1].tensor_and_data_parallel
    assert not parse_key(SMALLEST)[1].tensor_and_data_parallel
    with pytest.raises(PolicyError, match="is taken when an engine starts"):
        Policy.parse({**SMALLEST, "tensor_and_data_parallel": True})


def test_startup_has_defaults_and_shares_no_key_with_the_policy() -> None:
    assert parse_key(SMALLEST) == (Policy.parse(SMALLEST), Startup())
    assert parse_key(Policy.parse(SMALLEST))[1].dispatch == "allgather"
    assert not set(Startup.model_fields) & set(Policy.model_fields)


def test_the_key_may_name_a_file_of_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("similarity: a.safetensors\nselect_top_k: 2\ndispatch: all_to_all\n")
    assert parse_key(read_key_file(str(file))) == parse_key(
        {"similarity": "a.safetensors", "select_top_k": 2, "dispatch": "all_to_all"}
    )
    file.write_text("select_top_k: 2")
    with pytest.raises(PolicyError, match="similarity is missing"):
        parse_key(read_key_file(str(file)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"a: [", "not a YAML file"),
        (b"\xff", "not a YAML file"),
        (b"", "must be a mapping"),
    ],
)
def test_a_file_that_holds_no_policy_is_refused(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "policy.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PolicyError, match=words) as caught:
        parse_key(read_key_file(str(file)))
    assert str(caught.value).startswith("sere = ")


def test_a_policy_that_travels_names_no_file(tmp_path: Path) -> None:
    """A string that came through the control API or in another file is followed nowhere."""
    file = tmp_path / "policy.yaml"
    file.write_text("similarity: a.safetensors\nselect_top_k: 2\n")
    with pytest.raises(PolicyError, match="must be a mapping"):
        parse_key(str(file))


def test_a_wrong_startup_value_names_what_is_allowed() -> None:
    with pytest.raises(PolicyError) as caught:
        parse_key({**SMALLEST, "dispatch": "deepep"})
    assert str(caught.value).startswith("sere.dispatch = 'deepep': ")
    assert "'allgather' or 'all_to_all'" in str(caught.value)


def test_a_policy_holds_nothing_of_the_start() -> None:
    message = refusal_of("dispatch", "all_to_all")
    assert "when an engine starts" in message
    assert "leave it out" in message


def test_a_misspelt_startup_key_is_recognised() -> None:
    with pytest.raises(PolicyError) as caught:
        parse_key({**SMALLEST, "dispach": "all_to_all"})
    assert "did you mean 'dispatch'?" in str(caught.value)


def test_examples() -> None:
    results = doctest.testmod(config)
    assert results.failed == 0
    assert results.attempted > 0


LOSS = {**SMALLEST, "select_top_k": None, "rule": "margin", "loss": 0.01}


def bound_of(keys, where="sere"):
    return Policy.parse(keys).for_model(top_k=4, strengths={"margin": make_strength()}, where=where)


def test_a_loss_is_a_tau_by_rows_and_layers():
    bound = bound_of({**LOSS, "guard": True})
    found = {rows: bound.for_rows(rows).of_layer(1, 48, None) for rows in (1, 4, 6, 16, 100)}
    assert [found[rows].tau for rows in (1, 4, 16, 100)] == [0.001, 0.001, 0.004, 0.004]
    assert 0.001 < found[6].tau < 0.004
    assert {layer.most for layer in found.values()} == {4000}
    assert all(layer.guard for layer in found.values())
    assert bound.for_rows(4).of_layer(0, 48, None).most == 2000
    assert not bound_of(LOSS).of_layer(0, 48, None).guard


def test_ranges_of_a_user_hold_as_far_as_they_go():
    """Each with the taus of its own loss, or with a tau."""
    entries = [{"up_to": 5, "loss": 0.001}, {"up_to": 8, "loss": None, "tau": 0.5}]
    bound = bound_of({**LOSS, "by_rows": entries})
    taus = [bound.for_rows(rows).of_layer(0, 48, None).tau for rows in (4, 5, 6, 8, 16, 99)]
    assert taus[0] == 0.00001
    assert taus[0] < taus[1] < 0.00004
    assert taus[2:] == [0.5, 0.5, 0.004, 0.004]
    assert [up_to for up_to, _ in bound.by_rows] == [4, 5, 8, 10]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tau": 0.01}, ["sere.loss = 0.01", "tau = 0.01", "null"]),
        ({"beta": 0.25}, ["sere.loss = 0.01", "beta = 0.25"]),
        ({"min_primary_experts": 3}, ["sere.loss = 0.01", "min_primary_experts = 3"]),
        ({"loss": None}, ["sere.tau is missing", "loss in its place"]),
        ({"loss": 0.0}, ["sere.loss = 0.0", "greater than 0"]),
        ({"loss": None, "tau": 0.1, "guard": True}, ["sere.guard = True", "give loss"]),
        ({"rule": "sere", "select_top_k": 1}, ["sere.loss = 0.01", "no such key"]),
    ],
)
def test_loss_stands_alone(changes, words, has_words):
    with pytest.raises(PolicyError) as caught:
        Policy.parse({**LOSS, **changes})
    has_words(str(caught.value), *words)


def test_one_of_tau_and_loss_takes_the_others_place():
    policy = Policy.parse({**LOSS, "guard": True})
    by_tau = policy.changed({"tau": 0.02})
    assert (by_tau.tau, by_tau.loss, by_tau.guard) == (0.02, None, None)
    assert by_tau.changed({"loss": 0.03}).loss == 0.03


def test_a_loss_that_the_artifact_cannot_translate(has_words):
    with pytest.raises(ArtifactError) as caught:
        Policy.parse(LOSS).for_model(top_k=4)
    has_words(str(caught.value), "sere.loss = 0.01", "sere-ray strength", "--rules margin", "tau")
    for loss in (0.0001, 0.5):
        with pytest.raises(PolicyError) as refused:
            bound_of({**LOSS, "loss": loss}, where="policy")
        has_words(str(refused.value), f"policy.loss = {loss}", "0.001 to 0.1", "mode: off")
