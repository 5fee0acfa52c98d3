"""The safetensors files of a checkpoint, and parts of a model filled from them.

Renaming and stacking of weights are those of transformers, so any checkpoint layout that
``from_pretrained`` reads is read here, too, a few weights at a time.
"""

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from sere_ray.calibration.loading import is_local, quiet
from sere_ray.calibration.quantised import dequantise, logical_names
from sere_ray.util.errors import SereError


class Checkpoint:
    """The weight files of a model, by name of the weight.

    Args:
        model: local folder or hub name.
        revision: commit or branch of a hub model.

    Raises:
        SereError: there are no safetensors weights, or a file is missing or damaged.
    """

    def __init__(self, model: str, revision: str | None = None) -> None:
        self._model = model
        self._revision = revision
        self.files: dict[str, Path] = {}
        """Name of a weight in the checkpoint -> the file that holds it."""
        for path in self._paths():
            self.files |= dict.fromkeys(self._names(path), path)
        self.parts = logical_names(self.files)
        """Name of a weight -> the names in the checkpoint that it is made of."""

    def names_by_target(self, model: PreTrainedModel) -> dict[str, list[str]]:
        """Weights and buffers of ``model`` that are in the checkpoint -> their names there."""
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        targets = model.state_dict()
        found: dict[str, list[str]] = {}
        for name in self.parts:
            target, _ = rename_source_key(
                name, renamings, converters, model.base_model_prefix, targets
            )
            found.setdefault(target, []).append(name)
        return {target: names for target, names in found.items() if target in targets}

    def fill(self, model: PreTrainedModel, names: Iterable[str], device: torch.device) -> None:
        """Load some weights into a model on the meta device, in the dtypes that it has there.

        Args:
            model: changed in place.
            names: keys of ``parts``; quantised ones are dequantised.
            device: where they go.

        Raises:
            SereError: a weight is damaged or of another shape.
        """
        with ExitStack() as stack:
            slices = self._slices(names, stack, model)
            settings = LoadStateDictConfig(
                device_map={"": device},
                dtype=model.dtype,
                dtype_plan=model._get_dtype_plan(model.dtype),
                weight_mapping=get_model_conversion_mapping(model),
            )
            with quiet():
                info, _ = convert_and_load_state_dict_in_model(model, slices, settings)
        if problems := [*info.mismatched_keys, *info.conversion_errors.items()]:
            raise SereError(
                f"model = {self._model!r}: weights that do not fit its config.json, the first is "
                f"{problems[0]}; the checkpoint is damaged or of another architecture"
            )

    def fingerprint(self) -> dict[str, str]:
        """File name -> SHA-256 of its size, its first and its last MiB: names, shapes, samples."""
        return {path.name: _file_fingerprint(path) for path in sorted(set(self.files.values()))}

    def _paths(self) -> list[Path]:
        index = self._find(SAFE_WEIGHTS_INDEX_NAME)
        if index is None:
            single = self._find(SAFE_WEIGHTS_NAME)
            if single is None:
                raise SereError(
                    f"model = {self._model!r}: cannot load its weights (neither "
                    f"{SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}); only safetensors are read"
                )
            return [single]
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise SereError(f"{index}: not an index of safetensors files; copy it again") from None
        found = {name: self._find(name) for name in names}
        if missing := [name for name, path in found.items() if path is None]:
            raise SereError(
                f"model = {self._model!r}: {len(missing)} of {len(names)} weight files are "
                f"missing, the first is {missing[0]!r}; copy or download the whole checkpoint"
            )
        return [path for path in found.values() if path is not None]

    def _find(self, name: str) -> Path | None:
        if is_local(self._model):
            path = Path(self._model).expanduser() / name
            return path if path.is_file() else None
        found = cached_file(
            self._model,
            name,
            revision=self._revision,
            _raise_exceptions_for_missing_entries=False,
        )
        return Path(found) if found else None

    def _names(self, path: Path) -> list[str]:
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except (SafetensorError, OSError) as error:
            raise SereError(f"{path}: damaged weight file ({error}); copy it again") from None

    def _slices(
        self, names: Iterable[str], stack: ExitStack, model: PreTrainedModel
    ) -> dict[str, Any]:
        """Lazy slices, readable until ``stack`` closes their files; tensors of quantised ones."""
        quantisation = getattr(model.config, "quantization_config", None)
        opened: dict[Path, Any] = {}

        def file_of(name: str) -> Any:
            path = self.files[name]
            if path not in opened:
                opened[path] = stack.enter_context(safe_open(path, framework="pt"))
            return opened[path]

        slices: dict[str, Any] = {}
        for name in names:
            parts = self.parts[name]
            if len(parts) == 1:
                slices[name] = file_of(name).get_slice(name)
            else:
                stored = [file_of(part).get_tensor(part) for part in parts]
                slices[name] = dequantise(stored, quantisation, model.dtype)
        return slices


def _file_fingerprint(path: Path) -> str:
    size, piece = path.stat().st_size, 2**20
    with open(path, "rb") as file:
        digest = hashlib.sha256(str(size).encode() + file.read(piece))
        file.seek(max(0, size - piece))
        digest.update(file.read(piece))
    return digest.hexdigest()
