"""Microseconds that re-routing adds to a layer, under a CUDA graph, on a GPU host.

    python kernels/benchmark.py --out kernel-h200.json --plot kernel-h200.png
    python kernels/benchmark.py --only-margin --repeats 12 --out margin-h200.json

A graph holds for each of 48 layers an empty kernel and one launch of an arm, with ids, weights and
tables of the layer's own; the time beyond a graph of empty kernels only, over 48, is what the arm
adds to a layer. (Without the empty kernels, our launches would overlap with each other.) Arms take
turns; repeats are medians.

The second form measures margin and spare beside sere alone, in less than a minute: margin as it is
launched, with 1, 2, 4 and 8 blocks, and behind a gate with a sigmoid, a selection bias and groups
(`gated`); spare keeping 30 to 50 experts.
sere's `..._8_blocks_us` are its times in a graph captured for margin.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from launches import LAYERS, Launch, Layers, arms, empty_launch, margin_arms
from random_layers import GPU
from rich.console import Console

from sere_ray.kernel.limits import blocks_of_margin
from sere_ray.util.progress import progress
from sere_ray.util.results import write_result

SHAPES = [(60, 4), (64, 6), (128, 8), (256, 8)]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
MARGIN_SHAPES = SHAPES[1:]
MARGIN_ROWS = [4, 16, 32, 64, 128]


def capture(launch: Launch) -> torch.cuda.CUDAGraph:
    """A graph of one launch for each layer."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for layer in range(LAYERS):  # compiles, loads, allocates
            launch(layer)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    empty = empty_launch(32)
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
        ("spare_us", "margin_us", "spare_over_margin_us"),
        ("spare_with_sorting_us", "margin_with_sorting_us", "spare_over_margin_when_sorting_us"),
        ("spare_with_top_k_us", "margin_with_top_k_us", "spare_over_margin_with_top_k_us"),
        ("gated_us", "margin_us", "gated_over_softmax_us"),
        ("gated_with_sorting_us", "margin_with_sorting_us", "gated_over_softmax_when_sorting_us"),
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
