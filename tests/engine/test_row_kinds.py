import numpy as np
import pytest

from sere_ray.engine.row_kinds import request_kinds, row_kinds
from sere_ray.rules import EXACT, REROUTABLE


@pytest.mark.parametrize(
    ("computed", "prompt", "known", "kind"),
    [
        (0, 10, 10, EXACT),  # whole prompt
        (8, 10, 10, EXACT),  # second chunk of a prompt
        (9, 10, 10, EXACT),  # all but the last prompt token came from the prefix cache
        (10, 10, 11, REROUTABLE),  # first decode step
        (17, 10, 18, REROUTABLE),  # later decode step
        (0, 10, 18, EXACT),  # preempted: recomputes prompt and answer
        (12, 10, 18, EXACT),  # preempted: a chunk that lies wholly in the answer
    ],
)
def test_request_kind(computed, prompt, known, kind):
    kinds = request_kinds(np.array([computed]), np.array([prompt]), np.array([known]))
    assert kinds.dtype == np.int8
    assert kinds.tolist() == [kind]


def test_kinds_are_spread_over_rows():
    kinds = np.array([REROUTABLE, EXACT, REROUTABLE], dtype=np.int8)
    rows = row_kinds(kinds, np.array([0, 1, 4, 5]))
    assert rows.tolist() == [REROUTABLE, EXACT, EXACT, EXACT, REROUTABLE]


def test_no_requests():
    empty = np.array([], dtype=np.int32)
    assert row_kinds(request_kinds(empty, empty, empty), np.array([0])).tolist() == []
