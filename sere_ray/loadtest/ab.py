"""Policies against each other in one run: blocks in random order, intervals over the rounds."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from rich.console import Console

from sere_ray.loadtest.arrivals import Arrivals
from sere_ray.loadtest.driver import LoadPlan, new_salt
from sere_ray.loadtest.figures import PERCENTILES, Sample, figures, pool, rounded, sample
from sere_ray.loadtest.generator import Generator, generator
from sere_ray.loadtest.policies import kept_policy, whole_policy
from sere_ray.loadtest.slo import Price, Slo
from sere_ray.observe.stats import means
from sere_ray.serve.client import Deployment, set_policy, settable
from sere_ray.util.errors import SereError

_RESAMPLES = 1000
_FIRST_SECONDS = 2.0
"""Enough to count the experts of some hundred steps."""
OBSERVE = {"mode": "observe"}
Save = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Amount:
    """How much load: ``streams`` users that wait for answers, or ``rate`` requests per second."""

    streams: int | None = None
    rate: float | None = None

    def of(self, plan: LoadPlan) -> LoadPlan:
        """The plan with this much load."""
        arrivals = None if self.rate is None else Arrivals.at(self.rate)
        return replace(plan, streams=self.streams, arrivals=arrivals)

    @property
    def row(self) -> dict[str, Any]:
        """The amount as fields of a row of the result file."""
        return {"streams": self.streams} if self.rate is None else {"rate": self.rate}

    def __str__(self) -> str:
        return f"{self.streams} streams" if self.rate is None else f"{self.rate:g} requests/s"


@dataclass(frozen=True)
class Comparison:
    """What is compared, and on what conditions."""

    url: str
    """Address of the deployment, without ``/v1``."""
    plan: LoadPlan
    """The load of one block; its amount is still to be said."""
    amounts: Sequence[Amount]
    policies: dict[str, dict[str, Any]]
    """Changes of the deployment's policy; the first one is what the others are compared to."""
    rounds: int
    slo: Slo = field(default_factory=Slo)
    price: Price | None = None
    processes: int = 1

    def conditions(self) -> dict[str, Any]:
        """The fields at the head of the result file."""
        plan, price = self.plan, self.price
        return {
            "model": plan.target.model,
            "slo": str(self.slo),
            "usd_per_gpu_hour": price and price.usd_per_gpu_hour,
            "gpus": price and price.gpus,
            "rounds": self.rounds,
            "seconds_per_block": plan.seconds,
            "warmup_seconds_per_block": plan.warmup,
            "prefix_cache": plan.cache,
            "workload_requests": len(plan.entries),
            "api_keys": len(plan.target.keys),
            "seed": plan.seed,
            "generator_processes": self.processes,
        }


@dataclass
class _Block:
    sample: Sample
    steps: dict[str, float | None]
    """Means of the engine's decode-only steps."""


def run_comparison(what: Comparison, save: Save, console: Console) -> dict[str, Any]:
    """Run all blocks; the result is saved after each amount of load.

    Returns:
        The content of the result file.

    Raises:
        SereError: no control API, a refused policy, or a block without a single answer. The policy
            is put back in any case.
    """
    content: dict[str, Any] = {**what.conditions(), "rows": [], "blocks": []}
    with kept_policy(what.url, console) as before, generator(what.processes) as sender:
        wholes = {n: whole_policy(before, change, n) for n, change in what.policies.items()}
        for whole in wholes.values():  # what is refused, is before any load
            set_policy(what.url, whole)
        content["policies"] = {name: settable(whole) for name, whole in wholes.items()}
        runner = _Runner(what, before, sender, console, content["blocks"])
        for amount in what.amounts:
            observed = runner.first(amount)
            blocks = runner.rounds(amount)
            content["rows"] += _rows(what, amount, blocks, observed)
            save(content)
    return content


