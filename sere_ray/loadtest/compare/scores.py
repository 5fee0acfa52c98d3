"""What one run of a task found, and how two runs differ, item by item."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sere_ray.evaluation.paired import Paired
from sere_ray.evaluation.statistics import Estimate, draws, mean
from sere_ray.evaluation.task_rows import paired_fields
from sere_ray.util.errors import SereError

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """The items of one task, scored in one way, under one policy."""

    task: str
    scored_by: str
    """What makes an answer right, such as lm-eval's metric and filter."""
    right: dict[str, bool]
    """By item."""
    measures: dict[str, dict[str, float]] = field(default_factory=dict)
    """By name, then by item: what else was counted, such as an answer's tokens."""


def compared(exact: Scores, policy: Scores, half_width: float) -> dict[str, Any]:
    """The fields of a row: flips both ways, and for each measure both means and their difference.

    Differences are in the unit of the measure, with a 95 % bootstrap interval over items.

    Args:
        exact: of the exact model.
        policy: the same items under a policy.
        half_width: of the relative loss's interval, for the number of items that give it.

    Raises:
        SereError: the two did not answer the same items.
    """
    if exact.right.keys() != policy.right.keys():
        only = len(exact.right.keys() ^ policy.right.keys())
        raise SereError(
            f"{exact.task}: {only} items were answered under one policy only, so nothing can be "
            "paired; run it again, and do not change the task meanwhile"
        )
    items = sorted(exact.right)
    paired = Paired(
        np.array([exact.right[item] for item in items]),
        np.array([policy.right[item] for item in items]),
        np.arange(len(items)),
    )
    row = {"task": exact.task, "scored_by": exact.scored_by, **paired_fields(paired, half_width)}
    for name, of_policy in policy.measures.items():
        before, after = (
            np.array([numbers[item] for item in items])
            for numbers in (exact.measures[name], of_policy)
        )
        row |= {
            f"{name}_mean_exact": round(float(before.mean()), 4),
            f"{name}_mean": round(float(after.mean()), 4),
            f"{name}_max": round(float(after.max()), 4),
            **change(before, after).fields(f"{name}_change", 4),
        }
    return row


def change(before: Numbers, after: Numbers) -> Estimate:
    """The mean difference of n pairs, in the unit of the numbers, with its interval."""
    return mean(after - before, draws(len(before)))
