"""Raw outputs of all experts, taken while an unmodified Hugging Face model runs.

Every expert sees every token anyway, so the routed output of a layer is a weighted sum of what was
computed for the sums; the module's own walk over experts is left out.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sere_ray.artifact.gates import find_gate, gate_weight
from sere_ray.calibration.data import Batch
from sere_ray.calibration.experts import expert_outputs, routed_output
from sere_ray.calibration.similarity import Sums, working_bytes
from sere_ray.util.errors import UnsupportedError

# fewest tokens of a piece: they keep each expert's product busy
_BUSY_TOKENS = 64


@dataclass(frozen=True)
class MoELayer:
    """The parts of one MoE layer that calibration needs."""

    experts: nn.Module
    gate_weight: Tensor
    """``[E, H]``"""
    selection_bias: Tensor | None = None
    """What the gate adds to scores before it ranks experts, E numbers; None = nothing."""


@dataclass(frozen=True)
class MoEShape:
    """The shape of a model's MoE layers, in which an artifact must agree with it."""

    architecture: str
    num_experts: int
    top_k: int
    layers: tuple[int, ...]


def find_moe_layers(model: PreTrainedModel) -> dict[int, MoELayer]:
    """The MoE layers by decoder layer index.

    Raises:
        UnsupportedError: there is none, or none with stacked experts behind a ``gate``.
    """
    decoder_layers = getattr(model.get_decoder(), "layers", ())
    blocks = {index: moe_layer(layer) for index, layer in enumerate(decoder_layers)}
    found = {index: block for index, block in blocks.items() if block is not None}
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__}: no MoE layer found ({len(decoder_layers)} decoder layers); "
            "calibration needs a mixture-of-experts model of the Qwen2-MoE, Qwen3-MoE, "
            "DeepSeek-V2, DeepSeek-V3, Mixtral or OLMoE kind"
        )
    return found


def moe_layer(decoder_layer: nn.Module) -> MoELayer | None:
    """The MoE part of a decoder layer; None for a dense one."""
    for block in decoder_layer.modules():
        experts, gate = getattr(block, "experts", None), find_gate(block)
        weight = None if gate is None else gate_weight(gate)
        if isinstance(experts, nn.Module) and weight is not None and _takes_choices(experts):
            return MoELayer(experts, weight, _selection_bias(block))
    return None


def _selection_bias(block: nn.Module) -> Tensor | None:
    """Transformers gives it the same name everywhere, and keeps it as a parameter or a buffer."""
    tensors = itertools.chain(block.named_parameters(), block.named_buffers())
    found = (tensor for name, tensor in tensors if name.endswith("e_score_correction_bias"))
    return next(found, None)


def moe_shape(model: PreTrainedModel, layers: Mapping[int, MoELayer]) -> MoEShape:
    """The shape of a model's MoE layers.

    Args:
        model: it may be on the meta device.
        layers: of :func:`find_moe_layers`.

    Raises:
        UnsupportedError: the layers differ in their number of experts.
    """
    sizes = {len(layer.gate_weight) for layer in layers.values()}
    if len(sizes) > 1:
        raise UnsupportedError(
            f"{type(model).__name__}: layers have {sorted(sizes)} experts; only models with the "
            "same number in every MoE layer are supported"
        )
    architectures = model.config.architectures or [type(model).__name__]
    return MoEShape(
        # the published code appends SERE to the architecture of a model it has calibrated
        architecture=architectures[0].removesuffix("SERE"),
        num_experts=sizes.pop(),
        top_k=_top_k(model.config.get_text_config()),
        layers=tuple(sorted(layers)),
    )


@torch.inference_mode()
def collect(
    model: PreTrainedModel,
    layers: Mapping[int, MoELayer],
    batches: Iterable[Batch],
    sums: Mapping[int, Sums],
    on_batch: Callable[[int], object] = lambda tokens: None,
) -> None:
    """Run the model over the batches and add what every expert makes of every real token.

    Layer inputs are those of the model as it is, within the rounding of its dtype.

    Args:
        model: in eval mode.
        layers: of :func:`find_moe_layers`.
        batches: padded windows; pad tokens are left out.
        sums: one per layer, changed in place.
        on_batch: called with the number of real tokens after each batch.
    """
    decoder = model.get_decoder()  # without the output layer, whose logits nobody reads
    with watched(layers, sums) as streams:
        for batch in batches:
            mask = batch.mask.to(model.device)
            for stream in streams:
                stream.next_batch(mask)
            ids = batch.input_ids.to(model.device)
            decoder(input_ids=ids, attention_mask=mask, use_cache=False)
            on_batch(int(batch.mask.sum()))


