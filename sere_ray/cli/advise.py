"""The commands `advise` and `speed`."""

from pathlib import Path
from typing import Annotated

import typer

from sere_ray.cli.common import Device, Model, TextColumn, console, names, share, user_errors

_RULES = "sere,margin,spare"


def advise(
    model: Model,
    data: Annotated[str, typer.Option(help="Text like yours: parquet, jsonl or text file.")],
    out: Annotated[Path, typer.Option(help="Folder for all results; a run goes on from it.")],
    batch: Annotated[int, typer.Option(min=2, max=256, help="Decode rows of a step.")] = 16,
    loss: Annotated[
        str, typer.Option(help="Right answers that the policy may lose, of the worst task.")
    ] = "1%",
    check: Annotated[
        str | None, typer.Option(help="Second text [every other document of --data].")
    ] = None,
    step_times: Annotated[
        Path | None, typer.Option(help="Result of `bench step-time` on your GPU, for speed.")
    ] = None,
    rules: Annotated[str, typer.Option(help="Rules to choose among.")] = _RULES,
    tasks: Annotated[
        str, typer.Option(help="Which decide, comma-separated.")
    ] = "arithmetic,cloze,continuation,copying",
    most_items: Annotated[
        int, typer.Option(min=16, help="Of a task, on each text: ask no more from there on.")
    ] = 20_000,
    calibration_sequences: Annotated[
        int, typer.Option(min=1, help="Windows of 128 tokens to calibrate on, at most.")
    ] = 400,
    sequences: Annotated[int, typer.Option(min=2, help="Windows to compare settings on.")] = 64,
    text_column: TextColumn = "text",
    device: Device = "auto",
) -> None:
    """From a checkpoint to a decision: what to switch on, what it gains, what it costs.

    Calibrates, compares the rules, asks tasks, chooses and checks on a second text. Writes
    policy.yaml, serve.yaml, advice.html and advise.json into the folder.

    Example: sere-ray advise MODEL --data text.jsonl --batch 16 --loss 1% --out advice
    """
    with user_errors():
        from sere_ray.advise.advise import advise as run
        from sere_ray.advise.files import write_for_use
        from sere_ray.advise.page import write_advice
        from sere_ray.advise.plan import AdvicePlan
        from sere_ray.calibration.loading import pick_device
        from sere_ray.evaluation.settings import check_rules
        from sere_ray.util.errors import SereError
        from sere_ray.util.results import load_result, write_result

        check_rules(names(rules), served=True)
        plan = AdvicePlan(
            *(model, data, check, batch, share("--loss", loss), names(rules), names(tasks)),
            *(most_items, calibration_sequences, sequences, device, text_column, step_times),
        )
        found = run(plan, out, console)
        write_result(out / "advise.json", found, row_lines=True)
        write_advice(load_result(out / "advise.json"), plan.loss, out / "advice.html")
        chosen = next(row for row in found["rows"] if row["loss"] == plan.loss)
        if chosen["rule"] is None:
            raise SereError(
                f"--loss = {loss}: no setting was shown to keep it; {out / 'advice.html'} says "
                "how near they come and how many items it takes; give more text or a higher loss"
            )
        settings = {"rule": chosen["rule"], **chosen["settings"]}
        on_gpu = pick_device(device).type == "cuda"
        write_for_use(out, model, settings, on_gpu=on_gpu)
        console.print(
            f"{chosen['rule']}: {chosen['experts_share']:.0%} of exact's experts; worst task "
            f"{chosen['checked_task']} on the second text: {chosen['checked_loss']:.1%} lost",
            highlight=False,
        )
    print(out / "advice.html")


def speed(
    tasks: Annotated[list[Path], typer.Argument(help="Results of `sere-ray tasks`.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    step_times: Annotated[
        Path | None, typer.Option(help="Result of `bench step-time`, skewed and uniform gates.")
    ] = None,
    losses: Annotated[
        str, typer.Option(help="What the worst task may lose, comma-separated.")
    ] = "1%,3%",
) -> None:
    """How fast each rule is where tasks stay right: the fewest experts at a held loss.

    Example: sere-ray speed tasks-a.json tasks-b.json --step-times step-time.json --out speed.json
    """
    with user_errors():
        from sere_ray.advise.speed import speed_at_quality
        from sere_ray.util.results import write_result

        held = [share("--losses", loss) for loss in names(losses)]
        rows = speed_at_quality(tasks, step_times, held)
        write_result(out, {"rows": rows}, row_lines=True)
        for row in rows:
            console.print(
                f"{row['model']}, {row['batch']} rows, {row['held_loss']:.0%}: {row['rule']} "
                f"{row['settings']} reads {row['experts_share']:.0%}, {row['step_speedup']}x",
                highlight=False,
            )
