"""Microseconds that re-routing adds to a layer, under a CUDA graph, on a GPU host.

    python kernels/benchmark.py --out kernel-h200.json --plot kernel-h200.png
    python kernels/benchmark.py --only-margin --repeats 12 --out margin-h200.json

A graph holds for each of 48 layers an empty kernel and one launch of an arm, with ids, weights and
tables of the layer's own; the time beyond a graph of empty kernels only, over 48, is what the arm
adds to a layer. (Without the empty kernels, our launches would overlap with each other.) Arms take
turns; repeats are medians.

The second form measures margin beside sere alone, in less than a minute: as it is launched, and
with 1, 2, 4 and 8 blocks. sere's `..._8_blocks_us` are its times in a graph captured for margin.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_layers import GPU, RandomLayers
from rich.console import Console
from torch import Tensor

from sere_ray.bound_policy import BoundPolicy
from sere_ray.kernel.compiler import compile_cubin
from sere_ray.kernel.launcher import MAX_ROUTED_ROWS, RuleKernel, blocks_of_margin
from sere_ray.kernel.memory import DeviceLayer, Settings
from sere_ray.progress import progress
from sere_ray.results import write_result
from sere_ray.rules.sere import apply_plan, count, make_plan

LAYERS = 48
SHAPES = [(60, 4), (64, 6), (128, 8), (256, 8)]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
MARGIN_SHAPES = SHAPES[1:]
MARGIN_ROWS = [4, 16, 32, 64, 128]
BLOCK_SIZE = 16

Launch = Callable[[int], Any]
"""Enqueue one layer's work, given the layer."""


class Layers(RandomLayers):
    """The same with a place for new ids: each replay of a graph starts from the gate's.

    Attributes:
        margin: the layers under the rule ``margin``, which keeps first choices alone: those that
            sere keeps with S = 1. Every other slot is refilled.
        margin_weights: what it changes in place; beta = 1 keeps their sum through many replays.
    """

    def __init__(self, rows: int, num_experts: int, top_k: int, select_top_k: int) -> None:
        super().__init__(LAYERS, rows, num_experts, top_k, select_top_k)
        self.new_ids, self.new_weights = torch.empty_like(self.ids), torch.empty_like(self.weights)
        policy = BoundPolicy(
            mode="on",
            rule="margin",
            select_top_k=top_k,
            threshold=None,
            min_primary_experts=0,
            knobs=(("tau", 1.0), ("beta", 1.0)),
        )
        settings = Settings(GPU, LAYERS)
        settings.write(policy, top_k=top_k, num_experts=num_experts)
        rows_of = zip(self.layers, settings.buffer, strict=True)
        self.margin = [layer._replace(settings=row) for layer, row in rows_of]
        self.margin_weights = self.weights.clone()


def arms(
    rows: int, num_experts: int, top_k: int, data: Layers, *, compiled: bool
) -> dict[str, Launch]:
    """What is measured, by the name of its column."""
    kernel = RuleKernel(num_experts, top_k, torch.int32)
    kernel.load(GPU, ("reroute", "reroute_and_align", "route_and_align"))

    def reference(layer: int) -> None:
        _reference(
            data.ids[layer],
            data.weights[layer],
            data.layers[layer].tables.similarity,
            data.kinds,
            data.select_top_k,
        )

    found: dict[str, Launch] = {
        "empty_us": _empty_launch(kernel.threads("reroute", rows)),
        "reference_us": reference,
        "published_us": _published_launch(rows, num_experts, top_k, data),
        **_sere_launches(kernel, rows, data),
        **_margin_launches(kernel, rows, data, blocks_of_margin(rows, GPU)),
        **_vllm_launches(num_experts, data),
    }
    if compiled:
        fast = torch.compile(_reference, dynamic=False)
        found["compiled_us"] = lambda layer: fast(
            data.ids[layer],
            data.weights[layer],
            data.layers[layer].tables.similarity,
            data.kinds,
            data.select_top_k,
        )
    return found


