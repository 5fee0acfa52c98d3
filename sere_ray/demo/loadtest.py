"""`sere-ray loadtest demo`: serve the demo model and compare policies, two minutes of load."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sere_ray import assets
from sere_ray.calibration import calibrate
from sere_ray.demo.run import check_machine
from sere_ray.demo.serving import HOST, MODEL_ID, served
from sere_ray.loadtest.ab import Amount, Comparison, Save, run_comparison
from sere_ray.loadtest.driver import LoadPlan, Target
from sere_ray.loadtest.policies import parse_policies
from sere_ray.loadtest.slo import Price, Slo
from sere_ray.loadtest.workload import arithmetic_workload
from sere_ray.policy.policy import Policy

STREAMS = 8
SECONDS = 7.0
WARMUP = 2.0
SLO = Slo(ttft=1000, tpot=100)
"""Far above the times of all policies, on slow machines, too. Near them a small difference in time
would decide whether a request counts, and so make a large one in cost."""
_NOTE = (
    "Reading fewer experts saves the demo model no time: it is so small that it probably stays in "
    "a CPU's cache (not measured). So the time that the rule itself takes shows. Engines, proxy "
    "and generator share the same cores, and the price is assumed."
)
_NOTE_ON_ONE = " Few answers of S=1 are right: the model has 48 experts that are not very alike."


def run_demo_comparison(
    save: Save,
    *,
    policies: str,
    price: Price,
    port: int,
    rates: Sequence[float],
    rounds: int,
    console: Console,
) -> dict[str, Any]:
    """Serve the demo model in two ranks and compare policies on its arithmetic.

    Args:
        save: called with the content of the result file.
        policies: such as ``off,S=2,S=1``, as :func:`~sere_ray.loadtest.policies.parse_policies`
            reads them.
        price: of this machine; an assumption, since nobody rents it.
        port: to serve on.
        rates: requests per second of a sweep; none = eight streams, closed loop.
        rounds: blocks of each policy.
        console: where progress is printed.

    Returns:
        The content of the result file.

    Raises:
        SereError: the port is taken, or a package of the extra ``cpu`` is missing.
    """
    arms = parse_policies(policies)
    compiled = check_machine(port, console)
    with tempfile.TemporaryDirectory(prefix="sere-loadtest-") as folder:
        similarity = Path(folder) / "demo.safetensors"
        calibrate(str(assets.MODEL), data=str(assets.CALIBRATION), out=similarity, console=console)
        policy = Policy.parse({"similarity": str(similarity), "select_top_k": 2})
        url = f"http://{HOST}:{port}"
        plan = LoadPlan(Target(f"{url}/v1", MODEL_ID), tuple(arithmetic_workload()), SECONDS)
        comparison = Comparison(
            url,
            replace(plan, warmup=WARMUP, cache="cold"),
            [Amount(rate=rate) for rate in rates] or [Amount(STREAMS)],
            arms,
            rounds,
            SLO,
            price,
        )
        with served(policy, port, max_streams=16, compiled=compiled, console=console):
            content = run_comparison(comparison, save, console)
    return {**content, "note": _NOTE + (_NOTE_ON_ONE if "S=1" in arms else "")}
