"""What every way of running ``margin.cuh`` must return: the integers of ``rules/margin.py``, and of
``rules/spare.py`` where a case has that rule.

Both are given the same scores: as the device's own ``expf`` and ``log1pf`` compute them.
"""

import ctypes
import ctypes.util
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from sere_ray.kernel.launcher import RuleKernel
from sere_ray.kernel.memory import (
    MASKED_COUNTERS,
    OWN_COUNTERS,
    DeviceLayer,
    LayerTables,
    Settings,
    StepInput,
)
from sere_ray.policy.bound import BoundPolicy
from sere_ray.rules import EXACT, PADDING, REROUTABLE, RULES, Layer, margin, name_dropped, spare
from sere_ray.rules import gate as gates
from sere_ray.rules.common import named_by
from sere_ray.rules.demand import DEMAND_RULES
from sere_ray.rules.gate import PLAIN, SCORINGS, Gate
from sere_ray.rules.margin import WEIGHT_UNIT
from tests.rules.gate_cases import choose, make_gate
from tests.rules.test_sere import assert_same_ids

from .emulator import launch
from .kernel_cases import check_aligned, empty_alignment, library, rule_arguments

# (E, K): of known models, the smallest, the largest, odd ones, one without runners-up.
SHAPES = [(128, 8), (60, 4), (64, 6), (256, 8), (512, 10), (9, 3), (33, 16), (300, 5), (4, 4)]
SHAPES += [(1024, 32)]
# (E, K, groups): of DeepSeek-V3, GLM-4.5, the most that kernels take, odd ones.
GATED_SHAPES = [(256, 8, 8), (160, 8, 1), (1024, 32, 1), (48, 4, 3), (64, 6, 32), (9, 3, 1)]
KNOBS = {
    "tau": [0.0, 0.0005, 0.004, 0.02, 0.1, 1.0],
    "beta": [0.0, 0.3, 0.5, 1.0],
    "fill": [0.0, 0.5, 1.0],
    "runners_up": [1, 3, 8, 1000],
    "most": [None, 0, 3000, 50_000, 500_000],
    "guard": [False, True],
}


class Math(NamedTuple):
    """Functions of the device that runs the kernel, of float32 on a CPU."""

    exp: Callable[[Tensor], Tensor]
    log1p: Callable[[Tensor], Tensor]


_ROWS = ("logits", "ids", "weights", "kinds")
Found = tuple[Tensor, Tensor, tuple[int, ...]]
"""Ids, weights, counters."""


class MarginCase(NamedTuple):
    """A batch of one layer."""

    logits: Tensor
    ids: Tensor
    weights: Tensor
    kinds: Tensor
    floor: int
    knobs: dict[str, float]
    gate: Gate = PLAIN
    row_weight: Tensor | None = None
    rule: str = "margin"
    statistics: Mapping[str, Tensor] = {}
    owner: Tensor | None = None

    def policy(self, mode: str = "on") -> BoundPolicy:
        return BoundPolicy(
            mode=mode,
            rule=self.rule,
            select_top_k=self.ids.shape[1],
            threshold=None,
            min_primary_experts=self.floor,
            knobs=tuple(self.knobs.items()),
        )

    @property
    def layer(self) -> Layer:
        knobs = {**self.knobs, "gate": self.gate, "statistics": self.statistics}
        knobs["owner"] = self.owner
        return Layer(self.logits.shape[1], min_primary_experts=self.floor, **knobs)

    def expected(self, math: Math) -> Found:
        rows = self.ids, self.weights, self.logits, self.kinds
        return by_reference(*rows, self.layer, math, self.row_weight, self.rule)

    def asked(self, math: Math) -> Tensor:
        """What a rank with these rows tells the others."""
        scores = scores_of(self.logits, self.gate, math)
        rows = self.ids, self.weights, scores, self.kinds
        if self.rule == "spare":
            return spare.ask(*rows, spare.with_modes(self.layer), self.row_weight)
        return margin.ask(*rows, self.layer, self.row_weight)

    def read(self, new_ids: Tensor, *, active: bool) -> Tensor:
        """``[E]`` bool: what rows name in the end; nothing where no row is re-routable."""
        rows = (self.kinds != PADDING) & active
        return named_by(new_ids, rows, self.logits.shape[1])

    def split(self, share: float, device: torch.device | None = None) -> "list[Rank]":
        """Its rows as those of two ranks."""
        first = round(share * len(self.ids))
        active = int((self.kinds == REROUTABLE).sum())
        return [
            Rank.of(
                self._replace(**{name: getattr(self, name)[rows] for name in _ROWS}),
                device or torch.device("cpu"),
                active,
            )
            for rows in (slice(first), slice(first, None))
        ]


