"""The controller of mode ``auto`` against a simulated engine."""

import math
import random

import pytest

from sere_ray.serve.policy_actor.auto import Controller, Observation
from sere_ray.serve.policy_actor.auto_config import AutoTarget

LEVELS = 4
SHARE = [0.0, 0.1, 0.2, 0.35]
EXPERTS, TOP_K = 64, 4


def step_ms(level, rows):
    """A decode step: a fixed part, and the experts that ``rows`` rows read under uniform routing.

    Level l keeps K - l slots of each row.
    """
    kept = TOP_K - level
    return 4 + 0.4 * EXPERTS * (1 - (1 - kept / EXPERTS) ** rows)


def simulate(loads, target, *, noise=0.03, seed=0):
    """The level after each interval."""
    rng = random.Random(seed)
    controller, levels = Controller(target, LEVELS), []
    for load in loads:
        rows = 0 if load == 0 else max(1, load + rng.gauss(0, 0.02 * load))
        tpot = step_ms(controller.level, rows) * rng.gauss(1, noise) if load else None
        seen = Observation(tpot, rows, SHARE[controller.level])
        levels.append(controller.observe(seen).level)
    return levels


def changes(levels):
    return sum(a != b for a, b in zip([0, *levels], levels, strict=False))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("load", [1, 4, 12, 24, 48, 200])
def test_it_settles_under_a_constant_load(load, seed):
    target = AutoTarget(tpot_ms=16)
    levels = simulate([load] * 400, target, seed=seed)
    assert levels == sorted(levels), "it went back although the load stayed"
    assert changes(levels) <= LEVELS - 1
    if step_ms(0, load) < 0.9 * target.tpot_ms:
        assert levels[-1] == 0, "it re-routes without need"
    held = [level for level in range(LEVELS) if step_ms(level, load) < 0.9 * target.tpot_ms]
    if held:
        assert step_ms(levels[-1], load) <= target.tpot_ms * 1.1


@pytest.mark.parametrize("seed", range(20))
def test_it_follows_a_day_up_and_down_and_ends_exact(seed):
    day = [round(2 + 40 * (1 - math.cos(2 * math.pi * i / 1000)) / 2) for i in range(1000)]
    levels = simulate(day, AutoTarget(tpot_ms=16), seed=seed)
    peak = levels.index(max(levels))
    assert max(levels) >= 2
    assert levels[-1] == 0
    assert changes(levels) <= 2 * (LEVELS - 1) + 2
    assert levels[:peak] == sorted(levels[:peak])


@pytest.mark.parametrize("seed", range(20))
def test_a_burst_is_answered_in_time_and_undone(seed):
    levels = simulate([2] * 50 + [60] * 100 + [2] * 100, AutoTarget(tpot_ms=16), seed=seed)
    assert max(levels[:50]) == 0
    assert levels[50 + 3 * LEVELS] == LEVELS - 1
    assert levels[150 + 3 * LEVELS] == 0
    assert changes(levels) == 2 * (LEVELS - 1)


def test_without_requests_it_is_exact_at_once():
    levels = simulate([60] * 50 + [0] + [1] * 5, AutoTarget(tpot_ms=16))
    assert levels[49] == LEVELS - 1
    assert levels[50:] == [0] * 6


@pytest.mark.parametrize("seed", range(20))
def test_the_quality_floor_wins_over_the_target(seed):
    target = AutoTarget(tpot_ms=5, max_rerouted_share=0.25)
    levels = simulate([40] * 200, target, seed=seed)
    assert levels[-1] == 2, "levels of at most a quarter re-routed"
    assert levels.count(3) <= 3
    assert changes(levels[30:]) <= 3


def test_reasons_say_what_was_seen():
    controller = Controller(AutoTarget(tpot_ms=10, max_rerouted_share=0.5, patience=2), 2)
    slow = Observation(12.34, 8, 0.0)
    assert controller.observe(slow).reason == ""
    assert controller.observe(slow).reason == "p90 12.3 ms > 10.0 ms"
    assert "0.600 > 0.500" in controller.observe(Observation(9.0, 8, 0.6)).reason
    assert [controller.observe(slow).level for _ in range(5)] == [0] * 5, "the level stays closed"
    other_load = Observation(12.34, 20, 0.0)
    assert controller.observe(other_load).level == 1, "and opens when the load has changed"
    assert controller.observe(Observation(None, 0, 0.0)).reason == "idle"


def test_a_score_above_its_limit_leads_down_and_a_level_waits_for_its_score():
    controller = Controller(AutoTarget(max_score=0.1, patience=1), 4)

    def see(score, load=8):
        return controller.observe(Observation(None, load, 0.0, score))

    assert see(None).level == 1, "level 0 is exact: nothing to wait for"
    assert [see(None).level for _ in range(5)] == [1] * 5
    assert see(0.08).level == 2
    assert [see(None).level for _ in range(5)] == [2] * 5
    down = see(0.1234)
    assert (down.level, down.reason) == (1, "score 0.1234 > 0.1000 nats")
    assert [see(0.08).level for _ in range(5)] == [1] * 5, "the level above stays closed"
    assert see(0.08, load=20).level == 2, "and opens when the load has changed"


def test_an_interval_that_says_nothing_about_the_time_holds():
    """Also the count of slow ones: an interval may be shorter than what the time is taken over."""
    controller = Controller(AutoTarget(tpot_ms=10, max_rerouted_share=0.5, patience=2), 3)
    slow, unknown = Observation(12.0, 8, 0.0), Observation(None, 8, 0.0)
    assert [controller.observe(seen).level for seen in (slow, unknown, slow)] == [0, 0, 1]
    assert [controller.observe(unknown).level for _ in range(5)] == [1] * 5
    assert controller.observe(Observation(None, 8, 0.6)).level == 0, "the floor needs no time"


def test_one_level_is_always_exact():
    controller = Controller(AutoTarget(tpot_ms=1), 1)
    assert {controller.observe(Observation(9, 9, 0)).level for _ in range(9)} == {0}
