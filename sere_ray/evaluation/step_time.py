"""Decode step time of stock vLLM and of this plugin, in one run, on random weights.

One engine without the ``sere`` key (stock) and one with it take turns. Repeats are interleaved over
all settings in random order, so that drift of the machine hits all alike.
"""

import itertools
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sere_ray.calibration.synthetic import synthetic_artifact
from sere_ray.config import Policy
from sere_ray.demo import assets
from sere_ray.engine.control import experts_read, read_counters, set_policy
from sere_ray.progress import progress

PROMPT_TOKENS = 4

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 2048,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""What the random models share."""


@dataclass(frozen=True)
class Model:
    """What is measured: a configuration with random weights, or a checkpoint."""

    name: str
    config: dict[str, Any]
    checkpoint: Path | None = None

    @property
    def top_k(self) -> int:
        """K of the model."""
        return int(self.config["num_experts_per_tok"])


def get_model(name: str) -> Model:
    """``demo``, ``random-e128`` or ``random-e64``.

    The random ones are far beyond a CPU's cache: layers x experts x 3 x 1024 x width x bytes.
    ``random-e128`` has the 128 experts, top-8, of Qwen3-30B-A3B and float32 weights, which CPUs
    without bf16 arithmetic read as they are.
    """
    if name == "demo":
        config = json.loads((assets.MODEL / "config.json").read_text())
        return Model("demo model: 4 layers x 48 experts, top-4, 5 MB, bf16", config, assets.MODEL)
    layers, experts, width, dtype, size = {
        "random-e128": (4, 128, 640, "float32", "4.0 GB"),
        "random-e64": (8, 64, 640, "bfloat16", "2.0 GB"),
    }[name]
    config = {
        **CONFIG,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "moe_intermediate_size": width,
        "torch_dtype": dtype,
    }
    return Model(f"random: {layers} layers x {experts} experts, top-8, {size}, {dtype}", config)


@dataclass(frozen=True)
class Arm:
    """One setting that is measured."""

    name: str
    policy: Policy | None
    """None: the engine without the key."""

    @property
    def select_top_k(self) -> int | None:
        """S of the arm; None for stock."""
        return self.policy.select_top_k if self.policy else None


def arms(similarity: str, top_k: int) -> list[Arm]:
    """Stock, then the rule discarded (`observe`), then S = K, K/2, 2 and 1 without floor."""

    def policy(select_top_k: int, mode: str = "on") -> Policy:
        return Policy.parse(
            {
                "similarity": similarity,
                "select_top_k": select_top_k,
                "min_primary_experts": 0,
                "mode": mode,
            }
        )

    sizes = sorted({top_k, top_k // 2, 2, 1}, reverse=True)
    return [
        Arm("stock", None),
        Arm("off", policy(1, "off")),
        Arm("observe", policy(1, "observe")),
        *(Arm(f"S={size}", policy(size)) for size in sizes),
    ]


def measure(
    model: Model,
    batches: list[int],
    repeats: int,
    tokens: int,
    *,
    compiled: bool,
    console: Console,
) -> list[dict[str, Any]]:
    """Rows of the result file, one for each batch size and arm.

    Args:
        model: what to serve.
        batches: decode batch sizes.
        repeats: interleaved repeats of every point.
        tokens: decode steps that are timed in a repeat.
        compiled: run vLLM's compiled graphs; False = eager.
        console: where progress goes.
    """
    # Both engines in this process: as processes of their own, each one's polling would take time
    # from the other's cores.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory(prefix="sere-step-time-") as name:
        folder, similarity = Path(name) / "model", Path(name) / "synthetic.safetensors"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(model.config))
        synthetic_artifact(folder).save(similarity)
        settings = arms(str(similarity), model.top_k)
        console.print(f"starting two engines: {model.name}")
        engines = {
            None: _engine(folder, None, max(batches), compiled),
            "sere": _engine(folder, settings[1].policy, max(batches), compiled),
        }
        return _measure(model, engines, settings, batches, repeats, tokens, console)


def _measure(
    model: Model,
    engines: dict[str | None, Any],
    settings: list[Arm],
    batches: list[int],
    repeats: int,
    tokens: int,
    console: Console,
) -> list[dict[str, Any]]:
    times: dict[tuple[int, str], list[float]] = {}
    experts: dict[tuple[int, str], float] = {}
    order = random.Random(0)
    points = len(batches) * len(settings) * (repeats + 1)
    with progress(console, points, task="measure", unit="points") as advance:
        for batch, repeat in itertools.product(batches, range(repeats + 1)):
            for arm in order.sample(settings, len(settings)):
                engine = engines["sere" if arm.policy else None]
                if arm.policy:
                    set_policy(engine, arm.policy)
                    read_counters(engine, reset=True)
                seconds = _step_seconds(engine, model, batch, tokens, seed=repeat)
                if repeat:  # the first one warms up
                    times.setdefault((batch, arm.name), []).append(seconds * 1e3)
                if arm.policy and arm.policy.mode == "on":
                    experts[batch, arm.name] = experts_read(read_counters(engine), "experts_after")
                elif arm.name == "observe":
                    before = experts_read(read_counters(engine), "experts_before")
                    experts[batch, "stock"] = experts[batch, "off"] = experts[batch, arm.name] = (
                        before
                    )
                advance(1)
    return [
        _row(
            model,
            batch,
            arm,
            times[batch, arm.name],
            times[batch, "stock"],
            experts[batch, arm.name],
        )
        for batch in batches
        for arm in settings
    ]


def _row(
    model: Model, batch: int, arm: Arm, step_ms: list[float], stock_ms: list[float], experts: float
) -> dict[str, Any]:
    ratios = [stock / own for stock, own in zip(stock_ms, step_ms, strict=True)]
    return {
        "model": model.name,
        "batch": batch,
        "arm": arm.name,
        "select_top_k": arm.select_top_k,
        "mode": arm.policy.mode if arm.policy else None,
        "step_ms": round(statistics.median(step_ms), 3),
        "step_ms_min": round(min(step_ms), 3),
        "step_ms_max": round(max(step_ms), 3),
        "stock_step_ms": round(statistics.median(stock_ms), 3),
        "speedup": round(statistics.median(ratios), 3),
        "speedup_min": round(min(ratios), 3),
        "speedup_max": round(max(ratios), 3),
        "repeats": len(step_ms),
        "experts_read": round(experts, 2),
    }


def _engine(folder: Path, policy: Policy | None, max_batch: int, compiled: bool) -> Any:
    from vllm import LLM

    return LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=max_batch,
        enforce_eager=not compiled,
        enable_prefix_caching=False,
        disable_log_stats=True,
        kv_cache_memory_bytes=1 << 28,
        gpu_memory_utilization=0.2,
        additional_config={"sere": policy.model_dump()} if policy else {},
    )


def _step_seconds(engine: Any, model: Model, batch: int, tokens: int, seed: int) -> float:
    """Median seconds between two steps in which every row decodes."""
    from vllm import SamplingParams

    rng = random.Random(seed)
    vocabulary = int(model.config["vocab_size"])
    sampling = SamplingParams(
        max_tokens=tokens + 2, temperature=0, ignore_eos=True, detokenize=False
    )
    core = engine.llm_engine
    for row in range(batch):
        prompt = [rng.randrange(2, vocabulary) for _ in range(PROMPT_TOKENS)]
        core.add_request(f"{seed}-{row}", {"prompt_token_ids": prompt}, sampling)
    ends: list[float] = []
    while core.has_unfinished_requests():
        outputs = core.step()
        if len(outputs) == batch and min(len(o.outputs[0].token_ids) for o in outputs) > 1:
            ends.append(time.perf_counter())
    return statistics.median(after - before for before, after in itertools.pairwise(ends))
