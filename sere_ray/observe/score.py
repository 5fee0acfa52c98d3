"""The production score: how much likelier served tokens were as they were served than to the exact
model.

Of every token of an answer after its first (which comes from a prompt row): log p as served minus
log p of the exact model over the same text, in nats. Where tokens are drawn at temperature 1 its
mean estimates KL(served, exact). Exact requests score 0 within the noise of the arithmetic.

Everything here is pure: sums of one rank, their total over ranks, and what they mean.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

from sere_ray.policy.tiers import TIERS, Tier

SCORED = "scored"
OUTCOMES = (
    SCORED,
    "no_room",
    "timed_out",
    "failed",
    "unfinished",
    "unsupported",
    "too_short",
    "too_long",
    "policy_changed",
)
"""What becomes of a sampled request."""
KEEP_VERSIONS = 4
"""Newest policy versions of which a rank keeps sums."""


@dataclass(frozen=True)
class TokenScore:
    """One served token."""

    served: float
    """Log-probability with which it was served, nats."""
    exact: float
    """Log-probability under the exact model, nats."""
    agrees: bool
    """Whether both hold the same token for the likeliest."""


class ScoreSums(BaseModel):
    """Sums over scored answers; all but ``loss_tokens`` only grow."""

    answers: int = Field(default=0, description="scored answers")
    tokens: int = Field(default=0, description="their tokens, without each answer's first")
    served_nats: float = Field(default=0.0, description="minus log p of these as served, nats")
    exact_nats: float = Field(default=0.0, description="minus log p of them by the exact model")
    agreed: int = Field(default=0, description="tokens where both have the same likeliest one")
    loss_squared: float = Field(
        default=0.0, description="squares of answers' losses, for the error"
    )
    loss_tokens: float = Field(default=0.0, description="loss x tokens of answers, for the error")
    tokens_squared: int = Field(default=0, description="squares of answers' tokens, for the error")

    def add(self, tokens: Sequence[TokenScore]) -> None:
        """Add an answer."""
        served = -math.fsum(token.served for token in tokens)
        exact = -math.fsum(token.exact for token in tokens)
        self.add_sums(served, exact, sum(token.agrees for token in tokens), len(tokens))

    def add_sums(self, served_nats: float, exact_nats: float, agreed: int, count: int) -> None:
        """Add an answer by its own sums."""
        loss = exact_nats - served_nats
        self.answers += 1
        self.tokens += count
        self.served_nats += served_nats
        self.exact_nats += exact_nats
        self.agreed += agreed
        self.loss_squared += loss * loss
        self.loss_tokens += loss * count
        self.tokens_squared += count * count

    def plus(self, other: "ScoreSums") -> "ScoreSums":
        """Of both."""
        fields = ScoreSums.model_fields
        return ScoreSums(**{name: getattr(self, name) + getattr(other, name) for name in fields})

    @property
    def nats(self) -> float | None:
        """Mean over tokens of log p as served minus log p exact; None without a token."""
        return (self.exact_nats - self.served_nats) / self.tokens if self.tokens else None

    @property
    def standard_error(self) -> float | None:
        """Of ``nats`` over answers, whose tokens depend on each other: of a ratio of two sums.

        None of fewer than two answers. (Cochran, Sampling Techniques, 3rd ed., 2.11.)
        """
        if self.answers < 2 or self.nats is None:
            return None
        squares = (
            self.loss_squared
            - 2 * self.nats * self.loss_tokens
            + self.nats**2 * self.tokens_squared
        )
        scale = self.answers / (self.answers - 1)
        return math.sqrt(max(squares, 0.0) * scale) / self.tokens

    @property
    def agreement(self) -> float | None:
        """Share of tokens with the same likeliest token; None without a token."""
        return self.agreed / self.tokens if self.tokens else None


class VersionSums(ScoreSums):
    """Sums of the answers that were served under one version of the policy, in one tier."""

    version: int = Field(description="of the policy")
    tier: Tier = Field(description="of the requests")


class ScoreTotals(BaseModel):
    """Scores of finished answers: what became of the sampled ones, and their sums."""

    outcomes: dict[str, int] = Field(
        description=f"sampled answers by what became of them: {', '.join(OUTCOMES)}"
    )
    tiers: dict[Tier, ScoreSums] = Field(description="since the start of each engine")
    versions: list[VersionSums] = Field(
        description=f"of the newest {KEEP_VERSIONS} policy versions with a score, oldest first"
    )


class Score(BaseModel):
    """The score of one version of the policy, in one tier."""

    version: int
    tier: Tier
    answers: int
    tokens: int
    nats: float = Field(description="mean over tokens: log p as served minus log p exact")
    standard_error: float | None = Field(description="of nats, over answers")
    agreement: float = Field(description="tokens with the same likeliest token, 0..1")


class Scores:
    """What one rank has scored since its engine started."""

    def __init__(self) -> None:
        self._outcomes = dict.fromkeys(OUTCOMES, 0)
        self._tiers = {tier: ScoreSums() for tier in TIERS}
        self._versions: dict[int, dict[Tier, ScoreSums]] = {}

    def count(self, outcome: str) -> None:
        """Count what became of a sampled answer; ``add`` counts a scored one."""
        self._outcomes[outcome] += 1

    def add(self, version: int, tier: Tier, tokens: Sequence[TokenScore]) -> None:
        """Take the score of an answer.

        Args:
            version: of the policy it was served under, from its start to its end.
            tier: of its request.
            tokens: of it, without its first; at least one.
        """
        self.count(SCORED)
        self._tiers[tier].add(tokens)
        of_version = self._versions.setdefault(version, {t: ScoreSums() for t in TIERS})
        of_version[tier].add(tokens)
        for old in sorted(self._versions)[:-KEEP_VERSIONS]:
            del self._versions[old]

    def report(self) -> dict[str, Any]:
        """Fields of :class:`ScoreTotals`."""
        return {
            "outcomes": dict(self._outcomes),
            "tiers": {tier: sums.model_dump() for tier, sums in self._tiers.items()},
            "versions": [
                {"version": version, "tier": tier, **sums.model_dump()}
                for version in sorted(self._versions)
                for tier, sums in self._versions[version].items()
                if sums.answers
            ],
        }


def total_scores(reports: Iterable[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Sums over ranks: fields of :class:`ScoreTotals`.

    Args:
        reports: of :meth:`Scores.report`; None of a rank that scores nothing.
    """
    outcomes = dict.fromkeys(OUTCOMES, 0)
    tiers = {tier: ScoreSums() for tier in TIERS}
    versions: dict[tuple[int, Tier], ScoreSums] = {}
    for report in reports:
        if report is None:
            continue
        parsed = ScoreTotals.model_validate(report)
        for name, count in parsed.outcomes.items():
            outcomes[name] += count
        for tier, sums in parsed.tiers.items():
            tiers[tier] = tiers[tier].plus(sums)
        for each in parsed.versions:
            key = (each.version, each.tier)
            versions[key] = versions.get(key, ScoreSums()).plus(each)
    return {
        "outcomes": outcomes,
        "tiers": {tier: sums.model_dump() for tier, sums in tiers.items()},
        "versions": [
            {"version": version, "tier": tier, **versions[version, tier].model_dump()}
            for version, tier in sorted(versions)
        ],
    }


def scores_of(totals: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Fields of :class:`Score` of each version and tier.

    Args:
        totals: of :func:`total_scores`.
    """
    return [
        {name: getattr(sums, name) for name in Score.model_fields}
        for sums in map(VersionSums.model_validate, totals["versions"])
    ]
