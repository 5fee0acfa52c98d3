"""Tiles of the expert GEMMs with SiLU inside (engine/gpu/gate_up.py), against vLLM's launches.

    python kernels/tune_experts.py --out docs/results/experts-h200.json \\
        --folder sere_ray/engine/gpu/tiles

Stock chooses a tile from the number of rows alone; re-routed batches have few experts with more
rows each. Times are of a layer's experts and the sum over slots, in a graph of eight layers: with
fewer, small batches would find weights in the L2 cache. Each GEMM is timed alone with every tile;
the best of both are timed together, with and without overlap. Written for each number of rows: the
pair that is fastest for S = 2 and S = 1 together among those that are not slower than stock for
S = K, since a captured graph must serve every S.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from experts_bf16 import Experts, VllmTile
from experts_fp8 import Fp8Experts
from random_layers import GPU, RandomLayers
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

from sere_ray.engine.gpu.gate_up import Slots, Tile
from sere_ray.kernel.alignment import Aligned
from sere_ray.kernel.launcher import RuleKernel
from sere_ray.util.results import write_result

SHAPES = {  # experts, top-k, hidden size, width of an expert
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "qwen3-30b-a3b on 2 ranks": (64, 4, 2048, 768),  # rows of both; half of their slots
    "qwen1.5-moe-a2.7b": (60, 4, 2048, 1408),
    "deepseek-v2-lite": (64, 6, 2048, 1408),
}
ROWS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]
SLACK = 1.003
"""So much slower than stock may tiles be on a batch that is not re-routed: timing noise."""
LAYERS, PROCESSES = 8, 14
OVERLAPS = [(False, 0), (True, 0), (True, 256)]
"""Start early or not; how much of the second GEMM's weights to fetch meanwhile."""
REFERENCE = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1}
"""A tile of stock whose bits ours must have."""
Shape = tuple[int, int, int, int]
Pair = tuple[Tile, Tile]


def overlapped(pair: Pair, overlap: bool, ahead: int) -> Pair:
    """The pair with another kind of overlap."""
    first, second = (replace(tile, overlap=overlap) for tile in pair)
    return first, replace(second, ahead=ahead)


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


class Timer:
    """A batch, re-routed with one S: vLLM's launches and ours on the same slots."""

    def __init__(self, experts: Experts, rows: int, select_top_k: int) -> None:
        self.experts, self.rows, layers = experts, rows, len(experts.w1)
        self.batch = Batch(experts, rows, select_top_k, layers)
        self.slots = [Slots(*aligned) for aligned in self.batch.aligned(16)]
        self.out = experts.out[:rows]
        self.summed = experts.x.new_empty(rows, experts.hidden)

    def stock(self, layer: int, tile: VllmTile) -> None:
        """GEMM, SiLU, GEMM, sum."""
        aligned = self.batch.aligned(tile["BLOCK_SIZE_M"])[layer]
        self.experts.run(layer, self.rows, self.batch.weights[layer], aligned, tile)
        ops.moe_sum(self.out, self.summed)

    def fused(self, layer: int, first: Tile | None, second: Tile | None) -> None:
        """One of the GEMMs, or both and the sum."""
        weights = self.batch.weights[layer]
        self.experts.fused(layer, self.rows, weights, self.slots[layer], first, second)
        if first and second:
            ops.moe_sum(self.out, self.summed)

    def us(self, step: Callable[..., None], *tiles: Any) -> float:
        """Microseconds of a layer; infinite where a tile does not fit."""
        return graph_us(lambda layer: step(layer, *tiles), len(self.slots), repeats=5)

    def check(self, pair: Pair) -> None:
        """Our bits are vLLM's."""
        self.stock(0, REFERENCE)
        wanted = self.out.clone()
        self.out.fill_(9)
        self.fused(0, *pair)
        if not torch.equal(self.out, wanted):
            raise AssertionError(f"{self.rows} rows, {pair}: not vLLM's bits")


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


def stock_tile(kind: type[Experts], shape: Shape, rows: int) -> VllmTile:
    """What stock vLLM would choose."""
    from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

    (experts, top_k, hidden, width), (dtype, block) = shape, kind.format
    weights = (experts, 2 * width, hidden), (experts, hidden, width)
    tile: VllmTile = dict(try_get_optimal_moe_config(*weights, top_k, dtype, rows, block))
    tile.pop("SPLIT_K", None)
    return tile


def compile_share(kind: type[Experts], shape: Shape, all_rows: list[int], share: slice) -> None:
    """Compile some of all tiles into Triton's cache; a process for each core."""
    torch.cuda.set_device(GPU)
    experts = kind(16, *shape[1:], layers=1)
    found = [tile for rows in all_rows for tile in (stock_tile(kind, shape, rows), REFERENCE)]
    for tile in found[share]:
        Timer(experts, 16, shape[1]).stock(0, tile)
    timer = Timer(experts, 16, shape[1])
    firsts = [
        replace(tile, overlap=overlap)
        for tile in experts.candidates(gated=True)
        for overlap in (False, True)
    ]
    seconds = [
        replace(tile, overlap=overlap, ahead=ahead)
        for tile in experts.candidates(gated=False)
        for overlap, ahead in OVERLAPS
    ]
    for first in firsts[share]:
        timer.us(timer.fused, first, None)
    for second in seconds[share]:
        timer.us(timer.fused, None, second)


