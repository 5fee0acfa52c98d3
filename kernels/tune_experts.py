"""Tiles of vLLM's Triton expert GEMM for re-routed batches: few experts, more rows each.

    python kernels/tune_experts.py --out docs/results/tiles-h200.json --folder sere_ray/engine/tiles

Stock chooses a tile from the number of rows alone. This times a layer's two GEMMs for every tile,
on batches as the gate returns them (S = K) and as the rule leaves them (S = 2, 1), and writes for
each number of rows the tile that is fastest for S = 2 and S = 1 together among those that are not
slower than stock's for S = K: a captured graph must serve every S.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_layers import GPU, RandomLayers
from torch import Tensor

from sere_ray.kernel.launcher import Aligned, RuleKernel
from sere_ray.results import write_result

LAYERS = 4
SHAPES = {  # experts, top-k, hidden size, width of an expert
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "qwen1.5-moe-a2.7b": (60, 4, 2048, 1408),
    "deepseek-v2-lite": (64, 6, 2048, 1408),
}
ROWS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]
SLACK = 1.003
"""So much slower than stock's tile may one be on a batch that is not re-routed: timing noise."""

Tile = dict[str, int]


def candidates() -> list[Tile]:
    """Tiles that fit the shared memory of a multiprocessor and are not hopeless for decoding."""
    found = []
    for m, n, k, warps, stages in itertools.product(
        (16, 32, 64), (32, 64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4, 5)
    ):
        size = stages * (m * k + n * k) * 2
        if size > 160_000 or size < 24_000 or (warps == 8) != (n == 256):
            continue
        if m == 64 and (n < 64 or stages > 3):
            continue
        found.append(
            {
                "BLOCK_SIZE_M": m,
                "BLOCK_SIZE_N": n,
                "BLOCK_SIZE_K": k,
                "GROUP_SIZE_M": 1,
                "num_warps": warps,
                "num_stages": stages,
            }
        )
    return found


class Experts:
    """Random experts of a few layers, and buffers for what they return."""

    def __init__(self, experts: int, top_k: int, hidden: int, width: int, layers: int) -> None:
        self.experts, self.top_k, self.hidden, self.width = experts, top_k, hidden, width

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device=GPU) * 0.02

        self.w1 = [random(experts, 2 * width, hidden) for _ in range(layers)]
        self.w2 = [random(experts, hidden, width) for _ in range(layers)]
        rows = max(ROWS)
        self.x = random(rows, hidden)
        self.gate_up = random(rows, top_k, 2 * width)
        self.activated = random(rows * top_k, width)
        self.out = random(rows, top_k, hidden)

    def run(self, layer: int, rows: int, weights: Tensor, aligned: Aligned, tile: Tile) -> None:
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


class Batch(RandomLayers):
    """A batch as the gate returns it, re-routed with one S, of each layer."""

    def __init__(self, experts: Experts, rows: int, select_top_k: int, layers: int) -> None:
        super().__init__(layers, rows, experts.experts, experts.top_k, select_top_k)
        self.kernel = RuleKernel(experts.experts, experts.top_k, torch.int32)
        self._aligned: dict[int, list[Aligned]] = {}

    def aligned(self, block_size: int) -> list[Aligned]:
        """Sorted slots of each layer for tiles of this height."""
        if block_size not in self._aligned:
            self._aligned[block_size] = [
                self.kernel.reroute_and_align(
                    ids, ids.clone(), weights, layer, block_size=block_size
                )
                for ids, weights, layer in zip(self.ids, self.weights, self.layers, strict=True)
            ]
        return self._aligned[block_size]

    @property
    def experts_read(self) -> float:
        """Mean over layers; they are counted at every alignment."""
        return float(self.counters[0, :, 1].float().mean()) / max(len(self._aligned), 1)


