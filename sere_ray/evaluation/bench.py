"""The step-time benchmark as a command: checks, result file, profile."""

from pathlib import Path
from typing import Any, cast

from rich.console import Console

from sere_ray.errors import SereError
from sere_ray.evaluation.engines import on_gpu
from sere_ray.evaluation.kernels import profile_arms
from sere_ray.evaluation.models import get_model
from sere_ray.evaluation.routing import ROUTERS, Router
from sere_ray.evaluation.step_time import ROW_KEY, Bench, Plan, measure
from sere_ray.results import check_continues, load_result, write_result


def run_step_time(
    model: str,
    out: Path,
    *,
    batches: list[int],
    repeats: int,
    tokens: int,
    routers: tuple[str, ...],
    arms: tuple[str, ...] | None,
    compiled: bool,
    append: bool,
    profile: Path | None,
    profile_batch: int,
    console: Console,
) -> None:
    """Measure, and write the result after every batch size.

    Args:
        model: a name of :func:`get_model`.
        out: the result file; replaced, each time in one step.
        batches: decode batch sizes.
        repeats: interleaved repeats of every point.
        tokens: decode steps that are timed in a repeat.
        routers: of ``ROUTERS``.
        arms: names of the settings to time; None is all of this machine.
        compiled: run vLLM's compiled graphs; False = eager.
        append: keep the rows of ``out``; a row that is measured again is replaced.
        profile: file for the kernels of stock and S = 1.
        profile_batch: their batch size.
        console: where progress goes.

    Raises:
        SereError: an option does not fit the model, the machine or the file.
    """
    unknown = [name for name in routers if name not in ROUTERS]
    if unknown:
        raise SereError(f"--router: {unknown[0]!r} is none of {', '.join(ROUTERS)}")
    if profile and not on_gpu():
        raise SereError("--profile: needs a GPU")
    if profile and profile_batch not in batches:
        raise SereError(f"--profile-batch = {profile_batch}: must be one of --batches")
    onto = load_result(out) if append and out.exists() else None
    if onto:
        check_continues(onto)
    plan = Plan(
        model=get_model(model),
        batches=batches,
        repeats=repeats,
        tokens=tokens,
        routers=cast(tuple[Router, ...], routers),
        arms=arms,
        compiled=compiled,
    )

    def save(content: dict[str, Any]) -> None:
        write_result(out, content, onto=onto, row_key=ROW_KEY)

    def write_profile(bench: Bench, router: Router) -> None:
        if profile:
            write_result(profile, {"rows": profile_arms(bench, router, profile_batch)})

    measure(plan, console=console, save=save, then=write_profile)
