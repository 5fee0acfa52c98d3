import pytest

from sere_ray.bench.restart import run_restart

pytestmark = [pytest.mark.engine, pytest.mark.nightly]


def test_a_gang_answers_again_with_forked_engines_and_without():
    saved = []
    run_restart(1, ranks=2, compiled=False, proxies=["direct"], save=saved.append, console=None)
    rows = saved[-1]["rows"]
    assert [row["forked"] for row in rows] == [True, False]
    for row in rows:
        assert 0 < row["seconds_until_answers"] < 300
    forked, anew = (row["start_processor_s"] for row in rows)
    assert forked < anew, "three imports less"
