"""One deployment of two ranks for all tests of this folder, as a user runs it."""

import pytest

from tests.serve.deployment import deployed


@pytest.fixture(scope="package")
def live(tmp_path_factory):
    """A :class:`tests.serve.deployment.Served`; a test leaves it as it found it, those of
    ``test_zz_faults.py`` apart.

    Mode ``auto`` is not on; its target is out of reach. Every answer is scored.
    """
    levels = [{"select_top_k": 2}, {"select_top_k": 1}]
    with deployed(
        tmp_path_factory.mktemp("live"),
        data_parallel_size=2,
        auto={"tpot_ms": 0.01, "interval_s": 0.5, "patience": 2, "levels": levels},
        metrics_interval_s=1,
        score={"share": 1.0},
        environment={"RAY_metrics_report_interval_ms": "3000"},
    ) as deployment:
        yield deployment
