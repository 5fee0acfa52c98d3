"""Benchmarks as commands: checks, settings, result files."""

import tempfile
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from sere_ray import assets
from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.bench.demo_model import SEQUENCES, TOP_K, bound
from sere_ray.bench.dispatch_traffic import Setting, measure_dispatch
from sere_ray.bench.engines import on_gpu
from sere_ray.bench.kernel_profile import profile_arms
from sere_ray.bench.models import get_model, with_layers
from sere_ray.bench.routing import ROUTERS, Router
from sere_ray.bench.step_time import ROW_KEY, Bench, StepTimePlan, measure
from sere_ray.calibration import calibrate
from sere_ray.policy.policy import Policy
from sere_ray.util.errors import SereError
from sere_ray.util.progress import progress
from sere_ray.util.results import check_continues, load_result, write_result


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
    masks: float | None,
    append: bool,
    profile: Path | None,
    profile_batch: int,
    layers: int | None,
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
        masks: share of slots that random masks keep; None = no masks.
        append: keep the rows of ``out``; a row that is measured again is replaced.
        profile: file for the kernels of stock and S = 1.
        profile_batch: their batch size.
        layers: serve only so many layers of the model; None is all.
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
    plan = StepTimePlan(
        model=with_layers(get_model(model), layers),
        batches=batches,
        repeats=repeats,
        tokens=tokens,
        routers=cast(tuple[Router, ...], routers),
        arms=arms,
        compiled=compiled,
        masks=masks,
    )

    def save(content: dict[str, Any]) -> None:
        write_result(out, content, onto=onto, row_key=ROW_KEY)

    def write_profile(bench: Bench, router: Router) -> None:
        if profile:
            write_result(profile, {"rows": profile_arms(bench, router, profile_batch)})

    measure(plan, console=console, save=save, then=write_profile)


def run_dispatch(
    out: Path,
    *,
    group_sizes: list[int],
    rows_per_rank: int,
    similarity: Path | None,
    console: Console,
) -> None:
    """Measure what travels between ranks, and write the result.

    Args:
        out: the result file; replaced in one step.
        group_sizes: numbers of ranks, each a process.
        rows_per_rank: decode rows of every rank.
        similarity: artifact of the demo model; None calibrates one first.
        console: where progress goes.

    Raises:
        SereError: there is too little held-out text for that many rows, or an artifact is wrong.
    """
    for size in group_sizes:
        if size * rows_per_rank > SEQUENCES:
            raise SereError(
                f"--rows-per-rank = {rows_per_rank}: {size} ranks need {size * rows_per_rank} "
                f"held-out texts and there are {SEQUENCES}; give fewer rows or ranks"
            )
    artifact = _demo_artifact(similarity, console)
    settings = [
        Setting(size, bound(Policy.parse({"similarity": "-", "select_top_k": select_top_k})))
        for size in group_sizes
        for select_top_k in (TOP_K, 2, 1)
    ]
    with progress(console, len(settings), task="dispatch", unit="settings") as advance:
        rows = measure_dispatch(settings, artifact.layers, rows_per_rank, lambda: advance(1))
    write_result(
        out, {"model": "demo", "per": "MoE layer and decode step, all ranks", "rows": rows}
    )


def _demo_artifact(path: Path | None, console: Console) -> SimilarityArtifact:
    if path is not None:
        artifact = SimilarityArtifact.load(path)
        config = assets.model_config()
        artifact.check_model(
            architecture=config["architectures"][0],
            num_experts=config["num_experts"],
            top_k=TOP_K,
            path=str(path),
        )
        return artifact
    with tempfile.TemporaryDirectory(prefix="sere-dispatch-") as folder:
        return calibrate(
            str(assets.MODEL),
            data=str(assets.CALIBRATION),
            out=Path(folder) / "demo.safetensors",
            console=console,
        )
