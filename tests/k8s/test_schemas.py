"""Every document of every overlay against its schema; and the schemas catch what they should."""

import copy

import pytest

from tests.k8s.conftest import only
from tests.k8s.schemas import FILES, InvalidError, crd_schema, rules_used, validate

CLUSTER = ("spec", "rayClusterConfig")
WORKER = (*CLUSTER, "workerGroupSpecs", 0)
CONTAINER = ("spec", "template", "spec", "containers", 0)
RULE = ("spec", "groups", 0, "rules", 0)
METRICS = ("spec", "podMetricsEndpoints", 0)


def test_all_documents(documents):
    for document in documents:
        validate(document)


@pytest.mark.parametrize(
    ("kind", "path", "key", "value", "words"),
    [
        ("RayService", WORKER, "groupNme", "x", "groupNme"),
        ("RayService", WORKER, "minReplicas", "two", "'two' is not of type 'integer'"),
        ("RayService", CLUSTER, "authOptions", {"mode": "tokens"}, "'tokens' is not one of"),
        ("RayService", (*WORKER, "template", "metadata"), "lables", {}, "lables"),
        ("RayService", (*WORKER, "template", "spec", "volumes", 0), "emptydir", {}, "emptydir"),
        ("RayService", ("metadata",), "anotations", {}, "anotations"),
        ("PodMonitor", METRICS, "intervall", "1s", "intervall"),
        ("PodMonitor", METRICS, "interval", 15, "15 is not of type 'string'"),
        ("PrometheusRule", RULE, "exprr", "1", "exprr"),
        ("PrometheusRule", RULE, "for", "5 minutes", "does not match"),
        ("StatefulSet", (*CONTAINER, "resources"), "limit", {}, "limit"),
        ("StatefulSet", ("spec",), "replicas", "one", "'one' is not of type"),
        ("NetworkPolicy", ("spec",), "policyType", [], "policyType"),
        ("Ingress", ("spec",), "tls", "yes", "'yes' is not of type"),
        ("PodDisruptionBudget", ("spec",), "minAvailble", 1, "minAvailble"),
    ],
)
def test_a_misspelt_key_and_a_wrong_type_are_caught(rendered, kind, path, key, value, words):
    documents = rendered["multi-node", "deployment"]
    document = copy.deepcopy(next(d for d in documents if d["kind"] == kind))
    validate(document)
    place = document
    for part in path:
        place = place[part]
    place[key] = value
    with pytest.raises(InvalidError) as caught:
        validate(document)
    assert words in str(caught.value)


def test_a_misspelt_key_and_a_wrong_type_in_a_job_are_caught(rendered):
    good = only(rendered["cpu-demo", "calibration"], "RayJob")
    for key, value, words in (
        ("entryPoint", "x", "entryPoint"),
        ("activeDeadlineSeconds", "1 h", "'1 h' is not of type 'integer'"),
    ):
        document = copy.deepcopy(good)
        document["spec"][key] = value
        with pytest.raises(InvalidError) as caught:
            validate(document)
        assert words in str(caught.value)


def test_an_unknown_kind_is_no_silent_pass():
    with pytest.raises(InvalidError, match="no schema"):
        validate({"apiVersion": "ray.io/v1", "kind": "RayCrontab", "metadata": {"name": "x"}})


def test_no_rule_that_only_an_api_server_evaluates_applies(documents):
    """CEL rules are not evaluated here; so no field may be set that has one."""
    for document in documents:
        if document["kind"] in FILES:
            assert rules_used(crd_schema(document["kind"]), document) == []


def test_the_rules_would_be_found(rendered):
    document = copy.deepcopy(only(rendered["cpu-demo", "deployment"], "RayService"))
    document["spec"]["managedBy"] = "me"
    assert len(rules_used(crd_schema("RayService"), document)) == 2