def compile_share(shape: tuple[int, int, int, int], tiles: list[Tile]) -> None:
    """Compile some tiles into Triton's cache; a process for each core."""
    torch.cuda.set_device(GPU)
    _, top_k, hidden, width = shape
    experts = Experts(16, top_k, hidden, width, layers=1)
    for rows, tile in itertools.product((1, 16), tiles):
        batch = Batch(experts, rows, top_k, layers=1)
        try:
            experts.run(0, rows, batch.weights[0], batch.aligned(tile["BLOCK_SIZE_M"])[0], tile)
        except Exception as error:  # a tile that does not fit this GPU is no candidate
            print(tile, type(error).__name__, flush=True)
    torch.cuda.synchronize()


def layer_us(experts: Experts, batch: Batch, rows: int, tile: Tile, repeats: int) -> float:
    """Microseconds of a layer's experts; infinite where the tile does not fit."""
    aligned = batch.aligned(tile["BLOCK_SIZE_M"])
    return graph_us(
        lambda layer: experts.run(layer, rows, batch.weights[layer], aligned[layer], tile),
        LAYERS,
        repeats,
    )


def graph_us(step: Callable[[int], None], layers: int, repeats: int) -> float:
    """Median microseconds of a layer in a graph of some; infinite where it cannot be launched."""
    try:
        step(0)
    except Exception:
        return float("inf")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            step(layer)
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / layers)
    return statistics.median(times[1:])


def stock_tile(shape: tuple[int, int, int, int], rows: int) -> Tile:
    """What stock vLLM would choose."""
    from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

    experts, top_k, hidden, width = shape
    tile: Tile = dict(
        try_get_optimal_moe_config(
            (experts, 2 * width, hidden), (experts, hidden, width), top_k, None, rows
        )
    )
    tile.pop("SPLIT_K", None)
    return tile


def tune(
    shape: tuple[int, int, int, int], repeats: int
) -> tuple[list[dict[str, Any]], dict[str, Tile]]:
    """Rows of the result, and the chosen tiles by number of rows."""
    experts = Experts(*shape, layers=LAYERS)
    sizes = (shape[1], 2, 1)
    result, chosen = [], {}
    for rows in ROWS:
        batches = {s: Batch(experts, rows, s, LAYERS) for s in sizes}
        stock = stock_tile(shape, rows)
        tiles = [stock, *candidates()]
        times = {
            s: [layer_us(experts, batches[s], rows, tile, repeats) for tile in tiles] for s in sizes
        }
        allowed = [i for i, us in enumerate(times[shape[1]]) if us <= SLACK * times[shape[1]][0]]
        best = min(allowed, key=lambda i: times[2][i] + times[1][i])
        chosen[str(rows)] = tiles[best]
        for s in sizes:
            fastest = min(range(len(tiles)), key=lambda i: times[s][i])
            result.append(
                {
                    "rows": rows,
                    "select_top_k": s,
                    "experts_read": batches[s].experts_read,
                    "stock_us": round(times[s][0], 2),
                    "tuned_us": round(times[s][best], 2),
                    "fastest_us": round(times[s][fastest], 2),
                    "stock_tile": list(stock.values()),
                    "tuned_tile": list(tiles[best].values()),
                    "fastest_tile": list(tiles[fastest].values()),
                }
            )
            print({k: v for k, v in result[-1].items() if "tile" not in k}, flush=True)
    return result, chosen


def main() -> None:
    """Tune the named models and write tiles and timings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--folder", type=Path, required=True, help="where tiles are written")
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--processes", type=int, default=12)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    results = []
    for model in options.models.split(","):
        shape, start = SHAPES[model], time.perf_counter()
        tiles = candidates()
        context = multiprocessing.get_context("spawn")
        shares = [(shape, tiles[i :: options.processes]) for i in range(options.processes)]
        with context.Pool(options.processes) as pool:
            pool.starmap(compile_share, shares)
        print(f"{model}: {len(tiles)} tiles, {time.perf_counter() - start:.0f} s", flush=True)
        rows, chosen = tune(shape, options.repeats)
        results += [{"model": model, **row} for row in rows]
        name = torch.cuda.get_device_name(GPU).replace(" ", "_")
        file = options.folder / f"E={shape[0]},N={shape[3]},device_name={name}.json"
        file.write_text(json.dumps(chosen, indent=1) + "\n")
        write_result(options.out, {"tile": list(candidates()[0]), "rows": results})


if __name__ == "__main__":
    main()
