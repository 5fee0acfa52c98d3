"""What the launcher decides and refuses before a GPU is asked."""

import pytest
import torch

from sere_ray.kernel.alignment import empty_alignment
from sere_ray.kernel.launcher import RuleKernel
from sere_ray.kernel.limits import blocks_of_margin, check_shape, max_aligned_rows
from sere_ray.kernel.logits import check_routable, mask_arguments
from sere_ray.rules.gate import PLAIN, Gate
from sere_ray.util.errors import UnsupportedError

GPU = torch.device("cuda", 0)


def test_blocks_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = [blocks_of_margin(rows, GPU) for rows in (0, 1, 4, 5, 16, 17, 128, 4096)]
    assert found == [1, 1, 1, 2, 4, 8, 8, 8]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert blocks_of_margin(128, GPU) == 1


@pytest.mark.parametrize(("experts", "dtype"), [(128, torch.bfloat16), (60, torch.float32)])
def test_logits_that_no_vector_load_reaches(experts: int, dtype: torch.dtype, has_words) -> None:
    kernel = RuleKernel(experts, 4, torch.int32)
    memory = torch.zeros(3 * experts, dtype=dtype)
    rows = memory[experts:].view(2, experts)  # a row in a larger batch is well
    assert kernel.logit_arguments(rows, PLAIN)[:2] == (rows.data_ptr(), dtype.itemsize)
    with pytest.raises(ValueError) as error:
        kernel.logit_arguments(memory[1 : 1 + experts].view(1, experts), PLAIN)
    has_words(str(error.value), "whole rows", "offset 1")


def test_a_gate_that_the_kernel_was_not_compiled_for(has_words) -> None:
    logits = torch.zeros((2, 64))
    with pytest.raises(ValueError) as error:
        RuleKernel(64, 4, torch.int32).logit_arguments(logits, Gate("sigmoid"))
    has_words(str(error.value), "any_gate")


def test_more_rows_than_a_launch_sorts(has_words) -> None:
    ids, most = torch.zeros((129, 32), dtype=torch.int32), max_aligned_rows(1024, 32)
    empty_alignment(ids[:128], 16, 1024, most)
    with pytest.raises(ValueError) as error:
        empty_alignment(ids, 16, 1024, most)
    has_words(str(error.value), "[129, 32]", "at most 128 rows")
    with pytest.raises(ValueError, match="block_size = 48"):
        empty_alignment(ids[:128], 48, 1024, most)


@pytest.mark.parametrize(("experts", "slots"), [(1025, 8), (128, 33)])
def test_a_shape_that_a_block_does_not_hold(experts, slots, has_words):
    for refuse in (check_shape, lambda e, k: RuleKernel(e, k, torch.int32)):
        with pytest.raises(UnsupportedError) as error:
            refuse(experts, slots)
        has_words(str(error.value), f"num_experts = {experts}", f"top_k = {slots}", "1024", "32")


def test_masks_that_a_kernel_does_not_take(has_words) -> None:
    logits = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert mask_arguments(None, 64, takes=False) == ()
    assert mask_arguments(logits, 64, takes=True) == (logits.data_ptr(), 2)
    for given, takes in ((None, True), (logits, False)):
        with pytest.raises(ValueError, match="a kernel with masks is given their logits"):
            mask_arguments(given, 64, takes=takes)
    for wrong in (logits.half(), torch.zeros(64, 4).T, logits[:, :32]):
        with pytest.raises(ValueError) as error:
            mask_arguments(wrong, 64, takes=True)
        has_words(str(error.value), "mask_logits must be contiguous [T, 64]")
    with pytest.raises(ValueError, match=r"mask_logits must be torch.bfloat16 as the gate's"):
        check_routable(logits, logits.float(), torch.bfloat16, can_route=True)