def margin_arms(rows: int, num_experts: int, top_k: int, data: Layers) -> dict[str, Launch]:
    """The rule ``margin`` beside ``sere``, in one block and in clusters."""
    kernel = RuleKernel(num_experts, top_k, torch.int32)
    found = {
        "empty_us": _empty_launch(kernel.threads("reroute", rows)),
        **_sere_launches(kernel, rows, data),
        **_margin_launches(kernel, rows, data, blocks_of_margin(rows, GPU)),
    }
    if torch.cuda.get_device_capability(GPU) < (9, 0):
        return found
    for blocks in (1, 2, 4, 8):
        others = _margin_launches(kernel, rows, data, blocks)
        if blocks == 8:
            others |= _sere_launches(kernel, rows, data, blocks)
        for name, launch in others.items():
            found[f"{name.removesuffix('_us')}_{blocks}_blocks_us"] = launch
    return found


def _sere_launches(
    kernel: RuleKernel, rows: int, data: Layers, blocks: int = 1
) -> dict[str, Launch]:
    names = ("added_us", "with_sorting_us", "with_top_k_us")
    return _launches(kernel, rows, data, data.layers, data.weights, blocks, names)


def _margin_launches(kernel: RuleKernel, rows: int, data: Layers, blocks: int) -> dict[str, Launch]:
    names = ("margin_us", "margin_with_sorting_us", "margin_with_top_k_us")
    return _launches(kernel, rows, data, data.margin, data.margin_weights, blocks, names)


def _launches(
    kernel: RuleKernel,
    rows: int,
    data: Layers,
    layers: list[DeviceLayer],
    weights: Tensor,
    blocks: int,
    names: tuple[str, str, str],
) -> dict[str, Launch]:
    """A rule alone, with sorting, and with the gate's top-k where the kernel has it."""

    def arguments(layer: int) -> tuple[Any, ...]:
        return data.ids[layer], data.new_ids[layer], weights[layer], layers[layer]

    found: dict[str, Launch] = {
        names[0]: lambda layer: kernel.reroute(
            *arguments(layer), logits=data.logits[layer], blocks=blocks
        ),
        names[1]: lambda layer: kernel.reroute_and_align(
            *arguments(layer), logits=data.logits[layer], block_size=BLOCK_SIZE, blocks=blocks
        ),
    }
    if kernel.can_route and rows <= MAX_ROUTED_ROWS:
        found[names[2]] = lambda layer: kernel.route_and_align(
            data.logits[layer],
            data.new_ids[layer],
            data.new_weights[layer],
            layers[layer],
            is_padding=None,
            renormalize=True,
            block_size=BLOCK_SIZE,
            blocks=blocks,
        )
    return found


def _reference(
    ids: Tensor, weights: Tensor, similarity: Tensor, kinds: Tensor, select_top_k: int
) -> tuple[Tensor, Any]:
    """The specification, counters included, as the kernel does it."""
    plan = make_plan(ids, weights, similarity, row_kind=kinds, select_top_k=select_top_k)
    new_ids = apply_plan(plan, ids, kinds)
    return new_ids, count(plan, ids, new_ids, kinds)


def _compiled(name: str, defines: dict[str, int], kernel: str) -> Any:
    from cuda.core import Device, ObjectCode

    major, minor = torch.cuda.get_device_capability(GPU)
    Device(0).set_current()
    cubin = compile_cubin(name, defines, f"sm_{major}{minor}")
    return ObjectCode.from_cubin(cubin).get_kernel(kernel)


def _stream() -> Any:
    from cuda.core import Stream

    return Stream.from_handle(torch.cuda.current_stream().cuda_stream)


def _empty_launch(threads: int) -> Launch:
    from cuda.core import LaunchConfig, launch

    nothing = _compiled("published.cu", {"E": 2, "K": 1}, "nothing")
    config = LaunchConfig(grid=1, block=threads)
    return lambda layer: launch(_stream(), config, nothing)