def balanced(case: MarginCase, ranks: int) -> MarginCase:
    """The same under ``balance_ranks``, its experts on so many ranks, in no order."""
    experts = case.logits.shape[1]
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(ranks))
    owner = (order * ranks // experts).to(torch.int64)
    return case._replace(knobs={**case.knobs, "balance_ranks": True}, owner=owner)


class Rank(NamedTuple):
    """A rank's part of a case, where launches read and write it."""

    case: MarginCase
    ids: Tensor
    weights: Tensor
    layer: DeviceLayer

    @classmethod
    def of(cls, case: MarginCase, device: torch.device, reroutable: int) -> "Rank":
        """``reroutable``: how many rows of all ranks are."""
        layer = device_layer(case, device)
        step = StepInput(max(len(case.ids), 1), device)
        step.write(case.kinds.numpy(), counter_row=1, reroutable=reroutable)
        ids, weights = (tensor.to(device, copy=True) for tensor in (case.ids, case.weights))
        return cls(case, ids, weights, layer._replace(step=step))


def check_ranks(ranks: list[Rank], wanted: Found, case: MarginCase) -> None:
    """Experts are counted by every rank, slots by the one whose they are."""
    counts = torch.stack([rank.layer.counters[1].cpu() for rank in ranks])
    for column in (0, 1, 5):
        assert (counts[:, column] == wanted[2][column]).all()
    ids = torch.cat([rank.ids.cpu() for rank in ranks])
    weights = torch.cat([rank.weights.cpu() for rank in ranks])
    found = (*wanted[2][:2], int(counts[:, 2].sum()), 0, 0, wanted[2][5])
    check_margin((ids, weights, found), wanted, case)


def scores_of(logits: Tensor, gate: Gate, math: Math) -> Tensor:
    """As the kernels have them; of a softmax without its sum."""
    logits = logits.float()
    if gate.scoring == "softmax":
        return math.exp(logits - logits.amax(dim=1, keepdim=True))
    if gate.scoring == "sigmoid":
        return 1 / (1 + math.exp(-logits))
    softplus = torch.where(logits > 20, logits, math.log1p(math.exp(logits)))
    return torch.from_numpy(
        np.sqrt(softplus.numpy())
    )  # torch's own is not always rounded to nearest


def kernel_of(case: MarginCase, id_dtype: torch.dtype | None = None) -> RuleKernel:
    experts, slots = case.logits.shape[1], case.ids.shape[1]
    any_gate = not case.gate.is_plain
    return RuleKernel(experts, slots, id_dtype or case.ids.dtype, any_gate=any_gate)


def logit_arguments(logits: Tensor, gate: Gate) -> tuple[object, ...]:
    """What kernels with the rule take for them, for the emulator."""
    size = logits.dtype.itemsize
    return logits, size, gate.bias, SCORINGS.index(gate.scoring), gate.group_size


def rerouted(
    kernel: RuleKernel,
    layer: DeviceLayer,
    ids: Tensor,
    weights: Tensor,
    logits: Tensor,
    mask_logits: Tensor | None = None,
    *,
    cache: Path,
    threads: int = 64,
    seed: int = 0,
    block: int | None = None,
    inplace: bool = True,
    cluster: int = 1,
) -> Found:
    """One launch of ``reroute`` in the emulator, or of ``reroute_and_align`` with a block size."""
    ids, weights = ids.clone(), weights.clone()
    new_ids = ids if inplace else torch.full_like(ids, -7)
    name = "reroute_and_align" if block else "reroute"
    aligned, sorted_arguments = empty_alignment(kernel, ids, block) if block else (None, [])
    masks = [] if mask_logits is None else [mask_logits, mask_logits.dtype.itemsize]
    launch(
        library(kernel, name, threads, cache),
        name,
        *rule_arguments(ids, new_ids, weights, layer),
        *logit_arguments(logits, layer.gate),
        *sorted_arguments,
        *masks,
        threads=threads,
        cluster=cluster,
        seed=seed,
    )
    if aligned:
        check_aligned(new_ids, aligned, block, logits.shape[1])
    counters = OWN_COUNTERS if mask_logits is None else MASKED_COUNTERS
    assert layer.counters[0].tolist() == [0] * counters
    return new_ids, weights, tuple(layer.counters[1].tolist())


def by_reference(
    ids: Tensor,
    weights: Tensor,
    logits: Tensor,
    kinds: Tensor,
    layer: Layer,
    math: Math,
    row_weight: Tensor | None = None,
    rule: str = "margin",
) -> Found:
    """On CPU tensors. What a row drops is given a name, as an engine does."""
    scores = scores_of(logits, layer.gate, math)
    new_ids, new_weights = RULES[rule].apply(ids, weights, scores, kinds, layer, row_weight)
    rows = kinds != PADDING
    stayed = (new_ids[:, :, None] == ids[:, None, :]).any(dim=2)
    changed = (new_ids != ids).any(dim=1) & rows
    counts = [
        int(named_by(ids, rows, layer.num_experts).sum()),
        int(named_by(new_ids, rows, layer.num_experts).sum()),
        int((~stayed & changed[:, None]).sum()),
        0,
        0,
        _beyond(rule, (ids, weights, scores, kinds), layer, row_weight),
    ]
    if REROUTABLE not in kinds:
        counts = [0] * OWN_COUNTERS  # steps without a decode row are not counted
    return name_dropped(new_ids, ids), new_weights, tuple(counts)


def _beyond(rule: str, rows: tuple[Tensor, ...], layer: Layer, row_weight: Tensor | None) -> int:
    """Whether more demand is given up than calibration saw."""
    if layer.most is None:
        return 0
    of_rule = DEMAND_RULES[rule]
    settled = of_rule.settle(layer)
    asked = of_rule.ask(*rows, settled, row_weight)
    return int(of_rule.given_up(asked, settled) > layer.most)


def _in_libm(name: str) -> Callable[[Tensor], Tensor]:
    """What kernels call in the emulator."""

    def apply(values: Tensor) -> Tensor:
        function = getattr(ctypes.CDLL(ctypes.util.find_library("m")), name)
        function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float]
        flat = [function(value) for value in values.flatten().tolist()]
        return torch.tensor(flat, dtype=torch.float32).view(values.shape)

    return apply


