"""Rules tuned for a comparison: each as `sere-ray tune` tunes ours, on a second text.

All get the same budget: the KL that ``margin`` has on that text with its defaults, at half of what
there is to save. What is found, apart from its strength, is then measured on the held-out text from
strong to light.
"""

from contextlib import nullcontext
from typing import Any

from rich.console import Console

from sere_ray.evaluation.budget import Budget, Candidate, Text
from sere_ray.evaluation.evaluator import Evaluator
from sere_ray.evaluation.grids import STRENGTH, Keys, Routing, sweep
from sere_ray.evaluation.search import best_setting
from sere_ray.util.errors import SereError
from sere_ray.util.progress import waiting

_YARDSTICK = "margin"


class TunedRules:
    """Tuned settings by batch size.

    Args:
        evaluator: its plan names the text.
        routing: of the held-out text, by which settings are laid out.
        console: where progress goes; None = nowhere.

    Attributes:
        found: for a result file: what was found for each rule and batch, after how many attempts.
    """

    def __init__(self, evaluator: Evaluator, routing: Routing, console: Console | None) -> None:
        data, sequences = evaluator.plan.tune_data, evaluator.plan.tune_sequences
        if data is None:
            raise SereError("--tune-data: give a text to tune on")
        self.text = Text(evaluator, data, Budget(1.0, None), sequences)
        chosen = evaluator.plan.tune_rules
        self.rules = evaluator.rules if chosen is None else chosen
        self.routing, self.console = routing, console
        self.found: list[dict[str, Any]] = []

    def settings(self, batch: int) -> list[Keys]:
        """Settings of every rule whose strength can be chosen finely, without ``similarity``."""
        if not self.rules:
            return []
        places = self.routing.places(batch)
        usual = self.routing.at(
            {"rule": _YARDSTICK}, STRENGTH[_YARDSTICK], places[len(places) // 2], batch
        )
        spent = self.text.budget.spent(self.text.measure(usual, [batch])[batch], self.text.shares)
        self.text.budget = Budget(spent.high, None)
        settings = []
        for rule in (rule for rule in self.rules if rule in STRENGTH):
            attempts: set[str] = set()

            def attempt(keys: Keys, seen: set[str] = attempts) -> Candidate:
                seen.add(repr(keys))
                return self.text.attempt(keys, [batch])

            note = f"tuning {rule} at batch {batch}"
            with waiting(self.console, note) if self.console else nullcontext():
                best = best_setting(attempt, rule, self.text.routing)
            self.found.append(
                {
                    "rule": rule,
                    "batch": batch,
                    "max_kl": round(spent.high, 5),
                    "attempts": len(attempts),
                    "settings": best.keys if best else None,
                    "experts_read_mean": round(best.reads, 3) if best else None,
                }
            )
            if best:
                settings += sweep([best.keys], self.routing, batch)
        return settings
