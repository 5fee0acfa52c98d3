"""Decode step time over data- and expert-parallel ranks: stock, one union, a union per rank.

A process per rank (``rank_engines.py``), each with an engine without the key and one for every way
of taking the union, which take turns. Rows of a result are those of ``bench step-time``, with
``rows_per_rank``, ``union``, and what the ranks read.
"""

import multiprocessing
import queue
import statistics
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sere_ray.bench.engines import on_gpu, write_config
from sere_ray.bench.models import get_model, with_layers
from sere_ray.bench.rank_engines import WAYS, RankPlan, Report, measure_rank
from sere_ray.bench.routing import ROUTERS
from sere_ray.calibration.synthetic import synthetic_artifact
from sere_ray.util.errors import SereError
from sere_ray.util.ports import free_ports
from sere_ray.util.results import check_continues, load_result, write_result

ROW_KEY = ("model", "router", "data_parallel_size", "rows_per_rank", "union", "arm")
"""What tells rows of a result file apart."""
TIME_LIMIT = 900
"""How many seconds to wait for a rank's report before the run is given up."""
PORTS_OF_ENGINE = 8
"""vLLM counts up from the port that it is given."""


def arms(top_k: int) -> dict[str, dict[str, Any] | None]:
    """Stock, S = K, 2 and 1 without floor, S = 1 with a threshold, by name."""
    sizes = sorted({top_k, 2, 1}, reverse=True)
    return {
        "stock": None,
        **{f"S={size}": {"select_top_k": size} for size in sizes},
        "S=1 rho=0.9": {"select_top_k": 1, "threshold": 0.9},
    }


def run_expert_parallel(
    model: str,
    out: Path,
    *,
    layers: int | None,
    num_ranks: int,
    ways: tuple[str, ...],
    rows: list[int],
    repeats: int,
    tokens: int,
    routers: tuple[str, ...],
    chosen: tuple[str, ...] | None,
    compiled: bool,
    append: bool,
    profile: Path | None,
    profile_rows: int,
    console: Console,
) -> None:
    """Measure, and write the result after every number of rows.

    Args:
        model: a name of :func:`get_model`.
        out: the result file; replaced, each time in one step.
        layers: serve only so many layers of the model; None is all.
        num_ranks: data-parallel size; a GPU each.
        ways: of ``WAYS``.
        rows: decode rows per rank.
        repeats: interleaved repeats of every point.
        tokens: decode steps that are timed in a repeat.
        routers: of ``ROUTERS``.
        chosen: names of the settings to time; None is all. Stock always is.
        compiled: run vLLM's compiled graphs; False = eager.
        append: keep the rows of ``out``; a row that is measured again is replaced.
        profile: file for the kernels of stock and of each way at S = 1, on rank 0.
        profile_rows: their decode rows per rank.
        console: where progress goes.

    Raises:
        SereError: an option does not fit the model, the machine or the file, or a rank failed.
    """
    served = with_layers(get_model(model), layers)
    settings = arms(served.top_k)
    for option, values, allowed in (
        ("--union", ways, WAYS),
        ("--router", routers, ROUTERS),
        ("--arms", chosen or (), tuple(settings)),
    ):
        for value in values:
            if value not in allowed:
                raise SereError(f"{option}: {value!r} is none of {', '.join(allowed)}")
    _check_machine(num_ranks, ways, routers)
    if profile and not on_gpu():
        raise SereError("--profile: needs a GPU")
    if profile and profile_rows not in rows:
        raise SereError(f"--profile-batch = {profile_rows}: must be one of --rows-per-rank")
    onto = load_result(out) if append and out.exists() else None
    if onto:
        check_continues(onto)
    if chosen:
        settings = {n: s for n, s in settings.items() if n in (*chosen, "stock")}
    with tempfile.TemporaryDirectory(prefix="sere-expert-parallel-") as name:
        folder, similarity = write_config(served, Path(name)), Path(name) / "sere.safetensors"
        synthetic_artifact(folder).save(similarity)
        plan = RankPlan(
            model=served,
            folder=folder,
            similarity=str(similarity),
            ways=ways,
            rows=rows,
            arms=settings,
            repeats=repeats,
            tokens=tokens,
            routers=[router for router in ROUTERS if router in routers],
            ports=free_ports(len(ways) + 1, apart=PORTS_OF_ENGINE),
            compiled=compiled,
            num_ranks=num_ranks,
            profile_rows=profile_rows if profile else None,
        )
        found: list[dict[str, Any]] = []
        with _reports(plan) as reports:
            console.print(f"starting {len(ways) + 1} engines on {num_ranks} ranks: {served.name}")
            next(reports)
            for of_ranks in reports:
                if profile and "profile" in of_ranks[0]:
                    write_result(profile, {"rows": profile_rows_of(plan, of_ranks[0])})
                    continue
                found += result_rows(plan, of_ranks)
                write_result(out, {"rows": found}, onto=onto, row_key=ROW_KEY)
                console.print(f"{of_ranks[0]['router']}, {of_ranks[0]['rows']} rows per rank: done")


