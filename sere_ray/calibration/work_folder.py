"""Partial sums of a job on disk: what is done survives a killed worker and a killed job."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sere_ray.artifact.gates import same_gate
from sere_ray.calibration.checkpoint import Checkpoint
from sere_ray.calibration.loading import is_local
from sere_ray.calibration.plan import CalibrationPlan
from sere_ray.calibration.similarity import Sums
from sere_ray.util.errors import SereError
from sere_ray.util.files import atomic_path

_JOB = "job.json"
_IGNORED = {"batch_size", "device"}
"""Settings that do not change the sums, but for the dtype that follows from the device: each shard
holds its own."""


@dataclass(frozen=True)
class Partial:
    """The sums of one shard of the text."""

    sums: Mapping[int, Sums]
    """Sums of each MoE layer."""
    fingerprints: Mapping[int, str]
    """Fingerprint of the gate of each MoE layer."""
    dtype: str
    """The dtype in which the model computed."""


class WorkFolder:
    """One file for each shard, written in one step, so a shard counts exactly once.

    Args:
        path: created if it is not there.
        plan: what the job calibrates.
        shards: the windows of each shard.

    Raises:
        SereError: the folder holds another job's sums, or something else.
    """

    def __init__(self, path: Path, plan: CalibrationPlan, shards: list[list[list[int]]]) -> None:
        self.path = path
        self._settings = plan.settings
        self._shape = plan.shape
        path.mkdir(exist_ok=True)
        job = _job(plan, shards)
        if (path / _JOB).exists():
            _check_same(path, json.loads((path / _JOB).read_text()), job)
        elif any(path.iterdir()):
            raise SereError(f"work = {str(path)!r}: is not empty and no job's; give another folder")
        else:
            with atomic_path(path / _JOB) as temporary:
                temporary.write_text(json.dumps(job, indent=1) + "\n")

    def done(self) -> set[int]:
        """Numbers of the shards that are on disk."""
        return {int(path.stem.removeprefix("shard-")) for path in self.path.glob("shard-*")}

    def save(self, shard: int, partial: Partial) -> None:
        """Write one shard's sums in one step.

        Raises:
            SereError: those on disk were computed in another dtype, so on another device.
        """
        if done := self.done():
            with self._opened(min(done)) as (_, first):
                self._check_dtype(partial.dtype, first["dtype"])
        tensors = {f"{index}": sums.gram for index, sums in partial.sums.items()}
        for index, sums in partial.sums.items():
            if sums.routed is not None:
                tensors |= {f"{index}.{name}": t for name, t in sums.routed.sums.items()}
        about = {
            "tokens": {index: sums.tokens for index, sums in partial.sums.items()},
            "fingerprints": dict(partial.fingerprints),
            "dtype": partial.dtype,
        }
        with atomic_path(self._file(shard)) as temporary:
            save_file(tensors, temporary, metadata={"sere_ray": json.dumps(about)})

    def merged(self) -> Partial:
        """The sums of all shards, added in the order of their numbers.

        The order makes the result the same to the last bit, whatever the number of workers.

        Raises:
            SereError: a file is damaged, or shards are of different weights.
        """
        partials = [self._load(shard) for shard in sorted(self.done())]
        first = partials[0].fingerprints
        if not all(_same_gates(partial.fingerprints, first) for partial in partials):
            raise SereError(
                f"work = {str(self.path)!r}: shards were calibrated on different weights; give "
                "another folder"
            )
        for partial in partials:
            self._check_dtype(partial.dtype, partials[0].dtype)
        sums = {
            index: reduce(lambda a, b: a.merge(b), [partial.sums[index] for partial in partials])
            for index in self._shape.layers
        }
        return Partial(sums, first, partials[0].dtype)

    def remove(self) -> None:
        """Delete the folder: its job has ended."""
        shutil.rmtree(self.path)

    def _load(self, shard: int) -> Partial:
        sums: dict[int, Sums] = {}
        with self._opened(shard) as (file, about):
            for index in self._shape.layers:
                sums[index] = self._settings.make_sums(self._shape.num_experts)
                sums[index].gram = file.get_tensor(f"{index}")
                sums[index].tokens = about["tokens"][f"{index}"]
                if (routed := sums[index].routed) is not None:
                    prefix = f"{index}."
                    routed.sums = {
                        name.removeprefix(prefix): file.get_tensor(name)
                        for name in list(file.keys())
                        if name.startswith(prefix)
                    }
            gates = {int(index): gate for index, gate in about["fingerprints"].items()}
            return Partial(sums, gates, about["dtype"])

    @contextmanager
    def _opened(self, shard: int) -> Iterator[tuple[Any, dict[str, Any]]]:
        """A shard's file, and what it says of itself."""
        path = self._file(shard)
        try:
            with safe_open(path, framework="pt") as file:
                yield file, json.loads(file.metadata()["sere_ray"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise SereError(
                f"{path}: damaged ({error}); remove it and start the job again"
            ) from None

    def _check_dtype(self, dtype: str, on_disk: str) -> None:
        if dtype != on_disk:
            raise SereError(
                f"work = {str(self.path)!r}: holds sums of a model in {on_disk}, these are of "
                f"one in {dtype}, as another device has it; give --dtype {on_disk} or another "
                "folder"
            )

    def _file(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05}.safetensors"


def _job(plan: CalibrationPlan, shards: list[list[list[int]]]) -> dict[str, object]:
    """What the sums depend on: arguments, model, data."""
    settings = dataclasses.asdict(plan.settings)
    kept = {name: value for name, value in settings.items() if name not in _IGNORED}
    weights = Checkpoint(plan.settings.model).fingerprint() if is_local(plan.settings.model) else {}
    tokens = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
    return {
        **kept,
        "statistics": list(plan.settings.statistics),  # as JSON gives it back
        "revision": plan.revision,
        "config": hashlib.sha256(plan.config.to_json_string().encode()).hexdigest(),
        "weights": weights,
        "tokens": tokens,
    }


def _check_same(path: Path, old: dict[str, object], new: dict[str, object]) -> None:
    for name, value in new.items():
        if old.get(name) != value:
            raise SereError(
                f"work = {str(path)!r}: holds sums of a job with {name} = {old.get(name)!r}, this "
                f"one has {value!r}; remove the folder, give another one, or repeat that job"
            )


def _same_gates(some: Mapping[int, str], others: Mapping[int, str]) -> bool:
    """Whether fingerprints by layer, perhaps of two machines, are of the same gates."""
    same_layers = some.keys() == others.keys()
    return same_layers and all(same_gate(some[layer], others[layer]) for layer in some)
