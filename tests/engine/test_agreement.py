"""Which policy runs while ranks are told one after the other; and how calls reach them."""

import pytest
import torch

from sere_ray.artifact.similarity import ArtifactMetadata, SimilarityArtifact
from sere_ray.engine.agreement import Told, Versions
from sere_ray.engine.worker_calls import CHANGES, WorkerCalls
from sere_ray.policy.policy import Policy
from sere_ray.util.errors import PolicyError


def told(select_top_k=1, seed=0, file="a.safetensors"):
    metadata = ArtifactMetadata(
        model_id="m",
        architecture="A",
        num_experts=8,
        top_k=4,
        router_fingerprint={0: "0" * 32},
        metric="random",
        date="2026-11-22",
    )
    matrix = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed))
    policy = Policy.parse({"similarity": file, "select_top_k": select_top_k})
    return Told(policy.for_model(top_k=4), SimilarityArtifact({0: matrix}, metadata))


def test_a_policy_runs_when_all_ranks_were_told():
    versions = Versions(told(1))
    second, third = told(2), told(3)
    versions.add(second, None)
    versions.add(third, b"new")
    assert versions.newest == 2
    assert versions.common(1, 2, same_checksum=False) is second
    assert list(versions.told) == [1, 2], "no rank goes back to the first"
    assert versions.common(2, 2, same_checksum=True) is third


def test_ranks_that_were_told_as_many_but_others_are_refused(has_words):
    versions = Versions(told())
    with pytest.raises(PolicyError) as caught:
        versions.common(0, 0, same_checksum=False)
    has_words(str(caught.value), "differ in their policies (number 0)", "similarity artifact")
    assert list(versions.told) == [0]


def test_the_checksum_is_of_all_that_was_told_in_its_order():
    def checksum(first, *later):
        versions = Versions(first)
        for told_later, content in later:
            versions.add(told_later, content)
        return versions.checksum

    plain = checksum(told())
    assert plain == checksum(told(file="elsewhere.safetensors")), "each rank has a copy"
    different = [
        checksum(told(2)),
        checksum(told(seed=1)),
        checksum(told(), (told(2), None), (told(3), None)),
        checksum(told(), (told(3), None), (told(2), None)),
        checksum(told(), (told(2), b"file"), (told(3), None)),
    ]
    assert len({plain, *different}) == 6
    assert all(0 <= number < 2**32 for number in different)


def test_calls_go_by_the_names_that_workers_answer_to():
    from sere_ray.engine.patches import WORKER_METHODS

    sent = []
    calls = WorkerCalls(lambda name, arguments: sent.append((name, arguments)))
    calls.counters(reset=False)
    calls.set_policy({"mode": "off"}, b"file")
    calls.settle()
    calls.signatures()
    calls.gates()
    assert sent == [
        ("sere_counters", (False,)),
        ("sere_set_policy", ({"mode": "off"}, b"file")),
        ("sere_settle", ()),
        ("sere_signatures", ()),
        ("sere_gates", ()),
    ]
    assert [name for name, _ in sent] == list(WORKER_METHODS)
    assert set(CHANGES) < set(WORKER_METHODS)
