"""Layers whose re-routed answers would be wrong without a word are refused as they are attached."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sere_ray.artifact.similarity import ArtifactMetadata, SimilarityArtifact
from sere_ray.engine import layer_checks, option_checks
from sere_ray.engine.gpu.device_rule import DeviceRule
from sere_ray.kernel.memory import Settings
from sere_ray.policy.bound import BoundPolicy
from sere_ray.util.errors import UnsupportedError
from tests.engine.conftest import generate, prompts, running_engine, sere_key, state_of
from tests.engine.test_refusals import configure
from tests.models import build_tokenizer

NAME = "model.layers.3.mlp.experts"
RESULT = Path(__file__).parents[2] / "docs" / "results" / "back-ends-h200.json"
LARGEST_ERROR = 0.1
"""Of a right kernel, of the largest output: rounding. Wrong ones were off by 0.7 to 10."""


@pytest.fixture
def moe(checkpoint):
    return checkpoint("qwen3_moe")


def runner(**changes):
    """What the checks read of vLLM's ``MoERunner``: 4 of 16 experts, in decoder layer 3."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    experts = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(experts)
    experts.quant_method = SimpleNamespace()
    return SimpleNamespace(
        layer_name=NAME,
        layer_id=3,
        is_monolithic=False,
        moe_config=SimpleNamespace(experts_per_token=4, num_logical_experts=16),
        routed_experts=experts,
        **changes,
    )


def refused(check, *arguments):
    with pytest.raises(UnsupportedError) as error:
        check(*arguments)
    return str(error.value)


def test_a_layer_as_the_configuration_says():
    layer_checks.check_layer(runner(), {0, 1, 2}, 4, 16)


def test_a_second_runner_of_a_layer(has_words):
    message = refused(layer_checks.check_layer, runner(), {2, 3}, 4, 16)
    has_words(message, NAME, "second one of decoder layer 3", "remove the 'sere' key")


@pytest.mark.parametrize(("top_k", "experts"), [(8, 16), (4, 32)])
def test_a_layer_of_another_shape(top_k, experts, has_words):
    message = refused(layer_checks.check_layer, runner(), (), top_k, experts)
    has_words(message, NAME, "4 of 16 experts", f"{top_k} of {experts}")


def test_experts_that_change_ids_themselves(has_words):
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    class Substituted(RoutedExperts):
        def forward_modular(self, *args, **kwargs):
            raise NotImplementedError

    layer = runner()
    layer.routed_experts.__class__ = Substituted
    message = refused(layer_checks.check_layer, layer, (), 4, 16)
    has_words(message, NAME, "Substituted.forward_modular")


def test_a_kernel_that_chooses_itself(has_words):
    from vllm.model_executor.layers.fused_moe.experts.cpu_int4_moe import CPUExpertsInt4

    assert CPUExpertsInt4.is_monolithic()
    layer = runner()
    layer.is_monolithic = True
    layer.routed_experts.quant_method.experts_cls = CPUExpertsInt4
    message = refused(layer_checks.check_routes_outside_kernel, layer)
    has_words(message, NAME, "CPUExpertsInt4", "--moe-backend")


@pytest.mark.parametrize("made", [False, True], ids=["as it is built", "once it is made"])
def test_a_kernel_that_was_not_shown_right(made, has_words):
    from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutlass_moe import (
        FlashInferExperts,
    )

    method = runner().routed_experts.quant_method
    method.experts_cls = FlashInferExperts
    if made:
        kernel = FlashInferExperts.__new__(FlashInferExperts)
        method.moe_kernel = SimpleNamespace(fused_experts=kernel)
    layer = runner()
    layer.routed_experts.quant_method = method
    message = refused(layer_checks.check_expert_kernel, layer, "cuda")
    has_words(message, NAME, "FlashInferExperts", "--moe-backend triton", "names an expert twice")


def test_a_pair_of_kernels_is_as_good_as_the_worse(has_words):
    from vllm.model_executor.layers.fused_moe.experts.triton_deep_gemm_moe import (
        TritonOrDeepGemmExperts,
    )

    layer = runner()
    layer.routed_experts.quant_method.experts_cls = TritonOrDeepGemmExperts
    has_words(refused(layer_checks.check_expert_kernel, layer, "cuda"), "DeepGemmExperts")


def test_every_allowed_kernel_exists():
    folder = Path(find_spec("vllm").origin).parent / "model_executor/layers/fused_moe/experts"
    lines = (line for path in folder.glob("*.py") for line in path.read_text().splitlines())
    classes = {line.split("(")[0] for line in lines}
    for names in layer_checks.ALLOWED.values():
        assert {f"class {name}" for name in names} <= classes


