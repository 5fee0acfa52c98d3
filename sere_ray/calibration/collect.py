"""Raw outputs of all experts, taken by hooks on an unmodified Hugging Face model.

transformers 5 keeps the experts of a layer in one module that is called as
``experts(hidden_states [N, H], top_k_index [N, k], top_k_weights [N, k])`` and returns ``[N, H]``.
Expert j's raw output is therefore what this module returns if every token chooses only j with
weight 1, whatever the architecture, the layout of the weights and the kernels behind it.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sere_ray.calibration.data import Batch
from sere_ray.calibration.similarity import Sums
from sere_ray.errors import UnsupportedError

# float32 bytes of the outputs computed at a time; small beside any model, yet enough tokens per
# expert to keep a matrix product busy
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class MoELayer:
    """The parts of one MoE layer that calibration needs."""

    experts: nn.Module
    gate_weight: Tensor
    """``[E, H]``"""


@dataclass(frozen=True)
class MoEShape:
    """What an artifact must agree on with a model."""

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
    found = {
        index: MoELayer(block.experts, block.gate.weight)
        for index, layer in enumerate(decoder_layers)
        for block in layer.modules()
        if _is_moe_block(block)
    }
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__}: no MoE layer found ({len(decoder_layers)} decoder layers); "
            "calibration needs a mixture-of-experts model of the Qwen2-MoE, Qwen3-MoE, "
            "DeepSeek-V2, DeepSeek-V3, Mixtral or OLMoE kind"
        )
    return found


def moe_shape(model: PreTrainedModel, layers: Mapping[int, MoELayer]) -> MoEShape:
    """Architecture, E, K and layer set.

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
        top_k=model.config.get_text_config().num_experts_per_tok,
        layers=tuple(sorted(layers)),
    )


def expert_outputs(experts: nn.Module, tokens: Tensor, ids: range) -> Tensor:
    """Raw outputs, before the gate's weights.

    Args:
        experts: the experts module of a layer.
        tokens: ``[n, H]`` inputs of the layer.
        ids: which experts.

    Returns:
        ``[len(ids), n, H]`` of the dtype of ``tokens``.
    """
    choice = torch.arange(ids.start, ids.stop, device=tokens.device)
    choice = choice.repeat_interleave(len(tokens))[:, None]
    weight = torch.ones_like(choice, dtype=tokens.dtype)
    # forward, not __call__: the hook of this very module must not see it
    outputs: Tensor = experts.forward(tokens.repeat(len(ids), 1), choice, weight)
    return outputs.view(len(ids), *tokens.shape)


@torch.inference_mode()
def collect(
    model: PreTrainedModel,
    layers: Mapping[int, MoELayer],
    batches: Iterable[Batch],
    sums: Mapping[int, Sums],
    on_batch: Callable[[int], object] = lambda tokens: None,
) -> None:
    """Run the model over the batches and add what every expert makes of every real token.

    Layer inputs are those of the model as it is: a hook reads them and changes nothing.

    Args:
        model: in eval mode.
        layers: of :func:`find_moe_layers`.
        batches: padded windows; pad tokens are left out.
        sums: one per layer, changed in place.
        on_batch: called with the number of real tokens after each batch.
    """
    streams = [_Stream(layers[index].experts, sums[index]) for index in layers]
    decoder = model.get_decoder()  # without the output layer, whose logits nobody reads
    with _hooked(streams):
        for batch in batches:
            mask = batch.mask.to(model.device)
            for stream in streams:
                stream.real = mask.flatten().bool()
            ids = batch.input_ids.to(model.device)
            decoder(input_ids=ids, attention_mask=mask, use_cache=False)
            on_batch(int(batch.mask.sum()))
    for stream in streams:
        stream.close()


class _Stream:
    """Cuts the tokens of one layer into chunks and feeds them to its sums."""

    def __init__(self, experts: nn.Module, sums: Sums) -> None:
        self.experts = experts
        self.sums = sums
        self.real: Tensor | None = None  # [N] bool: rows of this batch that are not padding
        self.pending: Tensor | None = None  # [fewer than a chunk, H]

    def hook(self, _module: nn.Module, args: tuple[Any, ...], _output: object) -> None:
        self.push(args[0][self.real])

    def push(self, tokens: Tensor) -> None:
        if self.pending is not None:
            tokens = torch.cat([self.pending, tokens])
        size = self._chunk_tokens(tokens.shape[1])
        whole = len(tokens) - len(tokens) % size
        for start in range(0, whole, size):
            self._add(tokens[start : start + size])
        self.pending = tokens[whole:].clone()

    def close(self) -> None:
        if self.pending is not None and len(self.pending) >= self.sums.min_tokens:
            self._add(self.pending)
        self.pending = None

    def _add(self, tokens: Tensor) -> None:
        num_experts = len(self.sums.gram)
        width = max(tokens.shape)  # a metric's features may be n x n instead of n x H
        at_once = max(1, CHUNK_BYTES // (4 * len(tokens) * width))
        features = [
            self.sums.features(expert_outputs(self.experts, tokens, ids))
            for ids in _blocks(num_experts, at_once)
        ]
        self.sums.add(torch.cat(features), len(tokens))

    def _chunk_tokens(self, hidden_size: int) -> int:
        if self.sums.fixed_chunks:
            return self.sums.chunk_tokens
        fitting = CHUNK_BYTES // (4 * len(self.sums.gram) * hidden_size)
        return max(1, min(self.sums.chunk_tokens, fitting))


@contextmanager
def _hooked(streams: Iterable[_Stream]) -> Iterator[None]:
    handles = [stream.experts.register_forward_hook(stream.hook) for stream in streams]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_moe_block(module: nn.Module) -> bool:
    experts, gate = getattr(module, "experts", None), getattr(module, "gate", None)
    if not isinstance(experts, nn.Module) or not isinstance(gate, nn.Module):
        return False
    has_weight = isinstance(getattr(gate, "weight", None), Tensor)
    return has_weight and "top_k_index" in inspect.signature(type(experts).forward).parameters


def _blocks(count: int, size: int) -> Iterator[range]:
    """``0 .. count - 1`` in ranges of at most ``size``."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
