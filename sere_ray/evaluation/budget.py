"""Settings tried on a text and held against a budget of quality."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sere_ray.evaluation.decode_batches import DecodeBatches, Measured
from sere_ray.evaluation.evaluator import Evaluator
from sere_ray.evaluation.grids import Routing
from sere_ray.evaluation.statistics import Doubles, Estimate, draws, mean
from sere_ray.util.errors import SereError


@dataclass(frozen=True)
class Budget:
    """What a setting may cost; one of the two is None."""

    kl: float | None
    agreement: float | None

    def check(self) -> None:
        """Refuse both, neither, or a number that cannot be kept.

        Raises:
            SereError: names the options.
        """
        if (self.kl is None) == (self.agreement is None):
            raise SereError("--max-kl, --min-agreement: give one of the two, or --max-task-loss")
        if self.kl is not None and self.kl <= 0:
            raise SereError(f"--max-kl = {self.kl}: must be above 0 nats")
        if self.agreement is not None and not 0 < self.agreement < 1:
            raise SereError(f"--min-agreement = {self.agreement}: must be between 0 and 1")

    def tightened(self, factor: float) -> "Budget":
        """A budget of less: KL, or the share of other tokens, times a factor from 0 to 1."""
        if self.kl is not None:
            return Budget(self.kl * factor, None)
        assert self.agreement is not None
        return Budget(None, 1 - (1 - self.agreement) * factor)

    def spent(self, found: Measured, shares: Doubles) -> Estimate:
        """The budgeted number of a setting."""
        return mean(found.kl if self.kl is not None else found.agreement, shares)

    def kept(self, spent: Estimate) -> bool:
        """Whether the bad end of the interval is within the budget."""
        if self.kl is not None:
            return spent.high <= self.kl
        assert self.agreement is not None
        return spent.low >= self.agreement


@dataclass(frozen=True)
class Candidate:
    """A setting and what it did, by batch size."""

    keys: dict[str, Any]
    found: dict[int, Measured]
    fits: bool

    @property
    def reads(self) -> float:
        """Experts per layer and step, mean over batch sizes."""
        return float(np.mean([found.reads.mean() for found in self.found.values()]))

    @property
    def log_kl(self) -> float:
        """Mean over batch sizes."""
        kl = [max(float(found.kl.mean()), 1e-9) for found in self.found.values()]
        return float(np.mean(np.log(kl)))


class Text:
    """One text: its windows, on which settings are tried."""

    def __init__(
        self, evaluator: Evaluator, data: str, budget: Budget, sequences: int | None = None
    ) -> None:
        plan = evaluator.plan
        self.evaluator, self.batches, self.budget = evaluator, plan.batches, budget
        windows = evaluator.windows(data, sequences)
        self.chunks: list[DecodeBatches] = list(evaluator.chunks(windows, max(plan.batches)))
        self.routing = Routing(self.chunks[0], evaluator.bind)
        self.shares = draws(len(windows))
        self.known: dict[tuple[str, int], Measured] = {}
        self.exact = self.measure({"rule": "topk", "select_top_k": evaluator.shape.top_k})

    def measure(
        self, keys: dict[str, Any], batches: Sequence[int] | None = None
    ) -> dict[int, Measured]:
        """A setting at batch sizes, None = all; what was measured before is remembered."""
        policy, name = self.evaluator.bind(keys), json.dumps(keys, sort_keys=True)
        found = {}
        for batch in batches or self.batches:
            if (name, batch) not in self.known:
                repair = self.evaluator.repair(keys, batch)
                parts = [chunk.measure(policy, batch, repair=repair) for chunk in self.chunks]
                self.known[name, batch] = Measured.join(parts)
            found[batch] = self.known[name, batch]
        return found

    def attempt(
        self,
        keys: dict[str, Any],
        batches: Sequence[int] | None = None,
        budget: Budget | None = None,
    ) -> Candidate:
        """The same, held against a budget; None = the text's own."""
        found, budget = self.measure(keys, batches), budget or self.budget
        spent = [budget.spent(of_batch, self.shares) for of_batch in found.values()]
        return Candidate(keys, found, all(budget.kept(number) for number in spent))

    def report(self, found: dict[int, Measured]) -> list[dict[str, Any]]:
        """Per batch size: share of experts read, and what it costs."""
        rows = []
        for batch, of_batch in found.items():
            exact = self.exact[batch].reads.astype(np.float64)
            share = Estimate.of(
                of_batch.reads.mean() / exact.mean(),
                (self.shares @ of_batch.reads.astype(np.float64)) / (self.shares @ exact),
            )
            rows.append(
                {"batch": batch, "experts_exact": round(float(exact.mean()), 3)}
                | mean(of_batch.reads, self.shares).fields("experts_read_mean", 3)
                | share.fields("experts_to_exact", 4)
                | mean(of_batch.kl, self.shares).fields("kl_mean", 5)
                | mean(of_batch.agreement, self.shares).fields("top1_agreement", 4)
            )
        return rows
