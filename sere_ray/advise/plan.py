"""What `sere-ray advise` is asked, and the folder in which it keeps what it has done."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere_ray.calibration.data import open_texts
from sere_ray.evaluation.task_items import check_tasks
from sere_ray.util.errors import DataError, SereError
from sere_ray.util.files import atomic_path, file_sha256

NOTHING = 0.005
"""A relative loss that is called no loss: with the whole of its interval at most half a percent."""
LOSSES = (NOTHING, 0.01, 0.03)
"""What the page says anyway: what is gained at these losses."""


@dataclass(frozen=True)
class AdvicePlan:
    """The question.

    Attributes:
        model: checkpoint folder or hub name.
        data: text to choose on.
        check: second text; None = every other document of ``data``.
        batch: decode rows of a step, B.
        loss: relative task loss of the policy that is written, 0..1.
        rules: among which to choose.
        tasks: by which to choose.
        most_items: of a task, on each text.
        calibration_sequences: windows of 128 tokens to calibrate on.
        sequences: windows of 128 tokens on which settings are compared by KL.
        device: cpu, cuda or auto.
        text_column: of the text.
        step_times: result of `sere-ray bench step-time` on the GPU to serve on; None = no times.
    """

    model: str
    data: str
    check: str | None
    batch: int
    loss: float
    rules: tuple[str, ...]
    tasks: tuple[str, ...]
    most_items: int
    calibration_sequences: int
    sequences: int
    device: str
    text_column: str
    step_times: Path | None

    def check_values(self) -> None:
        """Refuse what makes no sense, before anything is loaded.

        Raises:
            SereError: names the option.
        """
        check_tasks(self.tasks)
        if not 0.001 <= self.loss < 1:
            raise SereError(f"--loss = {self.loss:g}: must be at least 0.1% and below 100%")
        if self.sequences % self.batch:
            raise SereError(
                f"--sequences = {self.sequences}: must be a multiple of --batch = {self.batch}"
            )

    @property
    def losses(self) -> tuple[float, ...]:
        """Those of the page, and the one that was asked for."""
        return tuple(sorted({*LOSSES, self.loss}))


class Folder:
    """Where results go, and the finished steps, so that a run that was cut off goes on.

    Args:
        path: the folder; made where it is missing.
        plan: of this run. A step is done anew if what it depends on has changed.
    """

    def __init__(self, path: Path, plan: AdvicePlan) -> None:
        self.path, self.plan = path, plan
        try:
            (path / "steps").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SereError(f"--out = {path}: cannot be made ({error.strerror})") from None
        self.artifact = path / "similarity.safetensors"
        self.texts = self._texts()
        self.inputs = {name: file_sha256(text) for name, text in self.texts.items()}

    def _texts(self) -> dict[str, Path]:
        """The text to choose on and the second one, as files of this folder."""
        plan = self.plan
        found = {name: self.path / f"{name}.jsonl" for name in ("choose", "check")}
        own = list(open_texts(plan.data, plan.text_column).texts)
        if plan.check is not None:
            parts = {"choose": own, "check": list(open_texts(plan.check, plan.text_column).texts)}
        else:
            if len(own) < 2:
                raise DataError(
                    f"--data = {plan.data!r}: is one document, which cannot be cut into two texts; "
                    "give a .jsonl or .parquet file, or a second text with --check"
                )
            parts = {"choose": own[::2], "check": own[1::2]}
        for name, texts in parts.items():
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
            with atomic_path(found[name]) as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")
        return found

    def forget(self, name: str) -> None:
        """Do a step anew, whose result is gone."""
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.path / "steps" / f"{name}.json"

    def step(self, name: str, depends: dict[str, Any], make: Callable[[], Any]) -> Any:
        """What a step gave: from its file if it was done for the same question, else anew.

        Args:
            name: of the step.
            depends: what its result depends on beside model and texts.
            make: does it; the result is JSON.
        """
        of = {"model": self.plan.model, "texts": self.inputs, **depends}
        key = hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()
        file = self._file(name)
        if file.exists():
            try:
                known = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                known = {}
            if known.get("key") == key:
                return known["result"]
        result = make()
        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps({"key": key, "result": result}), encoding="utf-8")
        return result
