"""Statistics over routed tokens, against the same written out token by token."""

import math

import pytest
import torch
from torch import Tensor

from sere_ray.artifact.statistics import GROUPS
from sere_ray.calibration.routed import RoutedSums
from sere_ray.calibration.similarity import make_sums
from sere_ray.util.errors import SereError

EXPERTS, TOKENS, TOP_K, HIDDEN = 6, 40, 3, 5


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs ``[E, n, H]``, choices and weights; expert 5 is never chosen, 4 once."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(EXPERTS, TOKENS, HIDDEN, generator=generator)
    outputs[1] = outputs[0] * 2.5 + 0.1 * outputs[1]
    outputs[2] = -outputs[0] * 9  # the other way round a scale of -9, clipped
    order = [torch.randperm(4, generator=generator)[:TOP_K] for _ in range(TOKENS)]
    choice = torch.stack(order)
    choice[7, 0] = 4
    return outputs, choice, torch.rand(TOKENS, TOP_K, generator=generator)


def by_hand(outputs: Tensor, choice: Tensor, weights: Tensor) -> dict[str, list]:
    """The formulas of ExFold's and MoNE's code, in plain Python."""
    rows = [{int(e): outputs[e, t].tolist() for e in choice[t]} for t in range(len(choice))]

    def dot(u: list[float], v: list[float]) -> float:
        return sum(a * b for a, b in zip(u, v, strict=True))

    found: dict[str, list] = {name: [] for names in GROUPS.values() for name in names}
    for e in range(EXPERTS):
        chosen = [row[e] for row in rows if e in row]
        norms = [math.sqrt(dot(u, u)) for u in chosen]
        found["output_norm"].append(sum(norms) / len(norms) if norms else None)
        mean = [sum(column) / len(chosen) for column in zip(*chosen, strict=True)] or [0.0] * HIDDEN
        about = [
            sum((u[i] - mean[i]) ** 2 for u in chosen) / max(len(chosen) - 1, 1)
            for i in range(HIDDEN)
        ]
        total = float(weights[choice == e].sum()) / len(choice)
        found["output_mean"].append(mean)
        found["novice_score"].append(math.sqrt(sum(about)) * total)
        scales, losses = [], []
        for other in range(EXPERTS):
            both = [(row[e], row[other]) for row in rows if e in row and other in row]
            if other == e or not both:
                scales.append(float(other == e))
                losses.append(1e30)
                continue
            size = [math.sqrt(dot(u, u)) for u, _ in both]
            top = sum(w * dot(u, v) for w, (u, v) in zip(size, both, strict=True))
            bottom = sum(w * dot(v, v) for w, (_, v) in zip(size, both, strict=True))
            whole = sum(w * dot(u, u) for w, (u, _) in zip(size, both, strict=True))
            scale = min(max(top / (bottom + 1e-3), -4.0), 4.0)
            scales.append(scale)
            losses.append(max(whole - 2 * scale * top + scale**2 * bottom, 0.0) / whole)
        of_chosen = [(float(weights[t][k]) ** 2, t) for t, k in (choice == e).nonzero().tolist()]
        scales_of_all, losses_of_all = [], []
        for other in range(EXPERTS):
            pairs = [(w, outputs[e, t].tolist(), outputs[other, t].tolist()) for w, t in of_chosen]
            if other == e or not pairs:
                scales_of_all.append(float(other == e))
                losses_of_all.append(1.0)
                continue
            top = sum(w * dot(u, v) for w, u, v in pairs)
            bottom = sum(w * dot(v, v) for w, _, v in pairs)
            whole = sum(w * dot(u, u) for w, u, _ in pairs)
            scale = min(max(top / bottom, -4.0), 4.0)
            scales_of_all.append(scale)
            losses_of_all.append(
                min(max(whole - 2 * scale * top + scale**2 * bottom, 0.0) / whole, 1.0)
            )
        found["directed_scale"].append(scales_of_all)
        found["directed_loss"].append(losses_of_all)
        found["stand_in_scale"].append(scales)
        found["stand_in_loss"].append(losses)
    seen = sorted(norm for norm in found["output_norm"] if norm is not None)
    usual = seen[(len(seen) - 1) // 2]
    found["output_norm"] = [usual if norm is None else norm for norm in found["output_norm"]]
    return found


def sums_of(parts: list[slice], groups: tuple[str, ...] = tuple(GROUPS)) -> RoutedSums:
    outputs, choice, weights = draw()
    merged = RoutedSums(groups)
    for part in parts:
        sums = RoutedSums(groups)
        sums.update(outputs[:, part], choice[part], weights[part])
        merged = merged.merge(sums)
    return merged


def test_equals_the_formulas() -> None:
    found = sums_of([slice(None)]).statistics(TOKENS)
    expected = by_hand(*draw())
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(values), atol=1e-5, rtol=1e-5)
    assert found["stand_in_scale"].max() > 1
    assert found["stand_in_scale"][2, 0] == -4
    assert found["stand_in_loss"][0, 2] < 1e-3, "the opposite of an expert is a perfect stand-in"


def test_sums_add_up_over_chunks_and_workers() -> None:
    whole = sums_of([slice(None)]).statistics(TOKENS)
    parts = sums_of([slice(0, 7), slice(7, 30), slice(30, TOKENS)]).statistics(TOKENS)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("group", GROUPS)
def test_one_group_alone(group: str) -> None:
    found = sums_of([slice(None)], (group,)).statistics(TOKENS)
    assert set(found) == set(GROUPS[group])


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(
        SereError, match="--statistics: 'novice' is none of stand_ins, directed, novices"
    ):
        make_sums("frobenius", 4, statistics=("novice",))
    with pytest.raises(SereError, match=r"metric = 'cka': .* use frobenius or cosine"):
        make_sums("cka", 4, statistics=("novices",))
    assert make_sums("frobenius", 4).routed is None
