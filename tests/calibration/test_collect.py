"""Sums from the six architectures while they run: what is seen, what is left alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from sere_ray.calibration import collect as collect_module
from sere_ray.calibration import similarity
from sere_ray.calibration.collect import collect, find_moe_layers, moe_shape
from sere_ray.calibration.data import make_batches
from sere_ray.calibration.experts import expert_outputs, routed_output
from sere_ray.calibration.loading import load_model
from sere_ray.calibration.similarity import METRICS, Sums, make_sums
from sere_ray.util.errors import UnsupportedError
from tests.models import ARCHITECTURES, MOE_LAYERS, NUM_EXPERTS, TOP_K

Checkpoint = Callable[[str], Path]


def load(path: Path, dtype: str = "float32") -> PreTrainedModel:
    return load_model(str(path), revision=None, device=torch.device("cpu"), dtype=dtype)


def random_windows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 1000, (n,), generator=generator).tolist() for n in lengths]


def run(
    model: PreTrainedModel, windows: list[list[int]], metric: str, batch_size: int
) -> dict[int, Sums]:
    layers = find_moe_layers(model)
    sums = {index: make_sums(metric, NUM_EXPERTS) for index in layers}
    collect(model, layers, make_batches(windows, batch_size), sums)
    return sums


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_finds_layers_and_shape(name: str, checkpoint: Checkpoint) -> None:
    model = load(checkpoint(name))
    layers = find_moe_layers(model)
    shape = moe_shape(model, layers)
    assert shape.layers == tuple(MOE_LAYERS[name])
    assert (shape.num_experts, shape.top_k) == (NUM_EXPERTS, TOP_K)
    assert shape.architecture == type(model).__name__
    assert all(layer.gate_weight.shape == (NUM_EXPERTS, 128) for layer in layers.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_raw_outputs_rebuild_the_routed_output(
    name: str, dtype: str, checkpoint: Checkpoint
) -> None:
    """The module's own routed output is the weighted sum of the raw outputs we take."""
    model = load(checkpoint(name), dtype)
    calls: list[tuple[Tensor, ...]] = []
    experts = find_moe_layers(model)[2].experts
    experts.register_forward_hook(lambda _, args, output: calls.append((*args, output)))
    with torch.inference_mode():
        model(torch.tensor(random_windows(24)))
        ((tokens, index, weight, routed),) = calls
        raw = expert_outputs(experts, tokens, NUM_EXPERTS)
    assert raw.shape == (NUM_EXPERTS, 24, 128)
    rebuilt = routed_output(raw, index, weight)
    assert rebuilt.dtype == routed.dtype
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    scale = routed.abs().max().float().item()
    torch.testing.assert_close(rebuilt, routed, atol=tolerance * scale, rtol=tolerance)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_raw_outputs_equal_the_plain_formula(
    name: str, stacked: bool, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By batched products, and by the module itself where its layout is not known."""
    if not stacked:
        monkeypatch.setattr("sere_ray.calibration.experts._has_stacked_products", lambda _: False)
    experts = find_moe_layers(load(checkpoint(name)))[1].experts
    tokens = torch.randn(9, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = expert_outputs(experts, tokens, NUM_EXPERTS)
    for expert in range(NUM_EXPERTS):
        gate, up = (tokens @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        expected = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T
        torch.testing.assert_close(found[expert], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("metric", ["frobenius", "cka"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layer_inputs_are_those_of_the_unmodified_model(
    name: str, metric: str, checkpoint: Checkpoint
) -> None:
    model = load(checkpoint(name))
    ids = torch.tensor(random_windows(20))
    seen: list[Tensor] = []
    with torch.inference_mode():
        before = model(ids).logits
        norm = model.get_decoder().norm.register_forward_hook(
            lambda _, args, __: seen.append(args[0].clone())
        )
        model(ids)
        run(model, ids.tolist(), metric, 1)
        norm.remove()
        torch.testing.assert_close(seen[1], seen[0], atol=1e-4, rtol=1e-4)
        layers = find_moe_layers(model)
        assert not any("forward" in vars(layer.experts) for layer in layers.values())
        assert torch.equal(model(ids).logits, before)


def test_experts_are_put_back_after_a_failure(checkpoint: Checkpoint) -> None:
    model = load(checkpoint("olmoe"))
    layers = find_moe_layers(model)
    sums = {index: make_sums("cosine", NUM_EXPERTS) for index in layers}

    def interrupted(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, layers, make_batches(random_windows(8), 1), sums, interrupted)
    assert not any("forward" in vars(layer.experts) for layer in layers.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_is_left_out(name: str, checkpoint: Checkpoint) -> None:
    model = load(checkpoint(name))
    windows = random_windows(32, 7, 19)
    padded, alone = run(model, windows, "frobenius", 3), run(model, windows, "frobenius", 1)
    for layer, sums in padded.items():
        assert sums.tokens == alone[layer].tokens == 58
        scale = alone[layer].gram.abs().max().item()
        torch.testing.assert_close(sums.gram, alone[layer].gram, atol=1e-5 * scale, rtol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_batch_size_does_not_change_the_result(
    metric: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(checkpoint("qwen3_moe"))
    windows = random_windows(*[40] * 6)
    expected = run(model, windows, metric, 1)
    for module in (collect_module, similarity):  # other pieces, too
        monkeypatch.setattr(module, "working_bytes", lambda _: 2**19)
    for batch_size in (2, 4):
        for layer, sums in run(model, windows, metric, batch_size).items():
            torch.testing.assert_close(
                sums.similarity(), expected[layer].similarity(), atol=1e-6, rtol=0
            )


def test_cka_chunks_have_1024_tokens_whatever_the_batches(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(checkpoint("mixtral"))
    sizes: list[int] = []
    original = collect_module.Stream._add

    def recording(self: collect_module.Stream, tokens: Tensor) -> None:
        sizes.append(len(tokens))
        original(self, tokens)

    monkeypatch.setattr(collect_module.Stream, "_add", recording)
    sums = run(model, random_windows(*[500] * 2, 27), "cka", 1)
    assert sizes == [1024] * 4  # the last 3 tokens are too few and dropped
    assert {layer.tokens for layer in sums.values()} == {1024}


def test_nothing_grows_with_the_number_of_tokens(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest call of the experts is the same for 2 and for 12 windows."""
    model = load(checkpoint("olmoe"))
    monkeypatch.setattr(collect_module, "working_bytes", lambda _: 2**20)
    largest: dict[int, int] = {}
    original = collect_module.expert_outputs
    for count in (2, 12):
        sizes: list[int] = []

        def recording(
            experts: torch.nn.Module, tokens: Tensor, count: int, sizes: list[int] = sizes
        ) -> Tensor:
            outputs = original(experts, tokens, count)
            sizes.append(outputs.numel() * 4)
            return outputs

        monkeypatch.setattr(collect_module, "expert_outputs", recording)
        run(model, random_windows(*[200] * count), "frobenius", 2)
        largest[count] = max(sizes)
    assert largest[2] == largest[12] <= 2**20


def test_progress_counts_real_tokens(checkpoint: Checkpoint) -> None:
    model = load(checkpoint("olmoe"))
    layers = find_moe_layers(model)
    sums = {index: make_sums("frobenius", NUM_EXPERTS) for index in layers}
    seen: list[int] = []
    collect(model, layers, make_batches(random_windows(9, 9, 4), 2), sums, seen.append)
    assert seen == [18, 4]


def test_a_dense_model_is_refused() -> None:
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    with pytest.raises(UnsupportedError, match=r"Qwen3ForCausalLM: no MoE layer found \(2 "):
        find_moe_layers(Qwen3ForCausalLM(config))
