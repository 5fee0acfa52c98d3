"""vLLM's expert load balancer (EPLB) at the level of the router, with redundant experts.

vLLM 0.32 refuses EPLB on a CPU, where its map is the identity, so no engine runs here and the
map below stands in for its Triton kernel. What is proven: the router hands the map re-routed
logical ids, so that the balancer places, replicates and counts what is computed. Engines with it:
``test_gpu_load_balancer.py``.
"""

import numpy as np
import pytest
import torch

from sere_ray.artifact.similarity import ArtifactMetadata, SimilarityArtifact
from sere_ray.engine import patches
from sere_ray.engine.cpu.back_end import CpuBackEnd
from sere_ray.engine.cpu.patches import define_op
from sere_ray.engine.cpu.state import CpuState
from sere_ray.engine.recording import distinct
from sere_ray.policy.policy import Policy
from sere_ray.rules import EXACT, PADDING, REROUTABLE, reroute

EXPERTS, REDUNDANT, TOP_K, ROWS = 16, 5, 4, 24


@pytest.fixture
def similarity():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(EXPERTS, EXPERTS, generator=generator).fill_diagonal_(1.0)


@pytest.fixture
def state(similarity):
    metadata = ArtifactMetadata(
        model_id="m",
        architecture="A",
        num_experts=EXPERTS,
        top_k=TOP_K,
        router_fingerprint={0: "0" * 32},
        metric="random",
        date="2026-11-22",
    )
    policy = {"similarity": "a.safetensors", "select_top_k": 1, "min_primary_experts": 0}
    artifact = SimilarityArtifact({0: similarity}, metadata)
    return CpuState(Policy.parse(policy), artifact, TOP_K, ROWS)


def balanced():
    """Experts 0 to 4 have two physical copies, all are placed in an order of their own."""
    from vllm.distributed.eplb.eplb_state import EplbLayerState

    physical = torch.randperm(EXPERTS + REDUNDANT, generator=torch.Generator().manual_seed(1))
    copies = torch.full((EXPERTS, 2), -1)
    copies[:, 0] = physical[:EXPERTS]
    copies[:REDUNDANT, 1] = physical[EXPERTS:]
    return EplbLayerState(
        expert_load_view=torch.zeros(EXPERTS + REDUNDANT, dtype=torch.int32),
        logical_to_physical_map=copies,
        logical_replica_count=(copies >= 0).sum(dim=1),
        should_record_tensor=torch.tensor(True),
        num_unpadded_tokens_tensors=[torch.tensor(ROWS)],
    )


def map_and_record(
    topk_ids,
    expert_load_view,
    logical_to_physical_map,
    logical_replica_count,
    record_enabled,
    num_unpadded_tokens=None,
):
    """vLLM's kernel in torch: copies in turn by a hash of the row, load counted per copy."""
    row = torch.arange(len(topk_ids))[:, None] * 2654435769 % 2**32
    ids = topk_ids.long()
    physical = logical_to_physical_map[ids, row % logical_replica_count[ids]]
    counts = torch.bincount(physical.flatten(), minlength=len(expert_load_view))
    expert_load_view += counts.to(expert_load_view.dtype)
    return physical.to(topk_ids.dtype)


@pytest.mark.parametrize("mode", ["on", "observe"])
def test_the_balancer_gets_rerouted_logical_ids(state, similarity, mode, monkeypatch):
    from vllm.model_executor.layers.fused_moe.router import base_router
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    monkeypatch.setattr(base_router, "eplb_map_to_physical_and_record", map_and_record)
    define_op()

    class Gate(BaseRouter):
        """vLLM's template around a plain top-k."""

        routing_method_type = None

        def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
            weights, ids = router_logits.softmax(dim=-1).topk(self.top_k)
            return weights, ids.to(indices_type)

    layer = balanced()
    router = Gate(TOP_K, EXPERTS + REDUNDANT, layer)
    router.sere_layer = 0
    router.__class__ = patches._rerouting_class(Gate, CpuBackEnd.route)
    captured = []
    router.set_capture_fn(lambda ids: captured.append(ids.clone()))
    state.set_policy({**state.policy.model_dump(), "mode": mode})
    logits = torch.randn(ROWS, EXPERTS, generator=torch.Generator().manual_seed(2))
    weights, logical = logits.softmax(dim=-1).topk(TOP_K)
    kinds = np.array([REROUTABLE] * 20 + [EXACT] * 2 + [PADDING] * 2, dtype=np.int8)
    with state.step(kinds):
        found_weights, physical = router._select_experts(None, logits, torch.int32)

    expected = logical
    if mode == "on":
        row_kind = torch.from_numpy(kinds)
        expected = reroute(logical, weights, similarity, row_kind=row_kind, select_top_k=1)
        assert not torch.equal(expected, logical)
    assert captured[0].tolist() == distinct(expected).tolist()
    assert torch.equal(found_weights, weights)
    logical_of = torch.full((EXPERTS + REDUNDANT,), -1)
    for expert, copies in enumerate(layer.logical_to_physical_map.tolist()):
        for copy in copies:
            if copy >= 0:
                logical_of[copy] = expert
    assert physical.dtype == torch.int32
    assert logical_of[physical.long()].tolist() == expected.tolist()
    load = torch.zeros(EXPERTS, dtype=torch.long)
    load.scatter_add_(0, logical_of, layer.expert_load_view.long())
    assert load.tolist() == torch.bincount(expected.flatten(), minlength=EXPERTS).tolist()


def test_vllm_refuses_the_balancer_on_a_cpu():
    """When it no longer does, test an engine."""
    from vllm.config import ParallelConfig

    with pytest.raises(ValueError, match="only supported on"):
        ParallelConfig(enable_eplb=True, enable_expert_parallel=True, tensor_parallel_size=2)