def _published_launch(rows: int, num_experts: int, top_k: int, data: Layers) -> Launch:
    """The six launches of the published implementation, for rows sorted by weight."""
    from cuda.core import LaunchConfig, launch

    scan = _compiled("published.cu", {"E": num_experts, "K": top_k}, "scan_for_stand_in")
    size = data.select_top_k
    config = LaunchConfig(grid=-(-rows * (top_k - size) // 256), block=256)
    mask = torch.zeros((LAYERS, num_experts), dtype=torch.bool, device=GPU)

    def layer_of(layer: int) -> None:
        is_primary, similarity = mask[layer], data.layers[layer].tables.similarity
        ids = data.ids[layer].to(torch.int64)
        is_primary.zero_()
        is_primary.scatter_(0, ids[:, :size].flatten(), True)
        launch(
            _stream(),
            config,
            scan,
            ids.data_ptr(),
            np.int32(rows),
            np.int32(size),
            similarity.data_ptr(),
            is_primary.data_ptr(),
        )
        data.new_ids[layer].copy_(ids)

    return layer_of


def _vllm_launches(num_experts: int, data: Layers) -> dict[str, Launch]:
    """What stock vLLM launches, if it is here: `with_sorting_us` replaces the sorting.

    `with_top_k_us` replaces the gate's top-k and the sorting.
    """
    try:
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
    except ImportError:
        return {}
    indices = torch.empty_like(data.ids[0])

    def sort(layer: int) -> None:
        moe_align_block_size(data.ids[layer], BLOCK_SIZE, num_experts)

    def choose_and_sort(layer: int) -> None:
        ops.topk_softmax(
            data.new_weights[layer], data.new_ids[layer], indices, data.logits[layer], True
        )
        sort(layer)

    return {"vllm_sorting_us": sort, "vllm_top_k_us": choose_and_sort}


def capture(launch: Launch) -> torch.cuda.CUDAGraph:
    """A graph of one launch for each layer."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for layer in range(LAYERS):  # compiles, loads, allocates
            launch(layer)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    empty = _empty_launch(32)
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            empty(layer)
            launch(layer)
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, replays: int = 5) -> float:
    """Microseconds per layer."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / replays / LAYERS


def measure(
    rows: int,
    num_experts: int,
    top_k: int,
    repeats: int,
    *,
    compiled: bool = False,
    only_margin: bool = False,
) -> dict[str, Any]:
    """One row of the result."""
    data = Layers(rows, num_experts, top_k, select_top_k=1)
    if only_margin:
        launches = margin_arms(rows, num_experts, top_k, data)
    else:
        launches = arms(rows, num_experts, top_k, data, compiled=compiled)
    graphs = {name: capture(launch) for name, launch in launches.items()}
    nothing = capture(lambda layer: None)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats + 1):
        base = replay_us(nothing)
        for name, graph in graphs.items():
            times[name].append(replay_us(graph) - base)
    medians = {name: round(statistics.median(values[1:]), 3) for name, values in times.items()}
    added = times["added_us"][1:]
    row = {
        "rows": rows,
        "num_experts": num_experts,
        "top_k": top_k,
        "launches": 1,
        "margin_blocks": blocks_of_margin(rows, GPU),
        **medians,
        "added_us_min": round(min(added), 3),
        "added_us_max": round(max(added), 3),
        "bytes": _bytes(rows, num_experts, top_k, data),
    }
    if "published_us" in medians:
        row["times_published"] = round(medians["published_us"] / medians["added_us"], 2)
    for ours, stock, added_name in (
        ("with_sorting_us", "vllm_sorting_us", "added_when_sorting_us"),
        ("with_top_k_us", "vllm_top_k_us", "added_with_top_k_us"),
        ("margin_us", "added_us", "margin_over_sere_us"),
        ("margin_with_sorting_us", "with_sorting_us", "margin_over_sere_when_sorting_us"),
        ("margin_with_top_k_us", "with_top_k_us", "margin_over_sere_with_top_k_us"),
    ):
        if {ours, stock} <= medians.keys():
            row[added_name] = round(medians[ours] - medians[stock], 3)
    return row


def _bytes(rows: int, num_experts: int, top_k: int, data: Layers) -> int:
    """Bytes a launch reads and writes: ids twice, weights, row kinds, tables, counters."""
    slots = rows * top_k
    neighbours = data.layers[0].tables.neighbours
    return slots * (4 + 4 + 4) + rows + neighbours.numel() * neighbours.element_size() + 36 + 64


def plot(result: Path, picture: Path) -> None:
    """Draw a result file: a panel for each number of experts, microseconds against rows."""
    from matplotlib.figure import Figure

    document = json.loads(result.read_text())
    arms = {
        "margin_with_top_k_us": "ours: top-k, margin and sort, 1 launch",
        "published_us": "published structure, 6 launches",
        "vllm_top_k_us": "vLLM: top-k, sort by expert, 3 launches",
        "with_top_k_us": "ours: top-k, re-route and sort, 1 launch",
        "vllm_sorting_us": "vLLM: sort by expert, 2 launches",
        "with_sorting_us": "ours: re-route and sort, 1 launch",
        "added_us": "ours: re-route, 1 launch",
        "empty_us": "an empty kernel",
    }
    figure = Figure(figsize=(3.4 * len(SHAPES) + 2.5, 3.6), layout="constrained")
    for axes, (num_experts, top_k) in zip(
        figure.subplots(1, len(SHAPES), sharey=True), SHAPES, strict=True
    ):
        rows = [row for row in document["rows"] if row["num_experts"] == num_experts]
        for color, (name, label) in enumerate(arms.items()):
            points = [(row["rows"], row[name]) for row in rows if name in row]
            if points:
                line = axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
                line[0].set_color(f"C{color}")
        axes.set(title=f"{num_experts} experts, top-{top_k}", xlabel="rows")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_yticks([1, 2, 4, 8, 16, 32], labels=["1", "2", "4", "8", "16", "32"])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("microseconds a layer, in a graph")
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.suptitle(f"{document['machine']['gpu']}, warm cache")
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Measure every shape and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--plot", type=Path, help="draw the result file here")
    parser.add_argument("--only-plot", action="store_true", help="draw what was measured before")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--rows", help="batch sizes, with commas between them")
    parser.add_argument("--only-margin", action="store_true", help="margin beside sere alone")
    parser.add_argument(
        "--compiled-rows",
        default="16,64,512",
        help="rows at which torch.compile is measured too (it compiles for seconds each)",
    )
    options = parser.parse_args()
    if options.only_plot:
        plot(options.out, options.plot)
        return
    torch._dynamo.config.cache_size_limit = 64
    compiled = {int(n) for n in options.compiled_rows.split(",") if n}
    shapes, batches = (MARGIN_SHAPES, MARGIN_ROWS) if options.only_margin else (SHAPES, ROWS)
    if options.rows:
        batches = [int(n) for n in options.rows.split(",")]
    points = list(itertools.product(shapes, batches))
    console, rows = Console(), []
    with progress(console, len(points), task="measure", unit="shapes") as advance:
        for (num_experts, top_k), count_of in points:
            rows.append(
                measure(
                    count_of,
                    num_experts,
                    top_k,
                    options.repeats,
                    compiled=count_of in compiled,
                    only_margin=options.only_margin,
                )
            )
            console.print({k: v for k, v in rows[-1].items() if not k.startswith("added_us_")})
            advance(1)
            write_result(options.out, {"layers": LAYERS, "repeats": options.repeats, "rows": rows})
    if options.plot:
        plot(options.out, options.plot)


if __name__ == "__main__":
    main()