class Stream:
    """Stands in for the experts of one layer and feeds all their outputs to its sums."""

    def __init__(self, experts: nn.Module, sums: Sums) -> None:
        self.experts = experts
        self.sums = sums
        self.real: Tensor | None = None  # [N] bool: rows of this batch that are not padding
        self.pending: Tensor | None = None  # [fewer than a chunk, H]

    def next_batch(self, mask: Tensor) -> None:
        """Say which tokens of the next call count: ``[B, L]``, 0 = padding."""
        real = mask.flatten().bool()
        self.real = None if bool(real.all()) else real

    def forward(self, tokens: Tensor, choice: Tensor, weights: Tensor) -> Tensor:
        """What the experts module returns for ``[N, H]``, ``[N, K]``, ``[N, K]``: ``[N, H]``."""
        if self.sums.fixed_chunks:
            self._push(tokens if self.real is None else tokens[self.real])
            routed: Tensor = type(self.experts).forward(self.experts, tokens, choice, weights)
            return routed
        parts = []
        for rows in _pieces(len(tokens), self._piece_tokens(tokens)):
            outputs = expert_outputs(self.experts, tokens[rows], len(self.sums.gram))
            parts.append(routed_output(outputs, choice[rows], weights[rows]))
            real = slice(None) if self.real is None else self.real[rows]
            self.sums.update(outputs[:, real])
            if self.sums.routed is not None:
                self.sums.routed.update(outputs[:, real], choice[rows][real], weights[rows][real])
        return torch.cat(parts)

    def close(self) -> None:
        """Add the last, short chunk, if it has tokens enough to count."""
        if self.pending is not None and len(self.pending) >= self.sums.min_tokens:
            self._add(self.pending)
        self.pending = None

    def _push(self, tokens: Tensor) -> None:
        """Cut ``[n, H]`` into chunks of exactly the size that the metric depends on."""
        if self.pending is not None:
            tokens = torch.cat([self.pending, tokens])
        size = self.sums.chunk_tokens
        whole = len(tokens) - len(tokens) % size
        for start in range(0, whole, size):
            self._add(tokens[start : start + size])
        self.pending = tokens[whole:].clone()

    def _add(self, tokens: Tensor) -> None:
        self.sums.update(expert_outputs(self.experts, tokens, len(self.sums.gram)))

    def _piece_tokens(self, tokens: Tensor) -> int:
        """How many tokens at a time: their outputs, of all experts, are held at once."""
        token_bytes = 4 * len(self.sums.gram) * tokens.shape[1]
        fitting = working_bytes(tokens.device) // token_bytes
        return max(_BUSY_TOKENS, min(self.sums.chunk_tokens, fitting))


@contextmanager
def watched(layers: Mapping[int, MoELayer], sums: Mapping[int, Sums]) -> Iterator[list[Stream]]:
    """Put a :class:`Stream` in the place of every layer's experts while the block runs.

    Args:
        layers: by decoder layer index.
        sums: of the same layers.
    """
    streams = [Stream(layer.experts, sums[index]) for index, layer in layers.items()]
    try:
        for stream in streams:
            stream.experts.forward = stream.forward
        yield streams
        for stream in streams:
            stream.close()
    finally:
        for stream in streams:
            del stream.experts.forward


def _takes_choices(experts: nn.Module) -> bool:
    """Whether it is called with the choices of rows: see ``experts.py``."""
    parameters = inspect.signature(type(experts).forward).parameters
    return bool({"top_k_index", "router_indices"} & parameters.keys())


def _top_k(config: PretrainedConfig) -> int:
    """K, under the name that a model's authors gave it."""
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
    found = next(value for name in names if (value := getattr(config, name, None)) is not None)
    top_k: int = max(found) if isinstance(found, list) else found
    return top_k


def _pieces(count: int, size: int) -> Iterator[slice]:
    """``0 .. count - 1`` in slices of at most ``size``."""
    for start in range(0, count, size):
        yield slice(start, start + size)
