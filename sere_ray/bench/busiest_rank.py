"""Experts that the busiest expert-parallel rank reads under ``margin``, at equal distance.

A step waits for the rank that reads the most. The demo model runs held-out text, teacher-forced,
under ``margin`` alone and under ``margin`` with ``balance_ranks``, each at many strengths; what is
compared are the experts of the busiest rank where both are as far from the exact model. K = 8 are
the same weights with twice as many experts a row, a width that they were not trained with.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from sere_ray import assets
from sere_ray.bench.demo_model import PROMPT_TOKENS, TOP_K, heldout_windows
from sere_ray.calibration.loading import load_model
from sere_ray.evaluation.comparison import Frontier
from sere_ray.evaluation.decode_batches import DecodeBatches
from sere_ray.evaluation.grids import STRENGTH, Keys, Routing
from sere_ray.evaluation.settings import as_policy
from sere_ray.util.progress import progress

CPU = torch.device("cpu")
TEXTS = 64
RANKS = (4, 8)
CHOICES: dict[str, Keys] = {
    "margin": {"rule": "margin"},
    "balance_ranks": {"rule": "margin", "balance_ranks": True},
}
"""By name, what is compared; the first is what the others are compared with."""
AT_KL = (0.003, 0.01, 0.02, 0.03)
"""Where they are compared, nats."""
EXACT = "exact"


def batches_of(ranks: int) -> list[int]:
    """Rows of a step: 16, 4 for each rank and 16 for each rank, as far as there are texts."""
    return sorted({rows for rows in (16, 4 * ranks, 16 * ranks) if rows <= TEXTS})


@contextmanager
def demo_with(top_k: int) -> Iterator[str]:
    """The demo model's folder, another one with so many experts a row if that is not its K."""
    if top_k == TOP_K:
        yield str(assets.MODEL)
        return
    with tempfile.TemporaryDirectory(prefix="sere-demo-") as folder:
        shutil.copytree(assets.MODEL, folder, dirs_exist_ok=True)
        config = Path(folder) / "config.json"
        changed = {**json.loads(config.read_text()), "num_experts_per_tok": top_k}
        config.write_text(json.dumps(changed))
        yield folder


class Judge:
    """The demo model with K experts a row, and what settings do to it."""

    def __init__(self, top_k: int) -> None:
        with demo_with(top_k) as folder:
            model = load_model(folder, revision=None, device=CPU, dtype=torch.float32)
        self.name = "demo" if top_k == TOP_K else f"demo, K = {top_k}"
        self.texts = DecodeBatches(model, heldout_windows(TEXTS), PROMPT_TOKENS, {}, RANKS)
        self.routing = Routing(self.texts, lambda keys: as_policy(keys).for_model(top_k=top_k))

    def rows(self, ranks: int, batch: int) -> list[dict[str, Any]]:
        """Rows of the result: exact, then every choice at every strength."""
        exact = {"rule": "topk", "select_top_k": self.routing.top_k}
        rows = [self._row(EXACT, exact, ranks, batch)]
        most = rows[0]["experts_max_rank"]
        for choice, keys in CHOICES.items():
            found: list[Keys] = []
            for reads in self.routing.places(batch, ranks):
                setting = self.routing.at(keys, STRENGTH[keys["rule"]], reads, batch, ranks)
                if setting not in found:
                    found.append(setting)
            rows += [self._row(choice, setting, ranks, batch) for setting in found]
        for row in rows:
            row["experts_max_rank_share"] = round(row["experts_max_rank"] / most, 4)
        return rows

    def _row(self, choice: str, keys: Keys, ranks: int, batch: int) -> dict[str, Any]:
        policy = self.routing.bind(keys)
        measured = self.texts.measure(policy, batch, ranks)
        return {
            "model": self.name,
            "ranks": ranks,
            "batch": batch,
            "choice": choice,
            "tau": keys.get("tau"),
            "experts_max_rank": round(float(measured.busiest[ranks].mean()), 3),
            "experts_read": round(float(measured.reads.mean()), 3),
            "kl_mean": round(float(measured.kl.mean()), 6),
        }


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of one model, ranks and batch: the busiest rank's experts at a KL that both choices reach."""
    frontiers = {
        choice: Frontier(
            *(
                np.array([r[name] for r in rows if r["choice"] == choice])
                for name in ("experts_max_rank", "kl_mean")
            )
        )
        for choice in CHOICES
    }
    base, *others = CHOICES
    found = []
    for kl in AT_KL:
        reads = {choice: frontiers[choice].reads_at(kl) for choice in CHOICES}
        for choice in others:
            if np.isfinite(reads[base]) and np.isfinite(reads[choice]):
                found.append(
                    {name: rows[0][name] for name in ("model", "ranks", "batch")}
                    | {"kl": kl, "choice": choice}
                    | {"experts_max_rank": round(reads[choice], 3)}
                    | {f"experts_max_rank_of_{base}": round(reads[base], 3)}
                    | {"fewer": round(1 - reads[choice] / reads[base], 3)}
                )
    return found


def run_busiest_rank(
    save: Callable[[dict[str, Any]], None], top_ks: list[int], *, console: Console
) -> None:
    """Measure every point; ``save`` gets the content after each.

    Args:
        save: writes the result.
        top_ks: K of the models; the demo's own is 4.
        console: where progress goes.
    """
    points = [(ranks, batch) for ranks in RANKS for batch in batches_of(ranks)]
    rows: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    with progress(console, len(top_ks) * len(points), task="ranks", unit="points") as advance:
        for top_k in top_ks:
            judge = Judge(top_k)
            for point in points:
                of_point = judge.rows(*point)
                rows += of_point
                compared += compare(of_point)
                save({"texts": TEXTS, "rows": rows, "comparison": compared})
                advance(1)
