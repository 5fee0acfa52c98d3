"""What is trained on what: checked before the weights are loaded."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from sere_ray.calibration.checkpoint import Checkpoint
from sere_ray.calibration.collect import MoEShape
from sere_ray.calibration.data import TextSource
from sere_ray.calibration.loading import is_local
from sere_ray.calibration.plan import CalibrationSettings, prepare
from sere_ray.masks.artifact import Penalty
from sere_ray.util.errors import DataError, SereError

MOST_KNOB = 100.0
MOST_SECONDS = 600.0
"""Between two meetings, well within the time limit of an exchange."""
Sync = Literal["allreduce", "edit", "a-edit"]
_PLACE = {"device"}
"""Settings that do not change what is computed, but for rounding."""
_OF_EDIT = {"workers", "sync_every", "sync_seconds", "warm_up"}
"""Settings that do so only under EDiT."""


@dataclass(frozen=True)
class TrainSettings:
    """How masks are trained.

    Attributes:
        model: local checkpoint folder or hub name.
        data: text file or dataset, see :func:`~sere_ray.calibration.data.open_texts`.
        knobs: weight of the penalty at each level, growing; a level starts from the one before.
        penalty: ``rows`` = share of each row's slots, ``batch`` = share of a batch's experts.
        keep_first: whether a row keeps its first choice.
        balance: weight of the load-balance term.
        steps: of a level.
        batch_size: windows of a step.
        batch: windows that make a batch of the penalty ``batch``; divides ``batch_size``.
        learning_rate: of Adam, falling to 0 over a level.
        sequences: windows of text, those of validation among them.
        validation: windows that are not trained on.
        length: tokens of a window.
        seed: of the order of windows.
        revision: branch, tag or commit of a hub model.
        device: ``auto``, ``cpu`` or a CUDA device.
        dtype: of the frozen weights.
        text_column: column of a parquet, jsonl or hub data set.
        workers: copies of the model; each has an equal share of a step's windows.
        sync: how workers stay together: by the sum of their gradients at every step, by EDiT
            after some steps, or by A-EDiT after some seconds.
        sync_every: steps of EDiT between two meetings.
        sync_seconds: seconds of A-EDiT between two meetings.
        warm_up: steps at the start of a level that EDiT sums gradients at, too.
    """

    model: str
    data: str
    knobs: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    penalty: Penalty = "batch"
    keep_first: bool = True
    balance: float = 0.0
    steps: int = 200
    batch_size: int = 16
    batch: int = 16
    learning_rate: float = 0.01
    sequences: int = 512
    validation: int = 32
    length: int = 128
    seed: int = 0
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    text_column: str = "text"
    workers: int = 1
    sync: Sync = "allreduce"
    sync_every: int = 10
    sync_seconds: float = 60.0
    warm_up: int = 10

    @property
    def steps_together(self) -> int:
        """Steps at the start of a level at which gradients are summed."""
        return self.steps if self.sync == "allreduce" else min(self.warm_up, self.steps)

    @property
    def share(self) -> int:
        """Windows of a step that a worker has."""
        return self.batch_size // self.workers

    def check(self) -> None:
        """Refuse numbers that make no sense, or do not go together.

        Raises:
            SereError: names the option and what is allowed.
        """
        if not self.knobs or not all(0 < knob <= MOST_KNOB for knob in self.knobs):
            raise SereError(
                f"--knob = {_listed(self.knobs)}: must be numbers above 0, at most {MOST_KNOB:g}"
            )
        if list(self.knobs) != sorted(set(self.knobs)):
            raise SereError(
                f"--knob = {_listed(self.knobs)}: must grow, since a level starts from the one "
                "before"
            )
        if not 0 <= self.balance <= MOST_KNOB:
            raise SereError(f"--balance = {self.balance}: must be 0..{MOST_KNOB:g}")
        if not 0 < self.learning_rate <= 1:
            raise SereError(f"--learning-rate = {self.learning_rate}: must be above 0, at most 1")
        if self.batch_size % self.batch or self.validation % self.batch:
            raise SereError(
                f"--batch = {self.batch}: must divide --batch-size = {self.batch_size} and "
                f"--validation = {self.validation}"
            )
        if self.sequences - self.validation < self.batch_size:
            raise DataError(
                f"--sequences = {self.sequences}: less --validation = {self.validation} it leaves "
                f"{self.sequences - self.validation} windows, but a step takes --batch-size = "
                f"{self.batch_size}"
            )
        self._check_workers()

    def _check_workers(self) -> None:
        """Refuse several workers whose steps would not be those of one."""
        if self.workers == 1:
            if self.sync != "allreduce":
                raise SereError(f"--sync {self.sync}: is for several workers; give --workers, too")
            return
        if self.batch_size % self.workers or self.share % self.batch:
            raise SereError(
                f"--workers = {self.workers}: each must have an equal part of --batch-size = "
                f"{self.batch_size}, of whole batches of --batch = {self.batch} windows; give "
                f"--batch-size {self.workers * self.batch}, or another --batch"
            )
        if self.balance:
            raise SereError(
                f"--balance = {self.balance}: is a term of a whole step, which several --workers "
                "do not see; give 0, or one worker"
            )
        if not 0 < self.sync_seconds <= MOST_SECONDS:
            raise SereError(
                f"--sync-seconds = {self.sync_seconds}: must be above 0, at most {MOST_SECONDS:g}"
            )


@dataclass(frozen=True)
class TrainPlan:
    """Settings that have been checked, and all that training needs besides the weights."""

    settings: TrainSettings
    config: PretrainedConfig
    revision: str | None
    """Commit of a hub model."""
    shape: MoEShape
    source: TextSource
    training: Tensor
    """``[windows, length]`` int64."""
    validation: Tensor
    """``[windows, length]`` int64."""

    def windows_of(self, level: int, step: int) -> Tensor:
        """``[batch_size, length]``: the windows of a step; every pass over them in a new order.

        Args:
            level: from 0.
            step: of the level, from 0.
        """
        size, count = self.settings.batch_size, len(self.training)
        per_pass = count // size
        number, place = divmod(level * self.settings.steps + step, per_pass)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + number)
        order = torch.randperm(count, generator=generator)
        return self.training[order[place * size : (place + 1) * size]]

    def windows_of_unit(self, level: int, unit: int) -> Tensor:
        """``[batch_size / workers, length]``: a unit of :mod:`sere_ray.masks.schedule`."""
        step, share = divmod(unit, self.settings.workers)
        size = self.settings.share
        return self.windows_of(level, step)[share * size : (share + 1) * size]

    def identity(self) -> dict[str, object]:
        """What the masks depend on: settings, weights, text. As JSON gives it back."""
        kept = dataclasses.asdict(self.settings)
        place = _PLACE | (_OF_EDIT if self.settings.sync == "allreduce" else set())
        kept = {name: value for name, value in kept.items() if name not in place}
        model = self.settings.model
        tokens = torch.cat([self.training, self.validation]).numpy().tobytes()
        identity = {
            **kept,
            "revision": self.revision,
            "weights": Checkpoint(model).fingerprint() if is_local(model) else {},
            "tokens": hashlib.sha256(tokens).hexdigest(),
        }
        restored: dict[str, object] = json.loads(json.dumps(identity))
        return restored


def prepare_training(settings: TrainSettings, out: Path) -> TrainPlan:
    """Refuse everything that can be refused before the weights are loaded, and cut the text.

    Raises:
        SereError: the model, the text, a number or the output path cannot be used.
    """
    settings.check()
    of_model = prepare(
        CalibrationSettings(
            settings.model,
            settings.data,
            revision=settings.revision,
            sequences=settings.sequences,
            length=settings.length,
            batch_size=settings.batch_size,
            device=settings.device,
            dtype=settings.dtype,
            text_column=settings.text_column,
        ),
        out,
    )
    whole = [window for window in of_model.windows if len(window) == settings.length]
    if len(whole) < settings.sequences:
        raise DataError(
            f"data = {settings.data!r}: gives {len(whole)} whole windows of {settings.length} "
            f"tokens, but --sequences = {settings.sequences}; give more text, or fewer or shorter "
            "sequences"
        )
    windows = torch.tensor(whole)
    every = math.ceil(len(windows) / settings.validation)
    held_out = torch.zeros(len(windows), dtype=torch.bool)
    held_out[::every] = True  # of the whole text, not of its end
    held_out[held_out.nonzero()[settings.validation :, 0]] = False
    missing = settings.validation - int(held_out.sum())
    held_out[(~held_out).nonzero()[:missing, 0]] = True
    return TrainPlan(
        settings=settings,
        config=of_model.config,
        revision=of_model.revision,
        shape=of_model.shape,
        source=of_model.source,
        training=windows[~held_out],
        validation=windows[held_out],
    )


def _listed(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{number:g}" for number in numbers)
