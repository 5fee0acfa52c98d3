"""The similarity artifact: one safetensors file with a matrix per MoE layer and its origin."""

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from sere_ray.artifact.gates import check_gate, other_gates
from sere_ray.artifact.statistics import GROUPS
from sere_ray.artifact.strength import Strength, check_layers_of
from sere_ray.artifact.tensors import (
    SIMILARITY,
    Framework,
    check_content,
    layer_and_name,
    read_file,
    tensor_name,
)
from sere_ray.util.errors import ArtifactError
from sere_ray.util.files import atomic_path, read_content

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 2
_METADATA_KEY = "sere_ray"


class ArtifactMetadata(BaseModel):
    """Where a similarity artifact comes from and which model it fits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    model_id: str
    revision: str | None = Field(None, description="resolved revision of the model, if it has one")
    architecture: str = Field(description="first entry of `architectures` in the model's config")
    num_experts: int = Field(description="E, logical experts of a layer")
    top_k: int = Field(description="K, experts a token chooses")
    router_fingerprint: dict[int, str] = Field(
        default_factory=dict,
        description="per layer: hash and sketch of the gate; format 1: hash",
    )
    metric: str
    tokens: int = Field(0, description="calibration tokens, each shown to every expert")
    dataset: str | None = None
    dataset_revision: str | None = None
    dataset_sha256: str | None = None
    libraries: dict[str, str] = Field(default_factory=dict)
    date: str = Field(description="ISO 8601, UTC")
    synthetic: bool = Field(False, description="random numbers, for benchmarks with dummy weights")
    strengths: dict[str, Strength] = Field(
        default_factory=dict, description="by rule: what `loss` means; of `sere-ray strength`"
    )


@dataclass(frozen=True)
class SimilarityArtifact:
    """Similarity matrices by decoder layer index, ``float32 [E, E]`` each, and their origin.

    ``statistics`` are further tensors of each layer by name, for rules that read more than
    similarity: :mod:`sere_ray.artifact.statistics`.
    """

    layers: "Mapping[int, Tensor]"
    metadata: ArtifactMetadata
    statistics: "Mapping[int, Mapping[str, Tensor]]" = field(default_factory=dict)

    def save(self, path: Path | str) -> None:
        """Write the file in one step: a reader sees the old file or the whole new one.

        Raises:
            ArtifactError: the content is not valid or the folder cannot be written.
        """
        from safetensors.torch import save_file

        path = Path(path)
        check_content(self.layers, self.statistics, self.metadata.num_experts, path)
        tensors = {tensor_name(i): m.contiguous() for i, m in sorted(self.layers.items())}
        for layer, named in sorted(self.statistics.items()):
            tensors |= {tensor_name(layer, name): t.contiguous() for name, t in named.items()}
        metadata = {_METADATA_KEY: self.metadata.model_dump_json()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: Path | str, framework: Framework = "pt") -> "SimilarityArtifact":
        """Read and check a file.

        Args:
            path: of the file.
            framework: ``np``: numbers stay arrays of numpy's, for a process without torch that
                checks artifacts and computes nothing with them.

        Raises:
            ArtifactError: missing, damaged, not an artifact, or of a newer format.
        """
        path = Path(path)
        metadata = read_metadata(path)
        layers: dict[int, Tensor] = {}
        statistics: dict[int, dict[str, Tensor]] = {}
        for full, tensor in read_file(path, framework)[1].items():
            layer, name = layer_and_name(full, path)
            if name == SIMILARITY:
                layers[layer] = tensor
            else:
                statistics.setdefault(layer, {})[name] = tensor
        artifact = cls(layers, metadata, statistics)
        check_content(layers, statistics, metadata.num_experts, path)
        check_layers_of(metadata.strengths, len(layers), path)
        return artifact

    @classmethod
    def from_bytes(
        cls, content: bytes, *, name: str, framework: Framework = "pt"
    ) -> "SimilarityArtifact":
        """Read and check the content of a file that came over the network.

        Args:
            content: of the file.
            name: of the file, for messages.
            framework: as of :meth:`load`.

        Raises:
            ArtifactError: as :meth:`load`.
        """
        return read_content(content, name, lambda path: cls.load(path, framework))

    def check_replaces(self, running: "SimilarityArtifact", *, path: str) -> None:
        """Refuse an artifact that was not calibrated on the weights which ``running`` fits.

        The engine has compared the running artifact with the gates it loaded, so equal
        fingerprints mean the same gates.

        Raises:
            ArtifactError: names the property, both values and what to do.
        """
        metadata = running.metadata
        self.check_model(
            architecture=metadata.architecture,
            num_experts=metadata.num_experts,
            top_k=metadata.top_k,
            path=path,
        )
        pairs: list[tuple[str, object, object]] = [
            ("synthetic", self.metadata.synthetic, metadata.synthetic),
            ("layers", _ranges(sorted(self.layers)), _ranges(sorted(running.layers))),
        ]
        prints = (self.metadata.router_fingerprint, metadata.router_fingerprint)
        pairs += other_gates(*prints, sorted(running.layers))
        for what, new, old in pairs:
            if new != old:
                raise ArtifactError(
                    f"{path}: {what} = {new!r}, but the running artifact has {old!r}; it belongs "
                    f"to other weights ({self.metadata.model_id!r}): run `sere-ray calibrate` on "
                    "the model you serve"
                )

    def check_model(self, *, architecture: str, num_experts: int, top_k: int, path: str) -> None:
        """Refuse an artifact of another model, as far as the model's config tells.

        Raises:
            ArtifactError: names the property, both values and what to do.
        """
        metadata = self.metadata
        pairs = [
            ("architecture", metadata.architecture, architecture),
            ("num_experts", metadata.num_experts, num_experts),
            ("top_k", metadata.top_k, top_k),
        ]
        for name, of_artifact, of_model in pairs:
            same = of_artifact == of_model
            if name == "architecture":  # of the text model alone, or of the whole
                same = _without_task(str(of_artifact)) == _without_task(str(of_model))
            if not same:
                raise ArtifactError(
                    f"{path}: {name} = {of_artifact!r}, but the model has {of_model!r}; this "
                    f"artifact belongs to {metadata.model_id!r}: run `sere-ray calibrate` on the "
                    "model you serve"
                )

    def check_layers(self, having: Container[int], *, path: str, but: str) -> None:
        """Refuse matrices of layers that the model has not.

        Args:
            having: layers that may have one.
            path: of the artifact, for the message.
            but: how the model differs, for the message.

        Raises:
            ArtifactError: names the layers and what to do.
        """
        surplus = [layer for layer in sorted(self.layers) if layer not in having]
        if surplus:
            raise ArtifactError(
                f"{path}: has layers {surplus}, but {but}; this artifact belongs to "
                f"{self.metadata.model_id!r}: run `sere-ray calibrate` on the model you serve"
            )

    def check_router(self, layer: int, gate_weight: "Tensor", *, path: str) -> None:
        """Refuse another fine-tune: the gate's weights must be those of calibration.

        Raises:
            ArtifactError: the fingerprint differs or the artifact has none.
        """
        other = (
            f"the artifact was calibrated on other weights ({self.metadata.model_id!r}): run "
            "`sere-ray calibrate` on the model you serve"
        )
        expected = self.metadata.router_fingerprint
        check_gate(layer, gate_weight, expected, path=path, other=other)

    def lacking(self, names: Sequence[str]) -> list[str]:
        """Groups of the named statistics that some layer has not."""
        has = set.intersection(*(set(self.statistics.get(i, {})) for i in self.layers))
        return [name for name, of in GROUPS.items() if set(of) & set(names) and not set(of) <= has]

    def check_has(self, names: tuple[str, ...], *, path: str, rule: str) -> None:
        """Refuse a rule that reads statistics which this artifact has not.

        Raises:
            ArtifactError: names the rule, what it reads, and the command that adds it.
        """
        if lacking := self.lacking(names):
            raise ArtifactError(
                f"{path}: rule {rule!r} reads {', '.join(names)}, which this artifact has not for "
                f"every layer; `sere-ray calibrate MODEL --data TEXT --out {path} --statistics "
                f"{','.join(lacking)}` adds them"
            )

    def matrix(self, layer: int, *, path: str) -> "Tensor":
        """The matrix of a decoder layer.

        Raises:
            ArtifactError: the artifact has none; it is never replaced by an identity matrix.
        """
        if layer not in self.layers:
            raise ArtifactError(
                f"{path}: no matrix for MoE layer {layer} (it has layers "
                f"{_ranges(sorted(self.layers))}); run `sere-ray calibrate` on the model you serve"
            )
        return self.layers[layer]


def read_metadata(path: Path | str) -> ArtifactMetadata:
    """Read the origin of an artifact without its matrices.

    Raises:
        ArtifactError: missing, damaged, not an artifact, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; `sere-ray calibrate` makes one")
    try:
        with safe_open(path, framework="np") as file:
            raw = (file.metadata() or {}).get(_METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path}: not a readable safetensors file ({error}); pickle files are never loaded: "
            "`sere-ray artifact import` converts the published formats"
        ) from None
    if raw is None:
        raise ArtifactError(
            f"{path}: a safetensors file, but not a similarity artifact (no {_METADATA_KEY!r} "
            "metadata); `sere-ray calibrate` or `sere-ray artifact import` makes one"
        )
    try:
        version = json.loads(raw).get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ArtifactError(
                f"{path}: format_version = {version}, this sere-ray reads up to {FORMAT_VERSION}; "
                "update sere-ray"
            )
        return ArtifactMetadata.model_validate_json(raw)
    except (json.JSONDecodeError, AttributeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{path}: damaged metadata ({reason}); calibrate again") from None


def _without_task(architecture: str) -> str:
    """``Qwen3_5MoeForCausalLM`` and ``Qwen3_5MoeForConditionalGeneration`` are one model."""
    return architecture.partition("For")[0]


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
