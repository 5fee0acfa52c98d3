"""``replicas.cu`` on a GPU: the integers of ``rules/replicas.py``, and vLLM's counts."""

import pytest
import torch

from sere_ray.kernel.launcher import RuleKernel
from sere_ray.kernel.replicas import MAX_ROWS, Balancer, map_to_copies
from sere_ray.rules.common import named_by
from tests.rules.test_replicas import draw

from .test_replicas_on_cpu import SHAPES, expected

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape):
    experts, slots, redundant, ranks = shape
    for seed in range(20):
        _, copies, per_rank = draw(seed, experts, redundant, ranks)
        generator = torch.Generator().manual_seed(seed)
        rows = (0, 1, 16, 64, MAX_ROWS)[seed % 5]
        ids = torch.rand(rows, experts, generator=generator).topk(slots).indices
        read = named_by(ids, torch.ones(rows, dtype=torch.bool), experts)
        ids = ids.to((torch.int32, torch.int64)[seed % 2])
        balancer = Balancer(
            copies=copies.to(GPU),
            num_copies=(copies >= 0).sum(dim=1).to(GPU),
            per_rank=per_rank,
            load=torch.zeros(experts + redundant, dtype=torch.int32, device=GPU),
            records=torch.tensor(True, device=GPU),
            num_unpadded=torch.tensor(rows // 2, dtype=torch.int32, device=GPU),
        )
        kernel = RuleKernel(experts, slots, ids.dtype)
        told = read.to(GPU, torch.uint8)
        physical = map_to_copies(kernel, ids.to(GPU), told, balancer).cpu()
        assert torch.equal(physical, expected(ids, read, copies, per_rank))
        counted = physical[: rows // 2].flatten().long().bincount(minlength=experts + redundant)
        assert torch.equal(balancer.load.cpu(), counted.int())
