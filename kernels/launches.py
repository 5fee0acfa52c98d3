"""What the benchmark of this folder times: our launches, the published structure, vLLM's, torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from random_layers import GPU, RandomLayers
from torch import Tensor

from sere_ray.kernel.compiler import compile_cubin
from sere_ray.kernel.launcher import RuleKernel
from sere_ray.kernel.limits import MAX_ROUTED_ROWS, blocks_of_margin
from sere_ray.kernel.memory import DeviceLayer, LayerTables, Settings
from sere_ray.policy.bound import BoundPolicy
from sere_ray.rules import count
from sere_ray.rules.gate import Gate
from sere_ray.rules.sere import apply_rerouting, find_rerouting

LAYERS = 48
BLOCK_SIZE = 16
SPARE_TAU = 5e-5
"""Of a row, in the demand of even routing."""

Launch = Callable[[int], Any]
"""Enqueue one layer's work, given the layer."""


class Layers(RandomLayers):
    """The same with a place for new ids: each replay of a graph starts from the gate's.

    Attributes:
        margin: the layers under the rule ``margin``, which keeps first choices alone: those that
            sere keeps with S = 1. Every other slot is refilled.
        gated: these with the gate of DeepSeek-V3: sigmoid, selection bias, eight groups.
        spare: the layers under the rule ``spare`` with random stand-ins, which keeps 30 to 50
            experts; scales of 1 keep the sum of a row's weights through many replays.
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
        bias = 0.1 * torch.rand(num_experts, generator=torch.Generator().manual_seed(0))
        gate = Gate("sigmoid", bias.to(GPU), num_experts // 8)
        self.gated = [layer._replace(gate=gate) for layer in self.margin]
        self.spare = self._spare_layers(rows, num_experts, top_k)

    def _spare_layers(self, rows: int, num_experts: int, top_k: int) -> list[DeviceLayer]:
        generator, shape = torch.Generator().manual_seed(0), (num_experts, num_experts)
        directed = [
            {
                "directed_loss": torch.rand(shape, generator=generator).fill_diagonal_(0.0),
                "directed_scale": torch.ones(shape),
            }
            for _ in range(LAYERS)
        ]
        knobs = {"tau": SPARE_TAU * rows, "lead": 0.0, "limit": 1.0, "protect": False}
        policy = BoundPolicy(
            mode="on",
            rule="spare",
            select_top_k=top_k,
            threshold=None,
            min_primary_experts=0,
            knobs=tuple(knobs.items()),
        )
        settings = Settings(GPU, LAYERS)
        settings.write(policy, top_k=top_k, num_experts=num_experts, statistics=directed)
        return [
            layer._replace(
                tables=LayerTables.build(layer.tables.similarity, GPU, of_layer), settings=row
            )
            for layer, row, of_layer in zip(self.layers, settings.buffer, directed, strict=True)
        ]


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
        "empty_us": empty_launch(kernel.threads("reroute", rows)),
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
    """The rules ``margin`` and ``spare`` beside ``sere``, in one block and in clusters."""
    kernel = RuleKernel(num_experts, top_k, torch.int32)
    found = {
        "empty_us": empty_launch(kernel.threads("reroute", rows)),
        **_sere_launches(kernel, rows, data),
        **_margin_launches(kernel, rows, data, blocks_of_margin(rows, GPU)),
        **_gated_launches(rows, num_experts, top_k, data),
        **_spare_launches(kernel, rows, data, blocks_of_margin(rows, GPU)),
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


def _spare_launches(kernel: RuleKernel, rows: int, data: Layers, blocks: int) -> dict[str, Launch]:
    names = ("spare_us", "spare_with_sorting_us", "spare_with_top_k_us")
    return _launches(kernel, rows, data, data.spare, data.margin_weights, blocks, names)


def _gated_launches(rows: int, num_experts: int, top_k: int, data: Layers) -> dict[str, Launch]:
    kernel = RuleKernel(num_experts, top_k, torch.int32, any_gate=True)
    names = ("gated_us", "gated_with_sorting_us", "")
    blocks = blocks_of_margin(rows, GPU)
    return _launches(kernel, rows, data, data.gated, data.margin_weights, blocks, names)


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
    if names[2] and kernel.can_route and rows <= MAX_ROUTED_ROWS:
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
    rerouting = find_rerouting(ids, weights, similarity, row_kind=kinds, select_top_k=select_top_k)
    new_ids = apply_rerouting(rerouting, ids, kinds)
    return new_ids, count(rerouting, ids, new_ids, kinds)


def _compiled(name: str, defines: dict[str, int], kernel: str) -> Any:
    from cuda.core import Device, ObjectCode

    major, minor = torch.cuda.get_device_capability(GPU)
    Device(0).set_current()
    cubin = compile_cubin(name, defines, f"sm_{major}{minor}")
    return ObjectCode.from_cubin(cubin).get_kernel(kernel)


def _stream() -> Any:
    from cuda.core import Stream

    return Stream.from_handle(torch.cuda.current_stream().cuda_stream)


def empty_launch(threads: int) -> Launch:
    """A kernel that does nothing, in a block of so many threads."""
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
