"""How far training is, on disk: a killed job goes on where it last saved."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sere_ray.util.errors import SereError
from sere_ray.util.files import atomic_path

_STATE = "state.safetensors"
_KEY = "sere_ray_training"
RAY_FOLDER = "ray"
"""In the folder: what Ray Train writes there; nothing that is needed again."""


@dataclass
class State:
    """All that training needs to go on; tensors are on the CPU."""

    level: int = 0
    """Which level is trained, from 0."""
    step: int = 0
    """Steps of it that are done."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Routers of the levels that are done, and routers and moments of this one; a moment has a row
    for each worker, or one where all have the same."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """What validation said so far."""
    ahead: list[int] = field(default_factory=list)
    """Units of it that are done beyond these steps: :mod:`sere_ray.masks.schedule`."""
    sent: int = 0
    """Bytes that a worker had to send."""
    fingerprints: dict[int, str] = field(default_factory=dict)
    """Of the gates."""


class WorkFolder:
    """One file, replaced in one step.

    Args:
        path: of the folder; created with the first state.
        identity: of the training, see :meth:`~sere_ray.masks.plan.TrainPlan.identity`.
    """

    def __init__(self, path: Path, identity: dict[str, object]) -> None:
        self.path, self.identity = path, identity

    def load(self) -> State:
        """The last state, or a new one.

        Raises:
            SereError: it is another training's, or damaged, or the folder is none of ours.
        """
        if not self.path.exists():
            return State()
        file = self.path / _STATE
        if not file.is_file():
            if self.path.is_dir() and {each.name for each in self.path.iterdir()} <= {RAY_FOLDER}:
                return State()
            raise SereError(
                f"work = {str(self.path)!r}: is there, but is no training's; remove it or give "
                "another --out"
            )
        try:
            with safe_open(file, framework="pt") as opened:
                about = json.loads(opened.metadata()[_KEY])
                tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise SereError(f"{file}: damaged ({error}); remove it and train again") from None
        self._check_same(about.pop("identity"))
        about["fingerprints"] = {int(i): gate for i, gate in about["fingerprints"].items()}
        return State(tensors=tensors, **about)

    def save(self, state: State) -> None:
        """Write a state; a reader sees the one before or this one."""
        self.path.mkdir(exist_ok=True)
        about = {name: value for name, value in vars(state).items() if name != "tensors"}
        about["identity"] = self.identity
        with atomic_path(self.path / _STATE) as temporary:
            save_file(state.tensors, temporary, {_KEY: json.dumps(about)})

    def remove(self) -> None:
        """Delete the folder: its training has ended."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _check_same(self, old: dict[str, object]) -> None:
        for name, value in self.identity.items():
            if old.get(name) != value:
                raise SereError(
                    f"work = {str(self.path)!r}: holds a training with {name} = "
                    f"{old.get(name)!r}, this one has {value!r}; remove the folder, give another "
                    "--out, or repeat that training"
                )
