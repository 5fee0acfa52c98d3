"""Rules that say which gang takes a request: Ray's own, ours, and the published one."""

import random
from collections.abc import Callable, Sequence

from sere_ray.engine.signatures import Floats
from sere_ray.serve.by_experts.placement import Gang, likeness, ranked

Rule = Callable[[Sequence[Gang], Floats | None, Floats], Gang]
NEAR = 0.1
"""ELDR (arXiv 2607.00466): the least loaded of those so near to the likest."""


def power_of_two(rng: random.Random) -> Rule:
    """Ray's default: of two gangs, drawn by lot, the less loaded."""

    def choose(gangs: Sequence[Gang], wanted: Floats | None, usual: Floats) -> Gang:
        return min(rng.sample(list(gangs), 2), key=lambda gang: gang.load)

    return choose


def round_robin(rng: random.Random) -> Rule:
    """Ray's default with direct streaming: one after the other."""
    count = rng.randrange(1000)

    def choose(gangs: Sequence[Gang], wanted: Floats | None, usual: Floats) -> Gang:
        nonlocal count
        count += 1
        return gangs[count % len(gangs)]

    return choose


def balance_first(rng: random.Random) -> Rule:
    """Ours: the likest of those that have little more to do than the least loaded."""

    def choose(gangs: Sequence[Gang], wanted: Floats | None, usual: Floats) -> Gang:
        shuffled = rng.sample(list(gangs), len(gangs))
        return ranked(shuffled, wanted, usual)[0]

    return choose


def likeness_first(rng: random.Random) -> Rule:
    """The published one: the least loaded of the likest."""

    def choose(gangs: Sequence[Gang], wanted: Floats | None, usual: Floats) -> Gang:
        likes = {gang.name: likeness(gang.likes, wanted, usual) for gang in gangs}
        best = max(likes.values())
        near = [gang for gang in gangs if likes[gang.name] >= best - NEAR]
        return min(rng.sample(near, len(near)), key=lambda gang: gang.load)

    return choose


RULES: dict[str, Callable[[random.Random], Rule]] = {
    rule.__name__: rule for rule in (power_of_two, round_robin, balance_first, likeness_first)
}
