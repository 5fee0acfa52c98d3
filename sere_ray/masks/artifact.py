"""The file of learned masks: one safetensors file, several levels, the model that they fit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sere_ray.artifact.gates import check_gate
from sere_ray.artifact.statistics import is_finite, is_float32
from sere_ray.artifact.tensors import Framework, read_file
from sere_ray.util.errors import ArtifactError
from sere_ray.util.files import atomic_path, read_content

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sere_ray.masks.slots import LayerMask

FORMAT_VERSION = 1
_METADATA_KEY = "sere_ray_masks"
_AGAIN = "run `sere-ray train-masks` on the model you serve"
Penalty = Literal["rows", "batch"]


class Level(BaseModel):
    """One set of masks: how hard they were pushed, and what that gave on validation windows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    knob: float = Field(description="weight of the penalty")
    slots_kept: float = Field(description="share of slots that are kept")
    experts_kept: float = Field(description="share of the experts of a batch that are still read")
    kl_mean: float = Field(description="to the exact model, nats; all rows are masked")


class MasksMetadata(BaseModel):
    """Where masks come from and which model they fit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    model_id: str
    revision: str | None = Field(None, description="resolved revision of the model, if it has one")
    num_experts: int = Field(description="E, logical experts of a layer")
    top_k: int = Field(description="K, experts a token chooses")
    router_fingerprint: dict[int, str] = Field(description="per layer: hash and sketch of the gate")
    levels: list[Level] = Field(description="level 1 first, the lightest")
    keep_first: bool = Field(description="whether a row keeps its first choice")
    penalty: Penalty = Field(description="rows: slots of each row; batch: experts of a batch")
    batch: int = Field(description="rows of a batch of that penalty")
    balance: float = Field(description="weight of the load-balance term")
    tokens: int = Field(description="tokens that each level was trained on")
    dataset: str
    dataset_revision: str | None = None
    dataset_sha256: str | None = None
    synthetic: bool = Field(False, description="random numbers, for benchmarks with dummy weights")
    libraries: dict[str, str] = Field(default_factory=dict)
    date: str = Field(description="ISO 8601, UTC")


@dataclass(frozen=True)
class MasksArtifact:
    """Mask routers ``float32 [E, H]`` by level, 1 first, and decoder layer index."""

    weights: "Mapping[int, Mapping[int, Tensor]]"
    metadata: MasksMetadata

    def save(self, path: Path) -> None:
        """Write the file in one step.

        Raises:
            ArtifactError: the content is not valid or the folder cannot be written.
        """
        from safetensors.torch import save_file

        self._check(path)
        tensors = {
            _tensor_name(level, layer): weight.contiguous()
            for level, of_level in self.weights.items()
            for layer, weight in of_level.items()
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {_METADATA_KEY: self.metadata.model_dump_json()})

    @classmethod
    def load(cls, path: Path | str, framework: Framework = "pt") -> "MasksArtifact":
        """Read and check a file.

        Args:
            path: of the file.
            framework: as of :meth:`~sere_ray.artifact.similarity.SimilarityArtifact.load`.

        Raises:
            ArtifactError: missing, damaged, no file of masks, or of a newer format.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise ArtifactError(
                f"masks = {str(path)!r}: no such file; `sere-ray train-masks` writes one"
            )
        weights: dict[int, dict[int, Tensor]] = {}
        raw, tensors = read_file(path, framework)
        metadata = _parse(raw.get(_METADATA_KEY), path)
        for name, tensor in sorted(tensors.items()):
            level, layer = _level_and_layer(name, path)
            weights.setdefault(level, {})[layer] = tensor
        found = cls(dict(sorted(weights.items())), metadata)
        found._check(path)
        return found

    @classmethod
    def from_bytes(
        cls, content: bytes, *, name: str, framework: Framework = "pt"
    ) -> "MasksArtifact":
        """Read and check the content of a file that came over the network.

        Args:
            content: of the file.
            name: of the file, for messages.
            framework: as of :meth:`load`.

        Raises:
            ArtifactError: as :meth:`load`.
        """
        return read_content(content, name, lambda path: cls.load(path, framework))

    def level(
        self, level: int, *, path: str, device: "torch.device | str" = "cpu"
    ) -> "dict[int, LayerMask]":
        """The masks of a level by decoder layer index.

        Args:
            level: 1 is the lightest; 0 masks nothing.
            path: of the file, for the message.
            device: where the weights go.

        Raises:
            ArtifactError: as :meth:`check_level`.
        """
        from sere_ray.masks.slots import LayerMask

        self.check_level(level, path=path)
        of_level = self.weights[level].items() if level else ()
        keep_first = self.metadata.keep_first
        return {layer: LayerMask(weight.to(device), keep_first) for layer, weight in of_level}

    def check_level(self, level: int, *, path: str) -> None:
        """Refuse a level that the file has not; 0, which masks nothing, is always there.

        Raises:
            ArtifactError: there is no such level; names those there are.
        """
        if level and level not in self.weights:
            known = " ".join(
                f"{number}: {of.slots_kept:.0%} of the slots."
                for number, of in enumerate(self.metadata.levels, start=1)
            )
            raise ArtifactError(
                f"level = {level}: {path} has levels 1..{len(self.weights)} ({known}); give one "
                "of these, or 0 to mask nothing"
            )

    @property
    def layers(self) -> list[int]:
        """Decoder layer indices, in order."""
        return sorted(self.weights[1])

    def check_model(self, gates: "Mapping[int, Tensor]", top_k: int, *, path: str) -> None:
        """Refuse masks of another model.

        Args:
            gates: weight ``[E, H]`` of the gate of each MoE layer, by decoder layer index.
            top_k: K of the model.
            path: of the file, for the message.

        Raises:
            ArtifactError: names the property, both values and what to do.
        """
        self.check_same(path, "layers", self.layers, sorted(gates))
        self.check_same(path, "top_k", self.metadata.top_k, top_k)
        for layer, gate in gates.items():
            self.check_layer(layer, gate, path=path)

    def check_layer(self, layer: int, gate: "Tensor", *, path: str) -> None:
        """Refuse the mask of a layer whose gate, ``[E, H]``, is another one.

        Raises:
            ArtifactError: as :meth:`check_model`.
        """
        mask = self.weights[1].get(layer)
        shape = None if mask is None else tuple(mask.shape)
        self.check_same(path, f"shape of layer {layer}", shape, tuple(gate.shape))
        other = f"the masks were trained on other weights ({self.metadata.model_id!r}): {_AGAIN}"
        check_gate(layer, gate, self.metadata.router_fingerprint, path=path, other=other)

    def check_same(self, path: str, what: str, of_masks: object, of_model: object) -> None:
        """Refuse a property that differs from the model's.

        Raises:
            ArtifactError: names it, both values and what to do.
        """
        if of_masks != of_model:
            raise ArtifactError(
                f"{path}: {what} = {of_masks}, but the model has {of_model}; these masks belong to "
                f"{self.metadata.model_id!r}: {_AGAIN}"
            )

    def _check(self, path: Path) -> None:
        """Refuse levels that do not fit each other, and numbers that are none.

        Raises:
            ArtifactError: names level and layer.
        """
        numbers = list(range(1, len(self.metadata.levels) + 1))
        if not numbers or sorted(self.weights) != numbers:
            raise ArtifactError(
                f"{path}: holds masks of levels {sorted(self.weights)}, its metadata describes "
                f"{numbers}; train again"
            )
        first = {layer: w.shape for layer, w in self.weights[1].items()}
        for level, of_level in self.weights.items():
            if of_level.keys() != first.keys():
                raise ArtifactError(
                    f"{path}: level {level} has layers {sorted(of_level)}, level 1 has "
                    f"{sorted(first)}; train again"
                )
            for layer, weight in of_level.items():
                where = f"{path}: level {level}, layer {layer}"
                rows = self.metadata.num_experts
                if weight.shape != first[layer] or weight.ndim != 2 or len(weight) != rows:
                    raise ArtifactError(
                        f"{where} is {tuple(weight.shape)}, level 1 is {tuple(first[layer])}; all "
                        f"must be the same, with num_experts = {rows} rows; train again"
                    )
                if not is_float32(weight):
                    raise ArtifactError(f"{where} is {weight.dtype}, must be torch.float32")
                if not is_finite(weight):
                    raise ArtifactError(f"{where} holds NaN or infinite values; train again")


def _parse(text: str | None, path: Path) -> MasksMetadata:
    """The metadata of a file.

    Raises:
        ArtifactError: none, damaged, or of a newer format.
    """
    if text is None:
        raise ArtifactError(
            f"{path}: is no file of masks (no {_METADATA_KEY!r} in its metadata); "
            "`sere-ray train-masks` writes one"
        )
    try:
        content = json.loads(text)
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"{path}: format_version = {version!r}, this version reads {FORMAT_VERSION}; "
                "update sere-ray, or train again"
            )
        return MasksMetadata.model_validate(content)
    except (ValueError, AttributeError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{path}: damaged metadata ({reason}); train again") from None


def _tensor_name(level: int, layer: int) -> str:
    return f"levels.{level}.layers.{layer}.mask"


def _level_and_layer(name: str, path: Path) -> tuple[int, int]:
    parts = name.split(".")
    if len(parts) == 5 and parts[1].isdigit() and parts[3].isdigit():
        level, layer = int(parts[1]), int(parts[3])
        if name == _tensor_name(level, layer):
            return level, layer
    raise ArtifactError(
        f"{path}: unexpected tensor {name!r}; allowed: levels.<level>.layers.<i>.mask"
    )