EMULATED = Math(_in_libm("expf"), _in_libm("log1pf"))
APPLY = """
extern "C" __global__ void apply(const float* from, float* to, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) to[i] = FUNCTION(from[i]);
}
"""


@functools.cache
def _on_gpu(function: str) -> Any:
    from cuda.core import Device, Program, ProgramOptions

    Device(0).set_current()
    major, minor = torch.cuda.get_device_capability(0)
    options = ProgramOptions(std="c++17", arch=f"sm_{major}{minor}")
    source = APPLY.replace("FUNCTION", function)
    return Program(source, "c++", options).compile("cubin").get_kernel("apply")


def _apply_on_gpu(values: Tensor, function: str) -> Tensor:
    from cuda.core import LaunchConfig, Stream, launch

    given = values.to("cuda:0").contiguous()
    found, count = torch.empty_like(given), given.numel()
    if count:
        stream = Stream.from_handle(torch.cuda.current_stream(0).cuda_stream)
        config = LaunchConfig(grid=-(-count // 256), block=256)
        arguments = (given.data_ptr(), found.data_ptr(), np.int32(count))
        launch(stream, config, _on_gpu(function), *arguments)
    return found.cpu()


GPU_MATH = Math(
    functools.partial(_apply_on_gpu, function="expf"),
    functools.partial(_apply_on_gpu, function="log1pf"),
)
"""What kernels on the GPU call; of CPU tensors."""


def device_layer(
    case: MarginCase, device: torch.device, mode: str = "on", *, merges: bool = False
) -> DeviceLayer:
    """Everything of a case but its ids, weights and logits; the second of two layers."""
    experts = case.logits.shape[1]
    settings = Settings(device, layers=2, merges=merges)
    shape = {"top_k": case.ids.shape[1], "num_experts": experts}
    settings.write(case.policy(mode), **shape, statistics=[case.statistics] * 2)
    step = StepInput(max(case.ids.shape[0], 1), device)
    drafts = None if case.row_weight is None else case.row_weight.numpy()
    step.write(case.kinds.numpy(), counter_row=1, weights=drafts)
    counters = torch.zeros((2, OWN_COUNTERS), dtype=torch.int64, device=device)
    tables = LayerTables.build(torch.eye(experts), device, case.statistics)
    gate = case.gate
    if gate.bias is not None:
        gate = replace(gate, bias=gate.bias.to(device))
    return DeviceLayer(tables, settings.buffer[1], step, counters, gate)


def make_margin_case(
    *,
    seed: int,
    rows: int,
    experts: int,
    slots: int,
    dtype: torch.dtype = torch.bfloat16,
    id_dtype: torch.dtype = torch.int32,
    kinds: str = "mixed",
    tied: bool = False,
    shuffled: bool = True,
    floor: int = 0,
    gate: Gate = PLAIN,
    **knobs: float,
) -> MarginCase:
    """A gate's choice of random logits.

    Args:
        seed: of everything random.
        rows: T.
        experts: E.
        slots: K.
        dtype: of the logits.
        id_dtype: of the ids.
        kinds: ``decode``, ``exact``, ``padding`` (ids of -1) or ``mixed`` of all, with some rows
            that lack an expert.
        tied: logits of few values.
        shuffled: slots in any order, as gates on CPUs return them; else best first.
        floor: m.
        gate: chooses; of groups half, and 2 at least.
        **knobs: of the rule; ``tau`` is needed.
    """
    g = torch.Generator().manual_seed(seed)
    if tied:
        logits = torch.randint(-3, 4, (rows, experts), generator=g).to(dtype)
    else:
        logits = (1.5 * torch.randn((rows, experts), generator=g)).to(dtype)
    groups = -(-experts // gate.group_size) if gate.group_size else 1
    ids, _ = choose(logits, gate, slots=slots, top_groups=max(2, groups // 2))
    p = gates.scores_of(logits, gate)
    if shuffled:
        order = torch.rand((rows, slots), generator=g).argsort(dim=1)
        ids = ids.gather(1, order)
    weights = p.gather(1, ids) * (0.2 + torch.rand((rows, 1), generator=g))
    of_kind = {"decode": REROUTABLE, "exact": EXACT, "padding": PADDING}
    if kinds == "mixed":
        row_kind = torch.tensor([PADDING, REROUTABLE, REROUTABLE, REROUTABLE, EXACT])
        row_kind = row_kind[torch.randint(0, 5, (rows,), generator=g)]
        ids[torch.rand((rows, slots), generator=g) < 0.01] = -1
    else:
        row_kind = torch.full((rows,), of_kind[kinds])
    ids[(row_kind == PADDING) & (torch.rand(rows, generator=g) < 0.8)] = -1
    ids = ids.to(id_dtype).contiguous()
    return MarginCase(logits, ids, weights, row_kind.to(torch.int8), floor, knobs, gate)


def any_gate(experts: int, groups: int) -> st.SearchStrategy[Gate]:
    """With any scores, and a bias of any size or none."""
    return st.builds(
        functools.partial(make_gate, experts=experts, groups=groups),
        scoring=st.sampled_from(SCORINGS),
        bias=st.sampled_from([0.0, 0.02, 0.5, 100.0]),
        seed=st.integers(0, 100),
    )


def draw_batch(draw, rows, fixed, **further):
    """What a random batch of a shape is made of, but its knobs.

    Args:
        draw: of a composite strategy.
        rows: strategy of their number; None = up to 40.
        fixed: what is not drawn; ``groups`` stands for any gate with so many.
        further: strategies of what else is drawn.
    """
    choices = {
        "seed": st.integers(0, 10**6),
        "rows": st.integers(0, 40) if rows is None else rows,
        "dtype": st.sampled_from([torch.bfloat16, torch.float32]),
        "id_dtype": st.sampled_from([torch.int32, torch.int64]),
        "kinds": st.sampled_from(["mixed", "mixed", "decode", "exact", "padding"]),
        "tied": st.booleans(),
        "floor": st.sampled_from([0, fixed["slots"], 40, 1000]),
        **further,
    }
    if "groups" in fixed:  # a gate that is not plain
        choices["gate"] = any_gate(fixed["experts"], fixed.pop("groups"))
    return fixed | {name: draw(choice) for name, choice in choices.items() if name not in fixed}


@st.composite
def margin_cases(draw, rows=None, **fixed):
    """Random ones of a shape."""
    knobs = {name: draw(st.sampled_from(values)) for name, values in KNOBS.items()}
    return make_margin_case(**draw_batch(draw, rows, fixed), **knobs)


def with_drafts(case: MarginCase) -> MarginCase:
    """Three of four re-routable rows count as far as they are likely to be accepted."""
    generator = torch.Generator().manual_seed(len(case.ids))
    drawn = torch.randint(1, WEIGHT_UNIT + 1, case.kinds.shape, generator=generator)
    is_draft = (case.kinds == REROUTABLE) & (torch.arange(len(case.ids)) % 4 > 0)
    return case._replace(row_weight=torch.where(is_draft, drawn, WEIGHT_UNIT))


def check_margin(found: Found, wanted: Found, case: MarginCase, what: str = "margin") -> None:
    """Ids and counters ``==``; weights too, but for rows that changed."""
    ids, weights, counts = found
    assert_same_ids(ids, wanted[0], what)
    assert counts == wanted[2]
    same = (wanted[0] == case.ids).all(dim=1)
    assert torch.equal(weights[same], case.weights[same])
    torch.testing.assert_close(weights, wanted[1], rtol=1e-5, atol=1e-9)
