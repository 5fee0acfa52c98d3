"""The command compare: tasks asked of a running deployment under several policies."""

import shlex
from typing import Annotated, Any

import typer

from sere_ray.cli.common import Out, TextColumn, as_root, console, names, user_errors
from sere_ray.cli.loadtest_common import Model, Seed


def compare(
    url: Annotated[str, typer.Argument(help="Of a deployment.", callback=as_root)],
    tasks: Annotated[
        str,
        typer.Option(
            help="Of lm-eval by name or FILE.yaml, or our json and long, comma-separated."
        ),
    ],
    policies: Annotated[
        str,
        typer.Option(help="As of `loadtest ab`: S=2, rule=margin:tau=0.01, FILE.yaml of `tune`."),
    ],
    out: Out,
    items: Annotated[
        int | None, typer.Option(min=1, help="Of each task [all of lm-eval's, 200 of ours].")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=512, help="Requests under way.")] = 16,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Of an answer to json and long, at most.")
    ] = 512,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="Of answers to json and long.")
    ] = 0,
    data: Annotated[
        str | None,
        typer.Option(help="Text that long continues: parquet, jsonl or text file [the demo's]."),
    ] = None,
    text_column: TextColumn = "text",
    lm_eval_options: Annotated[
        str, typer.Option(help="Further ones of lm-eval, such as '--num_fewshot 5'.")
    ] = "",
    model: Model = None,
    seed: Seed = 0,
) -> None:
    """Which right answers of tasks are lost, and won, when a deployment serves other policies.

    Every item is paired with the exact model's answer. The admin token is in SERE_ADMIN_TOKEN, an
    API key in OPENAI_API_KEY. The policy is put back afterwards, whatever happens.

    Example: sere-ray compare http://127.0.0.1:8000 --tasks gsm8k,json,long
    --policies S=2,policy.yaml --out compare.json
    """
    with user_errors():
        from sere_ray.loadtest.compare.ask import Endpoint
        from sere_ray.loadtest.compare.report import print_comparison
        from sere_ray.loadtest.compare.run import ComparePlan, check_policies, run_compare
        from sere_ray.loadtest.endpoint import find_model, read_keys
        from sere_ray.loadtest.policies import parse_policies
        from sere_ray.util.results import write_result

        named, options = parse_policies(policies), tuple(shlex.split(lm_eval_options))
        plan = ComparePlan(names(tasks), items, data, text_column, seed, options)
        check_policies(named)
        plan.check()
        keys = read_keys(None)
        key = keys[0].key if keys else None
        served = find_model(url, keys, model)
        endpoint = Endpoint(url, served, key, concurrency, max_tokens, temperature)

        def save(content: dict[str, Any]) -> None:
            write_result(out, content, row_lines=True)

        found = run_compare(plan, named, endpoint, save, console)
        print_comparison(found, console)
    print(out)