def finalists(times: dict[int, list[float]], tiles: list[Tile]) -> list[Tile]:
    """The best for each S, and for S = 2 and S = 1 together."""
    keys = [*times.values(), [a + b for a, b in zip(times[2], times[1], strict=True)]]
    return list(dict.fromkeys(tiles[key.index(min(key))] for key in keys))


def best(times: list[float], tiles: list[Tile]) -> list[float]:
    """Of tiles with a program for each, and of those that take tile after tile."""
    both = list(zip(times, tiles, strict=True))
    return [round(min(us for us, t in both if bool(t.programs) == p), 2) for p in (0, 1)]


def tune(shape: Shape, experts: Experts, rows: int) -> tuple[list[dict[str, Any]], Pair]:
    """Results for each S, and the pair to use."""
    top_k, sizes = shape[1], (shape[1], 2, 1)
    timers = {s: Timer(experts, rows, s) for s in sizes}
    firsts, seconds = experts.candidates(gated=True), experts.candidates(gated=False)
    first_us = {s: [t.us(t.fused, tile, None) for tile in firsts] for s, t in timers.items()}
    second_us = {s: [t.us(t.fused, None, tile) for tile in seconds] for s, t in timers.items()}
    ends = itertools.product(finalists(first_us, firsts), finalists(second_us, seconds), OVERLAPS)
    pairs = [overlapped((first, second), *overlap) for first, second, overlap in ends]
    for pair in pairs:
        timers[1].check(pair)
    pair_us = {s: [t.us(t.fused, *pair) for pair in pairs] for s, t in timers.items()}
    stock_us = {s: t.us(t.stock, stock_tile(type(experts), shape, rows)) for s, t in timers.items()}
    limit = max(SLACK * stock_us[top_k], min(pair_us[top_k]))
    allowed = [i for i, us in enumerate(pair_us[top_k]) if us <= limit]
    chosen = min(allowed, key=lambda i: pair_us[2][i] + pair_us[1][i])
    result = []
    for s, t in timers.items():
        fastest = pair_us[s].index(min(pair_us[s]))
        apart = [us for us, p in zip(pair_us[s], pairs, strict=True) if not p[0].overlap]
        columns = {"experts_read": t.batch.experts_read, "stock_us": stock_us[s]}
        columns |= {"chosen_us": pair_us[s][chosen], "fastest_us": pair_us[s][fastest]}
        columns |= {"no_overlap_us": min(apart)}
        row: dict[str, Any] = {"rows": rows, "select_top_k": s}
        row |= {name: round(value, 2) for name, value in columns.items()}
        row |= {"gate_up_us": best(first_us[s], firsts), "down_us": best(second_us[s], seconds)}
        result.append({**row, "fastest": [asdict(tile) for tile in pairs[fastest]]})
    return result, pairs[chosen]


def report(rows: list[dict[str, Any]], pair: Pair) -> None:
    """A line for each S; the chosen pair as n/k/warps/stages/programs of both GEMMs."""
    tiles = " ".join("/".join(map(str, list(asdict(t).values())[1:6])) for t in pair)
    overlap = f" +{pair[1].ahead}" if pair[0].overlap else ""
    for row in rows:
        values = [value for value in row.values() if isinstance(value, float)]
        columns = "".join(f"{value:7.1f}" for value in values + row["gate_up_us"] + row["down_us"])
        print(f"{row['rows']:4}{row['select_top_k']:2}{columns} {tiles}{overlap}", flush=True)


def main() -> None:
    """Tune the named models and write tiles and timings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--folder", type=Path, help="where tiles are written, if anywhere")
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    options = parser.parse_args()
    all_rows, results = [int(rows) for rows in options.rows.split(",")], []
    for model in options.models.split(","):
        shape, start = SHAPES[model.removesuffix("-fp8")], time.perf_counter()
        kind = Fp8Experts if model.endswith("-fp8") else Experts
        shares = [(kind, shape, all_rows, slice(i, None, PROCESSES)) for i in range(PROCESSES)]
        with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
            pool.starmap(compile_share, shares)
        print(f"{model}: compiled after {time.perf_counter() - start:.0f} s")
        print("rows S  read  stock chosen   best  apart gate_up:grid,persistent down:same")
        experts, chosen = kind(*shape, layers=LAYERS), {}
        for rows in all_rows:
            found, pair = tune(shape, experts, rows)
            report(found, pair)
            results += [{"model": model, **row} for row in found]
            keeps = found[0]["chosen_us"] <= SLACK * found[0]["stock_us"]  # S = K
            tiles = {"gate_up": asdict(pair[0]), "down": asdict(pair[1])}
            chosen[rows] = tiles if keeps else None  # vLLM's own launches
        write_result(options.out, {"rows": results})
        if options.folder:
            name = get_config_file_name(shape[0], shape[3], *kind.format)
            (options.folder / name).write_text(json.dumps(chosen, indent=1) + "\n")
        print(f"{model}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
