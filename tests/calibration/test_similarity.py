"""Sums against all-at-once float64 computations, written independently of them."""

import math

import pytest
import torch
from torch import Tensor

from sere_ray.calibration.similarity import (
    METRICS,
    CkaSums,
    CosineSums,
    FrobeniusSums,
    Sums,
    check_exact_fits,
    in_blocks,
    make_sums,
)
from sere_ray.util.errors import SereError


def naive_frobenius(outputs: Tensor) -> Tensor:
    a = outputs.double()
    distance = torch.stack([torch.stack([torch.linalg.norm(x - y) for y in a]) for x in a])
    return (1 - distance / distance.max()).fill_diagonal_(1)


def naive_cosine(outputs: Tensor) -> Tensor:
    a = outputs.double()
    rows = [
        torch.stack([torch.nn.functional.cosine_similarity(x, y, dim=1).mean() for y in a])
        for x in a
    ]
    return ((torch.stack(rows) + 1) / 2).fill_diagonal_(1)


def hsic_1(k: Tensor, el: Tensor) -> Tensor:
    """Song et al. 2012, eq. 5, as Nguyen et al. 2021 quote it (eq. 3)."""
    n = len(k)
    k, el = k.clone().fill_diagonal_(0), el.clone().fill_diagonal_(0)
    ones = torch.ones(n, dtype=k.dtype)
    middle = (ones @ k @ ones) * (ones @ el @ ones) / ((n - 1) * (n - 2))
    last = 2 / (n - 2) * (ones @ k @ el @ ones)
    return (torch.trace(k @ el) + middle - last) / (n * (n - 3))


def naive_cka(chunks: list[Tensor], weights: list[float]) -> Tensor:
    size = len(chunks[0])
    h = torch.zeros(size, size, dtype=torch.float64)
    for chunk, weight in zip(chunks, weights, strict=True):
        kernels = [a @ a.T for a in chunk.double()]
        for i in range(size):
            for j in range(size):
                h[i, j] += weight * hsic_1(kernels[i], kernels[j])
    norm = h.diagonal().sqrt()
    return (h / norm[:, None] / norm).clamp(0, 1).fill_diagonal_(1)


def naive_cka_exact(outputs: Tensor) -> Tensor:
    a = outputs.double() - outputs.double().mean(1, keepdim=True)

    def norm(x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.norm(y.T @ x) ** 2

    rows = [torch.stack([norm(x, y) / (norm(x, x) * norm(y, y)).sqrt() for y in a]) for x in a]
    return torch.stack(rows)


def random_outputs(experts: int = 7, tokens: int = 50, hidden: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(tokens, hidden, generator=generator)
    return shared + torch.randn(experts, tokens, hidden, generator=generator)


def near_identical(difference: float) -> Tensor:
    """All experts share almost everything."""
    generator = torch.Generator().manual_seed(2)
    shared = torch.randn(40, 32, generator=generator)
    return shared + difference * torch.randn(5, 40, 32, generator=generator)


def near_pair() -> Tensor:
    """Two of several different experts are almost the same."""
    outputs = random_outputs()
    outputs[3] = outputs[2] * (1 + 1e-6)
    return outputs


def summed(metric: str, outputs: Tensor, *cuts: int) -> Sums:
    sums = make_sums(metric, len(outputs))
    for chunk in outputs.tensor_split(cuts, dim=1):
        sums.update(chunk)
    return sums


CASES = {
    "random": random_outputs(),
    "near_1e-3": near_identical(1e-3),
    "near_1e-6": near_identical(1e-6),
    "near_pair": near_pair(),
    "bf16": random_outputs().bfloat16(),
}


@pytest.mark.parametrize("case", CASES)
def test_frobenius_equals_naive_float64(case: str) -> None:
    found = summed("frobenius", CASES[case], 8, 30).similarity()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), naive_frobenius(CASES[case]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_cosine_equals_naive_float64(case: str) -> None:
    found = summed("cosine", CASES[case], 8, 30).similarity()
    torch.testing.assert_close(found.double(), naive_cosine(CASES[case]), atol=1e-5, rtol=0)


def test_cka_equals_the_published_estimator_on_equal_chunks() -> None:
    outputs = random_outputs(experts=4, tokens=48)
    found = summed("cka", outputs, 16, 32).similarity()
    expected = naive_cka(list(outputs.tensor_split(3, dim=1)), [1, 1, 1])
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_cka_counts_a_short_chunk_by_its_pairs() -> None:
    outputs = random_outputs(experts=4, tokens=40)
    found = summed("cka", outputs, 32).similarity()
    expected = naive_cka(list(outputs.tensor_split([32], dim=1)), [32 * 29, 8 * 5])
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_cka_ignores_rotation_and_scale() -> None:
    outputs = random_outputs(experts=3, tokens=64)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(0))).Q
    outputs[1] = 3 * outputs[0] @ rotation + 1
    found = summed("cka", outputs).similarity()
    assert found[0, 1] == pytest.approx(1, abs=1e-5)
    assert found[0, 2] < 0.9


