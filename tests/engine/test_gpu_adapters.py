"""LoRA adapters on attention in a GPU engine, full CUDA graphs; those on experts are refused."""

import pytest

from sere_ray.engine.control import read_counters, set_policy
from sere_ray.policy.policy import Policy
from sere_ray.util.errors import UnsupportedError
from tests.engine.conftest import prompts, running_engine, sere_key
from tests.engine.lora import RANK, write_adapter
from tests.engine.test_gpu import GRAPHS
from tests.models import TOP_K

pytestmark = [pytest.mark.gpu, pytest.mark.engine]
ATTENTION = {
    f"model.layers.{layer}.self_attn.{name}": (128, 128)
    for layer in range(4)
    for name in ("q_proj", "o_proj")
}
EXPERTS = {f"model.layers.2.mlp.experts.{e}.down_proj": (128, 64) for e in range(16)}
GATE = {"model.layers.1.mlp.gate": (16, 128)}
OPTIONS = {
    **GRAPHS,
    "enable_lora": True,
    "max_lora_rank": RANK,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def answers(engine, adapter):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    request = None if adapter is None else LoRARequest(adapter.name, 1, str(adapter))
    outputs = engine.generate(prompts(), sampling, lora_request=request, use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def test_adapters_on_attention(checkpoint, tmp_path):
    folder = checkpoint("qwen3_moe")
    adapter = write_adapter(tmp_path / "attention", ATTENTION)
    with running_engine(folder, **OPTIONS) as engine:
        stock = {name: answers(engine, name) for name in (None, adapter)}
    assert stock[None] != stock[adapter]
    key = sere_key(folder, min_primary_experts=0)
    with running_engine(folder, key, **OPTIONS) as engine:
        for changes in ({"select_top_k": TOP_K}, {"mode": "off"}):
            set_policy(engine, Policy.parse({**key, **changes}))
            assert {name: answers(engine, name) for name in stock} == stock
        for name in stock:
            set_policy(engine, Policy.parse(key))
            read_counters(engine, reset=True)
            assert answers(engine, name) != stock[name]
            counts = read_counters(engine)["decode_only"]
            assert 0 < sum(counts["experts_after"]) < sum(counts["experts_before"])


@pytest.mark.parametrize("modules", [EXPERTS, GATE])
def test_adapters_with_modules_of_a_block_with_experts(checkpoint, tmp_path, has_words, modules):
    from vllm.lora.request import LoRARequest

    folder = checkpoint("qwen3_moe")
    adapter = write_adapter(tmp_path / "adapter", {**ATTENTION, **modules})
    with running_engine(folder, sere_key(folder), **OPTIONS) as engine:
        # vLLM itself refuses modules that no adapter of the model may have.
        with pytest.raises((UnsupportedError, ValueError)) as error:
            engine.llm_engine.add_lora(LoRARequest("adapter", 1, str(adapter)))
        has_words(str(error.value), str(adapter), "mlp")
        assert answers(engine, None)


def test_targets_of_a_block_with_experts(checkpoint, has_words):
    folder = checkpoint("qwen3_moe")
    options = {**OPTIONS, "lora_target_modules": ["q_proj", "experts"]}
    with (
        pytest.raises(UnsupportedError) as error,
        running_engine(folder, sere_key(folder), **options),
    ):
        pass
    has_words(str(error.value), "lora_target_modules", "mlp.experts")
    options.pop("lora_target_modules")
    with (
        pytest.raises(UnsupportedError) as error,
        running_engine(folder, sere_key(folder), **options),
    ):
        pass
    has_words(str(error.value), "without lora_target_modules", "--lora-target-modules q_proj")
