"""What a rank tells request routers, as Ray carries it: ``record_routing_stats``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sere_ray.engine.signatures import DIMENSIONS, Floats, unit
from sere_ray.serve.by_experts.kinds import MOST_KINDS, Kind, Kinds
from sere_ray.serve.by_experts.text import DIMENSIONS as TEXT_DIMENSIONS

KEY = "sere_experts"
"""Of the dictionary that Ray carries; others use other keys of it."""
FORM = 1
"""Number of this form: a router reads no other."""
_STEPS = 127


@dataclass(frozen=True)
class Report:
    """A rank at one moment.

    Attributes:
        model: word of its model's gates.
        gang: id of its gang.
        number: of the report, counted up.
        load: requests that it has.
        likes: ``[D]`` mean signature of its last ones; zeros = none is known.
        kinds: of its requests so far.
    """

    model: str
    gang: str
    number: int
    load: int
    likes: Floats
    kinds: Kinds

    def write(self) -> dict[str, Any]:
        """As plain numbers, strings and bytes: 12 KB at most."""
        return {
            "form": FORM,
            "model": self.model,
            "gang": self.gang,
            "number": self.number,
            "load": self.load,
            "likes": _small(self.likes),
            "kinds": [
                (_small(kind.text), _small(kind.signature), float(kind.seen))
                for kind in self.kinds.kinds
            ],
        }

    @classmethod
    def read(cls, stats: Mapping[str, Any]) -> "Report | None":
        """The report among what Ray carries for a replica; None if there is none of this form."""
        try:
            found = stats[KEY]
            if found["form"] != FORM or len(found["kinds"]) > MOST_KINDS:
                return None
            kinds = [
                Kind(_whole(text, TEXT_DIMENSIONS), _whole(signature, DIMENSIONS), float(seen))
                for text, signature, seen in found["kinds"]
            ]
            return cls(
                str(found["model"]),
                str(found["gang"]),
                int(found["number"]),
                max(0, int(found["load"])),
                _whole(found["likes"], DIMENSIONS),
                Kinds(kinds),
            )
        except (KeyError, TypeError, ValueError):
            return None


def _small(vector: Floats) -> bytes:
    """A vector's direction in a byte a number."""
    largest = float(np.abs(vector).max(initial=0.0))
    scaled = vector * (_STEPS / largest) if largest else vector
    return np.rint(scaled).astype(np.int8).tobytes()


def _whole(content: bytes, size: int) -> Floats:
    """The unit vector of :func:`_small`.

    Raises:
        ValueError: of another size.
    """
    vector = np.frombuffer(content, dtype=np.int8).astype(np.float32)
    if len(vector) != size:
        raise ValueError(f"{len(vector)} numbers, {size} are expected")
    return unit(vector)
