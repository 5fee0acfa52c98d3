"""A made-up answer of `sere-ray strength`, for tests of what reads it."""

from sere_ray.artifact.strength import Strength, StrengthCurve


def make_strength(layers: int = 4, most: int = 1000) -> Strength:
    """Of 4 and 16 rows; a loss of 0.01 is a tau of 0.001 at 4 rows and of 0.004 at 16.

    Args:
        layers: their number.
        most: demand that a step of layer 0 gave up at the first tau, in units; of layer i times
            i + 1, and twice that at every next tau.
    """
    curves = [
        StrengthCurve(
            rows=rows,
            tau=(tau / 100, tau, 100 * tau),
            loss=(0.001, 0.01, 0.1),
            most=tuple(
                tuple(most * 2**place * (layer + 1) for layer in range(layers))
                for place in range(3)
            ),
        )
        for rows, tau in ((4, 0.001), (16, 0.004))
    ]
    return Strength(curves=tuple(curves), tasks=("cloze",), items=1000, data="text.jsonl")