@dataclass
class _Runner:
    what: Comparison
    before: dict[str, Any]
    sender: Generator
    console: Console
    log: list[dict[str, Any]]

    def first(self, amount: Amount) -> dict[str, float | None]:
        """Send a first block that is not part of the comparison; returns means of its steps.

        An engine stalls at a batch size that is new to it (2 s on one GPU, in no result file). The
        policy that happens to come first would pay for that. The block runs in mode ``observe``,
        with the prompts and times of the first round, so it also counts the experts that exact
        routing reads. In a closed loop it is short.
        """
        plan = self.what.plan
        if amount.rate is None:  # an open loop only then has as many streams as in other blocks
            plan = replace(plan, seconds=min(plan.seconds, _FIRST_SECONDS))
        runner = replace(self, what=replace(self.what, plan=plan))
        return runner._block(amount, 1, OBSERVE, "observe", needs_answers=False).steps

    def rounds(self, amount: Amount) -> dict[str, list[_Block]]:
        """The blocks of each policy, in the order of the rounds."""
        draw = random.Random(f"{self.what.plan.seed} {amount}")
        blocks: dict[str, list[_Block]] = {name: [] for name in self.what.policies}
        for number in range(1, self.what.rounds + 1):
            for name in draw.sample(list(blocks), len(blocks)):
                block = self._block(amount, number, self.what.policies[name], name)
                blocks[name].append(block)
                self._tell(amount, number, name, block)
        return blocks

    def _block(
        self,
        amount: Amount,
        number: int,
        change: dict[str, Any],
        name: str,
        *,
        needs_answers: bool = True,
    ) -> _Block:
        what, deployment = self.what, Deployment(self.what.url)
        set_policy(what.url, whole_policy(self.before, change, name))
        deployment.read_counters()
        plan = amount.of(what.plan)
        # In a round all policies get the same prompts at the same times.
        plan = replace(
            plan,
            seed=random.Random(f"{plan.seed} {number}").getrandbits(32),
            salt=new_salt(),
        )
        load = self.sender.run(plan)
        counted = deployment.read_counters()
        one = sample(load, what.slo)
        has_answers = one.requests > sum(one.failures.values())
        # A short block may hold a part of long answers only: enough to count steps.
        if not has_answers and (needs_answers or one.failures):
            reason = one.failures.most_common(1)[0][0] if one.failures else "no request was due"
            raise SereError(f"{what.url}: no answer at {amount} under {name}: {reason}")
        return _Block(one, means(counted["decode_only"]))

    def _tell(self, amount: Amount, number: int, name: str, block: _Block) -> None:
        row = figures(block.sample, None)
        names = ("ttft_ms_p50", "tpot_ms_p50", "tokens_per_s", "requests", "failures")
        shown = {name: row[name] for name in (*names, "generator_lag_ms_p99")}
        self.log.append({**amount.row, "round": number, "policy": name, **shown})
        self.console.print(
            f"{amount}, round {number}, {name}: {row['requests']} requests, "
            f"{row['failures']} failed, TTFT {row['ttft_ms_p50']} ms, "
            f"TPOT {row['tpot_ms_p50']} ms, {row['tokens_per_s']} tokens/s",
            highlight=False,
        )


def _rows(
    what: Comparison,
    amount: Amount,
    blocks: dict[str, list[_Block]],
    observed: dict[str, float | None],
) -> list[dict[str, Any]]:
    samples = {name: [block.sample for block in own] for name, own in blocks.items()}
    base = next(iter(samples))
    drawn = _resamples(samples, what.price)
    rows: list[dict[str, Any]] = []
    for name, own in samples.items():
        row = {"policy": name, **amount.row, **figures(pool(own), what.price)}
        row |= _steps(blocks[name], what.policies[name]["mode"], observed)
        for field_name, values in drawn[name].items():
            row[f"{field_name}_95"] = _interval(values)
            if name != base:
                with np.errstate(invalid="ignore"):  # no cost, by no cost
                    ratio = values / drawn[base][field_name]
                row[f"{field_name}_ratio"] = _ratio(row[field_name], rows[0][field_name])
                row[f"{field_name}_ratio_95"] = _interval(ratio)
        rows.append(row)
    return rows


def _steps(blocks: list[_Block], mode: str, observed: dict[str, float | None]) -> dict[str, Any]:
    """Means over blocks of what the engines counted. Mode ``off`` counts no experts: for it,
    ``observed`` is taken."""
    counted = [observed] if mode == "off" else [block.steps for block in blocks]
    is_exact = mode in ("off", "observe")  # the latter counts what the rule would have left, too
    experts = [steps["experts_before" if is_exact else "experts_after"] for steps in counted]
    return {
        "experts_read": _mean(experts),
        "engine_step_ms": _mean([block.steps["step_ms"] for block in blocks]),
        "rows_per_step": _mean([block.steps["rows"] for block in blocks]),
    }


def _resamples(
    samples: dict[str, list[Sample]], price: Price | None
) -> dict[str, dict[str, np.ndarray]]:
    """Bootstrap: each policy's statistics over rounds drawn with replacement.

    All policies get the same rounds in a draw, so that ratios between them can be taken.
    """
    rounds = len(next(iter(samples.values())))
    draw = np.random.default_rng(0)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in samples}
    for _ in range(_RESAMPLES if rounds > 1 else 0):
        chosen = draw.integers(rounds, size=rounds)
        for name, own in samples.items():
            found[name].append(_statistics([own[i] for i in chosen], price))
    return {
        name: {field: np.array([one[field] for one in all_]) for field in all_[0]} if all_ else {}
        for name, all_ in found.items()
    }


def _statistics(chosen: list[Sample], price: Price | None) -> dict[str, float]:
    seconds = sum(one.seconds for one in chosen)
    found = {"tokens_per_s": sum(one.tokens for one in chosen) / seconds}
    for name in ("ttft", "tpot"):
        values = np.concatenate([getattr(one, name) for one in chosen])
        for percent in PERCENTILES:  # answers of one token have no TPOT
            value = float(np.percentile(values, percent)) if len(values) else math.nan
            found[f"{name}_ms_p{percent}"] = value
    if price is not None:
        cost = price.usd_per_million(sum(one.good_tokens for one in chosen) / seconds)
        found["usd_per_million_output_tokens"] = np.inf if cost is None else cost
    return found


def _interval(values: np.ndarray) -> list[float | None]:
    """Percentile bootstrap: the interval of 95 % of the values; None for what is not finite."""
    return [_finite(float(v)) for v in np.percentile(values, (2.5, 97.5), method="nearest")]


def _ratio(own: float | None, base: float | None) -> float | None:
    return None if own is None or not base else rounded(own / base)


def _finite(value: float) -> float | None:
    return rounded(value) if np.isfinite(value) else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return rounded(sum(known) / len(known)) if known else None