def _check_machine(num_ranks: int, ways: tuple[str, ...], routers: tuple[str, ...]) -> None:
    if on_gpu():
        if torch.cuda.device_count() < num_ranks:
            raise SereError(
                f"--data-parallel-size = {num_ranks}: this host has {torch.cuda.device_count()} "
                "GPUs; a rank needs one of its own"
            )
        return
    if "before-dispatch" in ways:
        raise SereError("--union before-dispatch: a CPU always does, as `global`")
    if "skewed" in routers:
        raise SereError("--router skewed: needs a GPU; on CPU vLLM packs the gates' weights away")


def result_rows(plan: RankPlan, of_ranks: list[Report]) -> list[dict[str, Any]]:
    """Rows of the result file from what each rank reports of the same steps.

    A step takes what the slowest rank takes. Experts are distinct ones per layer and step.
    """
    times = {
        point: [max(ms) for ms in zip(*(report["ms"][point] for report in of_ranks), strict=True)]
        for point in plan.points
    }
    observed = of_ranks[0]["counters"].get((plan.ways[0], "observe"))
    rows = []
    for way, arm in plan.points:
        ratios = [s / t for s, t in zip(times[None, "stock"], times[way, arm], strict=True)]
        step_ms = times[way, arm]
        counters = [report["counters"].get((way, arm)) for report in of_ranks]
        rows.append(
            {
                "model": plan.model.name,
                "router": of_ranks[0]["router"],
                "data_parallel_size": plan.num_ranks,
                "rows_per_rank": of_ranks[0]["rows"],
                "union": way,
                "arm": arm,
                "step_ms": round(statistics.median(step_ms), 3),
                "step_ms_min": round(min(step_ms), 3),
                "step_ms_max": round(max(step_ms), 3),
                "stock_step_ms": round(statistics.median(times[None, "stock"]), 3),
                "speedup": round(statistics.median(ratios), 3),
                "speedup_min": round(min(ratios), 3),
                "speedup_max": round(max(ratios), 3),
                "repeats": len(step_ms),
                "slots_rerouted": _slots(counters) if way else 0.0,
                **_experts(plan, counters[0] if way else observed, "read" if way else "before"),
            }
        )
    return rows


def profile_rows_of(plan: RankPlan, of_rank: Report) -> list[dict[str, Any]]:
    """Rows of the profile: as those of one GPU, with ``union`` and ``data_parallel_size``."""
    return [
        {
            "model": plan.model.name,
            "router": of_rank["router"],
            "data_parallel_size": plan.num_ranks,
            "union": way,
            "arm": "S=1" if way else "stock",
            **kernels,
        }
        for way, kernels in of_rank["profile"].items()
    ]


def _slots(counters: list[dict[str, Any]]) -> float:
    """Slots re-routed per layer and step, of all ranks."""
    decode = [of_rank["decode_only"] for of_rank in counters]
    layers = len(decode[0]["slots_rerouted"])
    steps: int = max(decode[0]["steps"], 1)
    total: int = sum(sum(of_rank["slots_rerouted"]) for of_rank in decode)
    return round(total / layers / steps, 2)


def _experts(plan: RankPlan, counters: dict[str, Any] | None, which: str) -> dict[str, Any]:
    """Experts that a rank reads per layer and step: mean over ranks, and the busiest's.

    None where the engine does not count what is gathered (CPU).
    """
    if counters is None or "gathered" not in counters:
        return {"experts_read": None, "experts_read_max_rank": None}
    gathered = counters["gathered"]["decode_only"]
    name = "experts_read" if which == "read" else "experts_before"
    per_layer, steps = len(gathered[name]), max(gathered["steps"], 1)
    mean, busiest = (
        sum(gathered[field]) / per_layer / steps for field in (name, f"busiest_{which}")
    )
    return {
        "experts_read": round(mean / plan.num_ranks, 2),
        "experts_read_max_rank": round(busiest, 2),
    }


# --- processes ------------------------------------------------------------------------------------


@contextmanager
def _reports(plan: RankPlan) -> Iterator[Iterator[list[Report]]]:
    """Run the ranks as processes; yields what all of them report, each time all have.

    No process is left behind.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    processes = [
        context.Process(target=_run_rank, args=(rank, plan, results))
        for rank in range(plan.num_ranks)
    ]
    for process in processes:
        process.start()

    def collect() -> Iterator[list[Report]]:
        for _ in range(1 + len(plan.routers) * len(plan.rows) + bool(plan.profile_rows)):
            found: dict[int, Report] = {}
            while len(found) < plan.num_ranks:
                rank, report = _next_result(results, processes)
                if isinstance(report, str):
                    raise SereError(f"rank {rank} failed:\n{report}")
                found[rank] = report
            yield [found[rank] for rank in range(plan.num_ranks)]

    try:
        yield collect()
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.join(30)


def _next_result(results: Any, processes: list[Any]) -> tuple[int, Report | str]:
    for _ in range(TIME_LIMIT):
        try:
            answer: tuple[int, Report | str] = results.get(timeout=1)
            return answer
        except queue.Empty:
            for rank, process in enumerate(processes):
                if process.exitcode not in (None, 0):
                    raise SereError(f"rank {rank} ended with {process.exitcode}") from None
    raise SereError(f"no rank reported anything for {TIME_LIMIT} s")


def _run_rank(rank: int, plan: RankPlan, results: Any) -> None:
    def report(found: Report) -> None:
        results.put((rank, found))

    try:
        measure_rank(rank, plan, report)
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise
