"""The commands about quality: evaluate, tasks, tune."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sere_ray.cli.common import (
    Device,
    Dtype,
    Model,
    TextColumn,
    console,
    names,
    numbers,
    share,
    user_errors,
)

if TYPE_CHECKING:
    from sere_ray.evaluation.evaluator import EvaluationPlan

Similarity = Annotated[Path, typer.Option(help="Artifact of this model.")]
Sequences = Annotated[int, typer.Option(min=1, help="How many windows of text.")]
Length = Annotated[int, typer.Option(min=3, help="Tokens of a window.")]
Prompt = Annotated[int, typer.Option(min=1, help="Of these, exact and not scored.")]
MostItems = Annotated[int, typer.Option(min=1, help="Of a task: ask no more from there on.")]


def evaluate(
    model: Model,
    similarity: Similarity,
    data: Annotated[str, typer.Option(help="Held-out text: parquet, jsonl or text file.")],
    out: Annotated[Path, typer.Option(help="JSON to write; replaced in one step.")],
    html: Annotated[Path | None, typer.Option(help="Page with plots and tables to write.")] = None,
    rules: Annotated[
        str | None,
        typer.Option(help="Which rules, comma-separated [all that the artifact has numbers for]."),
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="YAML list of settings in place of the grids of --rules.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Decode batch sizes.")] = "1,2,4,8,16,32,64",
    ranks: Annotated[str, typer.Option(help="Numbers of expert-parallel ranks, 1..8.")] = "1,8",
    sequences: Sequences = 256,
    length: Length = 128,
    prompt: Prompt = 64,
    text_column: TextColumn = "text",
    device: Device = "auto",
    dtype: Dtype = "auto",
    tune_data: Annotated[
        str | None,
        typer.Option(help="Second text: rules are tuned on it as `tune` does, LDA fitted."),
    ] = None,
    tune_sequences: Annotated[int, typer.Option(min=1, help="Windows of --tune-data.")] = 64,
    tune_rules: Annotated[
        str | None,
        typer.Option(help="Which rules to tune on it, none = LDA alone [all of --rules]."),
    ] = None,
    best_only: Annotated[
        bool, typer.Option("--best-only", help="Leave out rows that one of their rule beats.")
    ] = False,
    append: Annotated[
        bool, typer.Option("--append", help="Keep what the file has of other batch sizes.")
    ] = False,
) -> None:
    """Compare every rule on held-out text: experts read against distance from the exact model.

    Example: sere-ray evaluate MODEL --similarity MODEL.sere.safetensors --data heldout.jsonl
    --out frontier.json --html frontier.html
    """
    with user_errors():
        from sere_ray.evaluation.frontier import best_rows, check_same_text
        from sere_ray.evaluation.frontier import evaluate as run
        from sere_ray.evaluation.frontier_page import write_frontier_page
        from sere_ray.evaluation.settings import check_rules, read_settings
        from sere_ray.evaluation.tables import print_distance
        from sere_ray.util.results import check_continues, load_result, write_result

        onto = load_result(out) if append and out.exists() else None
        if onto:
            check_continues(onto)
        chosen_rules = names(rules) if rules else None
        check_rules(chosen_rules or ())
        text = (data, text_column, sequences, length, prompt)
        plan = _plan(model, similarity, text, batches, ranks, device, dtype)
        tuned = None if tune_rules is None else names(tune_rules) if tune_rules != "none" else ()
        check_rules(tuned or (), option="--tune-rules")
        plan = replace(plan, tune_data=tune_data, tune_sequences=tune_sequences, tune_rules=tuned)
        chosen = read_settings(settings) if settings else None
        found = run(plan, rules=chosen_rules, settings=chosen, console=console, best_only=best_only)
        if onto:
            check_same_text(onto, found, plan.batches)
        write_result(out, found, onto=onto, row_lines=best_only)
        print_distance(found["rows"] if settings else best_rows(found["rows"]), console)
        if html:
            write_frontier_page(load_result(out), html)
    print(out)


def tasks(
    model: Model,
    similarity: Similarity,
    data: Annotated[str, typer.Option(help="Held-out text: parquet, jsonl or text file.")],
    out: Annotated[Path, typer.Option(help="JSON to write, after each task; as tasks-MODEL.json.")],
    policies: Annotated[
        str,
        typer.Option(help="S=2, rule=margin:tau=0.01 or a .yaml file of `tune`, comma-separated."),
    ] = "",
    settings: Annotated[
        Path | None, typer.Option(help="YAML list of settings, those of published peers, too.")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Which, comma-separated.")
    ] = "cloze,continuation,arithmetic,copying,definitions",
    batches: Annotated[str, typer.Option(help="Decode batch sizes.")] = "16",
    half_width: Annotated[
        float, typer.Option(help="Ask until the 95 % interval of each relative loss is +- this.")
    ] = 0.005,
    most_items: MostItems = 20_000,
    text_column: TextColumn = "text",
    device: Device = "auto",
    dtype: Dtype = "auto",
    append: Annotated[
        bool, typer.Option("--append", help="Go on: leave out what the file has.")
    ] = False,
) -> None:
    """Count what policies answer wrongly that the exact model has right, item by item.

    Example: sere-ray tasks MODEL --similarity MODEL.sere.safetensors --data heldout.jsonl
    --policies S=2,rule=margin:tau=0.01 --batches 16 --out tasks-MODEL.json
    """
    with user_errors():
        from sere_ray.evaluation.settings import read_settings
        from sere_ray.evaluation.tables import print_tasks
        from sere_ray.evaluation.task_items import check_tasks
        from sere_ray.evaluation.task_run import TaskPlan
        from sere_ray.evaluation.tasks import as_settings, run_tasks
        from sere_ray.loadtest.policies import parse_policies
        from sere_ray.util.results import check_continues, load_result, write_result

        check_tasks(names(tasks))
        named = parse_policies(policies) if policies else {}
        chosen = as_settings(named, read_settings(settings) if settings else [])
        old = load_result(out) if append and out.exists() else None
        if old:
            check_continues(old)
        text = (data, text_column, 0, 128, 64)
        plan = _plan(model, similarity, text, batches, "1", device, dtype)
        wanted = TaskPlan(names(tasks), half_width, most_items)

        def save(found: dict[str, Any]) -> None:
            write_result(out, found, onto=old, row_lines=True)

        run_tasks(plan, wanted, chosen, console, save, old)
        print_tasks(load_result(out), console)
    print(out)


def tune(
    model: Model,
    similarity: Similarity,
    data: Annotated[str, typer.Option(help="Text to choose on.")],
    check: Annotated[str, typer.Option(help="Second text, which has no part in the choice.")],
    out: Annotated[Path, typer.Option(help="Policy to write, YAML: `sere:` of a deployment.")],
    max_kl: Annotated[float | None, typer.Option(help="Budget: mean KL, nats.")] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Budget: top-1 agreement, 0..1.")
    ] = None,
    max_task_loss: Annotated[
        str | None,
        typer.Option(
            help="Budget, such as 1%: right answers that the worst of --tasks may lose, interval "
            "and all. KL or agreement is then a gate [--max-kl 0.1]."
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Which decide, comma-separated.")
    ] = "cloze,continuation,arithmetic,copying",
    most_items: MostItems = 20_000,
    batches: Annotated[str, typer.Option(help="Decode batch sizes that must keep it.")] = "8,16,32",
    by_rows: Annotated[
        bool,
        typer.Option(
            "--by-rows/--one-setting", help="A setting for each range of batch sizes, or for all."
        ),
    ] = True,
    rules: Annotated[
        str | None,
        typer.Option(help="Rules to choose among [served ones that the artifact has data for]."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="JSON of all numbers to write.")] = None,
    sequences: Sequences = 128,
    length: Length = 128,
    prompt: Prompt = 64,
    text_column: TextColumn = "text",
    device: Device = "auto",
) -> None:
    """Find the policy that reads the fewest experts within a budget of quality, and check it.

    Example: sere-ray tune MODEL --similarity MODEL.sere.safetensors --data a.jsonl
    --check b.jsonl --max-task-loss 1% --batches 8,16,32 --out policy.yaml
    """
    with user_errors():
        from sere_ray.evaluation.budget import Budget
        from sere_ray.evaluation.settings import check_rules
        from sere_ray.evaluation.tune import tune as run
        from sere_ray.evaluation.tune import write_policy
        from sere_ray.evaluation.tune_report import print_report
        from sere_ray.evaluation.tune_tasks import GATE, TaskBudget
        from sere_ray.util.results import write_result

        chosen_rules = names(rules) if rules else None
        check_rules(chosen_rules or (), served=True)
        text = (data, text_column, sequences, length, prompt)
        plan = _plan(model, similarity, text, batches, "1", device)
        of_tasks = None
        if max_task_loss is not None:
            of_tasks = TaskBudget(share("--max-task-loss", max_task_loss), names(tasks), most_items)
            if max_kl is None and min_agreement is None:
                max_kl = GATE
        budget = Budget(max_kl, min_agreement)
        found = run(plan, check, budget, chosen_rules, console, by_rows=by_rows, of_tasks=of_tasks)
        write_policy(found["policy"], out)
        if report:
            write_result(report, found)
        print_report(found, console)
    print(out)


def _plan(
    model: str,
    similarity: Path,
    text: tuple[str, str, int, int, int],
    batches: str,
    ranks: str,
    device: str,
    dtype: Dtype = "auto",
) -> "EvaluationPlan":
    """The plan that the options describe.

    Args:
        model: checkpoint folder or hub name.
        similarity: its artifact.
        text: data, text column, number of windows, tokens of a window, and tokens of its prompt.
        batches: ``--batches``.
        ranks: ``--ranks``.
        device: ``--device``.
        dtype: ``--dtype``.

    Raises:
        SereError: ``batches`` or ``ranks`` are not such numbers.
    """
    from sere_ray.evaluation.evaluator import EvaluationPlan

    data, text_column, sequences, length, prompt = text
    return EvaluationPlan(
        model=model,
        similarity=similarity,
        data=data,
        text_column=text_column,
        sequences=sequences,
        length=length,
        prompt_tokens=prompt,
        batches=tuple(numbers("--batches", batches, range(1, 257))),
        ranks=tuple(numbers("--ranks", ranks, range(1, 9))),
        device=device,
        dtype=dtype,
    )
