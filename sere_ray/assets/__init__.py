"""The files shipped with the package: model, held-out text, arithmetic, calibration text."""

import json
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
MODEL = _HERE / "model"
"""The demo model (see its README.md for how it was trained)."""
DATA = _HERE / "data"
"""Texts, with the licence of where they come from."""
CALIBRATION = DATA / "calibration.jsonl"
"""Text to calibrate the demo model on: from the part that it was trained on."""


def model_config() -> dict[str, Any]:
    """The demo model's ``config.json``."""
    config: dict[str, Any] = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    return config


def heldout_texts() -> list[str]:
    """Source of standard-library modules that the model never saw."""
    return [record["text"] for record in records("heldout.jsonl")]


def arithmetic() -> list[tuple[str, str]]:
    """Held-out (prompt, final answer) pairs."""
    return [(record["prompt"], record["answer"]) for record in records("arithmetic.jsonl")]


def final_answer(reply: str) -> str | None:
    """What follows the last ``Answer:`` of a reply; None if there is none."""
    _, found, answer = reply.rpartition("Answer:")
    return answer.strip() if found else None


def records(name: str) -> list[dict[str, Any]]:
    """The JSON lines of a file of ``data/``."""
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
