"""The metrics of the production score (``score.py``), part of the list in ``metrics.py``."""

from sere_ray.observe.metric import RANK_LABELS, Metric

_TIER = (*RANK_LABELS, "tier")
_SCORED = (*_TIER, "version")
SCORE_ANSWERS = Metric(
    "sere_score_answers_total",
    "counter",
    "answers",
    (*RANK_LABELS, "outcome"),
    "sampled answers by what became of them; scored: by the exact model",
)
SCORE_TOKENS = Metric(
    "sere_score_tokens_total", "counter", "tokens", _TIER, "their tokens, without each one's first"
)
SCORE_SERVED = Metric(
    "sere_score_served_nats_total",
    "counter",
    "nats",
    _TIER,
    "minus log p of these tokens as they were served, summed",
)
SCORE_EXACT = Metric(
    "sere_score_exact_nats_total",
    "counter",
    "nats",
    _TIER,
    "minus log p of these tokens under the exact model, summed; less the former, over tokens: the "
    "score",
)
SCORE_AGREED = Metric(
    "sere_score_agreed_total",
    "counter",
    "tokens",
    _TIER,
    "of these, tokens where both have the same likeliest token",
)
SCORE_NATS = Metric(
    "sere_score_nats",
    "gauge",
    "nats",
    _SCORED,
    "score of a policy version's answers since it began; of the newest versions",
)
SCORE_AGREEMENT = Metric(
    "sere_score_agreement", "gauge", "share", _SCORED, "share of their tokens that agree"
)

SCORE_SUMS = {
    "tokens": SCORE_TOKENS,
    "served_nats": SCORE_SERVED,
    "exact_nats": SCORE_EXACT,
    "agreed": SCORE_AGREED,
}
"""The metric of each field of a tier's score sums."""
