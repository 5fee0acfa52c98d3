"""The rule for many steps at once gives the integers of the reference."""

import pytest
import torch
from hypothesis import given, settings

from sere_ray.rules.sere_steps import reroute_steps

from .test_sere import RULES, Case, assert_same_ids, cases, make_case


def check(case: Case) -> None:
    new = reroute_steps(
        case.ids,
        case.weights,
        case.similarity,
        case.kinds,
        select_top_k=case.select_top_k,
        threshold=case.threshold,
        min_primary_experts=case.floor,
    )
    assert_same_ids(new, case.reroute(), "many steps at once")
    assert new.dtype == case.ids.dtype


@settings(RULES, max_examples=200)
@given(case=cases())
def test_equals_reference(case: Case) -> None:
    check(case)


@pytest.mark.gpu
def test_equals_the_cpu_on_a_gpu() -> None:
    case = make_case(seed=5, rows=64, experts=64, slots=8, select_top_k=2, gate=True)
    knobs = {"select_top_k": 2, "threshold": 0.3, "min_primary_experts": 8}
    tensors = (case.ids, case.weights, case.similarity, case.kinds)
    on_gpu = reroute_steps(*(tensor.cuda() for tensor in tensors), **knobs)
    assert torch.equal(on_gpu.cpu(), reroute_steps(*tensors, **knobs))
