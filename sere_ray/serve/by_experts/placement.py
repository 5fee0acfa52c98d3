"""Which gang a request goes to: the rule of the request router, the same in the simulation.

Balance comes first. Of the gangs that have little more to do than the least loaded one, the one is
taken whose last requests are most like the request (compare ELDR, arXiv 2607.00466).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sere_ray.engine.signatures import Floats, unit

SLACK = 0.25
"""So much more than the least loaded gang may one have, as a share of the mean load of all."""
LEAST_SLACK = 2.0
"""And at least so many requests. With less, less is saved; with more, loads spread further."""
MEMORY = 50.0
"""What a gang likes is a mean that follows its last so many requests. The mean of those that run
now finds less: a gang would forget what it has come to serve."""


@dataclass(frozen=True)
class Gang:
    """What is known of a gang when a request comes.

    Attributes:
        name: of the gang.
        load: requests that it has, running and waiting, divided by its ranks.
        likes: ``[D]``, mean signature of its last requests; zeros = nothing is known.
    """

    name: str
    load: float
    likes: Floats


class Likes:
    """Mean signature of the last requests of a gang, or of one of its ranks.

    Args:
        size: of a signature.
    """

    def __init__(self, size: int) -> None:
        self.mean = np.zeros(size, dtype=np.float32)
        self._seen = 0.0

    def add(self, signature: Floats) -> None:
        """One more request."""
        self._seen = min(self._seen + 1, MEMORY)
        self.mean = self.mean + (signature - self.mean) / np.float32(self._seen)


def ranked(gangs: Sequence[Gang], wanted: Floats | None, usual: Floats) -> list[Gang]:
    """The gangs, the one to take first.

    Args:
        gangs: at least one.
        wanted: ``[D]`` signature that the request will have; None = not known.
        usual: ``[D]`` mean signature of all requests: what all have in common tells nothing.
    """
    least = min(gang.load for gang in gangs)
    mean = sum(gang.load for gang in gangs) / len(gangs)
    most = least + max(LEAST_SLACK, SLACK * mean)

    def order(gang: Gang) -> tuple[bool, float, float]:
        is_over = gang.load > most
        return is_over, gang.load if is_over else -likeness(gang.likes, wanted, usual), gang.load

    return sorted(gangs, key=order)


def likeness(likes: Floats, wanted: Floats | None, usual: Floats) -> float:
    """Cosine of two vectors without what they share with the usual one, -1..1; 0 = not known."""
    if wanted is None or not likes.any():
        return 0.0
    return float(np.dot(_apart(likes, usual), _apart(wanted, usual)))


def _apart(vector: Floats, usual: Floats) -> Floats:
    """Direction of the part of a vector that is orthogonal to the usual one."""
    mean = unit(usual)
    return unit(vector - np.dot(vector, mean) * mean) if mean.any() else unit(vector)
