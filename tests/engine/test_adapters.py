"""LoRA adapters as vLLM loads them: those that reach into a block with experts are refused.

vLLM's CPU build cannot run LoRA on a model with experts. What loads an adapter is the same on a
dense one, whose feed-forward blocks stand for blocks with experts here; ``test_gpu_adapters.py``
has the real ones.
"""

from types import SimpleNamespace

import pytest

from sere_ray.engine.adapters import load_adapter, load_lora_model
from sere_ray.util.errors import UnsupportedError
from tests.engine.conftest import prompts, running_engine
from tests.engine.lora import write_adapter
from tests.models import build_tokenizer

pytestmark = pytest.mark.engine
ATTENTION = {
    f"model.layers.{layer}.self_attn.{name}": (64, 64)
    for layer in range(2)
    for name in ("q_proj", "o_proj")
}
BLOCK = {"model.layers.1.mlp.down_proj": (64, 128)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("dense") / "model"
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=1024,
        max_position_embeddings=2048,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def test_adapters_are_checked_where_vllm_loads_them(dense, tmp_path, monkeypatch, has_words):
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    from sere_ray.engine import adapters, patches

    layers = [SimpleNamespace(layer_name=f"model.layers.{i}.mlp.experts") for i in range(2)]
    state = SimpleNamespace(attached=dict(enumerate(layers)))
    monkeypatch.setattr(adapters, "find_state", lambda vllm_config: state)
    for owner, name in (
        (LoRAModelRunnerMixin, "load_lora_model"),
        (WorkerLoRAManager, "_load_adapter"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    patches._wrap(LoRAModelRunnerMixin, "load_lora_model", load_lora_model)
    patches._wrap(WorkerLoRAManager, "_load_adapter", load_adapter)
    attention = write_adapter(tmp_path / "attention", ATTENTION)
    block = write_adapter(tmp_path / "block", {**ATTENTION, **BLOCK})
    options = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj", "o_proj"]}
    with running_engine(dense, **options) as engine:
        plain = engine.generate(prompts(2), use_tqdm=False)
        with_adapter = engine.generate(
            prompts(2), lora_request=LoRARequest("attention", 1, str(attention)), use_tqdm=False
        )
        tokens = [[o.outputs[0].token_ids for o in outputs] for outputs in (plain, with_adapter)]
        assert tokens[0] != tokens[1]
        with pytest.raises(UnsupportedError) as error:
            engine.llm_engine.add_lora(LoRARequest("block", 2, str(block)))
    has_words(
        str(error.value), "adapter 'block'", str(block), "model.layers.1.mlp.down_proj", "merge it"
    )
    options["lora_target_modules"] = ["q_proj", "down_proj"]
    with pytest.raises(UnsupportedError) as error, running_engine(dense, **options):
        pass
    has_words(str(error.value), "lora_target_modules", "model.layers.0.mlp.down_proj", "q_proj")
