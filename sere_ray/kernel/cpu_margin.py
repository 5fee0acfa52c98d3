"""The rule ``margin`` for decode steps on a CPU: scalar loops, compiled by numba.

Functions have names and arguments of :mod:`sere_ray.rules.margin`, for one step at a time, and
return the same bits. Why loops: see :mod:`sere_ray.kernel.cpu_sere`.
"""

import functools
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sere_ray.kernel.cpu_sere import as_numpy, owners
from sere_ray.rules import Choice, Layer
from sere_ray.rules.gate import Gate
from sere_ray.rules.margin import DEMAND, UNIT, demand_units, drops_first

_NOBODY = np.zeros(0, np.int64)
_NO_LIMIT = 2**62
"""Above every demand."""
_NO_BIAS = np.zeros(0, np.float32)


def ask(
    topk_ids: Tensor,
    topk_weights: Tensor,
    scores: Tensor,
    row_kind: Tensor,
    layer: Layer,
    row_weight: Tensor | None = None,
) -> Tensor:
    """``[E]`` int64: :func:`sere_ray.rules.margin.ask`.

    Args:
        topk_ids: ``[T, K]`` int32 or int64.
        topk_weights: ``[T, K]`` float.
        scores: ``[T, E]`` float32.
        row_kind: ``[T]`` int8.
        layer: its knobs; ``lead`` is not read.
        row_weight: ``[T]`` int64; None = all rows are whole.
    """
    demand = np.zeros(layer.num_experts, np.int64)
    anyway, named = (np.zeros(layer.num_experts, np.bool_) for _ in range(2))
    _loops().ask(
        topk_ids.contiguous().numpy(),
        as_numpy(topk_weights),
        scores.contiguous().numpy(),
        row_kind.contiguous().numpy(),
        _NOBODY if row_weight is None else row_weight.contiguous().numpy(),
        *_of_gate(layer.gate),
        layer.runners_up,
        drops_first(layer),
        demand,
        anyway,
        named,
    )
    wanted = np.where(anyway, UNIT + 1, np.minimum(demand, UNIT + 1))
    return torch.from_numpy(wanted * DEMAND + named)


def keep(asked: Tensor, layer: Layer) -> Tensor:
    """``[E]`` bool: :func:`sere_ray.rules.margin.keep` of ``asked [E]`` int64."""
    guards = layer.guard and layer.most is not None
    return torch.from_numpy(_keep(asked, layer, layer.most if guards else _NO_LIMIT)[0])


def demand_given_up(asked: Tensor, layer: Layer) -> Tensor:
    """``[]`` int64: :func:`sere_ray.rules.margin.demand_given_up` of ``asked [E]`` int64."""
    return torch.tensor(_keep(asked, layer, _NO_LIMIT)[1], dtype=torch.int64)


def _keep(asked: Tensor, layer: Layer, most: int | None) -> Any:
    numbers = asked.numpy()
    return _loops().keep(
        numbers // DEMAND,
        numbers % DEMAND > 0,
        demand_units(layer.tau),
        max(layer.min_primary_experts, 1),
        layer.balance_ranks,
        owners(layer.owner, layer.num_experts),
        most,
    )


def refill_rows(
    kept: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    scores: Tensor,
    row_kind: Tensor,
    layer: Layer,
) -> Choice:
    """:func:`sere_ray.rules.margin.refill_rows`; new tensors. ``kept``: ``[E]`` bool."""
    new_ids = topk_ids.clone(memory_format=torch.contiguous_format)
    new_weights = torch.from_numpy(as_numpy(topk_weights).copy())
    _loops().refill(
        new_ids.numpy(),
        new_weights.numpy(),
        scores.contiguous().numpy(),
        row_kind.contiguous().numpy(),
        kept.numpy(),
        *_of_gate(layer.gate),
        layer.gate.is_plain,
        float(layer.beta),
        np.float32(layer.fill),
    )
    return new_ids, new_weights.to(topk_weights.dtype)


def finish(
    before: Tensor, topk_ids: Tensor, row_kind: Tensor, *, names_dropped: bool
) -> tuple[int, int]:
    """Count what rows take, and name what they drop: :func:`sere_ray.rules.name_dropped`.

    Args:
        before: ``[T, K]`` ids of the gate.
        topk_ids: ``[T, K]`` contiguous, after a rule.
        row_kind: ``[T]`` int8.
        names_dropped: whether dropped slots are named, in place.

    Returns:
        Slots whose expert the row did not have before, or that are dropped, whatever their order;
        and those that are dropped.
    """
    counts: tuple[int, int] = _loops().finish(
        before.contiguous().numpy(),
        topk_ids.numpy(),
        row_kind.contiguous().numpy(),
        names_dropped,
    )
    return counts


def busiest(named: Tensor, owner: Tensor | None) -> int:
    """Experts of the rank that holds most of those that are ``named``, ``[E]`` bool."""
    return int(_loops().busiest(named.numpy(), owners(owner, len(named))))


@functools.cache
def _loops() -> ModuleType:
    from sere_ray.kernel import margin_loops

    return margin_loops


def _of_gate(gate: Gate) -> tuple[Any, bool, int]:
    """Bias, whether it counts against the sum of the scores, and experts of a group."""
    bias = _NO_BIAS if gate.bias is None else gate.bias.float().contiguous().numpy()
    return bias, gate.scoring == "softmax", gate.group_size
