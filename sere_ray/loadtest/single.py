"""One load on any OpenAI endpoint, without touching its policy."""

from typing import Any

from rich.console import Console

from sere_ray.loadtest.driver import LoadPlan
from sere_ray.loadtest.figures import figures, sample
from sere_ray.loadtest.generator import generator
from sere_ray.loadtest.slo import Price, Slo
from sere_ray.util.errors import SereError


def run_single(
    plan: LoadPlan, slo: Slo, price: Price | None, processes: int, console: Console
) -> dict[str, Any]:
    """Send the load; returns the content of a result file, failures included.

    Raises:
        SereError: not a single request was due.
    """
    with generator(processes) as sender:
        one = sample(sender.run(plan), slo)
    if not one.requests:
        raise SereError("no request was due in the measured part: a longer one, or more load")
    amount: dict[str, Any] = {"streams": plan.streams}
    if plan.arrivals is not None:
        amount = {"rate": one.requests / one.seconds, "steps": plan.arrivals.steps}
    elif plan.streams is None:
        amount = {"rate": one.requests / one.seconds, "trace_requests": len(plan.entries)}
    row = {"policy": None, **amount, **figures(one, price)}
    for name, value in row.items():
        console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    return {
        "model": plan.target.model,
        "slo": str(slo),
        "usd_per_gpu_hour": price and price.usd_per_gpu_hour,
        "gpus": price and price.gpus,
        "seconds": plan.seconds,
        "warmup_seconds": plan.warmup,
        "seed": plan.seed,
        "rows": [row],
    }
