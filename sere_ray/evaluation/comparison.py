"""Rules at equal experts read, and at equal distance from the exact model.

With several expert-parallel ranks the experts that count are those of the busiest one.

A rule's frontier at one batch size: of its settings, those that no other of them beats in both
numbers; between them log KL is taken as linear in the experts read. Peers get the best of all their
settings on the very rows they are judged on.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sere_ray.evaluation.decode_batches import Measured
from sere_ray.evaluation.settings import EXACT
from sere_ray.evaluation.statistics import Doubles, Estimate

OURS = ("margin", "spare")
"""Rules of ours: at each place the better one is compared."""
_OURS = "ours"
ANYWHERE = 12
"""Numbers of experts, evenly spaced over what ours reads, at which the worst ratio is sought."""
_RESAMPLES = 300
LEAST_KL = 1e-5
"""A setting that costs less changes hardly anything and is no point of a frontier."""
_WORTH_COMPARING = 1e-4
"""Least KL of the best peer where ratios are sought anywhere."""
_EDGE = 0.01
"""How far, in parts, outside of what was measured its edge still stands."""


@dataclass(frozen=True)
class Point:
    """What is measured once: the settings of a rule, at a batch size."""

    rule: str
    """Name of the rule, or ``exact``."""
    keys: dict[str, Any]
    """Keys of the policy, without ``similarity``."""
    batch: int
    """Rows of a decode step."""
    ranks: int | None = None
    """Number of expert-parallel ranks that the rule was told; None where it does not matter."""


class Frontier:
    """The best settings of one rule at one batch size.

    Args:
        reads: ``[n]`` experts read by each setting.
        kl: ``[n]`` its mean KL to the exact model, nats.
    """

    def __init__(self, reads: Doubles, kl: Doubles) -> None:
        order = np.lexsort((kl, reads))
        reads, kl = reads[order], kl[order]
        better = np.concatenate(([True], kl[1:] < np.minimum.accumulate(kl)[:-1]))
        better &= kl >= LEAST_KL
        self.reads, self.log_kl = reads[better], np.log(kl[better])

    def kl_at(self, reads: float) -> float:
        """KL where the rule reads so many experts; NaN outside of what was measured."""
        if not len(self.reads) or not self.reads[0] * (1 - _EDGE) <= reads <= self.reads[-1] * (
            1 + _EDGE
        ):
            return float("nan")
        return float(np.exp(np.interp(reads, self.reads, self.log_kl)))

    def reads_at(self, kl: float) -> float:
        """Experts that the rule reads at this KL; NaN outside of what was measured."""
        level = np.log(kl)
        if not len(self.reads) or not self.log_kl[-1] <= level <= self.log_kl[0]:
            return float("nan")
        return float(np.interp(-level, -self.log_kl, self.reads))


Frontiers = dict[str, Frontier]
Values = dict[str, tuple[Doubles, Doubles]]
"""Rule -> reads and KL of its settings, ``[settings, texts]`` each."""


def compare(
    points: list[Point], found: list[Measured], shares: Doubles, ranks: tuple[int, ...] = (1,)
) -> list[dict[str, Any]]:
    """Compare ours with SERE and with the best other rule, by batch size and ranks.

    It is done at the experts that each setting of SERE reads, and where ours does worst.

    Args:
        points: settings at batch sizes.
        found: what each of them did.
        shares: resamples of texts.
        ranks: numbers of expert-parallel ranks; the experts are those of the busiest one.

    Returns:
        Rows of a result file; none where ours, SERE and a third rule were not all measured.
    """
    rows = []
    for batch in dict.fromkeys(point.batch for point in points if point.batch > 1):
        for count in ranks:
            of_case = [
                (point, measured)
                for point, measured in zip(points, found, strict=True)
                if point.batch == batch
                and point.rule not in (EXACT, "none")
                and not point.keys.get("masks")  # rules are compared as they are without training
                and point.ranks in (None, count)
            ]
            rules = {point.rule for point, _ in of_case}
            if not rules.intersection(OURS) or "sere" not in rules or rules <= {*OURS, "sere"}:
                return []
            case = {"batch": batch, "ranks": count}
            rows += [case | row for row in _compare_case(of_case, shares, count)]
    return rows


def _compare_case(
    of_case: list[tuple[Point, Measured]], shares: Doubles, ranks: int
) -> Iterator[dict[str, Any]]:
    """The rows of one batch size and number of ranks."""
    measured: dict[str, list[Measured]] = {}
    for point, of_point in of_case:
        measured.setdefault(point.rule, []).append(of_point)
        if point.rule in OURS:
            measured.setdefault(_OURS, []).append(of_point)
    values = {rule: _values(of_rule, ranks) for rule, of_rule in measured.items()}
    of_sere = [point.keys for point, _ in of_case if point.rule == "sere"]
    for i, keys in enumerate(of_sere):
        if keys.get("threshold") is None:
            numbers = functools.partial(_at_sere, position=i)
            at = f"experts of SERE S={keys['select_top_k']}"
            yield {"at": at} | _bootstrap(values, shares, numbers)
    yield {"at": "worst anywhere"} | _bootstrap(values, shares, _anywhere)


def best_peer(frontiers: Frontiers, reads: float) -> tuple[str, float]:
    """The peer with the least KL at so many experts, and that KL; NaN where none was measured."""
    peers = {rule: f.kl_at(reads) for rule, f in frontiers.items() if rule not in (*OURS, _OURS)}
    measured = {rule: kl for rule, kl in peers.items() if not np.isnan(kl)}
    if not measured:
        return "", float("nan")
    name = min(measured, key=lambda rule: measured[rule])
    return name, measured[name]


Means = dict[str, tuple[Doubles, Doubles]]
"""Rule -> reads and KL of its settings, ``[settings]`` each."""


def _at_sere(frontiers: Frontiers, means: Means, position: int) -> dict[str, float]:
    """The comparison at the experts that one setting of SERE reads."""
    reads, sere_kl = (float(values[position]) for values in means["sere"])
    kl = frontiers[_OURS].kl_at(reads)
    _, peer_kl = best_peer(frontiers, reads)
    return {
        "experts": reads,
        "kl": kl,
        "kl_to_sere": kl / sere_kl,
        "kl_to_best_peer": kl / peer_kl,
        "experts_to_best_peer_at_its_kl": frontiers[_OURS].reads_at(peer_kl) / reads,
    }


def _anywhere(frontiers: Frontiers, _: Means) -> dict[str, float]:
    """The largest ratio to the best peer over what ours reads."""
    ours = frontiers[_OURS].reads
    worst = (float("nan"), float("nan"))
    for target in np.linspace(ours[0], ours[-1], ANYWHERE):
        peer_kl = best_peer(frontiers, target)[1]
        ratio = frontiers[_OURS].kl_at(target) / peer_kl
        if peer_kl >= _WORTH_COMPARING and not ratio <= worst[1]:
            worst = (float(target), ratio)
    return {"experts": worst[0], "kl_to_best_peer": worst[1]}


def _values(measured: list[Measured], ranks: int) -> tuple[Doubles, Doubles]:
    reads = np.stack([found.busiest[ranks] for found in measured]).astype(np.float64)
    kl = np.stack([found.kl.mean(axis=1) for found in measured]).astype(np.float64)
    return reads, kl


def _bootstrap(
    values: Values, shares: Doubles, numbers: Callable[[Frontiers, Means], dict[str, float]]
) -> dict[str, Any]:
    """The numbers of all texts, with intervals over resamples, and who the best peer is."""

    def of(share: Doubles) -> tuple[Frontiers, dict[str, float]]:
        means = {rule: (reads @ share, kl @ share) for rule, (reads, kl) in values.items()}
        frontiers = {rule: Frontier(*of_rule) for rule, of_rule in means.items()}
        return frontiers, numbers(frontiers, means)

    texts = shares.shape[1]
    frontiers, estimates = of(np.full(texts, 1 / texts))
    resampled = [of(share)[1] for share in shares[:_RESAMPLES]]
    row: dict[str, Any] = {"best_peer": best_peer(frontiers, estimates["experts"])[0] or None}
    for name, value in estimates.items():
        others = np.array([of_resample[name] for of_resample in resampled])
        others = others[~np.isnan(others)]
        known = not np.isnan(value) and len(others) > 0.9 * len(resampled)
        row |= (
            Estimate.of(value, others).fields(name, 5)
            if known
            else {name: None, f"{name}_95": None}
        )
    return row
