"""Sums of scores over answers, ranks and versions, and what they mean."""

import math
import random

import pytest

from sere_ray.observe.score import (
    KEEP_VERSIONS,
    OUTCOMES,
    Score,
    Scores,
    ScoreSums,
    ScoreTotals,
    TokenScore,
    scores_of,
    total_scores,
)


def answer(losses, served=-1.0):
    return [TokenScore(served, served - loss, agrees=loss < 0.5) for loss in losses]


def test_the_score_is_the_mean_over_tokens_not_over_answers():
    sums = ScoreSums()
    sums.add(answer([0.2] * 9))
    assert sums.standard_error is None, "of one answer nothing is known"
    sums.add(answer([1.2]))
    assert sums.nats == pytest.approx(0.3)
    assert sums.agreement == 0.9
    assert (sums.answers, sums.tokens) == (2, 10)


def test_without_a_token_nothing_is_said():
    sums = ScoreSums()
    assert (sums.nats, sums.standard_error, sums.agreement) == (None, None, None)


def test_the_standard_error_covers_answers_whose_tokens_go_together():
    """1.96 of it hold the true mean in about 95 of 100 samples of 40 answers."""
    rng, held, samples = random.Random(0), 0, 400
    for _ in range(samples):
        sums = ScoreSums()
        for _ in range(40):
            of_answer = rng.gauss(0.1, 0.05)  # an answer is all easy or all hard
            sums.add(answer([rng.gauss(of_answer, 0.02) for _ in range(rng.randint(2, 20))]))
        held += abs(sums.nats - 0.1) < 1.96 * sums.standard_error
    assert 0.91 < held / samples < 0.98


def test_an_answer_that_the_exact_model_likes_better_counts_below_zero():
    sums = ScoreSums()
    for loss in (0.3, -0.1):
        sums.add(answer([loss]))
    assert sums.nats == pytest.approx(0.1)


def test_ranks_add_up_by_version_and_tier():
    ranks = [Scores(), Scores()]
    ranks[0].add(1, "default", answer([0.4]))
    ranks[0].add(1, "exact", answer([0.0]))
    ranks[1].add(1, "default", answer([0.2, 0.0]))
    ranks[1].add(2, "default", answer([0.1]))
    ranks[1].count("no_room")
    totals = total_scores([ranks[0].report(), None, ranks[1].report()])
    ScoreTotals.model_validate(totals)
    assert {k: n for k, n in totals["outcomes"].items() if n} == {"scored": 4, "no_room": 1}
    scores = [Score.model_validate(each) for each in scores_of(totals)]
    assert [(s.version, s.tier, s.answers) for s in scores] == [
        (1, "default", 2),
        (1, "exact", 1),
        (2, "default", 1),
    ]
    assert scores[0].nats == pytest.approx(0.2)
    assert totals["tiers"]["default"]["tokens"] == 4


def test_one_rank_keeps_few_versions_and_counts_all_answers():
    scores = Scores()
    for version in range(3 * KEEP_VERSIONS):
        scores.add(version, "default", answer([0.1]))
    report = scores.report()
    assert [v["version"] for v in report["versions"]] == list(
        range(2 * KEEP_VERSIONS, 3 * KEEP_VERSIONS)
    )
    assert report["tiers"]["default"]["answers"] == 3 * KEEP_VERSIONS


def test_every_outcome_is_there_from_the_start():
    assert Scores().report()["outcomes"] == dict.fromkeys(OUTCOMES, 0)
    assert total_scores([])["outcomes"] == dict.fromkeys(OUTCOMES, 0)
    assert math.isclose(sum(total_scores([])["tiers"]["exact"].values()), 0)
