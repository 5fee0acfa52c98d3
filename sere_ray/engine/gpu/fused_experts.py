"""Decode batches of a layer through ``gate_up.py``, in the place of vLLM's GEMMs.

Tiles are in ``tiles/*.json``, made by kernels/tune_experts.py, a file for each shape, format and
GPU named as vLLM names its own. A rank's shard of the experts takes those of the whole layer, a
card of the H200's generation without a file those of the H200. Where there are none, or a batch is
anything but plain bf16 or FP8 in blocks of 128 x 128, vLLM's own code runs.
"""

import functools
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sere_ray.engine.gpu.gate_up import Slots, Tile

logger = logging.getLogger("vllm.sere_ray")
_FOLDER = Path(__file__).parent / "tiles"
_BLOCK = [128, 128]


class Tiles(NamedTuple):
    """Of the two GEMMs of a batch, for slots sorted once."""

    gate_up: "Tile"
    down: "Tile"


def apply_experts(original: Callable[..., Any], experts: Any, **call: Any) -> Any:
    """In the place of ``TritonExperts.apply``: its sequence, with fewer launches.

    Args:
        original: ``TritonExperts.apply``, which runs whatever is not covered here.
        experts: its ``self``.
        call: its arguments, all by name, as vLLM's modular kernel passes them.
    """
    w2, ids = call["w2"], call["topk_ids"]
    fp8 = experts.quant_config.quant_dtype == torch.float8_e4m3fn
    tiles = tiles_for(w2.shape[0], w2.shape[2], ids.shape[0], fp8=fp8)
    covered = _is_plain_fp8 if fp8 else _is_plain_bf16
    if tiles is None or not (_is_plain(experts) and covered(experts, call)):
        return original(experts, **call)
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    (rows, top_k), hidden = ids.shape, w2.shape[1]
    gathered = triton_moe._resize_cache(call["workspace2"], (rows, top_k, hidden))
    out = gathered.view(rows * top_k, hidden)
    slots = _sorted(call, tiles.gate_up.block_m)
    (_compute_fp8 if fp8 else _compute_bf16)(experts, call, out, slots, tiles)
    experts.moe_sum(gathered, call["output"], ids, call["expert_map"])
    return None


def _sorted(call: dict[str, Any], block_m: int) -> "Slots":
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    from sere_ray.engine.gpu.gate_up import Slots

    ids, expert_map = call["topk_ids"], call["expert_map"]
    # By vLLM's module, where the plugin has put a launch that also re-routes.
    return Slots(
        *triton_moe._prepare_expert_assignment(
            ids,
            {"BLOCK_SIZE_M": block_m},
            *ids.shape,
            call["w2"].shape[0] if expert_map is None else call["global_num_experts"],
            expert_map,
            ignore_invalid_experts=expert_map is not None,  # and moe_sum skips them
        )
    )


def _compute_bf16(
    experts: Any, call: dict[str, Any], out: Tensor, slots: "Slots", tiles: Tiles
) -> None:
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    from sere_ray.engine.gpu.gate_up import down, gate_up

    w2, top_k = call["w2"], call["topk_ids"].shape[1]
    activated = triton_moe._resize_cache(call["workspace13"], (len(out), w2.shape[2]))
    gate_up(call["hidden_states"], call["w1"], activated, slots, top_k, tiles.gate_up)
    down(activated, w2, call["topk_weights"], out, slots, tiles.down)


def _compute_fp8(
    experts: Any, call: dict[str, Any], out: Tensor, slots: "Slots", tiles: Tiles
) -> None:
    from sere_ray.engine.gpu.gate_up_fp8 import down_fp8, empty_activated, gate_up_fp8

    w1, w2 = (call["w1"], experts.w1_scale), (call["w2"], experts.w2_scale)
    activated = empty_activated(len(out), w2[0].shape[2], out.device)
    x, top_k = (call["hidden_states"], call["a1q_scale"]), call["topk_ids"].shape[1]
    gate_up_fp8(x, w1, activated, slots, top_k, tiles.gate_up)
    down_fp8(activated, w2, call["topk_weights"], out, slots, tiles.down)


