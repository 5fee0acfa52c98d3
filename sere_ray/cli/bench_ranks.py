"""The part of ``bench`` on several ranks and gangs: what they send, read and share."""

from pathlib import Path
from typing import Annotated

import typer

from sere_ray.cli.common import Out, console, names, numbers, saver, user_errors


def dispatch_bytes(
    out: Out,
    ranks: Annotated[
        str, typer.Option(help="Sizes of the group, 2 to 8, comma-separated.")
    ] = "2,4",
    rows_per_rank: Annotated[
        int, typer.Option(min=1, help="Decode rows of a rank; at most 32 over all ranks.")
    ] = 8,
    similarity: Annotated[
        Path | None, typer.Option(help="Artifact of the demo model [calibrated first].")
    ] = None,
) -> None:
    """Bytes between expert-parallel ranks: the demo model's routing through real gloo processes.

    Example: sere-ray bench dispatch --ranks 2,4 --out dispatch-cpu.json
    """
    with user_errors():
        from sere_ray.bench.commands import run_dispatch

        run_dispatch(
            out,
            group_sizes=numbers("--ranks", ranks, range(2, 9)),
            rows_per_rank=rows_per_rank,
            similarity=similarity,
            console=console,
        )
    print(out)


def scale(out: Out) -> None:
    """Simulate 8 to 256 ranks: experts read, destination ranks and bytes. Nothing is timed.

    Example: sere-ray bench scale --out scale-simulated.json
    """
    with user_errors():
        from sere_ray.bench.scale import run_scale

        run_scale(saver(out), console=console)
    print(out)


def busiest_rank(
    out: Out,
    top_k: Annotated[
        str, typer.Option(help="Experts a row, comma-separated; trained with 4.")
    ] = "4,8",
) -> None:
    """Experts of the busiest of 4 and 8 ranks at equal KL, with `balance_ranks` and without.

    Example: sere-ray bench busiest-rank --out busiest-rank.json
    """
    with user_errors():
        from sere_ray.bench.busiest_rank import run_busiest_rank

        run_busiest_rank(saver(out), numbers("--top-k", top_k, range(1, 48)), console=console)
    print(out)


def rank_time(
    results: Annotated[list[Path], typer.Argument(help="Files of `bench step-time` on GPUs.")],
    out: Out,
) -> None:
    """Fit a + b x experts read to measured decode steps: what an expert costs, and the rest.

    Example: sere-ray bench rank-time docs/results/step-time-h200.json --out rank-time.json
    """
    with user_errors():
        from sere_ray.bench.rank_time import fit_rank_times

        saver(out)({"rows": fit_rank_times(results)})
    print(out)


def replica_reads(out: Out) -> None:
    """Simulate copies of experts chosen by experts read, against vLLM's choice. Nothing is timed.

    Example: sere-ray bench replicas --out replicas-by-experts.json
    """
    with user_errors():
        from sere_ray.bench.replica_reads import run_replica_reads

        run_replica_reads(saver(out), console=console)
    print(out)


def locality(
    out: Out,
    conversations: Annotated[
        int, typer.Option(min=8, max=120, help="Of each kind of text, of up to 4 turns.")
    ] = 75,
    traffic: Annotated[
        str, typer.Option(help="mixed, bursts (one kind prevails), or kinds; comma-separated.")
    ] = "mixed,bursts,code",
) -> None:
    """Requests placed by their experts, simulated on the demo model's routing. Nothing is timed.

    The file is written after every point.

    Example: sere-ray bench locality --out locality.json
    """
    with user_errors():
        from sere_ray.bench.locality.run import run_locality

        run_locality(out, conversations=conversations, traffic=names(traffic), console=console)
    print(out)
