import pytest
import torch
from torch import nn

from sere_ray.artifact.gates import (
    HASH_LENGTH,
    find_gate,
    gate_weight,
    router_fingerprint,
    same_gate,
)

FINGERPRINT = (
    "1c8fdd8e75dac85a520d9986762b3d88-"
    "4fXWPriILL/h9da+8wS1vJKlyz62wwc/VWQePrbDBz7ea42+VWSePljuZz/MXK8+3msNv7bDBz+2wwe/MEZiPw=="
)


class Block(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


@pytest.mark.parametrize("name", ["gate", "router"])
def test_the_gate_beside_the_experts(name):
    gate = nn.Linear(8, 4)
    block = Block(experts=nn.Linear(8, 8), shared_expert_gate=nn.Linear(8, 1), **{name: gate})
    assert find_gate(block) is gate
    assert gate_weight(gate) is gate.weight


def test_a_gate_whose_matrix_is_one_of_its_parts():
    inner = nn.Linear(8, 4)
    assert gate_weight(Block(norm=nn.LayerNorm(8), wg=inner)) is inner.weight


def test_none_where_there_is_none_or_it_is_not_clear():
    assert find_gate(Block(experts=nn.Linear(8, 8))) is None
    assert gate_weight(Block(norm=nn.LayerNorm(8))) is None
    assert gate_weight(Block(first=nn.Linear(8, 4), second=nn.Linear(4, 4))) is None
    own = nn.Module()
    own.weight = nn.Parameter(torch.ones(4, 8))
    assert gate_weight(own) is own.weight


def gate(scale, seed=0):
    values = torch.randn((64, 256), generator=torch.Generator().manual_seed(seed)) * scale
    return values.bfloat16()


@pytest.mark.parametrize("scale", [0.1, 0.02, 1e-4, 1e-5])
def test_a_build_in_float16_has_the_same_gate(scale):
    """bf16 -> fp16 changes numbers below 2^-14."""
    first, second = router_fingerprint(gate(scale)), router_fingerprint(gate(scale).half())
    assert same_gate(first, second)
    assert router_fingerprint(gate(scale).float()) == first


@pytest.mark.parametrize("share", [1.0, 0.01, 0.001])
def test_another_fine_tune_has_another_gate(share):
    """A share of the numbers has moved to the next bf16."""
    before = gate(0.02)
    bits = before.view(torch.int16).clone()
    moved = torch.rand(bits.shape, generator=torch.Generator().manual_seed(1)) < share
    after = torch.where(moved, bits + 1, bits).view(torch.bfloat16)
    assert moved.any()
    assert not same_gate(router_fingerprint(before), router_fingerprint(after))
    assert not same_gate(router_fingerprint(before), router_fingerprint(after.half()))


def test_an_artifact_of_format_1_is_compared_by_its_hash():
    fingerprint = router_fingerprint(gate(0.02))
    assert same_gate(fingerprint[:HASH_LENGTH], fingerprint)
    assert not same_gate("0" * HASH_LENGTH, fingerprint)
    assert not same_gate("", fingerprint)
    assert not same_gate("0" * HASH_LENGTH + "-damaged", fingerprint)


def test_a_fingerprint_stays_what_it_is():
    """Artifacts hold it: another version of numpy or torch must give the same."""
    ones = torch.arange(32, dtype=torch.float32).reshape(4, 8) / 32
    found = router_fingerprint(ones)
    assert found[:HASH_LENGTH] == FINGERPRINT[:HASH_LENGTH]
    assert same_gate("0" * HASH_LENGTH + FINGERPRINT[HASH_LENGTH:], found), "the sketch"
