"""What acts on a layer's output: LDA's map, MoNE's constants; and ACE's numbers of the weights."""

import math

import numpy as np
import pytest
import torch

from sere_ray import assets
from sere_ray.bench.demo_model import heldout_windows
from sere_ray.calibration.collect import find_moe_layers
from sere_ray.calibration.loading import load_model
from sere_ray.evaluation.decode_batches import DecodeBatches
from sere_ray.evaluation.lda import Moments
from sere_ray.evaluation.settings import as_policy
from sere_ray.evaluation.teacher_forced import forward_changed
from sere_ray.evaluation.weight_statistics import ace_statistics, spectral

PROMPT, LENGTH, TEXTS, TOP_K, EXPERTS, HIDDEN = 24, 40, 16, 4, 48, 128


@pytest.fixture(scope="module")
def model():
    return load_model(str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype="float32")


@pytest.fixture(scope="module")
def batches(model):
    generator = torch.Generator().manual_seed(3)
    statistics = {
        layer: {
            "novice_score": torch.rand(EXPERTS, generator=generator),
            "output_mean": torch.randn(EXPERTS, HIDDEN, generator=generator) / 20,
        }
        for layer in range(4)
    }
    similarity = {i: torch.eye(EXPERTS) for i in range(4)}
    windows = heldout_windows()[:TEXTS, :LENGTH]
    return DecodeBatches(model, windows, PROMPT, similarity, statistics=statistics)


def bound(**keys):
    return as_policy(keys).for_model(top_k=TOP_K)


# --- LDA ---------------------------------------------------------------------------------------


def test_moments_by_hand():
    exact = torch.tensor([[1.0, 5.0, 2.0], [3.0, 5.0, 2.0], [5.0, 5.0, 2.0], [7.0, 5.0, 2.0]])
    changed = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 4.0], [4.0, 1.0, 0.0], [4.0, 1.0, 4.0]])
    parts = [Moments() for _ in range(3)]
    parts[0].add(exact[:1], changed[:1])
    parts[1].add(exact[1:], changed[1:])
    scale, shift = Moments.merge(parts).affine()
    assert scale.tolist() == pytest.approx([math.sqrt(5), 1.0, 0.0])
    mapped = changed * scale + shift
    assert mapped.mean(0).tolist() == pytest.approx([4.0, 5.0, 2.0])
    assert mapped.std(0, correction=0).tolist() == pytest.approx([math.sqrt(5), 0.0, 0.0])


def test_a_repair_restores_moments_with_earlier_layers_exact(batches, model):
    """Layer by layer against a plain run: only that layer is re-routed, its output compared."""
    policy = bound(rule="topk", select_top_k=1)
    repair = {layer: sums.affine() for layer, sums in batches.fit(policy, 8).items()}
    assert sorted(repair) == [0, 1, 2, 3]
    ids = torch.cat([batches.ids[:, :PROMPT], batches.answers], dim=1)
    for layer in (0, 2):
        outputs = []
        for reroute in (False, True):

            def change(index, hidden, topk_ids, weights, reroute=reroute, layer=layer):
                if index != layer or not reroute:
                    return topk_ids, weights
                best = weights == weights.amax(-1, keepdim=True)
                return topk_ids, weights.sum(-1, keepdim=True) * best

            def after(index, hidden, output, layer=layer, outputs=outputs):
                if index == layer:
                    outputs.append(output.view(TEXTS, LENGTH, -1)[:, PROMPT:].flatten(0, 1))
                return output

            forward_changed(model, ids, PROMPT, change, after=after)
        exact, changed = outputs
        scale, shift = repair[layer]
        mapped = changed * scale + shift
        assert torch.allclose(mapped.mean(0), exact.mean(0), atol=1e-4)
        assert torch.allclose(mapped.std(0), exact.std(0), rtol=1e-2, atol=1e-4)
        assert not torch.allclose(changed.std(0), exact.std(0), rtol=0.1)