def test_exact_cka_equals_naive_float64() -> None:
    outputs = random_outputs(experts=5)
    found = summed("cka-exact", outputs, 3, 20).similarity()
    torch.testing.assert_close(found.double(), naive_cka_exact(outputs), atol=1e-5, rtol=0)


def test_minibatch_cka_approaches_exact_cka() -> None:
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(1024, 6, generator=generator)
    mixes = torch.randn(4, 6, 16, generator=generator)
    outputs = torch.einsum("tr,erh->eth", signal, mixes)
    streamed = summed("cka", outputs, 256, 512, 768).similarity()
    exact = summed("cka-exact", outputs).similarity()
    torch.testing.assert_close(streamed, exact, atol=0.03, rtol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_result_is_a_similarity_matrix(metric: str) -> None:
    found = summed(metric, random_outputs(), 20).similarity()
    assert found.dtype == torch.float32
    assert found.diagonal().eq(1).all()
    assert torch.equal(found, found.T)
    assert found.min() >= 0
    assert found.max() <= 1


@pytest.mark.parametrize("metric", METRICS)
def test_merge_is_associative_and_leaves_operands_alone(metric: str) -> None:
    outputs = random_outputs(tokens=48)
    a, b, c = (summed(metric, part) for part in outputs.tensor_split(3, dim=1))
    before = a.gram.clone()
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    together = summed(metric, outputs, 16, 32)
    assert left.tokens == right.tokens == together.tokens == 48
    assert torch.equal(a.gram, before)
    for merged in (left, right, c.merge(a).merge(b)):
        torch.testing.assert_close(merged.similarity(), together.similarity(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("count", [3, 4, 60])
def test_equal_experts_have_similarity_1(count: int) -> None:
    outputs = random_outputs()[:1].expand(count, -1, -1)
    assert summed("frobenius", outputs, 7).similarity().eq(1).all()
    assert summed("cosine", outputs, 7).similarity().ge(1 - 1e-6).all()


def test_a_zero_output_has_cosine_0() -> None:
    outputs = random_outputs()
    outputs[2] = 0
    found = summed("cosine", outputs).similarity()
    assert found[2, 0] == 0.5
    assert found[2, 2] == 1


@pytest.mark.parametrize("metric", ["cka", "cka-exact"])
def test_a_constant_expert_is_unlike_all_others(metric: str) -> None:
    outputs = random_outputs()
    outputs[2] = 1
    found = summed(metric, outputs).similarity()
    assert torch.isfinite(found).all()
    assert found[2, 0] == pytest.approx(0, abs=1e-3)
    assert found[2, 2] == 1


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(SereError, match=r"saw 0 usable tokens.*at least 4"):
        CkaSums(4).similarity()
    with pytest.raises(SereError, match="at least 1"):
        FrobeniusSums(4).similarity()
    assert CosineSums(2).tokens == 0


def test_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(SereError, match=r"'euclid'.*frobenius, cosine, cka, cka-exact"):
        make_sums("euclid", 4)


def test_exact_cka_refuses_large_models() -> None:
    check_exact_fits(layers=4, num_experts=16, tokens=4096, hidden_size=128)
    with pytest.raises(SereError, match=r"2400\.0 GiB.*use 'cka'"):
        check_exact_fits(layers=48, num_experts=128, tokens=51200, hidden_size=2048)
    assert math.isclose(48 * 128 * 51200 * 2048 * 4 / 2**30, 2400)


@pytest.mark.parametrize("columns", [1, 7, 64, 130])
def test_blocks_of_columns_have_the_same_gram_matrix(columns: int) -> None:
    features = torch.randn(6, columns, dtype=torch.float64, generator=torch.manual_seed(0))
    blocks = in_blocks(features, 8)
    assert blocks.shape[:2] == (8, 6)
    assert torch.allclose((blocks @ blocks.mT).sum(0), features @ features.T, atol=1e-12)
    assert torch.equal(in_blocks(features, 1)[0], features)
