"""The command that measures what `loss` means on a model: strength."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sere_ray.cli.common import (
    Device,
    Dtype,
    Model,
    TextColumn,
    console,
    names,
    numbers,
    user_errors,
)


def strength(
    model: Model,
    similarity: Annotated[Path, typer.Option(help="Its artifact, to which the answer is added.")],
    data: Annotated[str, typer.Option(help="Text like yours: parquet, jsonl or text file.")],
    rules: Annotated[str, typer.Option(help="Which rules, comma-separated.")] = "margin",
    rows: Annotated[str, typer.Option(help="Re-routable rows of the steps measured.")] = "4,16,64",
    tasks: Annotated[
        str | None, typer.Option(help="Which, comma-separated [all that text and model allow].")
    ] = None,
    precision: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="Ask until the strongest setting's loss is +- this part of it."
        ),
    ] = 0.15,
    most_items: Annotated[int, typer.Option(min=100, help="Of a task: ask no more.")] = 4000,
    sequences: Annotated[
        int, typer.Option(min=1, help="Windows of 128 tokens that show what steps give up.")
    ] = 64,
    out: Annotated[Path | None, typer.Option(help="JSON with what was measured.")] = None,
    text_column: TextColumn = "text",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure what the policy key `loss` means on MODEL and keep it in its artifact.

    Example: sere-ray strength MODEL --similarity MODEL.sere.safetensors --data text.jsonl
    """
    with user_errors():
        from sere_ray.artifact.similarity import SimilarityArtifact
        from sere_ray.evaluation.evaluator import EvaluationPlan
        from sere_ray.evaluation.strength import StrengthPlan, described, measure_strength
        from sere_ray.evaluation.task_items import check_tasks
        from sere_ray.util.results import write_result

        chosen = names(tasks) if tasks else None
        check_tasks(chosen or ())
        plan = EvaluationPlan(
            model=model,
            similarity=similarity,
            data=data,
            text_column=text_column,
            sequences=sequences,
            length=128,
            prompt_tokens=64,
            batches=tuple(sorted(numbers("--rows", rows, range(2, 257)))),
            ranks=(1,),
            device=device,
            dtype=dtype,
        )
        wanted = StrengthPlan(names(rules), chosen, precision, most_items)
        found, measured = measure_strength(plan, wanted, console)
        artifact = SimilarityArtifact.load(similarity)
        metadata = artifact.metadata
        strengths = {**metadata.strengths, **found}
        replace(artifact, metadata=metadata.model_copy(update={"strengths": strengths})).save(
            similarity
        )
        for rule, of_rule in found.items():
            for line in described(of_rule, (0.005, 0.01, 0.03)):
                console.print(f"{rule}: {line}", highlight=False, markup=False, soft_wrap=True)
        if out:
            content = {
                "model": Path(model).name,
                "data": Path(data).name,
                "strengths": {rule: of.model_dump() for rule, of in found.items()},
                "rows": measured,
            }
            write_result(out, content, row_lines=True)
    print(similarity)