def test_a_kernel_for_gpus_takes_what_it_was_measured_right_for():
    """Of every format; `repeats` is rows of either rule, `dropped` ids of -1 with all experts."""
    measured = {}
    for row in json.loads(RESULT.read_text())["rows"]:
        if row["experts_kernel"]:
            errors = measured.setdefault(row["experts_kernel"], {}).setdefault(row["rule"], {})
            error = math.inf if row["largest_error"] is None else row["largest_error"]
            errors[row["format"], row["batch"]] = error
    assert set(measured) == set(layer_checks.ALLOWED["cuda"])
    for kernel, takes in layer_checks.ALLOWED["cuda"].items():
        of_rules = measured[kernel]
        for errors in of_rules.values():
            assert {batch for _, batch in errors} == {1, 16, 300, 600}
        repeats = [*of_rules["sere"].values(), *of_rules["margin"].values()]
        assert takes.repeats == (max(repeats) < LARGEST_ERROR)
        assert takes.dropped == (max(of_rules["sere merged"].values()) < LARGEST_ERROR)
        assert takes.repeats or takes.dropped


def test_whether_slots_are_merged():
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    class UnfusedOAITritonExperts:
        """vLLM's needs Triton to be imported."""

    layer = runner()
    for kernel, merges in ((TritonExperts, False), (UnfusedOAITritonExperts, True)):
        layer.routed_experts.quant_method.experts_cls = kernel
        assert layer_checks.check_expert_kernel(layer, "cuda") is merges


@pytest.mark.engine
def test_a_model_none_of_whose_layers_is_reached(tmp_path, has_words):
    """Its configuration has experts, its layers are dense."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, path = tmp_path / "model", tmp_path / "identity.safetensors"
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, vocab_size=len(tokenizer))
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written |= {"num_experts": 16, "num_experts_per_tok": 4}
    (folder / "config.json").write_text(json.dumps(written))
    metadata = ArtifactMetadata(
        model_id="dense",
        architecture="LlamaForCausalLM",
        num_experts=16,
        top_k=4,
        metric="random",
        date="2026-11-29",
    )
    SimilarityArtifact({0: torch.eye(16)}, metadata).save(path)
    with (
        pytest.raises(UnsupportedError) as error,
        running_engine(folder, {"similarity": str(path), "select_top_k": 1}),
    ):
        pass
    has_words(str(error.value), "LlamaForCausalLM", "no layer", "moe_backend = 'auto'")


@pytest.mark.engine
def test_a_running_engine_refuses_other_weights_and_other_rows(moe, has_words):
    with running_engine(moe, sere_key(moe)) as engine:
        with pytest.raises(UnsupportedError) as error:
            engine.collective_rpc("reload_weights")
        has_words(str(error.value), "reload_weights", "calibrate the new weights")
        state = state_of(engine)
        layer = state.layers[0]
        ids = torch.zeros((2, 4), dtype=torch.int32)
        state.rows = 3
        with pytest.raises(UnsupportedError) as error:
            state.choose(layer, ids, ids.float(), torch.zeros((2, 16)))
        has_words(str(error.value), f"layer {layer}", "2 rows of a step of 3")
        generate(engine, prompts(2), tokens=4)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("parallel_config", {"enable_elastic_ep": True}, ["enable_elastic_ep"]),
        ("cache_config", {"kv_sharing_fast_prefill": True}, ["kv_sharing_fast_prefill"]),
    ],
)
def test_options_that_give_layers_other_rows(moe, part, changes, words, has_words):
    config = configure(moe, sere_key(moe))
    for name, value in changes.items():
        setattr(getattr(config, part), name, value)
    has_words(refused(option_checks.check_options, config), *words, "start without it")


def test_weights_that_a_trainer_sends(moe, has_words):
    config = configure(moe, sere_key(moe))
    config.weight_transfer_config = object()
    has_words(refused(option_checks.check_options, config), "weight_transfer_config", "calibrate")


@pytest.mark.parametrize("architecture", option_checks.OTHER_ROWS)
def test_models_whose_layers_get_other_rows(moe, architecture, has_words):
    config = configure(moe, sere_key(moe))
    config.model_config._architecture = architecture
    has_words(refused(option_checks.check_options, config), architecture, "serve another model")


def test_layers_of_a_gpu_agree_on_whether_slots_are_merged():
    bound = BoundPolicy(mode="on", select_top_k=1, threshold=None, min_primary_experts=0)
    rule = DeviceRule({0: torch.eye(4)}, 2, 4, torch.device("cpu"), bound)
    wanted = Settings(torch.device("cpu"), merges=True)
    wanted.write(bound, top_k=2, num_experts=4)
    assert not torch.equal(rule.settings.buffer, wanted.buffer)
    for layer in ("first", "second", "first"):  # as built, and when its kernel is made
        rule.note_experts(layer, merges=True)
    assert torch.equal(rule.settings.buffer, wanted.buffer)
    with pytest.raises(UnsupportedError, match=r"'second' .*another form"):
        rule.note_experts("second", merges=False)
