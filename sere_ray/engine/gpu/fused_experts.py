"""Decode batches of a layer through ``gate_up.py``, in the place of vLLM's GEMMs.

Tiles are in ``tiles/*.json``, made by kernels/tune_experts.py, a file for each shape and GPU named
as vLLM names its own. A rank's shard of the experts takes those of the whole layer, a card of the
H200's generation without a file those of the H200. Where there are none, or a batch is anything but
the plain bf16 case, vLLM's own code runs.
"""

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sere_ray.engine.gpu.gate_up import Tile

logger = logging.getLogger("vllm.sere_ray")
_FOLDER = Path(__file__).parent / "tiles"


class Tiles(NamedTuple):
    """Of the two GEMMs of a batch, for slots sorted once."""

    gate_up: "Tile"
    down: "Tile"


def apply_experts(original: Callable[..., Any], experts: Any, **call: Any) -> Any:
    """In the place of ``TritonExperts.apply``: its sequence, with two launches for its three.

    Args:
        original: ``TritonExperts.apply``, which runs whatever is not covered here.
        experts: its ``self``.
        call: its arguments, all by name, as vLLM's modular kernel passes them.
    """
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    w1, w2, ids = call["w1"], call["w2"], call["topk_ids"]
    tiles = tiles_for(w2.shape[0], w2.shape[2], ids.shape[0])
    if tiles is None or not (_is_plain(experts) and _is_plain_batch(call)):
        return original(experts, **call)
    from sere_ray.engine.gpu.gate_up import Slots, down, gate_up

    (rows, top_k), (num_experts, hidden, width) = ids.shape, w2.shape
    activated = triton_moe._resize_cache(call["workspace13"], (rows * top_k, width))
    gathered = triton_moe._resize_cache(call["workspace2"], (rows, top_k, hidden))
    # By vLLM's module, where the plugin has put a launch that also re-routes.
    sort = triton_moe._prepare_expert_assignment
    block, expert_map = {"BLOCK_SIZE_M": tiles.gate_up.block_m}, call["expert_map"]
    slots = Slots(
        *sort(
            ids,
            block,
            rows,
            top_k,
            num_experts if expert_map is None else call["global_num_experts"],
            expert_map,
            ignore_invalid_experts=expert_map is not None,  # and moe_sum skips them
        )
    )
    gate_up(call["hidden_states"], w1, activated, slots, top_k, tiles.gate_up)
    out = gathered.view(rows * top_k, hidden)
    down(activated, w2, call["topk_weights"], out, slots, tiles.down)
    experts.moe_sum(gathered, call["output"], ids, expert_map)
    return None


def tiles_for(num_experts: int, width: int, rows: int) -> Tiles | None:
    """Tiles of the nearest measured batch, None where vLLM's own GEMMs stand.

    Args:
        num_experts: E of the layer's weights.
        width: of an expert.
        rows: T.
    """
    from vllm import envs
    from vllm.model_executor.layers.fused_moe import get_config

    if envs.VLLM_TUNED_CONFIG_FOLDER is not None or envs.VLLM_BATCH_INVARIANT or get_config():
        return None  # the user's choice
    measured = _load(_FOLDER, num_experts, width)
    if not measured or rows > max(measured):
        return None
    return measured[min(measured, key=lambda tuned: abs(tuned - rows))]


_SHARDS = (1, 2, 4, 8, 16)
"""Of how many expert-parallel ranks the experts may be one's."""


@functools.cache
def _load(folder: Path, num_experts: int, width: int) -> dict[int, Tiles]:
    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name
    from vllm.platforms import current_platform

    names = [get_config_file_name(num_experts * shards, width, None) for shards in _SHARDS]
    if current_platform.is_device_capability(90):
        names += [name.split("device_name=")[0] + "device_name=NVIDIA_H200.json" for name in names]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        logger.info("sere-ray: expert GEMMs are vLLM's: there are no tiles in %s", names[0])
        return {}
    logger.info("sere-ray: expert GEMMs of small batches with the tiles in %s", file.name)
    from sere_ray.engine.gpu.gate_up import Tile

    return {
        int(rows): Tiles(Tile(**pair["gate_up"]), Tile(**pair["down"]))
        for rows, pair in json.loads(file.read_text()).items()
    }


def _is_plain(experts: Any) -> bool:
    """No quantisation, bias, clamp or LoRA, and not a subclass that computes something else."""
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    config = experts.quant_config
    return (
        type(experts) is TritonExperts
        and config.quant_dtype is None
        and config.weight_quant_dtype is None
        and config.w1_bias is None
        and config.w2_bias is None
        and experts.activation_config.clamp_limit is None
        and not experts.quantization_emulation
        and experts._lora_context is None
        and getattr(experts, "post_gemm2_hook", None) is None  # of vLLM 0.33
    )


def _is_plain_batch(call: dict[str, Any]) -> bool:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    weights: Tensor = call["topk_weights"]
    tensors: list[Tensor] = [call[name] for name in ("hidden_states", "w1", "w2")]
    return (
        all(tensor.dtype == torch.bfloat16 and tensor.is_contiguous() for tensor in tensors)
        and weights.dtype == torch.float32
        and weights.is_contiguous()
        and call["activation"] == MoEActivation.SILU
        and call["a1q_scale"] is None
        and not call["apply_router_weight_on_input"]
    )
