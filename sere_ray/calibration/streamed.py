"""Calibration one decoder layer at a time, for models that are larger than the device's memory.

The model is built without memory. Each decoder layer in turn is filled from the safetensors
files, run over the hidden states of all batches, and dropped; hidden states wait in the CPU's
memory. Masks and positions are those of the model's own forward pass: it runs with the other
layers replaced by modules that hand their input on.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sere_ray.artifact.gates import router_fingerprint
from sere_ray.calibration.checkpoint import Checkpoint
from sere_ray.calibration.collect import moe_layer, watched
from sere_ray.calibration.data import Batch
from sere_ray.calibration.loading import empty_model
from sere_ray.calibration.quantised import check_format
from sere_ray.calibration.similarity import Sums
from sere_ray.util.errors import SereError, UnsupportedError

_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
"""The parts of a decoder that this module can take apart."""


class StreamedModel:
    """A decoder whose layers come and go.

    Args:
        config: of the model.
        checkpoint: its weights.
        device: where a layer runs.
        dtype: of weights and hidden states.

    Raises:
        UnsupportedError: another quantisation than those read, or a decoder with parts of its own.
        SereError: weights are missing, or their format is not the one that the configuration names.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model: PreTrainedModel = empty_model(config, dtype).eval()
        quantisation = getattr(self.model.config, "quantization_config", None)
        has_scales = any(len(parts) > 1 for parts in checkpoint.parts.values())
        check_format(quantisation, has_scales, type(self.model).__name__)
        _check_structure(self.model)
        self.checkpoint = checkpoint
        self.device = device
        self._decoder = self.model.get_decoder()
        self._names = checkpoint.names_by_target(self.model)
        self._check_complete()
        self.num_layers = len(self._decoder.layers)
        self._layers = list(self._decoder.layers)
        for index in range(self.num_layers):
            self._decoder.layers[index] = _HandOn()
        self._decoder.norm = nn.Identity()  # nobody reads what comes after the last layer
        rotary = type(self._decoder.rotary_emb)
        self._decoder.rotary_emb = rotary(config=self._decoder.config).to(device)

    @torch.inference_mode()
    def collect(
        self,
        batches: Sequence[Batch],
        make: Callable[[], Sums],
        on_batch: Callable[[int], object] = lambda tokens: None,
    ) -> tuple[dict[int, Sums], dict[int, str]]:
        """Add what every expert makes of every real token, layer by layer. Can be called once.

        Args:
            batches: padded windows; pad tokens are left out.
            make: empty sums of one layer.
            on_batch: called with the number of real tokens, for each layer after each batch.

        Returns:
            Sums and router fingerprints, by MoE layer.
        """
        hidden = self._embed(batches)
        sums: dict[int, Sums] = {}
        fingerprints: dict[int, str] = {}
        for index in range(self.num_layers):
            self._run_layer(index, batches, hidden, make, on_batch, sums, fingerprints)
        return sums, fingerprints

    def _run_layer(
        self,
        index: int,
        batches: Sequence[Batch],
        hidden: list[Tensor],
        make: Callable[[], Sums],
        on_batch: Callable[[int], object],
        sums: dict[int, Sums],
        fingerprints: dict[int, str],
    ) -> None:
        """Fill a layer with weights, take all hidden states through it, and drop it."""
        layer, self._layers[index] = self._layers[index], _HandOn()
        self._decoder.layers[index] = layer
        self._fill(f"layers.{index}.", layer)
        moe = moe_layer(layer)
        if moe is not None:
            sums[index], fingerprints[index] = make(), router_fingerprint(moe.gate_weight)
        found = {} if moe is None else {index: moe}
        with watched(found, sums) as streams:
            for number, batch in enumerate(batches):
                mask = batch.mask.to(self.device)
                for stream in streams:
                    stream.next_batch(mask)
                made = self._run(mask, inputs_embeds=hidden[number].to(self.device))
                hidden[number].copy_(made)  # new ones for each layer would scatter the heap
                on_batch(int(batch.mask.sum()))
        self._decoder.layers[index] = _HandOn()

    def _embed(self, batches: Sequence[Batch]) -> list[Tensor]:
        """What enters the first layer, ``[B, L, H]`` for each batch."""
        self._fill("embed_tokens.", self._decoder.embed_tokens)
        hidden = [
            self._run(batch.mask.to(self.device), input_ids=batch.input_ids.to(self.device))
            for batch in batches
        ]
        self._decoder.embed_tokens.to_empty(device="meta")
        return hidden

    def _run(self, mask: Tensor, **inputs: Tensor) -> Tensor:
        output = self._decoder(**inputs, attention_mask=mask, use_cache=False)
        hidden: Tensor = output.last_hidden_state.cpu()
        return hidden

    def _fill(self, part: str, module: nn.Module) -> None:
        prefix = f"{self.model.base_model_prefix}.{part}"
        wanted = [
            name
            for target, names in self._names.items()
            if target.startswith(prefix)
            for name in names
        ]
        self.checkpoint.fill(self.model, wanted, self.device)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_meta:
                raise UnsupportedError(
                    f"{type(self.model).__name__}: {part}{name} is not among the weights of the "
                    "checkpoint; calibrate this model without layer_streamed"
                )

    def _check_complete(self) -> None:
        decoder = f"{self.model.base_model_prefix}."
        expected = (name for name in self.model.state_dict() if name.startswith(decoder))
        if missing := sorted(set(expected) - self._names.keys()):
            raise SereError(
                f"model = {self.model.config.name_or_path!r}: {len(missing)} weights are missing, "
                f"the first is {missing[0]!r}; the checkpoint is incomplete or of another "
                "architecture"
            )


class _HandOn(nn.Module):
    """Stands in the place of a decoder layer that is not in memory."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        """Returns its input."""
        return hidden_states


def _check_structure(model: PreTrainedModel) -> None:
    name = type(model).__name__
    parts = {part for part, _ in model.get_decoder().named_children()}
    if parts != _PARTS:
        raise UnsupportedError(
            f"{name}: layer_streamed knows decoders of {', '.join(sorted(_PARTS))}, this one has "
            f"{', '.join(sorted(parts))}; calibrate it without layer_streamed"
        )
