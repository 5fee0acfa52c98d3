"""Tiles of vLLM's Triton expert GEMM, tuned for re-routed batches by kernels/tune_experts.py.

Files are in vLLM's format and named as vLLM names them; docs/results has what was measured.
"""

import json
from functools import cache
from pathlib import Path


def tile_for(num_experts: int, width: int, dtype: str | None, rows: int) -> dict[str, int] | None:
    """The tile for a batch, None where vLLM's own choice stands.

    Args:
        num_experts: E of the layer's weights.
        width: of an expert.
        dtype: of the weights in vLLM's words; None = bf16, the only one tuned here.
        rows: T.
    """
    from vllm import envs
    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

    if envs.VLLM_TUNED_CONFIG_FOLDER is not None or envs.VLLM_BATCH_INVARIANT:
        return None  # the user's choice
    tiles = _load(get_config_file_name(num_experts, width, dtype))
    if not tiles or rows > max(tiles):
        return None
    return dict(tiles[min(tiles, key=lambda tuned: abs(tuned - rows))])


@cache
def _load(name: str) -> dict[int, dict[str, int]]:
    file = Path(__file__).parent / name
    if not file.is_file():
        return {}
    return {int(rows): tile for rows, tile in json.loads(file.read_text()).items()}
