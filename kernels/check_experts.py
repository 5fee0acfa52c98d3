"""Which of vLLM's expert kernels are right where a row names an expert twice? Run on a GPU host:

    python kernels/check_experts.py --out docs/results/back-ends-h200.json

Stock routing never names an expert twice in a row, the rule `sere` does, and some kernels return
wrong rows then. So each kernel computes rows as `sere` (S = 1) and `margin` make them, and the same
sums over distinct experts: the weights of repeats are added, and other experts of weight 0 take
their places. A right kernel gives both alike but for rounding. `sere merged`: repeats are id -1,
with all experts or with half of them, as on one of two ranks (`in a shard`). Weights are random
numbers in a layer that vLLM has made, so the format is vLLM's own; a pass before each leaves
garbage in the kernel's workspaces. Every variant is a process of its own; one that does not start
says why.

`largest_error` is relative to the largest output; null: not finite.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BATCHES = (1, 16, 300, 600)
EXPERTS, TOP_K, HIDDEN, WIDTH, HOT = 64, 8, 512, 256, 4
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "moe_intermediate_size": WIDTH,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "norm_topk_prob": True,
    "torch_dtype": "bfloat16",
}
GPT_OSS = MODEL | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_local_experts": EXPERTS,
    "intermediate_size": WIDTH,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"],
}
FP8_BITS = int.from_bytes(b"\xbf" * 4, "little", signed=True)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
INT4 = {"bits": 4, "group_size": 128}
FORMATS = {
    "bf16": (MODEL, None, ("triton", "flashinfer_cutlass")),
    "fp8-block": (
        MODEL,
        FP8 | {"weight_block_size": [128, 128], "fmt": "e4m3"},
        ("triton", "flashinfer_cutlass", "deep_gemm", "cutlass", "marlin", "humming"),
    ),
    "fp8-tensor": (MODEL, FP8, ("triton", "flashinfer_cutlass", "cutlass", "marlin", "humming")),
    "int4-gptq": (
        MODEL,
        INT4 | {"quant_method": "gptq", "desc_act": False, "sym": True, "lm_head": False},
        ("marlin", "humming", "triton"),
    ),
    "int4-awq": (
        MODEL,
        INT4 | {"quant_method": "awq", "zero_point": True, "version": "gemm"},
        ("marlin", "humming", "triton"),
    ),
    "mxfp4": (
        GPT_OSS,
        {"quant_method": "mxfp4"},
        ("marlin", "triton", "triton_unfused", "humming", "flashinfer_cutlass"),
    ),
}
"""Format -> configuration, its quantisation, back ends to try. "auto" is tried for each."""


def rows_of(rule, batch, generator):
    """Ids as a rule leaves them, with weights; the same over distinct experts; and with -1."""
    import torch

    from sere_ray.rules import RULES, Layer, merge_repeated, name_dropped, reroute

    logits = torch.randn((batch, EXPERTS), generator=generator)
    logits[:, :HOT] += 8  # so that few are kept however many rows there are
    scores = logits.softmax(dim=1)
    weights, ids = scores.topk(TOP_K, dim=1)
    ids = ids.int()
    if rule == "sere":
        similarity = torch.rand((EXPERTS, EXPERTS), generator=generator)
        repeated = reroute(ids, weights, similarity, select_top_k=1)
        merged, merged_weights = merge_repeated(repeated, weights)
        return repeated, weights, merged, merged_weights
    kinds = torch.ones(batch, dtype=torch.int8)
    layer = Layer(EXPERTS, tau=1.0)
    merged, merged_weights = RULES["margin"].apply(ids, weights, scores, kinds, layer)
    return name_dropped(merged, ids), merged_weights, merged, merged_weights


def distinct(merged):
    """Other experts of the row's own in the place of -1; their weight is 0."""
    import torch

    named = torch.zeros((len(merged), EXPERTS + 1), dtype=torch.bool)
    named.scatter_(1, torch.where(merged < 0, EXPERTS, merged).long(), True)
    free = named[:, :EXPERTS].int().argsort(dim=1, stable=True)[:, :TOP_K]
    place = (merged < 0).cumsum(dim=1) - 1
    return torch.where(merged < 0, free.gather(1, place.clamp(min=0)).int(), merged)


def randomise(experts, is_fp8):
    """Random weights in the layer's own format. Packed bytes of FP8 must not be its NaN."""
    import torch

    torch.manual_seed(0)
    for name, tensor in experts.named_parameters():
        short = name.rpartition(".")[2]
        if "scale" in short:
            value = torch.rand(tensor.shape, device=tensor.device) * 0.01 + 0.005
            if is_fp8:  # a kernel may have put a power of two into them, which is to stay
                value = tensor.float().abs() * (value * 100)
            if tensor.dtype == torch.uint8:  # exponents
                value = torch.randint(118, 124, tensor.shape, device=tensor.device)
        elif "bias" in short:
            value = torch.randn(tensor.shape, device=tensor.device) * 0.1
        elif "weight" in short or "qzeros" in short:
            value = torch.randn(tensor.shape, device=tensor.device) * 0.2
            if not tensor.is_floating_point():
                low, high = (0, 256) if tensor.dtype == torch.uint8 else (-(2**31), 2**31)
                value = torch.randint(low, high, tensor.shape, device=tensor.device)
                if is_fp8:
                    value &= 0xBF if tensor.dtype == torch.uint8 else FP8_BITS
        else:
            continue
        tensor.data.copy_(value.to(tensor.dtype))