def tiles_for(num_experts: int, width: int, rows: int, *, fp8: bool = False) -> Tiles | None:
    """Tiles of the nearest measured batch, None where vLLM's own GEMMs stand.

    Args:
        num_experts: E of the layer's weights.
        width: of an expert.
        rows: T.
        fp8: the weights are e4m3 in blocks of 128 x 128, not bf16.
    """
    from vllm import envs
    from vllm.model_executor.layers.fused_moe import get_config

    if envs.VLLM_TUNED_CONFIG_FOLDER is not None or envs.VLLM_BATCH_INVARIANT or get_config():
        return None  # the user's choice
    measured = _load(_FOLDER, num_experts, width, fp8)
    if not measured or rows > max(measured):
        return None
    return measured[min(measured, key=lambda tuned: abs(tuned - rows))]


_SHARDS = (1, 2, 4, 8, 16)
"""Of how many expert-parallel ranks the experts may be one's."""


@functools.cache
def _load(folder: Path, num_experts: int, width: int, fp8: bool) -> dict[int, Tiles | None]:
    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name
    from vllm.platforms import current_platform

    form = ("fp8_w8a8", _BLOCK) if fp8 else (None, None)
    if fp8 and not current_platform.is_device_capability(90):
        return {}  # stock's kernel adds in another order there
    names = [get_config_file_name(num_experts * shards, width, *form) for shards in _SHARDS]
    if current_platform.is_device_capability(90):
        names += [re.sub("device_name=[^,.]*", "device_name=NVIDIA_H200", name) for name in names]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        logger.info("sere-ray: expert GEMMs are vLLM's: there are no tiles in %s", names[0])
        return {}
    logger.info("sere-ray: expert GEMMs of small batches with the tiles in %s", file.name)
    from sere_ray.engine.gpu.gate_up import Tile

    return {
        int(rows): pair and Tiles(Tile(**pair["gate_up"]), Tile(**pair["down"]))
        for rows, pair in json.loads(file.read_text()).items()
    }


def _is_plain(experts: Any) -> bool:
    """No bias, clamp or LoRA, and not a subclass that computes something else."""
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    config = experts.quant_config
    return (
        type(experts) is TritonExperts
        and config.w1_bias is None
        and config.w2_bias is None
        and experts.activation_config.clamp_limit is None
        and not experts.quantization_emulation
        and experts._lora_context is None
        and getattr(experts, "post_gemm2_hook", None) is None  # of vLLM 0.33
    )


def _is_plain_bf16(experts: Any, call: dict[str, Any]) -> bool:
    config = experts.quant_config
    tensors: list[Tensor] = [call[name] for name in ("hidden_states", "w1", "w2")]
    return (
        config.quant_dtype is None
        and config.weight_quant_dtype is None
        and all(tensor.dtype == torch.bfloat16 and tensor.is_contiguous() for tensor in tensors)
        and call["a1q_scale"] is None
        and _is_plain_batch(call)
    )


def _is_plain_fp8(experts: Any, call: dict[str, Any]) -> bool:
    """In blocks of 128 x 128, rows in groups of 128, with scales that are any float32."""
    from vllm.model_executor.layers.quantization.utils.fp8_utils import is_deep_gemm_e8m0_used

    values: list[Tensor] = [call[name] for name in ("hidden_states", "w1", "w2")]
    scales: list[Tensor | None] = [call["a1q_scale"], experts.w1_scale, experts.w2_scale]
    return (
        experts.quant_config.block_shape == _BLOCK
        and not is_deep_gemm_e8m0_used()
        and all(value.dtype == torch.float8_e4m3fn and value.is_contiguous() for value in values)
        and all(s is not None and s.dtype == torch.float32 and s.is_contiguous() for s in scales)
        and all(size % 128 == 0 for size in call["w2"].shape[1:])
        and _is_plain_batch(call)
    )


def _is_plain_batch(call: dict[str, Any]) -> bool:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    weights: Tensor = call["topk_weights"]
    return (
        weights.dtype == torch.float32
        and weights.is_contiguous()
        and call["activation"] == MoEActivation.SILU
        and not call["apply_router_weight_on_input"]
    )
