"""``sere-ray evaluate``: every rule at every setting and batch size, on the same held-out rows."""

from pathlib import Path
from typing import Any

from rich.console import Console

from sere_ray.calibration.loading import model_name
from sere_ray.evaluation.comparison import LEAST_KL, Point, compare
from sere_ray.evaluation.decode_batches import Measured
from sere_ray.evaluation.evaluator import EvaluationPlan, Evaluator
from sere_ray.evaluation.grids import Keys, Routing, grid, rank_grid
from sere_ray.evaluation.settings import EXACT, looks_at_ranks
from sere_ray.evaluation.statistics import Doubles, draws, mean, summarise
from sere_ray.evaluation.tuned_rules import TunedRules
from sere_ray.util.errors import SereError

_LAID_OUT_ON = 64
"""Texts whose routing grids are laid out by, or as many as the largest batch."""
_REPAIRED = ("topk", "exfold", "spare")
"""Rules whose grid is measured with LDA's repair, too, where there is a text to fit it on."""


def evaluate(
    plan: EvaluationPlan,
    *,
    rules: tuple[str, ...] | None,
    settings: list[dict[str, Any]] | None,
    console: Console | None,
    best_only: bool = False,
) -> dict[str, Any]:
    """The content of a result file: ``rows`` and ``comparison``.

    Args:
        plan: what to load; with ``tune_data`` rules are tuned on it, too.
        rules: names, used where ``settings`` is None; None = those that the artifact allows.
        settings: policies without ``similarity``; None = a grid for every rule.
        console: where progress goes.
        best_only: leave out rows that another setting of the same rule beats in both numbers.

    Raises:
        SereError: something cannot be used; says why.
    """
    of_settings = tuple(dict.fromkeys(keys["rule"] for keys in settings or ()))
    evaluator = Evaluator(plan, of_settings if settings else rules)
    shape = evaluator.shape
    size = min(plan.sequences, max(_LAID_OUT_ON, *plan.batches))
    routing = Routing(next(evaluator.chunks(evaluator.input_ids[:size], size)), evaluator.bind)
    tuned = TunedRules(evaluator, routing, console) if plan.tune_data and not settings else None
    points = _points(evaluator, routing, settings, tuned)
    found = evaluator.measure(points, console)
    shares = draws(plan.sequences)
    rows = [
        row
        for point, measured in zip(points, found, strict=True)
        for row in _rows(point, measured, plan.ranks, shares)
    ]
    tried = {rule: sum(row["rule"] == rule for row in rows) for rule in evaluator.rules}
    return {
        "model": model_name(plan.model),
        "data": Path(plan.data).name,
        "similarity": f"{evaluator.artifact.metadata.metric}, of "
        f"{evaluator.artifact.metadata.tokens} tokens",
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "sequences": plan.sequences,
        "scored_positions": plan.sequences * (plan.length - plan.prompt_tokens),
        "dtype": str(evaluator.model.dtype).removeprefix("torch."),
        "settings_tried": tried,
        **({"tuned": tuned.found} if tuned else {}),
        "rows": best_rows(rows) if best_only else rows,
        "comparison": compare(points, found, shares, plan.ranks),
    }


def _points(
    evaluator: Evaluator, routing: Routing, settings: list[Keys] | None, tuned: TunedRules | None
) -> list[Point]:
    """Every setting to measure; a setting that depends on ranks, with each number of ranks."""
    plan = evaluator.plan
    exact = {"rule": "topk", "select_top_k": routing.top_k}
    points = [Point(EXACT, exact, batch) for batch in plan.batches]
    for batch in plan.batches:
        of_batch = settings or [
            keys for rule in evaluator.rules for keys in grid(rule, routing, batch)
        ]
        if tuned:
            repaired = [keys for keys in of_batch if keys["rule"] in _REPAIRED]
            of_batch += [{**keys, "lda": True} for keys in repaired]
            of_batch += [keys for keys in tuned.settings(batch) if keys not in of_batch]
        for keys in of_batch:
            counts = plan.ranks if looks_at_ranks(keys) else (None,)
            points += [Point(keys["rule"], keys, batch, count) for count in counts]
        if not settings:
            points += [
                Point(rule, keys, batch, count)
                for count in plan.ranks
                for rule in evaluator.rules
                for keys in rank_grid(rule, count, routing, batch)
            ]
    return points


def best_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that no other one of their rule, batch and ranks beats in experts and KL.

    SERE's settings without threshold stay, since others are compared at what they read. Settings
    that change hardly anything are no points of a frontier.
    """

    def beaten(row: dict[str, Any]) -> bool:
        return any(
            all(other[name] == row[name] for name in ("rule", "batch", "ranks"))
            and other["experts_read_max_rank"] <= row["experts_read_max_rank"]
            and other["kl_mean"] < row["kl_mean"]
            for other in rows
        )

    def compared_at(row: dict[str, Any]) -> bool:
        return bool(row["rule"] == "sere" and "threshold" not in row["settings"])

    def changes(row: dict[str, Any]) -> bool:
        return bool(row["rule"] == EXACT or row["kl_mean"] >= LEAST_KL)

    return [row for row in rows if compared_at(row) or (changes(row) and not beaten(row))]


def check_same_text(old: dict[str, Any], new: dict[str, Any], batches: tuple[int, ...]) -> None:
    """Refuse to add to a result of another model or text, or one that has these batch sizes.

    Raises:
        SereError: names what differs.
    """
    for name in ("model", "data", "similarity", "sequences", "scored_positions"):
        if old.get(name) != new[name]:
            raise SereError(
                f"--append: the file's {name} is {old.get(name)!r}, this run's is {new[name]!r}; "
                "write another file"
            )
    known = {row["batch"] for row in old["rows"]}.intersection(batches)
    if known:
        raise SereError(f"--append: the file has batch sizes {sorted(known)} already")


def _rows(
    point: Point, found: Measured, ranks: tuple[int, ...], shares: Doubles
) -> list[dict[str, Any]]:
    quality = summarise(found, shares)
    knobs = {} if point.rule == EXACT else point.keys
    return [
        {
            "rule": point.rule,
            "settings": {k: v for k, v in knobs.items() if k != "rule" and v is not None},
            "level": knobs.get("level"),
            "batch": point.batch,
            "ranks": count,
            **quality,
            **mean(found.busiest[count], shares).fields("experts_read_max_rank", 3),
        }
        for count in ranks
        if point.ranks in (None, count)
    ]
