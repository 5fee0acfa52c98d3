"""Experts as ``tune_experts.py`` times them: vLLM's launches and ours on the same slots."""

import itertools
from dataclasses import replace
from typing import Any

import torch
from random_layers import GPU
from torch import Tensor

from sere_ray.engine.gpu.gate_up import Slots, Tile, down, gate_up
from sere_ray.kernel.alignment import Aligned

MAX_ROWS = 128
VllmTile = dict[str, int]


class Experts:
    """Random bf16 experts of a few layers, and buffers for what they return."""

    format: tuple[str | None, list[int] | None] = (None, None)
    """As vLLM names it."""

    def __init__(self, experts: int, top_k: int, hidden: int, width: int, layers: int) -> None:
        self.experts, self.top_k, self.hidden, self.width = experts, top_k, hidden, width

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device=GPU) * 0.02

        self.w1 = [random(experts, 2 * width, hidden) for _ in range(layers)]
        self.w2 = [random(experts, hidden, width) for _ in range(layers)]
        rows = MAX_ROWS
        self.x = random(rows, hidden)
        self.gate_up = random(rows, top_k, 2 * width)
        self.activated = random(rows * top_k, width)
        self.out = random(rows, top_k, hidden)

    def candidates(self, gated: bool) -> list[Tile]:
        """Each once with a program for every tile, once with as many as fit a multiprocessor."""
        found = []
        for n, k, warps, stages in itertools.product(
            (32, 64, 128), (64, 128, 256), (4, 8), range(2, 6)
        ):
            size = (stages - 1) * (16 + n) * k * 2
            if 12_000 <= size <= 110_000 and (warps == 4 or n * k >= 128 * 128):
                tile = Tile(16, n // 2 if gated else n, k, warps, stages)
                resident = min(227_000 // (size + 1024), 24 // warps)
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
        """One of the GEMMs of ours, or both."""
        activated = self.activated[: rows * self.top_k]
        if first:
            gate_up(self.x[:rows], self.w1[layer], activated, slots, self.top_k, first)
        if second:
            out = self.out[:rows].view(-1, self.hidden)
            down(activated, self.w2[layer], weights, out, slots, second)

    def run(self, layer: int, rows: int, weights: Tensor, aligned: Aligned, tile: VllmTile) -> None:
        """What ``TritonExperts`` launches between sorting and summing."""
        from vllm.model_executor.layers.fused_moe.fused_moe import invoke_fused_moe_triton_kernel
        from vllm.triton_utils import tl

        common: dict[str, Any] = {
            "config": tile,
            "compute_type": tl.bfloat16,
            "use_fp8_w8a8": False,
            "use_int8_w8a8": False,
            "use_int8_w8a16": False,
            "use_int4_w4a16": False,
            "per_channel_quant": False,
        }
        gate_up, out = self.gate_up[:rows], self.out[:rows]
        activated = self.activated[: rows * self.top_k]
        invoke_fused_moe_triton_kernel(
            self.x[:rows],
            self.w1[layer],
            gate_up,
            None,
            None,
            None,
            *aligned,
            False,
            self.top_k,
            **common,
        )
        torch.ops._C.silu_and_mul(activated, gate_up.view(-1, 2 * self.width))
        invoke_fused_moe_triton_kernel(
            activated, self.w2[layer], out, None, None, weights, *aligned, True, 1, **common
        )