def test_a_repair_of_nothing_changes_nothing(batches):
    policy = bound(rule="topk", select_top_k=TOP_K)
    repair = {layer: sums.affine() for layer, sums in batches.fit(policy, 8).items()}
    found = batches.measure(policy, 8, repair=repair)
    assert np.abs(found.kl).max() < 1e-4


def test_a_repair_is_used_and_gone_after(batches):
    policy = bound(rule="topk", select_top_k=1)
    plain = batches.measure(policy, 8)
    repair = {layer: sums.affine() for layer, sums in batches.fit(policy, 8).items()}
    repaired = batches.measure(policy, 8, repair=repair)
    assert repaired.kl.mean() < 0.95 * plain.kl.mean()
    assert repaired.reads.mean() == pytest.approx(plain.reads.mean(), rel=0.05)
    assert np.array_equal(batches.measure(policy, 8).kl, plain.kl)


# --- MoNE --------------------------------------------------------------------------------------


def test_all_experts_as_constants(batches, model):
    """With one expert kept nearly all is constants: held against a plain forward pass."""
    found = batches.measure(bound(rule="mone", experts=1), 8)
    layers = find_moe_layers(model)
    kept = {i: int(batches.statistics[i]["novice_score"].argmax()) for i in layers}
    choices = {}

    def change(index, hidden, ids, weights):
        choices[index] = (ids, weights)
        stays = ids == kept[index]
        return torch.where(stays, ids, kept[index]), torch.where(stays, weights, 0.0)

    def after(index, hidden, output):
        ids, weights = choices[index]  # [D, N, K]
        weights = torch.where(ids == kept[index], 0.0, weights)
        mean = batches.statistics[index]["output_mean"]
        added = (weights[..., None] * mean[ids]).sum(-2).transpose(0, 1)  # [N, D, H]
        whole = output.view(TEXTS, LENGTH, -1).clone()
        whole[:, PROMPT:] += added
        return whole.view_as(output)

    ids = torch.cat([batches.ids[:, :PROMPT], batches.answers], dim=1)
    logits = forward_changed(model, ids, PROMPT, change, after=after)[:, PROMPT:]
    logp = logits.log_softmax(-1)
    kl = (batches.exact.exp() * (batches.exact - logp)).sum(-1)
    assert np.allclose(found.kl, kl.numpy(), atol=1e-3)
    assert found.kl.mean() > 0.1
    assert (found.reads <= 1).all()


# --- ACE ---------------------------------------------------------------------------------------


def test_spectral_view_is_the_formula():
    generator = torch.Generator().manual_seed(1)
    gamma = torch.rand(5, generator=generator)
    gate_up = torch.randn(3, 2 * 4, 5, generator=generator)
    down = torch.randn(3, 5, 4, generator=generator)
    found = spectral(gamma, gate_up, down)
    for e in range(3):
        g = torch.diag(gamma)
        gate, up, last = gate_up[e, :4].T, gate_up[e, 4:].T, down[e].T
        first = torch.linalg.norm(g @ (torch.linalg.norm(g @ up) * (gate @ last)))
        second = torch.linalg.norm(g @ (torch.linalg.norm(g @ gate) * (up @ last)))
        assert found[e].item() == pytest.approx(math.sqrt(first * second), rel=1e-5)


def test_router_view_is_each_experts_own_response(model):
    found = ace_statistics(model)
    for index, layer in find_moe_layers(model).items():
        rows = layer.gate_weight - layer.gate_weight.mean(0)
        raw = []
        for e in range(EXPERTS):
            q = rows[e] / rows[e].square().mean().sqrt()
            gate, up = layer.experts.gate_up_proj[e].chunk(2)
            out = layer.experts.down_proj[e] @ (torch.nn.functional.silu(gate @ q) * (up @ q))
            raw.append((out.norm() / q.norm()).item())
        expected = np.array(raw) / np.mean(raw)
        assert np.allclose(found[index]["ace_rcr"].numpy(), expected, rtol=1e-4)
        assert found[index]["ace_gsp"].mean().item() == pytest.approx(1.0, abs=1e-5)
