"""What engines of a kind refuse, and in which words."""

import pytest
import torch

from sere_ray.artifact.similarity import ArtifactMetadata, SimilarityArtifact
from sere_ray.policy.capabilities import check_artifact, check_change, check_policy, check_tables
from sere_ray.policy.policy import Policy
from sere_ray.util.errors import ArtifactError, PolicyError, UnsupportedError

SERE = {"select_top_k": 1}
MARGIN = {"rule": "margin", "tau": 0.01}
SPARE = {"rule": "spare", "tau": 0.01}


def policy(keys):
    return Policy.parse({"similarity": "a.safetensors", **keys})


@pytest.mark.parametrize("keys", [SERE, MARGIN, SPARE])
def test_what_a_gpu_computes_can_change_while_it_runs(keys):
    check_policy(policy(keys), on_gpu=True)
    for running in (SERE, MARGIN, SPARE):
        check_change(policy(keys), policy(running), on_gpu=True, several_ranks=False)


def test_what_a_gpu_cannot(has_words):
    keys = {**MARGIN, "balance_ranks": True}
    check_policy(policy(keys), on_gpu=False)
    with pytest.raises(UnsupportedError) as caught:
        check_policy(policy(keys), on_gpu=True)
    has_words(str(caught.value), "sere.balance_ranks = True", "a CPU engine")


def test_a_rule_needs_what_it_reads(has_words):
    metadata = ArtifactMetadata(
        model_id="m", architecture="A", num_experts=4, top_k=2, metric="m", date="2026-11-30"
    )
    layers = {0: torch.eye(4), 1: torch.eye(4)}
    directed = {name: torch.eye(4) for name in ("directed_scale", "directed_loss")}
    whole = SimilarityArtifact(layers, metadata, {0: directed, 1: directed})
    partial = SimilarityArtifact(layers, metadata, {0: directed})
    spare = policy(SPARE)
    check_artifact(spare, whole)
    check_artifact(policy(MARGIN), partial)
    with pytest.raises(ArtifactError) as caught:
        check_artifact(spare, partial)
    has_words(str(caught.value), "a.safetensors", "'spare'", "--statistics directed")
    bare = SimilarityArtifact(layers, metadata)
    for new, running, on_gpu in ((whole, whole, True), (bare, whole, True), (whole, bare, False)):
        check_tables(new, running, on_gpu=on_gpu)
    with pytest.raises(PolicyError, match=r"directed_loss, the running one has not.* restart"):
        check_tables(whole, bare, on_gpu=True)


def test_captured_graphs_hold_what_ranks_exchange(has_words):
    ranks_of_gpus = {"on_gpu": True, "several_ranks": True}
    for keys in (MARGIN, SERE):
        check_policy(policy(keys), on_gpu=True)
        check_change(policy(keys), policy(keys), **ranks_of_gpus)
    with pytest.raises(PolicyError) as caught:
        check_change(policy(MARGIN), policy(SERE), **ranks_of_gpus)
    has_words(str(caught.value), "sere.rule = 'margin'", "hold", "'sere'", "restart")
    local = [policy({**keys, "union": "local"}) for keys in (MARGIN, SERE)]
    check_change(*local, **ranks_of_gpus)
