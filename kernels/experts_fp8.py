"""FP8 experts in blocks of 128 x 128, as ``tune_experts.py`` times them."""

import itertools
from dataclasses import replace
from typing import Any

import torch
from experts_bf16 import Experts, VllmTile
from random_layers import GPU
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

from sere_ray.engine.gpu.gate_up import Slots, Tile
from sere_ray.engine.gpu.gate_up_fp8 import Scaled, down_fp8, empty_activated, gate_up_fp8
from sere_ray.kernel.alignment import Aligned

BLOCK = [128, 128]


class Fp8Experts(Experts):
    """Random e4m3 experts of a few layers; rows come as bf16."""

    format = ("fp8_w8a8", BLOCK)

    def __init__(self, experts: int, top_k: int, hidden: int, width: int, layers: int) -> None:
        super().__init__(experts, top_k, hidden, width, layers)
        self.s1, self.s2 = ([self._scales(w) for w in all_w] for all_w in (self.w1, self.w2))
        for all_w in (self.w1, self.w2):
            all_w[:] = [(w * 12).to(torch.float8_e4m3fn) for w in all_w]
        self.quantised = empty_activated(len(self.x) * top_k, width, self.x.device)

    @staticmethod
    def _scales(weights: Tensor) -> Tensor:
        experts, rows, columns = weights.shape
        return torch.rand((experts, rows // 128, columns // 128), device=GPU) * 0.1 + 0.05

    def candidates(self, gated: bool) -> list[Tile]:
        """Each once with a program for every tile, once with as many as fit a multiprocessor."""
        kinds = [(64, 4), (128, 4)] if not gated else [(32, 4), (64, 4), (64, 8), (128, 8)]
        found = []
        for (n, warps), k, stages in itertools.product(kinds, (128, 256), (2, 3, 4, 5, 6)):
            size = stages * (16 + (2 * n if gated else n)) * k
            resident = min(227_000 // (size + 1024), 24 // warps)
            if 25_000 < size < 150_000:
                tile = Tile(16, n, k, warps, stages)
                found += [tile, replace(tile, programs=resident)]
        return found

    def fused(
        self,
        layer: int,
        rows: int,
        weights: Tensor,
        slots: Slots,
        first: Tile | None,
        second: Tile | None,
    ) -> None:
        """One of the GEMMs of ours, or both; the first with what quantises its rows."""
        values, scales = self.quantised
        activated: Scaled = values[: rows * self.top_k], scales[: rows * self.top_k]
        if first:
            x = per_token_group_quant_fp8(self.x[:rows], 128, use_ue8m0=False)
            w1 = self.w1[layer], self.s1[layer]
            gate_up_fp8(x, w1, activated, slots, self.top_k, first)
        if second:
            out = self.out[:rows].view(-1, self.hidden)
            down_fp8(activated, (self.w2[layer], self.s2[layer]), weights, out, slots, second)

    def run(self, layer: int, rows: int, weights: Tensor, aligned: Aligned, tile: VllmTile) -> None:
        """What vLLM launches between sorting and summing."""
        from vllm.model_executor.layers.fused_moe.fused_moe import invoke_fused_moe_triton_kernel
        from vllm.triton_utils import tl

        names = ("int8_w8a8", "int8_w8a16", "int4_w4a16")
        common: dict[str, Any] = {
            "config": tile,
            "compute_type": tl.bfloat16,
            "use_fp8_w8a8": True,
            **{f"use_{name}": False for name in names},
            "per_channel_quant": False,
            "block_shape": BLOCK,
        }
        both, out = self.gate_up[:rows], self.out[:rows]
        x, x_scale = per_token_group_quant_fp8(self.x[:rows], 128, use_ue8m0=False)
        invoke_fused_moe_triton_kernel(
            x,
            self.w1[layer],
            both,
            x_scale,
            self.s1[layer],
            None,
            *aligned,
            False,
            self.top_k,
            **common,
        )
        activated, scale = ops.silu_and_mul_per_block_quant(
            both.view(-1, 2 * self.width), group_size=128, quant_dtype=torch.float8_e4m3fn
        )
        invoke_fused_moe_triton_kernel(
            activated,
            self.w2[layer],
            out,
            scale,
            self.s2[layer],
            weights,
            *aligned,
            True,
            1,
            **common,
        )
