"""The demo, step by step: calibrate, score quality, time a large model, serve, send traffic."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from sere_ray import assets
from sere_ray.calibration import calibrate
from sere_ray.demo import report
from sere_ray.demo.measure import Run, measure_quality, measure_runs, policies
from sere_ray.demo.serving import HOST, MODEL_ID, RANKS, served
from sere_ray.demo.speed import measure_speed
from sere_ray.serve.run import wait_for_signal
from sere_ray.util.errors import SereError
from sere_ray.util.ports import check_free
from sere_ray.util.progress import progress, waiting
from sere_ray.util.results import write_result

CALIBRATION_SEQUENCES = 100
"""A quarter of the usual text, in a quarter of the time; only `sere` reads the artifact here."""


def run_demo(
    *,
    json: Path | None,
    html: Path | None,
    keep: bool,
    port: int,
    concurrencies: Sequence[int],
    problems: int,
    eager: bool,
    console: Console,
) -> list[Run]:
    """Serve the demo model on CPU and compare policies; see ``sere-ray demo --help``.

    Raises:
        SereError: the port is taken, or a package of the extra ``cpu`` is missing.
    """
    compiled = check_machine(port, console) and not eager
    streams, start = max(concurrencies), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sere-demo-") as folder:
        similarity = Path(folder) / "demo.safetensors"
        console.print("[bold]1. calibrate[/]: how alike are the demo model's experts?")
        artifact = calibrate(
            str(assets.MODEL),
            data=str(assets.CALIBRATION),
            out=similarity,
            sequences=CALIBRATION_SEQUENCES,
            console=console,
        )
        settings = policies(str(similarity))
        points = len(settings) * len(concurrencies)

        console.print("[bold]2. quality[/]: trained model on held-out text, exact and re-routed")
        with progress(console, points, task="   teacher-forced", unit="settings") as advance:
            quality = measure_quality(settings, concurrencies, artifact, lambda: advance(1))

        console.print("[bold]3. speed[/]: decode steps of a random model beyond the CPU's cache")
        of_streams = [each for each in quality if each.streams == streams]
        reads = [each.experts_read for each in of_streams]
        with waiting(console, "1.9 GB of experts"):
            speeds = measure_speed(settings, reads, streams, Path(folder) / "speed.log")
        words = report.summary(of_streams, speeds)
        console.print(f"\n[bold]{escape(words)}[/]", highlight=False)
        report.print_table(
            "loss on the trained model, and speed of the large one",
            report.comparison(quality, speeds),
            console,
        )
        first_s = time.perf_counter() - start
        console.print(f"   first comparison after {first_s:.0f} s")

        console.print(
            f"[bold]4. serve[/]: the trained model, Ray Serve and vLLM on CPU, {RANKS} ranks that "
            "share the experts"
        )
        start_of_engines = time.perf_counter()
        with served(
            settings[0], port, max_streams=streams, compiled=compiled, console=console
        ) as deployment:
            engines_s = time.perf_counter() - start_of_engines
            console.print(f"   up after {engines_s:.0f} s; arithmetic through the endpoint")
            with progress(console, points, task="   requests", unit="settings") as advance:
                runs = measure_runs(
                    settings,
                    concurrencies,
                    problems,
                    deployment,
                    f"http://{HOST}:{port}/v1",
                    MODEL_ID,
                    lambda: advance(1),
                )
            report.print_table("the trained model, served", report.served(runs), console)
            report.print_notes(console)
            console.print(f"all of it after {time.perf_counter() - start:.0f} s")
            if json:
                content = {
                    "model": "demo",
                    "summary": words,
                    "first_comparison_s": round(first_s, 1),
                    "engines_start_s": round(engines_s, 1),
                    "all_s": round(time.perf_counter() - start, 1),
                    "quality": [vars(row) for row in quality],
                    "speed": [vars(row) for row in speeds],
                    "runs": [vars(row) for row in runs],
                }
                write_result(json, content)
                console.print(f"wrote {json}")
            if html:
                report.write_html(quality, speeds, runs, words, html)
                console.print(f"wrote {html}")
            if keep:
                _wait(port, console)
    return runs


def check_machine(port: int, console: Console) -> bool:
    """Refuse at once what cannot run here, before the minutes of work.

    Returns:
        Whether vLLM can compile its graph: there is a C++ compiler.

    Raises:
        SereError: the port is taken, or the extra ``cpu`` is not installed.
    """
    for module in ("vllm", "ray"):
        if not _installed(module):
            raise SereError(
                f"the demo needs {module!r}: run `make demo`, or pip install 'sere-ray[cpu]'"
            )
    check_free(port, "--port")
    compiled = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
    if not compiled:
        console.print("no C++ compiler found: vLLM runs eager (slower steps, same rule)")
    return compiled


def _installed(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _wait(port: int, console: Console) -> None:
    """Leave the endpoint up until Ctrl-C."""
    console.print(
        f"\nThe endpoint stays up until Ctrl-C. Try:\n\n"
        f"curl http://{HOST}:{port}/v1/chat/completions -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{MODEL_ID}", "temperature": 0, "messages": '
        f'[{{"role": "user", "content": "Work out 23 + 48 - 17."}}]}}\'\n',
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    wait_for_signal()
    console.print("stopping")
