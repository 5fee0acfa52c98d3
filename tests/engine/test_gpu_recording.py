"""Recorded experts of engines on GPUs, full CUDA graphs: those after the rule, distinct.

What needs no GPU, and the weights that a trainer makes of them: ``test_recording.py``.
"""

import pytest
import torch

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.engine.control import set_policy
from sere_ray.engine.recording import distinct
from sere_ray.policy.policy import Policy
from sere_ray.rules import REROUTABLE, sere
from tests.engine.conftest import artifact_path, generate, prompts, running_engine, sere_key
from tests.engine.gpu_ranks import DEMAND, reports_of
from tests.engine.gpu_recording import RoutedRows, record_ranks, recorded_of
from tests.engine.ranks import RANKS
from tests.engine.test_gpu import GRAPHS

pytestmark = [pytest.mark.gpu, pytest.mark.engine]
MARGIN = {**DEMAND, "rule": "margin"}
DROPPED = 255
"""What 8 bits hold of -1."""


def check_recorded(recorded, passes):
    """Every row that vLLM returns is the one its layer's rule gave.

    Returns:
        How many rows dropped a slot.
    """
    rows_of = {request: [] for request in recorded}
    for requests, _, layers in passes:
        rows = [torch.tensor(layers[i][2]).long() for i in sorted(layers)]
        for row, request in enumerate(requests):
            rows_of[request].append(torch.stack([of_layer[row] for of_layer in rows]))
    dropped = 0
    for request, (dtype, found) in recorded.items():
        assert dtype == "uint8"
        found = torch.tensor(found)
        # A host that runs ahead computes rows behind the end of an answer, too.
        given = torch.stack(rows_of[request])[: len(found)]
        wanted = distinct(given.flatten(0, 1)).view_as(given)
        assert torch.equal(found, wanted.masked_fill(wanted < 0, DROPPED))
        dropped += int((wanted < 0).any(dim=-1).sum())
    return dropped


def check_rule(similarity, passes_of_ranks, select_top_k):
    """The ids of each pass against the reference over the rows of all ranks."""
    assert len({len(passes) for passes in passes_of_ranks}) == 1
    for of_ranks in zip(*passes_of_ranks, strict=True):
        kinds = torch.tensor([k for _, kinds, _ in of_ranks for k in kinds], dtype=torch.int8)
        if REROUTABLE not in kinds:
            continue
        for layer, matrix in similarity.items():
            tensors = ([], [], [])
            for _, own, layers in of_ranks:
                if own:
                    for column, values in zip(tensors, layers[layer], strict=True):
                        column.append(torch.tensor(values))
            before, weights, after = (torch.cat(column) for column in tensors)
            wanted = sere.reroute(
                before,
                weights,
                matrix,
                row_kind=kinds,
                select_top_k=select_top_k,
                threshold=None,
                min_primary_experts=0,
            )
            assert torch.equal(after, wanted)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_moe_64"])
def test_recorded_ids_are_those_of_the_rule(checkpoint, monkeypatch, architecture):
    """Chunked prefill beside decode; rules that change while the engine runs."""
    folder = checkpoint(architecture)
    requests = prompts(12, seed=1, length=(3, 90))
    options = {**GRAPHS, "max_num_batched_tokens": 64, "max_num_seqs": 8}
    with running_engine(folder, **options) as engine:
        stock, outputs = generate(engine, requests, tokens=9)
    key = sere_key(folder, min_primary_experts=0)
    similarity = SimilarityArtifact.load(artifact_path(folder)).layers
    watched = RoutedRows()
    watched.install(monkeypatch.setattr)
    options["enable_return_routed_experts"] = True
    with running_engine(folder, key, **options) as engine:
        for changes in ({"select_top_k": 4}, {"select_top_k": 1}, MARGIN):
            set_policy(engine, Policy.parse({**key, **changes}))
            watched.take()
            answers, outputs = generate(engine, requests, tokens=9)
            passes, recorded = watched.take(), recorded_of(outputs)
            for output, answer in zip(outputs, answers, strict=True):
                known = len(output.prompt_token_ids) + len(answer)
                assert len(recorded[output.request_id][1]) == known - 1
            dropped = check_recorded(recorded, passes)
            if changes == MARGIN:
                assert answers != stock
                continue
            assert (answers == stock) == (changes["select_top_k"] == 4)
            assert bool(dropped) == (changes["select_top_k"] == 1)
            check_rule(similarity, [passes], changes["select_top_k"])


@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")
def test_recorded_ids_of_data_parallel_ranks(checkpoint):
    reports = reports_of(record_ranks, checkpoint, engines=3, time_limit=300)
    similarity = SimilarityArtifact.load(artifact_path(checkpoint("qwen3_moe"))).layers
    for name, size in (("S=4", 4), ("S=1", 1), ("margin", None)):
        for report in reports:
            answers, recorded, passes = report[name]
            dropped = check_recorded(recorded, passes)
            if size is not None:
                assert bool(dropped) == (size == 1)
                assert (answers == report["stock"]) == (size == 4)
        if size is not None:
            check_rule(similarity, [report[name][2] for report in reports], size)
