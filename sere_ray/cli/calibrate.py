"""The commands around calibration."""

import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sere_ray.cli.common import (
    Device,
    Dtype,
    Model,
    Out,
    Revision,
    TextColumn,
    console,
    names,
    saver,
    user_errors,
)
from sere_ray.util.errors import SereError


def calibrate(
    model: Model,
    data: Annotated[
        str, typer.Option(help="parquet, jsonl or text file, or a data set of the hub.")
    ],
    out: Out,
    metric: Annotated[
        Literal["frobenius", "cosine", "cka", "cka-exact"],
        typer.Option(help="How alike two experts' outputs are."),
    ] = "frobenius",
    sequences: Annotated[int, typer.Option(min=1, help="How many windows of text.")] = 400,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 128,
    revision: Revision = None,
    text_column: TextColumn = "text",
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of a forward pass.")] = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    statistics: Annotated[
        str,
        typer.Option(
            help="Further statistics, for rules that `sere-ray evaluate` compares: directed "
            "(spare), stand_ins (exfold), novices (mone; as large as a number for each expert and "
            "dimension)."
        ),
    ] = "",
    layer_streamed: Annotated[
        bool,
        typer.Option("--layer-streamed", help="Hold one decoder layer at a time, not the model."),
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Spread the text over workers; can be resumed.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="With --ray: copies of the model [every GPU, or CPU core]."),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="With --ray: folder of partial sums [OUT.work].")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="With --ray: a cluster; auto: this machine's [one of its own]."),
    ] = None,
    publish: Annotated[
        str | None,
        typer.Option(help="URL of a deployment that shall use the file; OUT lies in its folder."),
    ] = None,
) -> None:
    """Measure how alike the experts of MODEL are and write the similarity artifact.

    Example: sere-ray calibrate Qwen/Qwen3-30B-A3B --data fineweb-edu.parquet --out q3.safetensors
    """
    settings: dict[str, Any] = {
        "model": model,
        "data": data,
        "revision": revision,
        "metric": metric,
        "sequences": sequences,
        "length": length,
        "batch_size": batch_size,
        "device": device,
        "dtype": dtype,
        "text_column": text_column,
        "statistics": names(statistics) if statistics else (),
    }
    with user_errors():
        from sere_ray.util.files import file_sha256

        if publish:
            from sere_ray.serve.client import request

            request(publish, "artifact")  # refuses a wrong URL or token before the work
        if ray:
            from sere_ray.calibration.plan import CalibrationSettings
            from sere_ray.calibration.ray_job import calibrate_on_ray

            if layer_streamed:
                raise SereError("--layer-streamed: runs in one process; leave out --ray")
            calibrate_on_ray(
                CalibrationSettings(**settings),
                out=out,
                workers=workers,
                work=work,
                address=ray_address,
                console=console,
            )
        else:
            from sere_ray.calibration import calibrate as run

            if workers or work or ray_address:
                raise SereError("--workers, --work, --ray-address: are for --ray; add it")
            run(**settings, out=out, layer_streamed=layer_streamed, console=console)
        console.print(f"sha256 {file_sha256(out)}", highlight=False, soft_wrap=True)
        if publish:
            runs = request(publish, "artifact", {"name": out.name})
            console.print(
                f"{publish} runs {runs['name']}, sha256 {runs['sha256']}",
                highlight=False,
                soft_wrap=True,
            )
    print(out)


def bench_calibration(
    out: Out,
    model: Annotated[
        Literal["demo", "qwen3-30b-a3b", "qwen1.5-moe-a2.7b", "deepseek-v2-lite"],
        typer.Option(help="The demo model; shapes of public ones with random weights (GPU)."),
    ] = "demo",
    tokens: Annotated[int, typer.Option(min=2048, help="Of a timed pass.")] = 4096,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved passes.")] = 5,
) -> None:
    """Token rates of calibration against a forward pass that keeps nothing; 1 and 2 workers.

    On a host with a GPU: rates and GPU memory alone, of the model as a whole.

    Example: sere-ray bench calibration --out calibration-cpu.json
    """
    with user_errors():
        from sere_ray.bench.calibration_speed import run_calibration_bench

        run_calibration_bench(
            saver(out),
            model=model,
            tokens=tokens,
            repeats=repeats,
            console=console,
        )
    print(out)


def bench_memory(out: Out) -> None:
    """Peak memory on a CPU of a random model of 440 MB in bf16, ordinary and one layer at a time.

    Three minutes on two cores.

    Example: sere-ray bench calibration-memory --out calibration-memory-cpu.json
    """
    with user_errors():
        from sere_ray.bench.calibration_memory import measure_memory
        from sere_ray.util.results import write_result

        write_result(out, measure_memory(console))
    print(out)


def bench_robustness(out: Out) -> None:
    """Stand-ins and KL of the demo model, calibrated on other text, less text, by other metrics.

    OUT.work keeps the matrices of each data set while it runs: started again, it goes on.

    Example: sere-ray bench calibration-robustness --out calibration-robustness.json
    """
    with user_errors():
        from sere_ray.bench.calibration_robustness import run_robustness

        work = out.with_name(f"{out.name}.work")
        run_robustness(saver(out), work=work, console=console)
        shutil.rmtree(work)
    print(out)