def check(name, backend, seed=0):
    """Rows of one variant, in this process."""
    import torch
    from vllm import LLM
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    config, quantisation, _ = FORMATS[name]
    if quantisation:
        config = config | {"quantization_config": quantisation}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        engine = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=1024,
            max_num_batched_tokens=1024,
            gpu_memory_utilization=0.1,
            kv_cache_memory_bytes=1 << 26,
            moe_backend=backend,
        )
    (model,) = engine.apply_model(lambda model: model)
    runner = next(module for module in model.modules() if isinstance(module, MoERunner))
    experts = runner.routed_experts
    if runner.is_monolithic:
        raise SystemExit("## chooses its experts inside the kernel")
    kernel = type(experts.quant_method.moe_kernel.fused_experts).__name__
    randomise(experts, is_fp8=name.startswith("fp8"))
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)

    def run(x, ids, weights):
        with set_forward_context(None, engine.llm_engine.vllm_config, num_tokens=len(x)):
            return experts.quant_method.apply(
                layer=experts,
                x=x.clone(),
                topk_weights=weights.to(device),
                topk_ids=ids.to(device),
                shared_experts=None,
                shared_experts_input=None,
            ).float()

    def compare(rule, batch, merges=False, shard=False):
        repeated, weights, merged, merged_weights = rows_of(rule, batch, generator)
        x = torch.randn((batch, HIDDEN), generator=generator).bfloat16().to(device)
        wanted = run(x, distinct(merged), merged_weights)
        run(torch.randn_like(x) * 9, distinct(merged).flip(0), weights)  # garbage
        found = run(x, merged, merged_weights) if merges else run(x, repeated, weights)
        error = float((found - wanted).abs().max() / wanted.abs().max())
        return {
            "experts_kernel": kernel,
            "format": name,
            "moe_backend": backend,
            "batch": batch,
            "rule": rule + " merged" * merges + " in a shard" * shard,
            "slots_repeated": int((merged < 0).sum()),
            "largest_error": error if math.isfinite(error) else None,
        }

    rows = [compare(rule, batch) for batch in BATCHES for rule in ("sere", "margin")]
    if device.type == "cuda":
        print("@@" + json.dumps(rows), flush=True)  # should what follows end the process
        rows += [compare("sere", batch, merges=True) for batch in BATCHES]
        half = torch.arange(EXPERTS, dtype=torch.int32, device=device)
        half[EXPERTS // 2 :] = -1  # as on one of two ranks; its experts are the first ones
        with_map = {"expert_map": property(lambda self: half)}
        experts.__class__ = type("Shard", (type(experts),), with_map)
        rows += [compare("sere", batch, merges=True, shard=True) for batch in BATCHES]
    return rows


def in_process(variant):
    """The rows of a variant, or one that says why there are none."""
    name, backend = variant
    command = [sys.executable, __file__, "--one", name, backend, "--out", "-"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=500, check=False
    )
    marked = [line[2:] for line in done.stdout.splitlines() if line.startswith("@@")]
    if marked:
        return json.loads(marked[-1])
    lines = (done.stderr + done.stdout).splitlines()
    said = [line[3:] for line in lines if line.startswith("## ")]
    said = said or [line for line in lines if "Error" in line]
    message = (said or (done.stderr or "no output").splitlines())[-1].strip()[-300:]
    return [{"format": name, "moe_backend": backend, "experts_kernel": None, "message": message}]


def main():
    """Every variant asked for, a few at a time; what was found so far is always on disk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", default=",".join(FORMATS), help="formats, comma-separated")
    parser.add_argument("--at-once", type=int, default=4, help="variants that run at a time")
    parser.add_argument("--one", nargs=2, metavar=("FORMAT", "BACKEND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("@@" + json.dumps(check(*options.one)))
        return
    from sere_ray.util.results import write_result

    variants = [
        (name, backend)
        for name in options.only.split(",")
        for backend in ("auto", *FORMATS[name][2])
    ]
    rows = []
    with ThreadPoolExecutor(options.at_once) as pool:
        for variant, found in zip(variants, pool.map(in_process, variants), strict=True):
            errors = [row.get("largest_error", "none") for row in found]
            worst = "not finite" if None in errors else max(errors, key=str)
            print(*variant, found[0]["experts_kernel"], found[0].get("message", worst), flush=True)
            rows += found
            write_result(Path(options.out), {"rows": rows})


if __name__ == "__main__":
    main()
